// Vectors of the instruction set a source is compiled for, written with the compiler's vector types so that one text
// serves all of them. Everything has internal linkage: an inline function shared between objects compiled for
// different instruction sets would be linked once, for all of them.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sca::SCA_CPU_CAPABILITY {
namespace {

template <typename T>
constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
constexpr T larger(T a, T b) {
  return a > b ? a : b;
}

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <typename T>
struct FloatTraits;
template <>
struct FloatTraits<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kExpLowest = -87.0f;     // exp is taken as zero below: 2^-126 is the smallest normal number
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kExpDegree = 7;
};
template <>
struct FloatTraits<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExpLowest = -708.0;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kExpDegree = 13;
};

template <typename T>
inline Vector<T> load(const T* source) {
  Vector<T> result;
  __builtin_memcpy(&result, source, sizeof(result));
  return result;
}

template <typename T>
inline void store(T* target, Vector<T> value) {
  __builtin_memcpy(target, &value, sizeof(value));
}

template <typename T>
inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// All bits of the first `count` lanes.
template <typename T>
inline __m256i first_lanes(int64_t count) {
  if constexpr (sizeof(T) == 4) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  } else {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
}
#endif

// The first `count` lanes; nothing behind them is touched. All lanes need no mask where the compiler knows that.
template <typename T>
inline Vector<T> load_some(const T* source, int64_t count) {
  if (__builtin_constant_p(count == kLanes<T>) && count == kLanes<T>) return load(source);
#if defined(__AVX512F__)
  const auto mask = static_cast<uint16_t>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(mask, source);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), source);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_maskload_ps(source, first_lanes<T>(count));
  if constexpr (sizeof(T) == 8) return _mm256_maskload_pd(source, first_lanes<T>(count));
#else
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load(lanes);
#endif
}
template <typename T>
inline void store_some(T* target, Vector<T> value, int64_t count) {
  if (__builtin_constant_p(count == kLanes<T>) && count == kLanes<T>) return store<T>(target, value);
#if defined(__AVX512F__)
  const auto mask = static_cast<uint16_t>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(target, mask, value);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(target, static_cast<__mmask8>(mask), value);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) _mm256_maskstore_ps(target, first_lanes<T>(count), value);
  if constexpr (sizeof(T) == 8) _mm256_maskstore_pd(target, first_lanes<T>(count), value);
#else
  T lanes[kLanes<T>];
  store<T>(lanes, value);
  for (int64_t i = 0; i < count; ++i) target[i] = lanes[i];
#endif
}

// Fetches a line of the second level cache. The empty statement keeps GCC from finding that a function which only does
// this has no effect, and leaving out its calls.
inline void prefetch(const void* address) {
  __builtin_prefetch(address, 0, 2);
  asm volatile("");
}

// Stores past the caches. `target` is aligned to kVectorBytes.
template <typename T>
inline void stream(T* target, Vector<T> value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(target), reinterpret_cast<__m512i>(value));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(target), reinterpret_cast<__m256i>(value));
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(target), reinterpret_cast<__m128i>(value));
#else
  store(target, value);
#endif
}

// From this size on a result is written past the caches: it would push out what is still to be read.
constexpr int64_t kStreamedBytes = 16 << 20;

// Makes streamed stores visible to the threads that the caller synchronises with.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The first `count` lanes, which may be none or more than there are, and `other` in those behind them.
template <typename T>
inline Vector<T> first_or(Vector<T> value, int64_t count, T other) {
  if (count >= kLanes<T>) return value;
  T lanes[kLanes<T>];
  for (int64_t i = 0; i < kLanes<T>; ++i) lanes[i] = static_cast<T>(i);
  return load(lanes) < static_cast<T>(count) ? value : broadcast<T>(other);
}

template <typename T>
inline Vector<T> maximum(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

#if defined(__clang__) || __GNUC__ >= 12
template <typename T, int... kIndex>
inline Vector<T> shuffle(Vector<T> a, Vector<T> b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b, kIndex...);
}
#else
template <typename T, int... kIndex>
inline Vector<T> shuffle(Vector<T> a, Vector<T> b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shuffle(a, b, Vector<typename FloatTraits<T>::Bits>{kIndex...});
}
#endif

// Lanes change places in two stages: inside 16 bytes, which takes one instruction for two vectors, and then as units of
// 16 bytes. Of either stage these say which of the lanes of two vectors, one after the other, comes to a place. Inside
// of each span they take units from the two in turn, all from the first half or the second:
template <int kLaneCount, int kUnit, int kSpan, int kHalf>
struct Interleaved {
  static constexpr int source(int place) {
    const int unit = place % kSpan / kUnit, begin = place / kSpan * kSpan + kHalf * kSpan / 2;
    return unit % 2 * kLaneCount + begin + unit / 2 * kUnit + place % kUnit;
  }
};
// or every second unit of the one and then of the other, from the first on or the second.
template <int kLaneCount, int kUnit, int kSpan, int kParity>
struct Separated {
  static constexpr int source(int place) {
    const int units = kSpan / kUnit, unit = place % kSpan / kUnit, begin = place / kSpan * kSpan;
    return unit / (units / 2) * kLaneCount + begin + (unit * 2 % units + kParity) * kUnit + place % kUnit;
  }
};
template <typename Pattern, int... kPlace>
constexpr std::integer_sequence<int, Pattern::source(kPlace)...> sources(std::integer_sequence<int, kPlace...>) {
  return {};
}
template <typename T, template <int, int, int, int> class Pattern, int kUnit, int kSpan, int kWhich>
inline Vector<T> shuffle(Vector<T> a, Vector<T> b) {
  constexpr int kCount = static_cast<int>(kLanes<T>);
  return shuffle<T>(a, b, sources<Pattern<kCount, kUnit, kSpan, kWhich>>(std::make_integer_sequence<int, kCount>{}));
}
template <typename T>
constexpr int kShortLanes = 16 / static_cast<int>(sizeof(T));

// Swaps rows and columns of squares of vectors, whose columns are units: in each step every vector of the first half is
// interleaved with its partner of the second.
template <typename T, int kUnit, int kSpan>
inline void transpose_units(Vector<T>* vectors) {
  constexpr int kHalf = kSpan / kUnit / 2;
#pragma GCC unroll 4
  for (int step = 1; step < kSpan / kUnit; step *= 2) {
    Vector<T> before[kLanes<T>];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes<T>; ++i) before[i] = vectors[i];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes<T> / 2; ++i) {
      const int64_t square = i / kUnit / kHalf * kSpan, row = i / kUnit % kHalf * kUnit, of_unit = i % kUnit;
      const Vector<T> a = before[square + row + of_unit], b = before[square + row + kHalf * kUnit + of_unit];
      vectors[square + 2 * row + of_unit] = shuffle<T, Interleaved, kUnit, kSpan, 0>(a, b);
      vectors[square + 2 * row + kUnit + of_unit] = shuffle<T, Interleaved, kUnit, kSpan, 1>(a, b);
    }
  }
}

// Swaps rows and columns of a square of kLanes vectors.
template <typename T>
inline void transpose(Vector<T>* square) {
  transpose_units<T, 1, kShortLanes<T>>(square);
  if constexpr (kShortLanes<T> < kLanes<T>) transpose_units<T, kShortLanes<T>, static_cast<int>(kLanes<T>)>(square);
}

// Combines units inside of each span, two vectors at a time.
template <typename T, int kUnit, int kSpan, typename Combine>
inline void combine_units(Vector<T>* terms, const Combine& combine) {
#pragma GCC unroll 4
  for (int64_t count = kLanes<T> / kUnit / 2; count >= kLanes<T> / kSpan; count /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) {
      const Vector<T> a = terms[2 * i], b = terms[2 * i + 1];
      terms[i] = combine(shuffle<T, Separated, kUnit, kSpan, 0>(a, b), shuffle<T, Separated, kUnit, kSpan, 1>(a, b));
    }
  }
}

// Lane i of the result combines all lanes of terms[i]. Overwrites terms.
template <typename T, typename Combine>
inline Vector<T> combine_each(Vector<T>* terms, const Combine& combine) {
  combine_units<T, 1, kShortLanes<T>>(terms, combine);
  if constexpr (kShortLanes<T> < kLanes<T>) {
    combine_units<T, kShortLanes<T>, static_cast<int>(kLanes<T>)>(terms, combine);
  }
  return terms[0];
}
template <typename T>
inline Vector<T> sum_each(Vector<T>* terms) {
  return combine_each<T>(terms, [](Vector<T> a, Vector<T> b) { return a + b; });
}
template <typename T>
inline Vector<T> max_each(Vector<T>* terms) {
  return combine_each<T>(terms, maximum<T>);
}

template <typename T>
inline T sum_lanes(Vector<T> value) {
  T lanes[kLanes<T>];
  store(lanes, value);
  for (int64_t step = kLanes<T> / 2; step > 0; step /= 2) {
    for (int64_t i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

// e^x for x <= 0 (and slightly above), NaN for NaN. Within 2 units in the last place; zero where e^x is subnormal.
template <typename T>
inline Vector<T> exp(Vector<T> x) {
  using Traits = FloatTraits<T>;
  using BitVector = Vector<typename Traits::Bits>;
  const Vector<T> lowest = broadcast<T>(Traits::kExpLowest);
  // Written so that NaN fails every comparison and passes through.
  const Vector<T> clamped = x < lowest ? lowest : x;
  const Vector<T> shifted = clamped * static_cast<T>(1.4426950408889634) + Traits::kRounder;
  const Vector<T> exponent = shifted - Traits::kRounder;
  const Vector<T> rest = (clamped - exponent * Traits::kLn2High) - exponent * Traits::kLn2Low;
  constexpr double kInverseFactorial[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
  Vector<T> power = broadcast<T>(static_cast<T>(kInverseFactorial[Traits::kExpDegree]));
#pragma GCC unroll 16
  for (int i = Traits::kExpDegree - 1; i >= 0; --i) power = power * rest + static_cast<T>(kInverseFactorial[i]);
  // The low bits of `shifted` hold the exponent as an integer; moved up they multiply by a power of two.
  const BitVector scaled =
      reinterpret_cast<BitVector>(power) + (reinterpret_cast<BitVector>(shifted) << Traits::kMantissaBits);
  return x < lowest ? Vector<T>{} : reinterpret_cast<Vector<T>>(scaled);
}

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
