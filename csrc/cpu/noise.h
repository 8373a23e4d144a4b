// A standard normal number for each element of a feature map, from a counter: Philox4x32-10 and Box-Muller, as
// sca_kernels/reference/noise.py defines them. The integers are the same as there, the normals within 1e-6.
#pragma once

#include "simd.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// One 32 bit word for each lane of a vector of T, however wide the lanes are.
template <typename T>
using Words = Vector<typename FloatTraits<T>::Bits>;

// Lane l holds first + l.
template <typename T>
inline Words<T> ascending(uint32_t first) {
  using Bits = typename FloatTraits<T>::Bits;
  Bits lanes[kLanes<T>];
  for (int64_t i = 0; i < kLanes<T>; ++i) lanes[i] = static_cast<Bits>(i);
  return load(lanes) + static_cast<Bits>(first);
}

// What one counter gives: values[i] belongs to channel 4 q + i of channel group q.
template <typename T>
struct Normals {
  Vector<T> values[4];
};

template <typename T>
struct NoiseTraits;
template <>
struct NoiseTraits<float> {
  static constexpr int kLogTerms = 5, kSineTerms = 5, kCosineTerms = 6;
};
template <>
struct NoiseTraits<double> {
  static constexpr int kLogTerms = 10, kSineTerms = 8, kCosineTerms = 9;
};

using Wide = Vector<uint64_t>;

// The products of the low words of the lanes with a word. What the high words hold does not matter. (Here and below the
// forms with a full mask: GCC 12 warns of an uninitialised variable in those without, and makes the same of both.)
inline Wide multiply_low_words(Wide a, uint32_t b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * uint64_t{b};
#endif
}

inline Vector<float> square_root(Vector<float> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x);
#else
  for (int64_t i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
inline Vector<double> square_root(Vector<double> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_pd(0xff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#elif defined(__SSE2__)
  return _mm_sqrt_pd(x);
#else
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// Ten rounds on the counters in the low words of four vectors; the results' high words hold anything.
inline void philox(Wide* counter, uint32_t low_key, uint32_t high_key) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Wide first = multiply_low_words(counter[0], 0xd2511f53u);
    const Wide third = multiply_low_words(counter[2], 0xcd9e8d57u);
    counter[0] = (third >> 32) ^ counter[1] ^ uint64_t { low_key };
    counter[1] = third;
    counter[2] = (first >> 32) ^ counter[3] ^ uint64_t { high_key };
    counter[3] = first;
    low_key += 0x9e3779b9u;
    high_key += 0xbb67ae85u;
  }
}

// The upper 24 bits of four random words for each lane.
inline void random_words(uint32_t low_key, uint32_t high_key, Words<float> pixels, Words<float> groups, uint32_t image,
                         Words<float>* words) {
  const Wide pixel = reinterpret_cast<Wide>(pixels), group = reinterpret_cast<Wide>(groups);
  Wide even[4] = {pixel, group, Wide{} + uint64_t{image}, Wide{}};
  Wide odd[4] = {pixel >> 32, group >> 32, Wide{} + uint64_t{image}, Wide{}};
  philox(even, low_key, high_key);
  philox(odd, low_key, high_key);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    words[i] = reinterpret_cast<Words<float>>((even[i] & 0xffffffffu) | (odd[i] << 32)) >> 8;
  }
}
inline void random_words(uint32_t low_key, uint32_t high_key, Words<double> pixels, Words<double> groups,
                         uint32_t image, Words<double>* words) {
  Wide counter[4] = {pixels, groups, Wide{} + uint64_t{image}, Wide{}};
  philox(counter, low_key, high_key);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) words[i] = (counter[i] & 0xffffffffu) >> 8;
}

// Integers below 2^25, which both types hold exactly. The doubles go by the bits of 2^52 + x: without AVX-512 no
// instruction converts 64 bit integers.
inline Vector<float> to_floating(Words<float> x) {
  return __builtin_convertvector(reinterpret_cast<Vector<int32_t>>(x), Vector<float>);
}
inline Vector<double> to_floating(Words<double> x) {
  return reinterpret_cast<Vector<double>>(x | uint64_t{0x4330000000000000u}) - 0x1p52;
}

// The logarithm of positive normal numbers up to 1.
template <typename T>
inline Vector<T> log(Vector<T> x) {
  using Traits = FloatTraits<T>;
  using Bits = typename Traits::Bits;
  constexpr Bits kMantissa = (Bits{1} << Traits::kMantissaBits) - 1;
  constexpr Bits kOne = static_cast<Bits>(sizeof(T) == 4 ? 127 : 1023) << Traits::kMantissaBits;
  constexpr Bits kRootOfHalf =
      kOne - (Bits{1} << Traits::kMantissaBits) + (sizeof(T) == 4 ? 0x3504f3 : 0x6a09e667f3bcd);
  // x = 2^-e m with m in [sqrt(1/2), sqrt(2)); e is kept positive, so that it converts like any other integer.
  const Words<T> exponent = (kRootOfHalf + kMantissa - reinterpret_cast<Words<T>>(x)) >> Traits::kMantissaBits;
  const Vector<T> m = reinterpret_cast<Vector<T>>(reinterpret_cast<Words<T>>(x) + (exponent << Traits::kMantissaBits));
  const Vector<T> e = to_floating(exponent);
  const Vector<T> s = (m - T{1}) / (m + T{1}), square = s * s;  // log m = 2 artanh s
  Vector<T> series = broadcast<T>(static_cast<T>(2.0 / (2 * NoiseTraits<T>::kLogTerms - 1)));
#pragma GCC unroll 16
  for (int k = NoiseTraits<T>::kLogTerms - 2; k >= 0; --k) series = series * square + static_cast<T>(2.0 / (2 * k + 1));
  return (s * series - e * Traits::kLn2Low) - e * Traits::kLn2High;
}

// scale * (pi / 2)^n / n!
constexpr double quarter_turn_term(double scale, int n) {
  return n == 0 ? scale : quarter_turn_term(scale * (1.5707963267948966 / n), n - 1);
}

// sqrt(-2 ln u) times cosine and sine of 2 pi v, with u = (first + 1) / 2^24 and v = second / 2^24.
template <typename T>
inline void box_muller(Words<T> first, Words<T> second, Vector<T>* cosine, Vector<T>* sine) {
  using Traits = FloatTraits<T>;
  constexpr int kSignShift = 8 * int{sizeof(T)} - 2;
  const Vector<T> radius = square_root(log<T>(to_floating(first + 1u) * static_cast<T>(0x1p-24)) * T{-2});

  const Vector<T> turns = to_floating(second) * static_cast<T>(0x1p-22);  // in quarters
  const Vector<T> shifted = turns + Traits::kRounder;
  const Vector<T> rest = turns - (shifted - Traits::kRounder), square = rest * rest;
  const Words<T> quadrant = reinterpret_cast<Words<T>>(shifted);

  // The first coefficient in two parts, so that of their product with `rest` only the sum is rounded.
  constexpr int kSine = NoiseTraits<T>::kSineTerms, kCosine = NoiseTraits<T>::kCosineTerms;
  constexpr T kHalfPi = static_cast<T>(1.5707963267948966);
  constexpr T kHalfPiRest =
      sizeof(T) == 4 ? static_cast<T>(-4.371139000186241e-8) : static_cast<T>(6.123233995736766e-17);
  Vector<T> near_sine = broadcast<T>(static_cast<T>(quarter_turn_term(kSine % 2 ? 1.0 : -1.0, 2 * kSine - 1)));
#pragma GCC unroll 16
  for (int k = kSine - 2; k > 0; --k) {
    near_sine = near_sine * square + static_cast<T>(quarter_turn_term(k % 2 ? -1.0 : 1.0, 2 * k + 1));
  }
  near_sine = rest * kHalfPi + rest * (near_sine * square + kHalfPiRest);
  Vector<T> near_cosine = broadcast<T>(static_cast<T>(quarter_turn_term(kCosine % 2 ? 1.0 : -1.0, 2 * kCosine - 2)));
#pragma GCC unroll 16
  for (int k = kCosine - 2; k >= 0; --k) {
    near_cosine = near_cosine * square + static_cast<T>(quarter_turn_term(k % 2 ? -1.0 : 1.0, 2 * k));
  }

  const auto odd = (quadrant & 1u) != 0u;
  const Vector<T> cosine_size = odd ? near_sine : near_cosine, sine_size = odd ? near_cosine : near_sine;
  const Words<T> cosine_sign = ((quadrant + 1u) & 2u) << kSignShift, sine_sign = (quadrant & 2u) << kSignShift;
  *cosine = radius * reinterpret_cast<Vector<T>>(reinterpret_cast<Words<T>>(cosine_size) ^ cosine_sign);
  *sine = radius * reinterpret_cast<Vector<T>>(reinterpret_cast<Words<T>>(sine_size) ^ sine_sign);
}

// The noise of one pixel (row * width + column) and one group of four channels (channel / 4) in each lane.
template <typename T>
inline Normals<T> normals(int64_t seed, Words<T> pixels, Words<T> groups, uint32_t image) {
  const auto low_key = static_cast<uint32_t>(seed), high_key = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  Words<T> words[4];
  random_words(low_key, high_key, pixels, groups, image, words);
  Normals<T> result;
  box_muller<T>(words[0], words[1], &result.values[0], &result.values[1]);
  box_muller<T>(words[2], words[3], &result.values[2], &result.values[3]);
  return result;
}

// The four numbers of lane 0, then those of lane 1, and so on: the order of adjacent channels where the lanes are
// adjacent groups of a pixel.
template <typename T>
inline Normals<T> by_lane(const Normals<T>& normals) {
  constexpr int kSpan = static_cast<int>(kLanes<T>);
  const auto low = [](Vector<T> a, Vector<T> b) { return shuffle<T, Interleaved, 1, kSpan, 0>(a, b); };
  const auto high = [](Vector<T> a, Vector<T> b) { return shuffle<T, Interleaved, 1, kSpan, 1>(a, b); };
  const Vector<T>* const v = normals.values;
  const Vector<T> even_low = low(v[0], v[2]), even_high = high(v[0], v[2]);
  const Vector<T> odd_low = low(v[1], v[3]), odd_high = high(v[1], v[3]);
  return {{low(even_low, odd_low), high(even_low, odd_low), low(even_high, odd_high), high(even_high, odd_high)}};
}

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
