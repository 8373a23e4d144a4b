// Feature maps in memory: numbers of several types, one by one or in packs of 16 bytes.
#pragma once

#include "../sca_kernels.h"
#include "execution.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace sca::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#ifdef __CUDACC__
SCA_DEVICE float widen(BFloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }
SCA_DEVICE float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
SCA_DEVICE void narrow(float value, BFloat16& target) {
  target.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
SCA_DEVICE void narrow(float value, Float16& target) { target.bits = __half_as_ushort(__float2half_rn(value)); }
#else
inline float widen(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline float widen(Float16 value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25)
                                         : std::ldexp(static_cast<float>(mantissa), -24);
  return value.bits & 0x8000 ? -magnitude : magnitude;
}
inline void narrow(float value, BFloat16& target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  target.bits = value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}
inline void narrow(float value, Float16& target) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  int exponent = -13;  // of zero and subnormal numbers
  if (magnitude > 0 && std::isfinite(magnitude)) std::frexp(magnitude, &exponent);
  // In units of the last place of a number of this size; what rounds up to the next power of two carries over.
  const int unit = larger(exponent - 11, -24);
  if (magnitude != magnitude) {
    target.bits = 0x7e00;
  } else if (magnitude >= 65520.0f) {
    target.bits = sign | 0x7c00;
  } else {
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
    target.bits = static_cast<uint16_t>(sign + units + (unit + 24) * 1024);
  }
}
#endif
SCA_DEVICE float widen(float value) { return value; }
SCA_DEVICE void narrow(float value, float& target) { target = value; }

// Adjacent numbers that are read and written at once.
template <typename Scalar, int kWidth>
struct alignas(sizeof(Scalar) * kWidth) Pack {
  Scalar values[kWidth];
};
template <typename Scalar>
constexpr int kPackWidth = 16 / static_cast<int>(sizeof(Scalar));

// Reads adjacent numbers; `wide` says that they are float, whatever Scalar is.
template <typename Scalar, int kWidth>
SCA_DEVICE void load(const void* data, int64_t offset, float (&values)[kWidth]) {
  const auto pack = *reinterpret_cast<const Pack<Scalar, kWidth>*>(static_cast<const Scalar*>(data) + offset);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = widen(pack.values[i]);
}
template <typename Scalar, int kWidth>
SCA_DEVICE void load(const void* data, int64_t offset, bool wide, float (&values)[kWidth]) {
  wide ? load<float, kWidth>(data, offset, values) : load<Scalar, kWidth>(data, offset, values);
}
template <typename Scalar, int kWidth>
SCA_DEVICE void store(void* data, int64_t offset, const float (&values)[kWidth]) {
  Pack<Scalar, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) narrow(values[i], pack.values[i]);
  *reinterpret_cast<Pack<Scalar, kWidth>*>(static_cast<Scalar*>(data) + offset) = pack;
}
template <typename Scalar, int kWidth>
SCA_DEVICE void store(void* data, int64_t offset, bool wide, const float (&values)[kWidth]) {
  wide ? store<float, kWidth>(data, offset, values) : store<Scalar, kWidth>(data, offset, values);
}

// Where the numbers of a feature map are. Images have fewer than 2^31 pixels, so that those are counted in 32 bits.
struct Pixels {
  uint32_t width;

  SCA_DEVICE int64_t offset(const sca_feature_map& map, uint32_t pixel) const {
    if (map.row_stride == map.column_stride * int64_t{width}) return pixel * map.column_stride;
    return pixel / width * map.row_stride + pixel % width * map.column_stride;
  }
};
SCA_DEVICE int64_t offset_of(const sca_feature_map& map, int64_t image, int64_t channel) {
  return image * map.batch_stride + channel * map.channel_stride;
}
constexpr int64_t kMostPixels = INT32_MAX;
constexpr char kTooManyPixels[] = "expected fewer than 2^31 pixels per image";

// Whether adjacent channels, rather than adjacent columns, are adjacent in memory.
inline bool adjacent_channels(const sca_feature_map& map) { return map.channel_stride == 1 && map.column_stride != 1; }

// Whether packs of `width` numbers, along the channels or along all pixels, can be read from a map wherever one begins.
inline bool allows_packs(const sca_feature_map& map, bool along_channels, int64_t channels, int64_t height,
                         int64_t image_width, int64_t bytes, int width) {
  if (reinterpret_cast<uintptr_t>(map.data) % (bytes * width) != 0) return false;
  if (map.batch_stride % width != 0) return false;
  if (along_channels) {
    return map.channel_stride == 1 && channels % width == 0 && map.row_stride % width == 0 &&
           map.column_stride % width == 0;
  }
  const bool without_gaps = map.row_stride == image_width || height == 1;
  return map.column_stride == 1 && without_gaps && height * image_width % width == 0 && map.channel_stride % width == 0;
}

// Calls visit(Scalar{}) for the type that a number of sca_scalar_type stands for.
template <typename Visit>
const char* with_scalar_type(int32_t scalar_type, const Visit& visit) {
  switch (scalar_type) {
    case SCA_FLOAT32: return visit(float{});
    case SCA_BFLOAT16: return visit(BFloat16{});
    case SCA_FLOAT16: return visit(Float16{});
    default: return "expected float32, bfloat16 or float16";
  }
}

}  // namespace sca::cuda
