// Gradients of instance_modulate: one pass for the sums over each channel, and one that writes the gradients of x and
// of maps; both compute again what went into the activation.
#include "instance_modulate.h"

namespace sca::cuda {
namespace {

// Sums over a channel of the gradient g of what goes into the activation: times the factor 1 + gamma, the same times
// x - mean, times the normalised x, alone, and times the noise.
enum Kind { kNormalized, kCentred, kGamma, kBeta, kStrength, kKinds };

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

bool packs_fit(const sca_instance_modulate& call, const sca_instance_modulate_gradients& gradients, int width) {
  return packs_fit(call, width) && packs_fit(call, width,
                                             {{gradients.grad_x, false},
                                              {gradients.grad_gamma, call.gamma_wide != 0},
                                              {gradients.grad_beta, call.beta_wide != 0}});
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
