// Pooling of raw features by the latents of each label: partial pools of blocks of pixels, with a running maximum, and
// their merge in order. Where shared memory has room for a tile, its pixels are read once, for the moments of the
// channels too unless there are so many blocks that a pass of their own is cheaper.
#include "cluster.h"
#include "partial_softmax.h"
#include "staging.h"

namespace sca::cuda {
namespace {

constexpr int kChannels = 32;  // that are worked on at once

// Leaves for each label block and row the maximum of its logits, the sum of exp(logit - maximum), and as many sums of
// features with that weight as there are channels.
template <typename Scalar, bool kStaged>
struct PartialPools {
  Logits<Scalar> logits;
  Staging<Scalar> staging;
  PixelValues position;  // logits of each pixel, for the masses
  float* spilled;        // logits of tiles with more rows than shared memory has, or null
  float* partial;        // ((image * heads + head) * blocks.rows + row) * row_size()
  Moments* moments;      // of the label blocks, (image * channels + channel) * blocks.per_image + block; null: not made

  struct Shared {
    float sums[kRowGroup][kTileParts * kTilePixels];
    float weights[kSharedRows * kTilePixels];
    float x[kStaged ? 1 : kChannels][kTilePixels + 1];
    CopyBarrier barrier;
  };
  SCA_HOST_DEVICE int64_t row_size() const { return logits.channels + kSoftmaxExtra; }
  SCA_DEVICE float* row(const Tile& tile, int row) const {
    const int64_t of_head = tile.block.image * logits.rows.heads + row / tile.block.latents;
    const int64_t index = of_head * logits.blocks.rows + tile.block.partial_row + row % tile.block.latents;
    return partial + index * row_size();
  }

  const char* run(int64_t batch, int32_t multiprocessors, void* stream) const {
    return launch_clusters(*this, batch * logits.blocks.per_image, 1, kStaged ? staging.bytes() : 0, multiprocessors,
                           stream);
  }

  SCA_DEVICE void operator()(const Cluster<Shared>& cluster, int64_t item) const {
    cluster.each_block([&](int, const Block& run, Shared& shared) { pool(run, item, shared, cluster.extra()); });
  }

  SCA_DEVICE void pool(const Block& run, int64_t item, Shared& shared, char* copy) const {
    const LabelBlock block = logits.blocks.at(item);
    const int64_t most_rows = logits.rows.heads * logits.blocks.latents.max_per_label;
    float* const weights = spilled ? spilled + item * most_rows * kTilePixels : shared.weights;
    if (moments) {
      run.each_thread([&](int thread) {
        for (int64_t c = thread; c < logits.channels; c += run.threads()) moments_of(block, item, c) = {};
      });
    }
    for (int64_t begin = block.begin; begin < block.end; begin += logits.lanes.pixels) {
      const Tile tile = logits.tile(block, begin);
      const bool first_tile = begin == block.begin;
      if constexpr (kStaged) {
        if (moments || tile.rows > 0) {
          staging.fill(run, logits, block.image, begin, tile.pixels, shared.barrier, copy);
        }
      }
      logits.compute(run, tile, shared, weights, [&](int64_t p) -> Features<Scalar> {
        if constexpr (kStaged) return staging.features(copy, static_cast<int>(p));
        return logits.features(logits.x, tile, static_cast<int>(p));
      });
      run.each_thread([&](int thread) {
        if (thread < tile.pixels) position.store_tile(tile, thread, logits.pixel(tile, thread), weights);
      });
      run.each_thread([&](int thread) {
        for (int r = thread; r < tile.rows; r += run.threads()) {
          update_softmax(row(tile, r) + logits.channels, weights + r * kTilePixels, tile.pixels, first_tile);
        }
      });
      if constexpr (kStaged) {
        run.each_thread([&](int thread) {
          for (int64_t c = thread; moments && c < logits.channels; c += run.threads()) {
            moments_of(block, item, c).merge(staging.moments(copy, c, 0, 1, tile.pixels));
          }
          add_rows<Scalar>(run, tile, thread, 0, logits.channels, weights, first_tile,
                           [&](int64_t c) { return staging.pixels_of(copy, c); });
        });
      } else {
        for (int64_t first = 0; first < logits.channels; first += kChannels) {
          run.each_thread([&](int thread) { fill(tile, thread, first, shared); });
          run.each_thread([&](int thread) {
            add_rows<float>(run, tile, thread, first, smaller<int64_t>(logits.channels - first, kChannels), weights,
                            first_tile, [&](int64_t c) -> Features<float> { return {shared.x[c], 1}; });
          });
        }
      }
    }
  }

  SCA_DEVICE Moments& moments_of(const LabelBlock& block, int64_t item, int64_t channel) const {
    const int64_t per_image = logits.blocks.per_image;
    return moments[(block.image * logits.channels + channel) * per_image + item % per_image];
  }

  SCA_DEVICE void fill(const Tile& tile, int thread, int64_t begin, Shared& shared) const {
    const TileLanes& lanes = logits.lanes;
    const int p = lanes.pixel(thread);
    if (!lanes.inside(thread) || p >= tile.pixels) return;
    const Features<Scalar> x = logits.features(logits.x, tile, p);
    for (int c = lanes.channel(thread); c < kChannels && begin + c < logits.channels; c += lanes.channels) {
      shared.x[c][p] = x[begin + c];
    }
  }

  // To the sums of `count` channels from `begin` on, where x_of(c) has the pixels of channel begin + c.
  template <typename Number, typename XOf>
  SCA_DEVICE void add_rows(const Block& run, const Tile& tile, int thread, int64_t begin, int64_t count,
                           const float* weights, bool first_tile, const XOf& x_of) const {
    multiply<Number, float>(
        run, thread, count, tile.rows, tile.pixels, 1, x_of,
        [&](int64_t r) -> Features<float> { return {weights + r * kTilePixels, 1}; },
        [&](int, int64_t c, int64_t r, float sum) {
          float* const target = row(tile, static_cast<int>(r));
          const float factor = target[logits.channels + kFactor];
          target[begin + c] = first_tile ? sum : target[begin + c] * factor + sum;
        });
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

// Whether writing and reading the partial moments of all label blocks is less than reading x.
bool moments_at_once(const sca_semantic_pool& call, const LabelBlocks& blocks) {
  const int64_t bytes = call.scalar_type == SCA_FLOAT32 ? 4 : 2;
  return 2 * blocks.per_image * int64_t{sizeof(Moments)} <= call.pixels.count * bytes;
}

struct Workspace {
  Moments* moments;
  float *partial, *spilled;
  PixelValues position;

  Workspace(const sca_semantic_pool& call, const LabelBlocks& blocks, Arena& arena) {
    const Tiling tiling(call.batch, call.channels, call.pixels.count, adjacent_channels(call.x), 1);
    const int64_t most_rows = call.heads * call.latents.max_per_label;
    const int64_t row_size = call.channels + kSoftmaxExtra;
    const int64_t chunks = larger(tiling.chunks, moments_at_once(call, blocks) ? blocks.per_image : 0);
    moments = arena.take<Moments>(call.batch * call.channels * chunks);
    partial = arena.take<float>(call.batch * call.heads * blocks.rows * row_size);
    position = PixelValues::take(arena, call.batch, call.heads, call.latents.max_per_label, call.pixels.count);
    const bool spills = most_rows > kSharedRows;
    spilled = arena.take<float>(spills ? call.batch * blocks.per_image * most_rows * kTilePixels : 0);
    if (!spills) spilled = nullptr;
  }
};

template <typename Scalar, bool kStaged>
const char* partial_pools(const sca_semantic_pool& call, const Logits<Scalar>& logits, const Staging<Scalar>& staging,
                          const Workspace& workspace, Moments* moments, void* stream) {
  const PartialPools<Scalar, kStaged> kernel = {
      logits, staging, workspace.position, workspace.spilled, workspace.partial, moments};
  return kernel.run(call.batch, call.threads, stream);
}

template <typename Scalar>
const char* forward(const sca_semantic_pool& call, void* stream) {
  Arena arena(call.workspace);
  const Logits<Scalar> logits(call, block_of_tiles(call.x, call.pixels.count), call.queries, nullptr);
  const Workspace workspace(call, logits.blocks, arena);
  auto *mean = static_cast<float*>(call.mean), *lse = static_cast<float*>(call.lse);
  const FinishMoments finish = {mean, static_cast<float*>(call.second_moment)};
  const Staging<Scalar> staging(logits, logits.lanes.pixels);
  const bool staged = staging.bytes() <= cluster_limits().extra;
  Moments* const of_blocks = staged && moments_at_once(call, logits.blocks) ? workspace.moments : nullptr;
  const char* error = staged ? partial_pools<Scalar, true>(call, logits, staging, workspace, of_blocks, stream)
                             : partial_pools<Scalar, false>(call, logits, staging, workspace, of_blocks, stream);
  if (error) return error;
  if (of_blocks) {
    const MergeRows<Moments, FinishMoments> merge(of_blocks, call.batch * call.channels, logits.blocks.per_image,
                                                  finish);
    error = launch(merge, merge.items(), call.threads, stream);
  } else {
    const auto moments =
        packs_fit(call, 4) ? channel_moments<Scalar, 4, FinishMoments> : channel_moments<Scalar, 1, FinishMoments>;
    error = moments(call.x, call.batch, call.channels, call.height, call.width, workspace.moments, finish, call.threads,
                    stream);
  }
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
