// Instance normalisation with modulation, noise and activation.
//
// Forward: the moments, then one pass that reads and writes each element once; small maps are read only once. Backward:
// one pass for the sums over each channel, and one that writes the gradients of x and of maps; both compute again what
// went into the activation.
#include <initializer_list>

#include "noise.h"
#include "reductions.h"

namespace sca::cuda {
namespace {

// Sums over a channel of the gradient g of what goes into the activation: times the factor 1 + gamma, the same times
// x - mean, times the normalised x, alone, and times the noise.
enum Kind { kNormalized, kCentred, kGamma, kBeta, kStrength, kKinds };

// The formula for packs of elements.
template <typename Scalar, int kWidth>
struct Formula {
  sca_instance_modulate call;
  Tiling tiling;
  Pixels pixels;
  Noise noise;

  explicit Formula(const sca_instance_modulate& call, int64_t steps = Tiling::kSteps)
      : call(call),
        tiling(call.batch, call.channels, call.height * call.width, adjacent_channels(call.x), kWidth, steps),
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

template <typename Scalar, int kWidth>
struct Forward {
  Formula<Scalar, kWidth> formula;
  struct Shared {};

  SCA_DEVICE void operator()(const Block& block, int64_t item, Shared&) const {
    block.each_thread([&](int thread) {
      const Lane lane = formula.tiling.lane(item, thread);
      if (!lane.active) return;
      const auto channels = formula.channels(lane);
      for (int64_t pixel = lane.pixel; pixel < lane.end; pixel += lane.step) {
        auto elements = formula.at(lane, channels, pixel);
        formula.activate(lane, elements, pixel);
      }
    });
  }
};

// Moments and result at once where a block has all pixels of its channels: they are read once and kept in shared
// memory, each number by the thread that has read it.
template <typename Scalar, int kWidth>
struct ForwardAtOnce {
  static constexpr int kSteps = 16 / kWidth;  // for which there is room
  using MomentsKernel = ChannelMoments<Scalar, kWidth>;

  Formula<Scalar, kWidth> formula;
  MomentsKernel moments;
  FinishStatistics<double> finish;
  struct Shared : MomentsKernel::Shared {
    float x[kSteps][kWidth][kThreads];
  };

  SCA_DEVICE void operator()(const Block& block, int64_t item, Shared& shared) const {
    moments.compute(block, item, shared, [&](int thread, int64_t step, const float (&values)[kWidth]) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) shared.x[step][i][thread] = values[i];
    });
    block.each_thread([&](int thread) {
      const Lane lane = formula.tiling.lane(item, thread);
      if (!lane.active || lane.entry >= formula.tiling.channel_lanes) return;
      for (int i = 0; i < moments.rows(); ++i) finish(formula.row(lane, i), shared.moments[i][lane.entry]);
    });
    block.each_thread([&](int thread) {
      const Lane lane = formula.tiling.lane(item, thread);
      if (!lane.active) return;
      const auto channels = formula.channels(lane);
      int64_t step = 0;
      for (int64_t pixel = lane.pixel; pixel < lane.end; pixel += lane.step, ++step) {
        float x[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) x[i] = shared.x[step][i][thread];
        auto elements = formula.at(lane, channels, pixel, x);
        formula.activate(lane, elements, pixel);
      }
    });
  }
};

// Partial sums: partial[(kind * rows + row) * chunks + chunk].
template <typename Scalar, int kWidth>
struct BackwardSums {
  Formula<Scalar, kWidth> formula;
  int64_t rows;
  Sum<double>* partial;
  struct Shared {
    float sums[kKinds][kWidth][kThreads];
  };

  SCA_DEVICE void operator()(const Block& block, int64_t item, Shared& shared) const {
    const Tiling& tiling = formula.tiling;
    const int places = tiling.along_channels ? kWidth : 1;
    block.each_thread([&](int thread) {
      const Lane lane = tiling.lane(item, thread);
      float sums[kKinds][kWidth] = {};
      if (lane.active) {
        const auto channels = formula.channels(lane);
        for (int64_t pixel = lane.pixel; pixel < lane.end; pixel += lane.step) {
          const auto elements = formula.at(lane, channels, pixel);
          float grad[kWidth];
          formula.gradient(lane, elements, pixel, grad);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            sums[kNormalized][i] += grad[i] * elements.factor[i];
            sums[kCentred][i] += grad[i] * elements.factor[i] * elements.centred[i];
            sums[kGamma][i] += grad[i] * (elements.centred[i] * channels.rstd[i]);
            sums[kBeta][i] += grad[i];
            sums[kStrength][i] += grad[i] * elements.noise[i];
          }
        }
      }
      if (lane.entry >= tiling.entries()) return;
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          if (i < places) {
            shared.sums[kind][i][lane.entry] = sums[kind][i];
          } else {
            shared.sums[kind][0][lane.entry] += sums[kind][i];
          }
        }
      }
    });
    reduce(block, tiling.pixel_lanes, tiling.channel_lanes, [&](int a, int b) {
      for (auto& of_kind : shared.sums) {
        for (int i = 0; i < places; ++i) of_kind[i][a] += of_kind[i][b];
      }
    });
    block.each_thread([&](int thread) {
      const Lane lane = tiling.lane(item, thread);
      if (!lane.active || lane.entry >= tiling.channel_lanes) return;
      for (int kind = 0; kind < kKinds; ++kind) {
        for (int i = 0; i < places; ++i) {
          const int64_t row = kind * rows + lane.image * tiling.channels + lane.channel + i;
          partial[row * tiling.chunks + lane.chunk].value = shared.sums[kind][i][lane.entry];
        }
      }
    });
  }
};

// Keeps the sums for the gradients of maps, and writes the gradients of tables.
struct FinishSums {
  sca_instance_modulate_gradients gradients;
  const double* rstd;
  double* sums;
  int64_t rows;

  SCA_DEVICE void operator()(int64_t index, const Sum<double>& sum) const {
    sums[index] = sum.value;
    const int64_t row = index % rows;
    switch (index / rows) {
      case kNormalized: return write(gradients.grad_mean, row, -sum.value * rstd[row]);
      case kCentred: return write(gradients.grad_rstd, row, sum.value);
      case kGamma: return write(gradients.grad_channel_gamma, row, sum.value);
      case kBeta: return write(gradients.grad_channel_beta, row, sum.value);
      default: return write(gradients.grad_noise_strength, row, sum.value);
    }
  }
  SCA_DEVICE static void write(void* table, int64_t row, double value) {
    if (table) static_cast<float*>(table)[row] = static_cast<float>(value);
  }
};

// Gradients that are maps. That of x flows through its mean and its deviation too, unless they are given.
template <typename Scalar, int kWidth>
struct BackwardMaps {
  Formula<Scalar, kWidth> formula;
  sca_instance_modulate_gradients gradients;
  int64_t rows;
  const double* sums;
  struct Shared {};

  SCA_DEVICE void operator()(const Block& block, int64_t item, Shared&) const {
    const sca_instance_modulate& call = formula.call;
    block.each_thread([&](int thread) {
      const Lane lane = formula.tiling.lane(item, thread);
      if (!lane.active) return;
      const auto channels = formula.channels(lane);
      float common[kWidth], proportional[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) through_statistics(formula.row(lane, i), common[i], proportional[i]);
      for (int64_t pixel = lane.pixel; pixel < lane.end; pixel += lane.step) {
        const auto elements = formula.at(lane, channels, pixel);
        float grad[kWidth], values[kWidth];
        formula.gradient(lane, elements, pixel, grad);
        if (gradients.grad_beta.data) {
          const int64_t offset = formula.offset(gradients.grad_beta, lane, pixel);
          store<Scalar>(gradients.grad_beta.data, offset, call.beta_wide, grad);
        }
        if (gradients.grad_gamma.data) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) values[i] = grad[i] * (elements.centred[i] * channels.rstd[i]);
          const int64_t offset = formula.offset(gradients.grad_gamma, lane, pixel);
          store<Scalar>(gradients.grad_gamma.data, offset, call.gamma_wide, values);
        }
        if (gradients.grad_x.data) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            const float of_normalized =
                grad[i] * elements.factor[i] - common[i] - elements.centred[i] * proportional[i];
            values[i] = of_normalized * channels.rstd[i];
          }
          store<Scalar>(gradients.grad_x.data, formula.offset(gradients.grad_x, lane, pixel), values);
        }
      }
    });
  }

  SCA_DEVICE void through_statistics(int64_t row, float& common, float& proportional) const {
    common = proportional = 0;
    if (formula.call.stats_given) return;
    const double pixels = static_cast<double>(formula.tiling.pixels), rstd = formula.call.rstd[row];
    const double freedom = larger(formula.call.unbiased ? pixels - 1 : pixels, 1.0);
    common = static_cast<float>(sums[kNormalized * rows + row] / pixels);
    proportional = static_cast<float>(sums[kCentred * rows + row] * rstd * rstd / freedom);
  }
};

// A map, and whether it is float whatever the type of x.
struct MapOfType {
  const sca_feature_map& map;
  bool wide;
};

bool packs_fit(const sca_instance_modulate& call, int width, std::initializer_list<MapOfType> maps) {
  for (const auto& [map, wide] : maps) {
    const int64_t bytes = wide || call.scalar_type == SCA_FLOAT32 ? 4 : 2;
    if (map.data &&
        !allows_packs(map, adjacent_channels(call.x), call.channels, call.height, call.width, bytes, width)) {
      return false;
    }
  }
  return true;
}
bool packs_fit(const sca_instance_modulate& call, int width) {
  return packs_fit(
      call, width,
      {{call.x, false}, {call.out, false}, {call.gamma, call.gamma_wide != 0}, {call.beta, call.beta_wide != 0}});
}
bool packs_fit(const sca_instance_modulate& call, const sca_instance_modulate_gradients& gradients, int width) {
  return packs_fit(call, width) && packs_fit(call, width,
                                             {{gradients.grad_x, false},
                                              {gradients.grad_gamma, call.gamma_wide != 0},
                                              {gradients.grad_beta, call.beta_wide != 0}});
}

// Chunks are most where packs do not fit.
int64_t most_chunks(const sca_instance_modulate& call) {
  const int64_t pixels = call.height * call.width;
  return Tiling(call.batch, call.channels, pixels, adjacent_channels(call.x), 1).chunks;
}

template <typename Scalar, int kWidth>
const char* forward(const sca_instance_modulate& call, void* stream) {
  Arena arena(call.workspace);
  const Formula<Scalar, kWidth> formula(call);
  const FinishStatistics<double> finish = {call.mean, call.rstd, call.eps, call.unbiased != 0};
  using AtOnce = ForwardAtOnce<Scalar, smaller(kWidth, 4)>;
  const Formula<Scalar, smaller(kWidth, 4)> whole(call, AtOnce::kSteps);
  if (!call.stats_given && whole.tiling.chunks == 1) {
    const AtOnce kernel = {whole, {call.x, whole.pixels, whole.tiling, nullptr}, finish};
    return launch(kernel, whole.tiling.items, call.threads, stream);
  }
  if (!call.stats_given) {
    auto* partial = arena.take<Moments>(call.batch * call.channels * most_chunks(call));
    const char* error = channel_moments<Scalar, smaller(kWidth, 4)>(call.x, call.batch, call.channels, call.height,
                                                                    call.width, partial, finish, call.threads, stream);
    if (error) return error;
  }
  return launch(Forward<Scalar, kWidth>{formula}, formula.tiling.items, call.threads, stream);
}

template <typename Scalar, int kWidth>
const char* backward(const sca_instance_modulate& call, const sca_instance_modulate_gradients& gradients,
                     void* stream) {
  Arena arena(call.workspace);
  const Formula<Scalar, kWidth> formula(call);
  const int64_t rows = call.batch * call.channels, chunks = formula.tiling.chunks;
  auto* sums = arena.take<double>(kKinds * rows);
  auto* partial = arena.take<Sum<double>>(kKinds * rows * chunks);
  const BackwardSums<Scalar, kWidth> summing = {formula, rows, partial};
  if (const char* error = launch(summing, formula.tiling.items, call.threads, stream)) return error;
  const MergeRows<Sum<double>, FinishSums> merge(partial, kKinds * rows, chunks, {gradients, call.rstd, sums, rows});
  if (const char* error = launch(merge, merge.items(), call.threads, stream)) return error;
  if (!gradients.grad_x.data && !gradients.grad_gamma.data && !gradients.grad_beta.data) return nullptr;
  const BackwardMaps<Scalar, kWidth> maps = {formula, gradients, rows, sums};
  return launch(maps, formula.tiling.items, call.threads, stream);
}

}  // namespace
}  // namespace sca::cuda

using namespace sca::cuda;

int64_t sca_cuda_instance_modulate_workspace(const sca_instance_modulate* call) {
  Arena arena(nullptr);
  arena.take<Moments>(call->batch * call->channels * most_chunks(*call));
  return arena.used();
}

const char* sca_cuda_instance_modulate_forward(const sca_instance_modulate* call, void* stream) {
  if (call->height * call->width > kMostPixels) return kTooManyPixels;
  return with_scalar_type(call->scalar_type, [&](auto scalar) {
    using Scalar = decltype(scalar);
    constexpr int kWidth = kPackWidth<Scalar>;
    return packs_fit(*call, kWidth) ? forward<Scalar, kWidth>(*call, stream) : forward<Scalar, 1>(*call, stream);
  });
}

int64_t sca_cuda_instance_modulate_backward_workspace(const sca_instance_modulate* call) {
  Arena arena(nullptr);
  arena.take<double>(kKinds * call->batch * call->channels);
  arena.take<Sum<double>>(kKinds * call->batch * call->channels * most_chunks(*call));
  return arena.used();
}

const char* sca_cuda_instance_modulate_backward(const sca_instance_modulate* call,
                                                const sca_instance_modulate_gradients* gradients, void* stream) {
  if (call->height * call->width > kMostPixels) return kTooManyPixels;
  return with_scalar_type(call->scalar_type, [&](auto scalar) {
    using Scalar = decltype(scalar);
    constexpr int kWidth = 4;  // more of them do not fit in registers
    const bool packs = packs_fit(*call, *gradients, kWidth);
    return packs ? backward<Scalar, kWidth>(*call, *gradients, stream) : backward<Scalar, 1>(*call, *gradients, stream);
  });
}
