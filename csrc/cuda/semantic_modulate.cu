// Modulation of normalised features by the latents of each pixel's label: the moments of x where they are not given,
// then one pass over tiles of pixels of one label.
#include "semantic_modulate.h"

namespace sca::cuda {
namespace {

template <typename Scalar>
struct Forward {
  Modulation<Scalar> modulation;
  struct Shared {
    float sums[kRowGroup][kThreads];
    float weights[1][kSharedRows * kTilePixels];
  };

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    const auto& logits = modulation.logits;
    const LabelBlock block = logits.blocks.at(item);
    float* const weights = modulation.weights(item, shared, 0, 1);
    for (int64_t begin = block.begin; begin < block.end; begin += logits.lanes.pixels) {
      const Tile tile = logits.tile(block, begin);
      modulation.attend(run, tile, shared, weights);
      run.each_thread([&](int thread) { write(tile, thread, weights); });
    }
  }

  SCA_DEVICE void write(const Tile& tile, int thread, const float* weights) const {
    const TileLanes& lanes = modulation.logits.lanes;
    const int p = lanes.pixel(thread);
    if (!lanes.inside(thread) || p >= tile.pixels) return;
    const sca_semantic_modulate& call = modulation.call;
    const int64_t base = modulation.logits.offset(call.out, tile, p);
    const auto slope = static_cast<float>(call.negative_slope);
    for (int64_t first = lanes.channel(thread); first < call.channels; first += kChannelGroup * lanes.channels) {
      const auto elements = modulation.at(tile, p, first, weights);
#pragma unroll
      for (int k = 0; k < kChannelGroup; ++k) {
        const int64_t channel = first + k * lanes.channels;
        if (channel >= call.channels) break;
        const float value = elements.before[k];
        narrow(value > 0 ? value : value * slope,
               static_cast<Scalar*>(call.out.data)[base + channel * call.out.channel_stride]);
      }
    }
  }
};

template <typename Scalar, int kWidth>
const char* moments_of(const sca_semantic_modulate& call, Moments* partial, void* stream) {
  const FinishStatistics<float> finish = {static_cast<float*>(call.mean), static_cast<float*>(call.rstd), call.eps,
                                          false};
  return channel_moments<Scalar, kWidth>(call.x, call.batch, call.channels, call.height, call.width, partial, finish,
                                         call.threads, stream);
}

template <typename Scalar>
const char* forward(const sca_semantic_modulate& call, void* stream) {
  Arena arena(call.workspace);
  Prepared<Scalar> prepared(call, tile_pixels(call), 1, arena);
  if (const char* error = prepared.launch_means(call, stream)) return error;
  if (!call.stats_given) {
    const char* error = packs_fit(call, call.x, 4) ? moments_of<Scalar, 4>(call, prepared.moments, stream)
                                                   : moments_of<Scalar, 1>(call, prepared.moments, stream);
    if (error) return error;
  }
  return launch(Forward<Scalar>{prepared.modulation}, prepared.modulation.items(), call.threads, stream);
}

}  // namespace
}  // namespace sca::cuda

using namespace sca::cuda;

int64_t sca_cuda_semantic_modulate_workspace(const sca_semantic_modulate* call) {
  Arena arena(nullptr);
  Prepared<float>(*call, tile_pixels(*call), 1, arena);
  return arena.used();
}

const char* sca_cuda_semantic_modulate_forward(const sca_semantic_modulate* call, void* stream) {
  return with_scalar_type(call->scalar_type, [&](auto scalar) { return forward<decltype(scalar)>(*call, stream); });
}
