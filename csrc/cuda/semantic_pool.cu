// Pooling of raw features by the latents of each label: partial pools of blocks of pixels, with a running maximum, and
// their merge in order. The moments of the channels come from a pass of their own.
#include "partial_softmax.h"
#include "reductions.h"

namespace sca::cuda {
namespace {

constexpr int kChannels = 32;  // that are worked on at once

// Leaves for each label block and row the maximum of its logits, the sum of exp(logit - maximum), and as many sums of
// features with that weight as there are channels.
template <typename Scalar>
struct PartialPools {
  Logits<Scalar> logits;
  PixelValues position;  // logits of each pixel, for the masses
  float* spilled;        // logits of tiles with more rows than shared memory has, or null
  float* partial;        // ((image * heads + head) * blocks.rows + row) * row_size()

  struct Shared {
    float sums[kRowGroup][kThreads];
    float weights[kSharedRows * kTilePixels];
    float x[kChannels][kTilePixels + 1];
  };
  SCA_HOST_DEVICE int64_t row_size() const { return logits.channels + kSoftmaxExtra; }
  SCA_DEVICE float* row(const Tile& tile, int row) const {
    const int64_t of_head = tile.block.image * logits.rows.heads + row / tile.block.latents;
    const int64_t index = of_head * logits.blocks.rows + tile.block.partial_row + row % tile.block.latents;
    return partial + index * row_size();
  }

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    const LabelBlock block = logits.blocks.at(item);
    const int64_t most_rows = logits.rows.heads * logits.blocks.latents.max_per_label;
    float* const weights = spilled ? spilled + item * most_rows * kTilePixels : shared.weights;
    for (int64_t begin = block.begin; begin < block.end; begin += logits.lanes.pixels) {
      const Tile tile = logits.tile(block, begin);
      const bool first_tile = begin == block.begin;
      logits.compute(run, tile, shared, weights);
      run.each_thread([&](int thread) {
        if (thread < tile.pixels) position.store_tile(tile, thread, logits.pixel(tile, thread), weights);
      });
      run.each_thread([&](int thread) {
        for (int r = thread; r < tile.rows; r += run.threads()) {
          update_softmax(row(tile, r) + logits.channels, weights + r * kTilePixels, tile.pixels, first_tile);
        }
      });
      for (int64_t first = 0; first < logits.channels; first += kChannels) {
        run.each_thread([&](int thread) { fill(tile, thread, first, shared); });
        run.each_thread([&](int thread) { pool(run, tile, thread, first, shared, weights, first_tile); });
      }
    }
  }

  SCA_DEVICE void fill(const Tile& tile, int thread, int64_t begin, Shared& shared) const {
    const TileLanes& lanes = logits.lanes;
    const int p = lanes.pixel(thread);
    if (!lanes.inside(thread) || p >= tile.pixels) return;
    const int64_t base = logits.offset(logits.x, tile, p);
    for (int c = lanes.channel(thread); c < kChannels && begin + c < logits.channels; c += lanes.channels) {
      shared.x[c][p] = logits.feature(logits.x, base, begin + c);
    }
  }

  SCA_DEVICE void pool(const Block& run, const Tile& tile, int thread, int64_t begin, const Shared& shared,
                       const float* weights, bool first_tile) const {
    for (int index = thread; index < tile.rows * kChannels; index += run.threads()) {
      const int r = index / kChannels, c = index % kChannels;
      if (begin + c >= logits.channels) continue;
      float sum = 0;
      for (int p = 0; p < tile.pixels; ++p) sum += weights[r * kTilePixels + p] * shared.x[c][p];
      float* const target = row(tile, r);
      const float factor = target[logits.channels + kFactor];
      target[begin + c] = first_tile ? sum : target[begin + c] * factor + sum;
    }
  }
};

struct FinishPools {
  float *pooled_rows, *lse_rows;
  const float* mean;
  int64_t image_rows, channels;
  bool empty_uniform;

  SCA_DEVICE void lse(int64_t row, float value) const { lse_rows[row] = value; }
  SCA_DEVICE void result(int64_t row, int64_t channel, float value) const {
    pooled_rows[row * channels + channel] = value;
  }
  SCA_DEVICE void empty(int64_t row, int64_t channel) const {
    result(row, channel, empty_uniform ? mean[row / image_rows * channels + channel] : 0.0f);
  }
};

struct FinishMoments {
  float *mean, *second_moment;

  SCA_DEVICE void operator()(int64_t row, const Moments& moments) const {
    mean[row] = static_cast<float>(moments.mean);
    second_moment[row] = static_cast<float>(moments.squares / larger(moments.count, 1.0));
  }
};

bool packs_fit(const sca_semantic_pool& call, int width) {
  const int64_t bytes = call.scalar_type == SCA_FLOAT32 ? 4 : 2;
  return allows_packs(call.x, adjacent_channels(call.x), call.channels, call.height, call.width, bytes, width);
}

struct Workspace {
  Moments* moments;
  float *partial, *spilled;
  PixelValues position;

  Workspace(const sca_semantic_pool& call, const LabelBlocks& blocks, Arena& arena) {
    const Tiling tiling(call.batch, call.channels, call.pixels.count, adjacent_channels(call.x), 1);
    const int64_t most_rows = call.heads * call.latents.max_per_label;
    const int64_t row_size = call.channels + kSoftmaxExtra;
    moments = arena.take<Moments>(call.batch * call.channels * tiling.chunks);
    partial = arena.take<float>(call.batch * call.heads * blocks.rows * row_size);
    position = PixelValues::take(arena, call.batch, call.heads, call.latents.max_per_label, call.pixels.count);
    const bool spills = most_rows > kSharedRows;
    spilled = arena.take<float>(spills ? call.batch * blocks.per_image * most_rows * kTilePixels : 0);
    if (!spills) spilled = nullptr;
  }
};

template <typename Scalar>
const char* forward(const sca_semantic_pool& call, void* stream) {
  Arena arena(call.workspace);
  const Logits<Scalar> logits(call, block_of_tiles(call.x, call.pixels.count), call.queries, nullptr);
  const Workspace workspace(call, logits.blocks, arena);
  auto *mean = static_cast<float*>(call.mean), *lse = static_cast<float*>(call.lse);
  const FinishMoments finish = {mean, static_cast<float*>(call.second_moment)};
  const auto moments =
      packs_fit(call, 4) ? channel_moments<Scalar, 4, FinishMoments> : channel_moments<Scalar, 1, FinishMoments>;
  const char* error = moments(call.x, call.batch, call.channels, call.height, call.width, workspace.moments, finish,
                              call.threads, stream);
  if (error) return error;

  const PartialPools<Scalar> pools = {logits, workspace.position, workspace.spilled, workspace.partial};
  error = launch(pools, call.batch * logits.blocks.per_image, call.threads, stream);
  if (error) return error;
  const bool uniform = call.empty_uniform != 0;
  const FinishPools pooled = {static_cast<float*>(call.pooled), lse,           mean,
                              call.heads * call.latents.count,  call.channels, uniform};
  const MergeSoftmax<FinishPools> merge = {logits.blocks, workspace.partial, call.heads, call.channels, pooled};
  error = launch(merge, merge.items(call.batch), call.threads, stream);
  if (error) return error;
  for (const bool rows : {true, false}) {
    auto* const masses = static_cast<float*>(rows ? call.row_mass : call.col_mass);
    const LineSums sums(workspace.position, call.latents.count, call.height, call.width, rows, masses, lse, uniform);
    error = launch(sums, sums.items(call.batch), call.threads, stream);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace sca::cuda

using namespace sca::cuda;

int64_t sca_cuda_semantic_pool_workspace(const sca_semantic_pool* call) {
  Arena arena(nullptr);
  Workspace(*call, LabelBlocks(call->pixels, call->latents, block_of_tiles(call->x, call->pixels.count)), arena);
  return arena.used();
}

const char* sca_cuda_semantic_pool_forward(const sca_semantic_pool* call, void* stream) {
  return with_scalar_type(call->scalar_type, [&](auto scalar) { return forward<decltype(scalar)>(*call, stream); });
}
