// The formula of instance_modulate, which forward and backward share.
#pragma once

#include <initializer_list>

#include "noise.h"
#include "reductions.h"

namespace sca::cuda {
namespace {

// The formula for packs of elements.
template <typename Scalar, int kWidth>
struct Formula {
  sca_instance_modulate call;
  Tiling tiling;
  Pixels pixels;
  Noise noise;

  explicit Formula(const sca_instance_modulate& call, int most_lanes = Tiling::kMostLanes)
      : call(call),
        tiling(call.batch, call.channels, call.height * call.width, adjacent_channels(call.x), kWidth, most_lanes),
        pixels{static_cast<uint32_t>(call.width)},
        noise{call.noise, static_cast<uint32_t>(call.width)} {}

  // What belongs to the channels of a lane.
  struct Channels {
    float mean[kWidth], mean_rest[kWidth], rstd[kWidth], factor[kWidth], offset[kWidth], strength[kWidth];
  };
  struct Elements {
    float before[kWidth];  // the activation
    float centred[kWidth], factor[kWidth], noise[kWidth];
  };

  SCA_DEVICE int64_t row(const Lane& lane, int i) const {
    return lane.image * call.channels + lane.channel + (tiling.along_channels ? i : 0);
  }
  SCA_DEVICE int64_t offset(const sca_feature_map& map, const Lane& lane, int64_t pixel) const {
    return offset_of(map, lane.image, lane.channel) + pixels.offset(map, static_cast<uint32_t>(pixel));
  }

  SCA_DEVICE Channels channels(const Lane& lane) const {
    Channels of;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int64_t index = row(lane, i);
      const double mean = call.mean[index];
      of.mean[i] = static_cast<float>(mean);
      of.mean_rest[i] = static_cast<float>(mean - of.mean[i]);  // which a float cannot hold of a large mean
      of.rstd[i] = static_cast<float>(call.rstd[index]);
      of.factor[i] = 1;
      if (call.channel_gamma) {
        of.factor[i] = static_cast<const float*>(call.channel_gamma)[index] + (call.add_one ? 1.0f : 0.0f);
      }
      of.offset[i] = call.channel_beta ? static_cast<const float*>(call.channel_beta)[index] : 0;
      of.strength[i] = noise.strength(index);
    }
    return of;
  }

  SCA_DEVICE Elements at(const Lane& lane, const Channels& of, int64_t pixel) const {
    float x[kWidth];
    load<Scalar>(call.x.data, offset(call.x, lane, pixel), x);
    return at(lane, of, pixel, x);
  }
  SCA_DEVICE Elements at(const Lane& lane, const Channels& of, int64_t pixel, const float (&x)[kWidth]) const {
    Elements elements;
    float gamma[kWidth] = {}, beta[kWidth] = {};
    if (call.gamma.data) load<Scalar>(call.gamma.data, offset(call.gamma, lane, pixel), call.gamma_wide, gamma);
    if (call.beta.data) load<Scalar>(call.beta.data, offset(call.beta, lane, pixel), call.beta_wide, beta);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      elements.centred[i] = x[i] - of.mean[i] - of.mean_rest[i];
      elements.factor[i] = call.gamma.data ? gamma[i] + (call.add_one ? 1.0f : 0.0f) : of.factor[i];
      const float normalized = elements.centred[i] * of.rstd[i];
      elements.before[i] = normalized * elements.factor[i] + (call.beta.data ? beta[i] : of.offset[i]);
      elements.noise[i] = 0;
      if (noise.present()) {
        const int along_channels = tiling.along_channels ? i : 0;
        elements.noise[i] =
            noise.at(lane.image, lane.channel + along_channels, static_cast<uint32_t>(pixel + i - along_channels));
        elements.before[i] += of.strength[i] * elements.noise[i];
      }
    }
    return elements;
  }

  // The gradient of what goes into the activation; backward gets that of the result in the place of the result.
  SCA_DEVICE void gradient(const Lane& lane, const Elements& elements, int64_t pixel, float (&grad)[kWidth]) const {
    load<Scalar>(call.out.data, offset(call.out, lane, pixel), grad);
    const auto slope = static_cast<float>(call.negative_slope);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grad[i] = elements.before[i] > 0 ? grad[i] : grad[i] * slope;
  }

  // Writes the result.
  SCA_DEVICE void activate(const Lane& lane, Elements& elements, int64_t pixel) const {
    const auto slope = static_cast<float>(call.negative_slope);
#pragma unroll
    for (float& value : elements.before) value = value > 0 ? value : value * slope;
    store<Scalar>(call.out.data, offset(call.out, lane, pixel), elements.before);
  }
};

// A map, and whether it is float whatever the type of x.
struct MapOfType {
  const sca_feature_map& map;
  bool wide;
};

inline bool packs_fit(const sca_instance_modulate& call, int width, std::initializer_list<MapOfType> maps) {
  for (const auto& [map, wide] : maps) {
    const int64_t bytes = wide || call.scalar_type == SCA_FLOAT32 ? 4 : 2;
    if (map.data &&
        !allows_packs(map, adjacent_channels(call.x), call.channels, call.height, call.width, bytes, width)) {
      return false;
    }
  }
  return true;
}
inline bool packs_fit(const sca_instance_modulate& call, int width) {
  return packs_fit(
      call, width,
      {{call.x, false}, {call.out, false}, {call.gamma, call.gamma_wide != 0}, {call.beta, call.beta_wide != 0}});
}

// Chunks are most where packs do not fit.
inline int64_t most_chunks(const sca_instance_modulate& call) {
  const int64_t pixels = call.height * call.width;
  return Tiling(call.batch, call.channels, pixels, adjacent_channels(call.x), 1).chunks;
}

}  // namespace
}  // namespace sca::cuda
