// The formula of semantic_modulate for a tile of pixels of one label, which forward and backward share.
#pragma once

#include <initializer_list>
#include <utility>

#include "folded_attention.h"
#include "noise.h"
#include "reductions.h"

namespace sca::cuda {
namespace {

constexpr int kChannelGroup = 4;  // channels that a thread works on at once, so that weights are read once for all

template <typename Scalar>
struct Modulation {
  sca_semantic_modulate call;
  Logits<Scalar> logits;
  Noise noise;
  const float *empty_scale, *empty_shift;  // (batch, channels) of pixels without latents; null: zero
  float* spilled;                          // weights of tiles with more rows than shared memory has, or null

  Modulation(const sca_semantic_modulate& call, int64_t block_size)
      : call(call),
        logits(call, block_size, call.keys, call.key_bias),
        noise{call.noise, static_cast<uint32_t>(call.width)},
        empty_scale(static_cast<const float*>(call.empty_scale)),
        empty_shift(static_cast<const float*>(call.empty_shift)),
        spilled(nullptr) {}

  int64_t most_rows() const { return call.heads * call.latents.max_per_label; }
  int64_t items() const { return call.batch * logits.blocks.per_image; }
  // How many numbers of tiles have to be spilled, if each item has so many per row and pixel.
  int64_t spilled_size(int64_t each) const {
    return most_rows() > kSharedRows ? items() * most_rows() * kTilePixels * each : 0;
  }

  // The formula at a pixel, for the channels first, first + step, ... of those that there are.
  struct Elements {
    float before[kChannelGroup];  // the activation
    float x[kChannelGroup], normalized[kChannelGroup], factor[kChannelGroup], noise[kChannelGroup];
  };

  SCA_DEVICE Elements at(const Tile& tile, int p, int64_t first, const float* weights) const {
    const int64_t image = tile.block.image, base = logits.offset(call.x, tile, p);
    int64_t channel[kChannelGroup];
    Elements of;
    float offset[kChannelGroup];
#pragma unroll
    for (int k = 0; k < kChannelGroup; ++k) {
      channel[k] = smaller(first + k * logits.lanes.channels, call.channels - 1);
      const int64_t index = image * call.channels + channel[k];
      of.factor[k] = (call.add_one ? 1.0f : 0.0f) + number(call.scale_bias, index);
      offset[k] = number(call.shift_bias, index);
      if (tile.rows == 0) {
        of.factor[k] += number(empty_scale, index);
        offset[k] += number(empty_shift, index);
      }
    }
    for (int row = 0; row < tile.rows; ++row) {
      const float weight = weights[row * kTilePixels + p];
      const int64_t begin = logits.rows.index(tile, row) * call.channels;
#pragma unroll
      for (int k = 0; k < kChannelGroup; ++k) {
        of.factor[k] += weight * static_cast<const float*>(call.scale)[begin + channel[k]];
        offset[k] += weight * static_cast<const float*>(call.shift)[begin + channel[k]];
      }
    }
    const uint32_t pixel = logits.pixel(tile, p);
#pragma unroll
    for (int k = 0; k < kChannelGroup; ++k) {
      const int64_t index = image * call.channels + channel[k];
      of.x[k] = logits.feature(call.x, base, channel[k]);
      of.normalized[k] = (of.x[k] - number(call.mean, index)) * number(call.rstd, index);
      of.noise[k] = noise.present() ? noise.at(image, channel[k], pixel) : 0.0f;
      of.before[k] = of.factor[k] * of.normalized[k] + offset[k] + noise.strength(index) * of.noise[k];
    }
    return of;
  }

  SCA_DEVICE static float number(const void* table, int64_t index) {
    return table ? static_cast<const float*>(table)[index] : 0.0f;
  }

  // Where the weights of an item's tile go: set `set` of `sets`.
  template <typename Shared>
  SCA_DEVICE float* weights(int64_t item, Shared& shared, int set, int sets) const {
    if (!spilled) return shared.weights[set];
    return spilled + (item * sets + set) * call.heads * call.latents.max_per_label * kTilePixels;
  }

  // The attention of the pixels of a tile.
  template <typename Shared>
  SCA_DEVICE void attend(const Block& run, const Tile& tile, Shared& shared, float* weights) const {
    logits.compute(run, tile, shared, weights);
    each_head(
        run, tile,
        [&](float* first, int latents) {
          float largest = first[0], sum = 0;
          for (int j = 1; j < latents; ++j) largest = larger(largest, first[j * kTilePixels]);
          for (int j = 0; j < latents; ++j) {
            float& weight = first[j * kTilePixels];
            sum += weight = expf(weight - largest);
          }
          for (int j = 0; j < latents; ++j) first[j * kTilePixels] /= sum;
        },
        weights);
  }

  // Calls visit(first number, latents) for each pixel of a tile and each head.
  template <typename Visit>
  SCA_DEVICE void each_head(const Block& run, const Tile& tile, const Visit& visit, float* numbers) const {
    run.each_thread([&](int thread) {
      const int latents = static_cast<int>(tile.block.latents), heads = static_cast<int>(call.heads);
      if (latents == 0) return;
      for (int index = thread; index < heads * kTilePixels; index += run.threads()) {
        const int head = index / kTilePixels, p = index % kTilePixels;
        if (p < tile.pixels) visit(numbers + head * latents * kTilePixels + p, latents);
      }
    });
  }
};

// The mean over all latents of the rows of a table, summed over heads: (batch, channels).
struct MeanRows {
  const float* table;
  int64_t heads, latents, channels;
  float* mean;
  int lanes;
  struct Shared {
    float sums[kThreads];
  };

  MeanRows(const void* table, int64_t heads, int64_t latents, int64_t channels, float* mean)
      : table(static_cast<const float*>(table)), heads(heads), latents(latents), channels(channels), mean(mean) {
    lanes = smaller(block_threads(), 32);
  }
  int64_t items(int64_t batch) const { return batch * divide_up(channels, lanes); }

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    const int64_t groups = divide_up(channels, lanes), image = item / groups, first = item % groups * lanes;
    const int parts = run.threads() / lanes;
    run.each_thread([&](int thread) {
      const int64_t channel = first + thread % lanes;
      float sum = 0;
      for (int64_t row = thread / lanes; channel < channels && row < heads * latents; row += parts) {
        sum += table[(image * heads * latents + row) * channels + channel];
      }
      shared.sums[thread] = sum;
    });
    reduce(run, parts, lanes, [&](int a, int b) { shared.sums[a] += shared.sums[b]; });
    run.each_thread([&](int thread) {
      const int64_t channel = first + thread;
      if (thread >= lanes || channel >= channels) return;
      mean[image * channels + channel] = shared.sums[thread] / static_cast<float>(latents);
    });
  }
};

inline bool packs_fit(const sca_semantic_modulate& call, const sca_feature_map& map, int width) {
  const int64_t bytes = call.scalar_type == SCA_FLOAT32 ? 4 : 2;
  return allows_packs(map, adjacent_channels(call.x), call.channels, call.height, call.width, bytes, width);
}

inline int64_t most_chunks(const sca_semantic_modulate& call) {
  return Tiling(call.batch, call.channels, call.height * call.width, adjacent_channels(call.x), 1).chunks;
}

// Pixels of a tile.
inline int64_t tile_pixels(const sca_semantic_modulate& call) { return TileLanes(adjacent_channels(call.x)).pixels; }

inline bool means_needed(const sca_semantic_modulate& call) {
  return call.empty_uniform && !call.empty_scale && call.latents.count > 0;
}

// The parts of the workspace that both passes have.
template <typename Scalar>
struct Prepared {
  Modulation<Scalar> modulation;
  float *mean_scale, *mean_shift;
  Moments* moments;

  Prepared(const sca_semantic_modulate& call, int64_t block_size, int64_t sets, Arena& arena)
      : modulation(call, block_size) {
    const int64_t table = call.batch * call.channels;
    mean_scale = arena.take<float>(table);
    mean_shift = arena.take<float>(table);
    moments = arena.take<Moments>(table * most_chunks(call));
    const int64_t spilled = modulation.spilled_size(sets);
    float* const numbers = arena.take<float>(spilled);
    if (spilled > 0) modulation.spilled = numbers;
  }

  // The rows of pixels without latents.
  const char* launch_means(const sca_semantic_modulate& call, void* stream) {
    if (!means_needed(call)) return nullptr;
    for (const auto& [table, mean] : {std::pair{call.scale, mean_scale}, std::pair{call.shift, mean_shift}}) {
      const MeanRows kernel(table, call.heads, call.latents.count, call.channels, mean);
      if (const char* error = launch(kernel, kernel.items(call.batch), call.threads, stream)) return error;
    }
    modulation.empty_scale = mean_scale;
    modulation.empty_shift = mean_shift;
    return nullptr;
  }
};

}  // namespace
}  // namespace sca::cuda
