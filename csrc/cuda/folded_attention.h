// What semantic_pool and semantic_modulate share: the logits of a tile of pixels of one label with the rows (head,
// latent) of that label, and the sums of numbers of those pixels over rows and columns of the image.
#pragma once

#include <initializer_list>

#include "label_blocks.h"

namespace sca::cuda {

constexpr int kTilePixels = 32;
constexpr int kRowGroup = 8;     // rows that are worked on at once
constexpr int kSharedRows = 64;  // rows of a tile that fit into shared memory; more go to the workspace

// The threads of a block share out a tile of pixels and all channels.
struct TileLanes {
  int pixels, channels;
  bool along_channels;

  explicit TileLanes(bool along_channels) : along_channels(along_channels) {
    pixels = smaller(block_threads(), kTilePixels);
    channels = block_threads() / pixels;
  }
  SCA_DEVICE bool inside(int thread) const { return thread < pixels * channels; }
  SCA_DEVICE int pixel(int thread) const { return along_channels ? thread / channels : thread % pixels; }
  SCA_DEVICE int channel(int thread) const { return along_channels ? thread % channels : thread / pixels; }

  // Sums over the channels of products for a group of rows from `first` on, given to finish(row, pixel, sum). What is
  // summed for a pixel of the tile and a channel, products(p, channel, sums) adds to `sums`.
  template <typename Shared, typename Products, typename Finish>
  SCA_DEVICE void sum_group(const Block& run, int pixels_of_tile, int rows, int first, Shared& shared,
                            const Products& products, const Finish& finish) const {
    run.each_thread([&](int thread) {
      if (!inside(thread)) return;
      const int p = pixel(thread), lane = channel(thread);
      float sums[kRowGroup] = {};
      if (p < pixels_of_tile) products(p, lane, sums);
#pragma unroll
      for (int i = 0; i < kRowGroup; ++i) shared.sums[i][lane * pixels + p] = sums[i];
    });
    reduce(run, channels, pixels, [&](int a, int b) {
#pragma unroll
      for (int i = 0; i < kRowGroup; ++i) shared.sums[i][a] += shared.sums[i][b];
    });
    run.each_thread([&](int thread) {
      for (int index = thread; index < kRowGroup * pixels; index += run.threads()) {
        const int i = index / pixels, p = index % pixels;
        if (first + i < rows && p < pixels_of_tile) finish(first + i, p, shared.sums[i][p]);
      }
    });
  }
};

// A tile is some of the pixels of a label block.
struct Tile {
  LabelBlock block;
  int64_t begin;
  int pixels, rows;  // rows: heads times latents
};

// The rows of a tile in tables of shape (batch, heads, latents, ...).
struct Rows {
  int64_t heads, latents;

  SCA_DEVICE int64_t index(const Tile& tile, int row) const {
    const int64_t head = row / tile.block.latents;
    return (tile.block.image * heads + head) * latents + tile.block.first_latent + row % tile.block.latents;
  }
};

// Logits: <key, x> and biases by latent, row of the image and column. A number of row r and pixel p of a tile is at
// [r * kTilePixels + p].
template <typename Scalar>
struct Logits {
  LabelBlocks blocks;
  TileLanes lanes;
  Rows rows;
  sca_feature_map x;
  int64_t channels, height, width;
  const float *keys, *key_bias, *row_bias, *col_bias;  // null: zero

  template <typename Call>
  Logits(const Call& call, int64_t block_size, const void* keys, const void* key_bias)
      : blocks(call.pixels, call.latents, block_size),
        lanes(adjacent_channels(call.x)),
        rows{call.heads, call.latents.count},
        x(call.x),
        channels(call.channels),
        height(call.height),
        width(call.width),
        keys(static_cast<const float*>(keys)),
        key_bias(static_cast<const float*>(key_bias)),
        row_bias(static_cast<const float*>(call.row_bias)),
        col_bias(static_cast<const float*>(call.col_bias)) {}

  SCA_DEVICE Tile tile(const LabelBlock& block, int64_t begin) const {
    const int64_t pixels = smaller<int64_t>(block.end - begin, lanes.pixels);
    return {block, begin, static_cast<int>(pixels), static_cast<int>(rows.heads * block.latents)};
  }
  SCA_DEVICE uint32_t pixel(const Tile& tile, int p) const { return blocks.pixel(tile.block.image, tile.begin + p); }
  SCA_DEVICE int64_t offset(const sca_feature_map& map, const Tile& tile, int p) const {
    return offset_of(map, tile.block.image, 0) + Pixels{static_cast<uint32_t>(width)}.offset(map, pixel(tile, p));
  }
  SCA_DEVICE float feature(const sca_feature_map& map, int64_t offset, int64_t channel) const {
    return widen(static_cast<const Scalar*>(map.data)[offset + channel * map.channel_stride]);
  }

  template <typename Shared>
  SCA_DEVICE void compute(const Block& run, const Tile& tile, Shared& shared, float* logits) const {
    for (int first = 0; first < tile.rows; first += kRowGroup) {
      const auto products = [&](int p, int lane, float (&sums)[kRowGroup]) {
        if (!keys) return;
        const float* key[kRowGroup];
#pragma unroll
        for (int i = 0; i < kRowGroup; ++i)
          key[i] = keys + rows.index(tile, smaller(first + i, tile.rows - 1)) * channels;
        const int64_t base = offset(x, tile, p);
        for (int64_t c = lane; c < channels; c += lanes.channels) {
          const float value = feature(x, base, c);
#pragma unroll
          for (int i = 0; i < kRowGroup; ++i) sums[i] += value * key[i][c];
        }
      };
      lanes.sum_group(run, tile.pixels, tile.rows, first, shared, products, [&](int row, int p, float sum) {
        const int64_t index = rows.index(tile, row);
        const uint32_t place = pixel(tile, p), w = static_cast<uint32_t>(width);
        if (key_bias) sum += key_bias[index];
        if (row_bias) sum += row_bias[index * height + place / w];
        if (col_bias) sum += col_bias[index * width + place % w];
        logits[row * kTilePixels + p] = sum;
      });
    }
  }
};

// Numbers of pixels and rows (head, latent of the pixel's label), as values[((image * heads + head) * most_latents +
// latent) * pixels + pixel], and the first latent and number of latents of each pixel's label.
struct PixelValues {
  float* values;
  int32_t *first_latents, *latents;
  int64_t heads, most_latents, pixels;

  static PixelValues take(Arena& arena, int64_t batch, int64_t heads, int64_t most_latents, int64_t pixels) {
    return {arena.take<float>(batch * heads * most_latents * pixels),
            arena.take<int32_t>(batch * pixels),
            arena.take<int32_t>(batch * pixels),
            heads,
            most_latents,
            pixels};
  }
  SCA_DEVICE float& at(int64_t image, int64_t head, int64_t latent, uint32_t pixel) const {
    return values[((image * heads + head) * most_latents + latent) * pixels + pixel];
  }
  SCA_DEVICE void store_tile(const Tile& tile, int p, uint32_t pixel, const float* of_tile) const {
    const int64_t place = tile.block.image * pixels + pixel;
    first_latents[place] = static_cast<int32_t>(tile.block.first_latent);
    latents[place] = static_cast<int32_t>(tile.block.latents);
    for (int row = 0; row < tile.rows; ++row) {
      const int64_t head = row / tile.block.latents, latent = row % tile.block.latents;
      at(tile.block.image, head, latent, pixel) = of_tile[row * kTilePixels + p];
    }
  }
};

// Sums of such numbers over each row of the image, or over each column: sums[((image * heads + head) * latents +
// latent) * lines + line]. Given an lse (batch, heads, latents), the numbers are logits, of which exp(logit - lse) is
// summed; a latent without pixels, whose lse is -inf, gets the same of each line in all, or nothing.
//
// A thread has a latent's place in its label and walks a line; it alone adds to the sums of that.
struct LineSums {
  PixelValues of;
  int64_t latents, lines, length, line_step, step;
  float* sums;
  const float* lse;
  bool empty_uniform;
  struct Shared {};

  // Along rows of an image, or along columns.
  LineSums(const PixelValues& of, int64_t latents, int64_t height, int64_t width, bool rows, float* sums,
           const float* lse = nullptr, bool empty_uniform = false)
      : of(of),
        latents(latents),
        lines(rows ? height : width),
        length(rows ? width : height),
        line_step(rows ? width : 1),
        step(rows ? 1 : width),
        sums(sums),
        lse(lse),
        empty_uniform(empty_uniform) {}
  int64_t items(int64_t batch) const { return batch * of.heads * lines; }

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared&) const {
    const int64_t line = item % lines, head = item / lines % of.heads, image = item / lines / of.heads;
    const int64_t first = (image * of.heads + head) * latents;
    run.each_thread([&](int thread) {
      for (int64_t latent = thread; latent < latents; latent += run.threads()) {
        const bool spread = empty_uniform && lse[first + latent] == -INFINITY;
        sums[(first + latent) * lines + line] = spread ? 1 / static_cast<float>(lines) : 0.0f;
      }
    });
    run.each_thread([&](int thread) {
      for (int64_t latent = thread; latent < of.most_latents; latent += run.threads()) {
        walk(image, head, line, latent, first);
      }
    });
  }

  // Runs of pixels of one label are added up before they go to memory.
  SCA_DEVICE void walk(int64_t image, int64_t head, int64_t line, int64_t latent, int64_t first) const {
    int64_t current = -1;
    float sum = 0;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t pixel = line * line_step + i * step, place = image * of.pixels + pixel;
      const int64_t row = latent < of.latents[place] ? first + of.first_latents[place] + latent : -1;
      if (row != current) {
        if (current >= 0) sums[current * lines + line] += sum;
        current = row;
        sum = 0;
      }
      if (row < 0) continue;
      const float value = of.at(image, head, latent, static_cast<uint32_t>(pixel));
      sum += lse ? expf(value - lse[row]) : value;
    }
    if (current >= 0) sums[current * lines + line] += sum;
  }
};

// Adds up the partial rows of each latent, of `size` numbers, in the order of the label blocks. The partial rows of a
// head of an image lie together. Calls finish(latent row (batch, heads, latents), place in the row, sum).
template <typename Finish>
struct MergeLatents {
  LabelBlocks blocks;
  const float* partial;
  int64_t heads, size;
  Finish finish;
  struct Shared {};

  int64_t items(int64_t batch) const { return batch * heads * blocks.latents.count; }

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared&) const {
    const int64_t latents = blocks.latents.count, of_head = item / latents;
    run.each_thread([&](int thread) {
      for (int64_t i = thread; i < size; i += run.threads()) {
        float sum = 0;
        blocks.each_partial_row(of_head / heads, item % latents,
                                [&](int64_t row) { sum += partial[(of_head * blocks.rows + row) * size + i]; });
        finish(item, i, sum);
      }
    });
  }
};

// Of many pixels a block takes more tiles, so that there are not too many partial results.
inline int64_t block_of_tiles(const sca_feature_map& x, int64_t pixels) {
  const int64_t tile = TileLanes(adjacent_channels(x)).pixels;
  return tile * smaller<int64_t>(larger<int64_t>(pixels / (tile * 256), 1), 16);
}

}  // namespace sca::cuda
