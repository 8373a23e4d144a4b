// Modulation of normalised features by the latents of each pixel's label. A block takes a slice of the pixels in the
// order of labels, and where shared memory has room for it keeps a copy there for logits and results. The moments of x,
// where they are not given, come from a pass of their own, or from the copies where a cluster has room for an image.
#include "cluster.h"
#include "semantic_modulate.h"
#include "staging.h"

namespace sca::cuda {
namespace {

// How the pixels of an image are cut into slices: so many, each of so many pixels and the last of what is left. `whole`
// says that the slices of an image are the blocks of a cluster, which makes the moments.
struct Slices {
  int64_t size, per_image;
  bool whole;

  int blocks() const { return whole ? static_cast<int>(per_image) : 1; }
};

template <typename Scalar, bool kStaged>
struct Forward {
  Modulation<Scalar> modulation;
  Slices slices;
  Staging<Scalar> staging;
  FinishStatistics<float> finish;

  static constexpr int kChannels = 32;  // that are worked on at once
  struct Shared {
    float sums[kRowGroup][kTileParts * kTilePixels];
    float weights[kSharedRows * kTilePixels];
    float scale[kChannels][kTilePixels + 8], shift[kChannels][kTilePixels + 8];
    CopyBarrier barrier;
  };
  // Positions of a plan.
  struct Slice {
    int64_t index, image, begin;
    int pixels;
  };
  SCA_DEVICE Slice slice(int64_t index) const {
    const int64_t begin = index % slices.per_image * slices.size;
    const int64_t left = larger<int64_t>(modulation.call.pixels.count - begin, 0);
    return {index, index / slices.per_image, begin, static_cast<int>(smaller(slices.size, left))};
  }
  // Moments of each channel lie behind the copy, and beside them those of parts of a slice.
  static int64_t moments(int64_t channels) { return larger<int64_t>(channels, block_threads()); }

  const char* run(void* stream) const {
    const sca_semantic_modulate& call = modulation.call;
    const int64_t extra = kStaged ? staging.bytes() : 0;
    const int64_t of_moments = slices.whole ? moments(call.channels) * int64_t{sizeof(Moments)} : 0;
    return launch_clusters(*this, call.batch * slices.per_image / slices.blocks(), slices.blocks(), extra + of_moments,
                           call.threads, stream);
  }

  SCA_DEVICE void operator()(const Cluster<Shared>& cluster, int64_t item) const {
    const int64_t first = item * cluster.blocks();
    if constexpr (kStaged) {
      cluster.each_block([&](int rank, const Block& block, Shared& shared) {
        const Slice of = slice(first + rank);
        staging.fill(block, modulation.logits, of.image, of.begin, of.pixels, shared.barrier, cluster.extra());
        if (slices.whole) take_moments(block, of, cluster.extra());
      });
      if (slices.whole) {
        cluster.each_block(
            [&](int rank, const Block& block, Shared&) { merge_moments(cluster, rank, block, slice(first).image); });
      }
    }
    cluster.each_block([&](int rank, const Block& block, Shared& shared) {
      const Slice of = slice(first + rank);
      float* const weights = modulation.weights(of.index, shared.weights);
      const auto& logits = modulation.logits;
      for (int64_t begin = of.begin; begin < of.begin + of.pixels;) {
        const LabelBlock run = logits.blocks.run(of.image, begin, of.begin + of.pixels);
        for (; begin < run.end; begin += logits.lanes.pixels) {
          const Tile tile = logits.tile(run, begin);
          const auto features_of = [&](int64_t p) { return features(cluster.extra(), of, tile, static_cast<int>(p)); };
          modulation.attend(block, tile, shared, weights, features_of);
          for (int64_t channel = 0; channel < logits.channels; channel += kChannels) {
            block.each_thread([&](int thread) {
              weigh_rows(block, tile, thread, modulation.call.scale, channel, weights, shared.scale);
              weigh_rows(block, tile, thread, modulation.call.shift, channel, weights, shared.shift);
            });
            block.each_thread([&](int thread) { write(tile, thread, channel, shared, features_of); });
          }
        }
        begin = run.end;
      }
    });
  }

  SCA_DEVICE Features<Scalar> features(const char* copy, const Slice& of, const Tile& tile, int p) const {
    if constexpr (kStaged) return staging.features(copy, static_cast<int>(tile.begin - of.begin) + p);
    return modulation.logits.features(modulation.call.x, tile, p);
  }

  // Those of a slice, from its copy, which they are put behind.
  SCA_DEVICE void take_moments(const Block& run, const Slice& of, char* copy) const {
    auto* const moments = reinterpret_cast<Moments*>(copy + staging.bytes());
    const int64_t channels = modulation.call.channels;
    const int lanes = static_cast<int>(smaller<int64_t>(run.threads(), larger<int64_t>(channels, 1)));
    const int parts = run.threads() / lanes;
    run.each_thread([&](int thread) {
      const int part = thread / lanes;
      for (int64_t c = thread % lanes; part < parts && c < channels; c += lanes) {
        moments[part * lanes + c] = staging.moments(copy, c, part, parts, of.pixels);
      }
    });
    reduce(run, parts, lanes, [&](int a, int b) { moments[a].merge(moments[b]); });
  }

  // Merges those of a cluster, which shares out the channels.
  SCA_DEVICE void merge_moments(const Cluster<Shared>& cluster, int rank, const Block& run, int64_t image) const {
    const int64_t channels = modulation.call.channels;
    run.each_thread([&](int thread) {
      for (int64_t c = rank * run.threads() + thread; c < channels; c += cluster.blocks() * run.threads()) {
        Moments merged = {};
        for (int other = 0; other < cluster.blocks(); ++other) {
          merged.merge(reinterpret_cast<const Moments*>(cluster.extra(other) + staging.bytes())[c]);
        }
        finish(image * channels + c, merged);
      }
    });
  }

  // The sums over latents and heads of some channels of a table, from `begin` on, with the weights of a tile.
  SCA_DEVICE void weigh_rows(const Block& run, const Tile& tile, int thread, const void* table, int64_t begin,
                             const float* weights, float (&sums)[kChannels][kTilePixels + 8]) const {
    const sca_semantic_modulate& call = modulation.call;
    const int64_t latents = tile.block.latents, channels = smaller<int64_t>(call.channels - begin, kChannels);
    for (int64_t head = 0; latents > 0 && head < call.heads; ++head) {
      const int64_t row = head * latents, of_head = modulation.logits.rows.index(tile, static_cast<int>(row));
      const float* const first = static_cast<const float*>(table) + of_head * call.channels + begin;
      multiply<float, float>(
          run, thread, channels, tile.pixels, latents, 1,
          [&](int64_t c) -> Features<float> { return {first + c, call.channels}; },
          [&](int64_t p) -> Features<float> { return {weights + row * kTilePixels + p, kTilePixels}; },
          [&](int, int64_t c, int64_t p, float sum) { sums[c][p] = head > 0 ? sums[c][p] + sum : sum; });
    }
  }

  template <typename FeaturesOf>
  SCA_DEVICE void write(const Tile& tile, int thread, int64_t begin, const Shared& shared,
                        const FeaturesOf& features_of) const {
    const TileLanes& lanes = modulation.logits.lanes;
    const int p = lanes.pixel(thread);
    if (!lanes.inside(thread) || p >= tile.pixels) return;
    const sca_semantic_modulate& call = modulation.call;
    const Features<Scalar> x = features_of(p);
    const int64_t base = modulation.logits.offset(call.out, tile, p), end = smaller(begin + kChannels, call.channels);
    const auto slope = static_cast<float>(call.negative_slope);
    for (int64_t first = begin + lanes.channel(thread); first < end; first += kChannelGroup * lanes.channels) {
      const auto add_rows = [&](const int64_t (&channel)[kChannelGroup], auto& of) {
        if (tile.rows == 0) return;
#pragma unroll
        for (int k = 0; k < kChannelGroup; ++k) {
          const int64_t c = smaller(channel[k], end - 1) - begin;
          of.factor[k] += shared.scale[c][p];
          of.before[k] += shared.shift[c][p];
        }
      };
      const auto elements = modulation.formula(tile, p, x, first, add_rows);
#pragma unroll
      for (int k = 0; k < kChannelGroup; ++k) {
        const int64_t channel = first + k * lanes.channels;
        if (channel >= end) break;
        const float value = elements.before[k];
        narrow(value > 0 ? value : value * slope,
               static_cast<Scalar*>(call.out.data)[base + channel * call.out.channel_stride]);
      }
    }
  }
};

// Whole images for clusters, if a block then has few tiles and room for them; else without slices.
template <typename Scalar>
Slices whole_images(const Logits<Scalar>& logits, int64_t pixels) {
  constexpr int64_t kMostTiles = 4;
  const ClusterLimits limits = cluster_limits();
  int blocks = 1;
  while (2 * blocks <= limits.blocks && blocks * logits.lanes.pixels < pixels) blocks *= 2;
  const int64_t size = divide_up(pixels, blocks);
  const int64_t moments = Forward<Scalar, true>::moments(logits.channels) * int64_t{sizeof(Moments)};
  const bool fits =
      size <= kMostTiles * logits.lanes.pixels && Staging<Scalar>(logits, size).bytes() + moments <= limits.extra;
  return {size, fits ? blocks : 0, true};
}

template <typename Scalar, int kWidth>
const char* moments_of(const sca_semantic_modulate& call, Moments* partial, const FinishStatistics<float>& finish,
                       void* stream) {
  return channel_moments<Scalar, kWidth>(call.x, call.batch, call.channels, call.height, call.width, partial, finish,
                                         call.threads, stream);
}

// A tile in each slice, if images are not taken as a whole.
Slices tiles_of(const sca_semantic_modulate& call) {
  const int64_t pixels = TileLanes(adjacent_channels(call.x)).pixels;
  return {pixels, divide_up(call.pixels.count, pixels), false};
}

// The workspace, with room for the weights of as many slices as there may be.
template <typename Scalar>
Prepared<Scalar> prepare(const sca_semantic_modulate& call, Arena& arena) {
  const Slices tiles = tiles_of(call);
  const int64_t slices = larger<int64_t>(tiles.per_image, kMostClusterBlocks);
  return {call, Modulation<Scalar>(call, tiles.size), call.batch * slices, arena};
}

template <typename Scalar>
const char* forward(const sca_semantic_modulate& call, void* stream) {
  Arena arena(call.workspace);
  Prepared<Scalar> prepared = prepare<Scalar>(call, arena);
  if (const char* error = prepared.launch_means(call, stream)) return error;
  const Modulation<Scalar>& modulation = prepared.modulation;
  const FinishStatistics<float> finish = {static_cast<float*>(call.mean), static_cast<float*>(call.rstd), call.eps,
                                          false};
  if (!call.stats_given) {
    const Slices whole = whole_images(modulation.logits, call.pixels.count);
    if (whole.per_image > 0) {
      const Staging<Scalar> staging(modulation.logits, whole.size);
      return Forward<Scalar, true>{modulation, whole, staging, finish}.run(stream);
    }
    const char* error = packs_fit(call, call.x, 4) ? moments_of<Scalar, 4>(call, prepared.moments, finish, stream)
                                                   : moments_of<Scalar, 1>(call, prepared.moments, finish, stream);
    if (error) return error;
  }
  const Slices tiles = tiles_of(call);
  const Staging<Scalar> staging(modulation.logits, tiles.size);
  return staging.bytes() <= cluster_limits().extra
             ? Forward<Scalar, true>{modulation, tiles, staging, finish}.run(stream)
             : Forward<Scalar, false>{modulation, tiles, staging, finish}.run(stream);
}

}  // namespace
}  // namespace sca::cuda

using namespace sca::cuda;

int64_t sca_cuda_semantic_modulate_workspace(const sca_semantic_modulate* call) {
  Arena arena(nullptr);
  prepare<float>(*call, arena);
  return arena.used();
}

const char* sca_cuda_semantic_modulate_forward(const sca_semantic_modulate* call, void* stream) {
  return with_scalar_type(call->scalar_type, [&](auto scalar) { return forward<decltype(scalar)>(*call, stream); });
}
