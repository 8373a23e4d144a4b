// Rows of channels, whatever their type and strides, as pointers to padded rows of the type that is computed in.
//
// A matrix that already is what the kernels want (their type, adjacent channels, a whole number of vectors) is used
// where it lies; any other is converted row by row into scratch memory, and written back the same way.
#pragma once

#include <type_traits>

#include "../sca_kernels.h"
#include "simd.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename Scalar>
using ComputeType = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  // The exponents differ by 112; multiplying, rather than adding to the exponent, also serves subnormal numbers.
  const float finite = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(finite) | special | ((value.bits & 0x8000u) << 16));
}

template <typename Scalar>
inline Scalar narrow(ComputeType<Scalar> value) {
  return value;
}
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}
template <>
inline Float16 narrow<Float16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding one half rounds to a multiple of 2^-24, the unit of the subnormal numbers.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | (bits >> 16 & 0x8000u))};
}

// A vector of numbers of another type.
template <typename Scalar>
inline Vector<ComputeType<Scalar>> load_widened(const Scalar* source) {
  using T = ComputeType<Scalar>;
  if constexpr (std::is_same_v<Scalar, T>) return load(source);
  T lanes[kLanes<T>];
  for (int64_t i = 0; i < kLanes<T>; ++i) lanes[i] = widen(source[i]);
  return load(lanes);
}
template <typename Scalar>
inline Vector<ComputeType<Scalar>> load_widened(const Scalar* source, int64_t count) {
  using T = ComputeType<Scalar>;
  if (count == kLanes<T>) return load_widened(source);
  if constexpr (std::is_same_v<Scalar, T>) return load_some(source, count);
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = widen(source[i]);
  return load(lanes);
}
template <typename Scalar>
inline void store_narrowed(Scalar* target, Vector<ComputeType<Scalar>> value) {
  using T = ComputeType<Scalar>;
  if constexpr (std::is_same_v<Scalar, T>) {
    store<T>(target, value);
  } else {
    T lanes[kLanes<T>];
    store<T>(lanes, value);
    for (int64_t i = 0; i < kLanes<T>; ++i) target[i] = narrow<Scalar>(lanes[i]);
  }
}

template <typename Scalar>
inline void store_narrowed(Scalar* target, Vector<ComputeType<Scalar>> value, int64_t count) {
  using T = ComputeType<Scalar>;
  if (count == kLanes<T>) return store_narrowed(target, value);
  if constexpr (std::is_same_v<Scalar, T>) {
    store_some<T>(target, value, count);
  } else {
    T lanes[kLanes<T>];
    store<T>(lanes, value);
    for (int64_t i = 0; i < count; ++i) target[i] = narrow<Scalar>(lanes[i]);
  }
}

// Calls visit(Scalar{}) for the type that a number of sca_scalar_type stands for.
template <typename Visit>
inline void with_scalar_type(int32_t scalar_type, const Visit& visit) {
  switch (scalar_type) {
    case SCA_FLOAT32: return visit(float{});
    case SCA_FLOAT64: return visit(double{});
    case SCA_BFLOAT16: return visit(BFloat16{});
    case SCA_FLOAT16: return visit(Float16{});
  }
}

// Rows are padded to whole vectors, and to whole blocks of products.h where a vector is shorter.
template <typename T>
constexpr int64_t kPadding = larger<int64_t>(kLanes<T>, 4);
template <typename T>
constexpr int64_t padded(int64_t width) {
  return (width + kPadding<T> - 1) / kPadding<T> * kPadding<T>;
}

// The tokens at consecutive positions.
struct Positions {
  const int32_t* order;
  int64_t begin;
  int64_t operator[](int64_t i) const { return order ? order[begin + i] : begin + i; }
};

// One image and head of a tensor.
template <typename Scalar>
struct Matrix {
  using Compute = ComputeType<Scalar>;

  Scalar* data;
  int64_t token_stride, channel_stride, width;

  bool direct() const {
    return std::is_same_v<Scalar, Compute> && channel_stride == 1 && width % kPadding<Compute> == 0;
  }
  bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && token_stride % kLanes<Compute> == 0;
  }

  // Points `rows` at the rows of the tokens, converted into `scratch` (count * padded width) where need be; then the
  // tokens after them, of which there are `following`, are fetched meanwhile.
  void gather(Positions tokens, int64_t count, int64_t following, Compute* scratch, Compute** rows) const {
    locate(tokens, count, scratch, rows);
    if (direct()) return;
    const int64_t stride = padded<Compute>(width);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = width; c < stride; ++c) rows[i][c] = 0;
    }
    if (channel_stride == 1) {
      for (int64_t i = 0; i < count; ++i) {
        if (i < following) fetch_row(tokens[count + i]);
        const Scalar* source = data + tokens[i] * token_stride;
        Compute* __restrict target = rows[i];
        for (int64_t c = 0; c < width; ++c) target[c] = widen(source[c]);
      }
      return;
    }
    for (int64_t c = 0; c < width; ++c) {
      const Scalar* source = data + c * channel_stride;
      for (int64_t i = 0; i < count; ++i) rows[i][c] = widen(source[tokens[i] * token_stride]);
    }
  }

  // Points `rows` at where the rows of the tokens are to be written: in place, or in `scratch` until `scatter`.
  void locate(Positions tokens, int64_t count, Compute* scratch, Compute** rows) const {
    const int64_t stride = padded<Compute>(width);
    for (int64_t i = 0; i < count; ++i) rows[i] = scratch + i * stride;
    if constexpr (std::is_same_v<Scalar, Compute>) {
      if (direct()) {
        for (int64_t i = 0; i < count; ++i) rows[i] = data + tokens[i] * token_stride;
      }
    }
  }

  void scatter(Positions tokens, int64_t count, const Compute* scratch) const {
    if (direct()) return;
    const int64_t stride = padded<Compute>(width);
    if (channel_stride == 1) {
      for (int64_t i = 0; i < count; ++i) {
        const Compute* source = scratch + i * stride;
        Scalar* __restrict target = data + tokens[i] * token_stride;
        for (int64_t c = 0; c < width; ++c) target[c] = narrow<Scalar>(source[c]);
      }
      return;
    }
    for (int64_t c = 0; c < width; ++c) {
      Scalar* target = data + c * channel_stride;
      for (int64_t i = 0; i < count; ++i) target[tokens[i] * token_stride] = narrow<Scalar>(scratch[i * stride + c]);
    }
  }

 private:
  void fetch_row(int64_t token) const {
    const char* row = reinterpret_cast<const char*>(data + token * token_stride);
    for (int64_t byte = 0; byte < width * int64_t{sizeof(Scalar)}; byte += 64) prefetch(row + byte);
  }
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
