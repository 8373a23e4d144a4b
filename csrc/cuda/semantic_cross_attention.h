// What forward and backward of semantic_cross_attention share. One side of it are latents; the tokens of the other
// side, pixels or latents, are walked in tiles of one label, one head at a time.
#pragma once

#include "partial_softmax.h"
#include "reductions.h"

namespace sca::cuda {
namespace {

constexpr int kChannels = 32;  // that are worked on at once

// Tokens of the walked side at positions from `begin` on, with the latents of their label.
struct AttentionTile {
  int64_t image, head, begin, first_latent, partial_row;
  int tokens, latents;
};

template <typename Scalar>
struct Attention {
  sca_semantic_cross_attention call;
  LabelBlocks blocks;
  TileLanes lanes;
  sca_tensor walked_key, latent_key;  // queries and keys, by side
  float* spilled;                     // numbers of tiles with more latents than shared memory has, or null

  Attention(const sca_semantic_cross_attention& call, bool walks_keys)
      : call(call),
        blocks(walks_keys ? call.key_tokens : call.query_tokens, walks_keys ? call.query_tokens : call.key_tokens,
               block_size(call)),
        lanes((walks_keys ? call.key : call.query).channel_stride == 1),
        walked_key(walks_keys ? call.key : call.query),
        latent_key(walks_keys ? call.query : call.key),
        spilled(nullptr) {}

  // Many tokens have blocks of several tiles, so that there are not too many partial results.
  static int64_t block_size(const sca_semantic_cross_attention& call) {
    const int64_t tile = TileLanes(true).pixels, tokens = larger(call.query_tokens.count, call.key_tokens.count);
    return tile * smaller<int64_t>(larger<int64_t>(tokens / (tile * 256), 1), 16);
  }
  int64_t heads() const { return call.batch * call.heads; }
  int64_t items() const { return heads() * blocks.per_image; }
  float* take_spilled(Arena& arena, int64_t sets) {
    const int64_t latents = blocks.latents.max_per_label;
    const bool spills = latents > kSharedRows;
    spilled = arena.take<float>(spills ? items() * latents * kTilePixels * sets : 0);
    if (!spills) spilled = nullptr;
    return spilled;
  }
  // Where the numbers of a tile go: set `set` of `sets`.
  template <typename Shared>
  SCA_DEVICE float* numbers(int64_t item, Shared& shared, int set, int sets) const {
    return spilled ? spilled + (item * sets + set) * blocks.latents.max_per_label * kTilePixels : shared.numbers[set];
  }

  // Calls visit(tile, whether it is the first) for each tile of an item.
  template <typename Visit>
  SCA_DEVICE void each_tile(int64_t item, const Visit& visit) const {
    const int64_t of_head = item / blocks.per_image, image = of_head / call.heads;
    const LabelBlock block = blocks.at(image * blocks.per_image + item % blocks.per_image);
    for (int64_t begin = block.begin; begin < block.end; begin += lanes.pixels) {
      const auto tokens = static_cast<int>(smaller<int64_t>(block.end - begin, lanes.pixels));
      const AttentionTile tile = {image,  of_head % call.heads,           begin, block.first_latent, block.partial_row,
                                  tokens, static_cast<int>(block.latents)};
      visit(tile, begin == block.begin);
    }
  }
  SCA_DEVICE int64_t token(const AttentionTile& tile, int p) const {
    return blocks.pixels.order ? blocks.pixel(tile.image, tile.begin + p) : tile.begin + p;
  }
  SCA_DEVICE static int64_t offset(const sca_tensor& tensor, const AttentionTile& tile, int64_t token) {
    return tile.image * tensor.batch_stride + tile.head * tensor.head_stride + token * tensor.token_stride;
  }
  SCA_DEVICE static float value(const sca_tensor& tensor, int64_t offset, int64_t channel) {
    return widen(static_cast<const Scalar*>(tensor.data)[offset + channel * tensor.channel_stride]);
  }
  SCA_DEVICE static void write(const sca_tensor& tensor, int64_t offset, int64_t channel, float number) {
    narrow(number, static_cast<Scalar*>(tensor.data)[offset + channel * tensor.channel_stride]);
  }
  // Of (batch, heads, tokens) numbers.
  SCA_DEVICE int64_t index(const AttentionTile& tile, int64_t tokens, int64_t token) const {
    return (tile.image * call.heads + tile.head) * tokens + token;
  }

  // numbers[j * kTilePixels + p] = finish(j, p, <row of token p, row of latent j>)
  template <typename Shared, typename Finish>
  SCA_DEVICE void products(const Block& run, const AttentionTile& tile, const sca_tensor& walked,
                           const sca_tensor& latent, int64_t width, Shared& shared, float* numbers,
                           const Finish& finish) const {
    for (int first = 0; first < tile.latents; first += kRowGroup) {
      const auto add = [&](int p, int lane, float (&sums)[kRowGroup]) {
        int64_t row[kRowGroup];
#pragma unroll
        for (int i = 0; i < kRowGroup; ++i) {
          row[i] = offset(latent, tile, tile.first_latent + smaller(first + i, tile.latents - 1));
        }
        const int64_t base = offset(walked, tile, token(tile, p));
        for (int64_t c = lane; c < width; c += lanes.channels) {
          const float number = value(walked, base, c);
#pragma unroll
          for (int i = 0; i < kRowGroup; ++i) sums[i] += number * value(latent, row[i], c);
        }
      };
      lanes.sum_group(run, tile.tokens, tile.latents, first, shared, add,
                      [&](int j, int p, float sum) { numbers[j * kTilePixels + p] = finish(j, p, sum); });
    }
  }
  template <typename Shared>
  SCA_DEVICE void logits(const Block& run, const AttentionTile& tile, Shared& shared, float* numbers) const {
    const auto scale = static_cast<float>(call.scale);
    products(run, tile, walked_key, latent_key, call.key_width, shared, numbers,
             [&](int, int, float sum) { return sum * scale; });
  }

  // Calls add(j, c, sum over the tile's tokens of weights[j][p] times their number c) for all latents and channels.
  template <typename Shared, typename Add>
  SCA_DEVICE void weighted_sums(const Block& run, const AttentionTile& tile, const sca_tensor& walked, int64_t width,
                                Shared& shared, const float* weights, const Add& add) const {
    for (int64_t first = 0; tile.latents > 0 && first < width; first += kChannels) {
      run.each_thread([&](int thread) {
        const int p = lanes.pixel(thread);
        if (!lanes.inside(thread) || p >= tile.tokens) return;
        const int64_t base = offset(walked, tile, token(tile, p));
        for (int c = lanes.channel(thread); c < kChannels && first + c < width; c += lanes.channels) {
          shared.rows[c][p] = value(walked, base, first + c);
        }
      });
      run.each_thread([&](int thread) {
        for (int place = thread; place < tile.latents * kChannels; place += run.threads()) {
          const int j = place / kChannels, c = place % kChannels;
          if (first + c >= width) continue;
          float sum = 0;
          for (int p = 0; p < tile.tokens; ++p) sum += weights[j * kTilePixels + p] * shared.rows[c][p];
          add(j, first + c, sum);
        }
      });
    }
  }

  // Writes number(p, channel) for each token of a tile, unless it is not wanted.
  template <typename Number>
  SCA_DEVICE void write_rows(const Block& run, const AttentionTile& tile, const sca_tensor& target, int64_t width,
                             const Number& number) const {
    if (!target.data) return;
    run.each_thread([&](int thread) {
      const int p = lanes.pixel(thread);
      if (!lanes.inside(thread) || p >= tile.tokens) return;
      const int64_t base = offset(target, tile, token(tile, p));
      for (int64_t c = lanes.channel(thread); c < width; c += lanes.channels) write(target, base, c, number(p, c));
    });
  }

  SCA_DEVICE float* partial_row(float* partial, const AttentionTile& tile, int j, int64_t size) const {
    return partial + (index(tile, blocks.rows, tile.partial_row) + j) * size;
  }
};

template <int kSets>
struct AttentionShared {
  float sums[kRowGroup][kThreads];
  float numbers[kSets][kSharedRows * kTilePixels];
  float rows[kChannels][kTilePixels + 1];
};

// Sums of numbers of (batch, heads, tokens, width) over chunks of the tokens, those with an lse of -inf alone if one is
// given: partial[((image * heads + head) * width + channel) * chunks + chunk].
template <typename Scalar>
struct TokenSums {
  sca_tensor tensor;
  const float* lse;
  int64_t heads, tokens, width, chunks;
  Sum<float>* partial;
  int lanes;
  struct Shared {
    float sums[kThreads];
  };
  static constexpr int64_t kChunk = 1024;

  TokenSums(const sca_tensor& tensor, const float* lse, int64_t heads, int64_t tokens, int64_t width)
      : tensor(tensor),
        lse(lse),
        heads(heads),
        tokens(tokens),
        width(width),
        chunks(divide_up(tokens, kChunk)),
        partial(nullptr),
        lanes(smaller(block_threads(), 32)) {}
  int64_t items(int64_t batch) const { return batch * heads * divide_up(width, lanes) * chunks; }
  int64_t size(int64_t batch) const { return batch * heads * width * chunks; }

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    const int64_t groups = divide_up(width, lanes), chunk = item % chunks, first = item / chunks % groups * lanes;
    const int64_t of_head = item / chunks / groups;
    const int64_t base = of_head / heads * tensor.batch_stride + of_head % heads * tensor.head_stride;
    const int parts = run.threads() / lanes;
    run.each_thread([&](int thread) {
      const int64_t channel = first + thread % lanes, end = smaller((chunk + 1) * kChunk, tokens);
      float sum = 0;
      for (int64_t t = chunk * kChunk + thread / lanes; channel < width && t < end; t += parts) {
        if (lse && lse[of_head * tokens + t] != -INFINITY) continue;
        sum += Attention<Scalar>::value(tensor, base + t * tensor.token_stride, channel);
      }
      shared.sums[thread] = sum;
    });
    reduce(run, parts, lanes, [&](int a, int b) { shared.sums[a] += shared.sums[b]; });
    run.each_thread([&](int thread) {
      const int64_t channel = first + thread;
      if (thread < lanes && channel < width) {
        partial[(of_head * width + channel) * chunks + chunk].value = shared.sums[thread];
      }
    });
  }
};

// Writes sums times a factor, and to a second table as they are.
struct FinishTokenSums {
  float *scaled, *plain;
  float factor;

  SCA_DEVICE void operator()(int64_t row, const Sum<float>& sum) const {
    scaled[row] = sum.value * factor;
    if (plain) plain[row] = sum.value;
  }
};

template <typename Scalar>
const char* sum_tokens(const TokenSums<Scalar>& kernel, int64_t batch, const FinishTokenSums& finish,
                       int32_t multiprocessors, void* stream) {
  if (const char* error = launch(kernel, kernel.items(batch), multiprocessors, stream)) return error;
  const MergeRows<Sum<float>, FinishTokenSums> merge(kernel.partial, batch * kernel.heads * kernel.width, kernel.chunks,
                                                     finish);
  return launch(merge, merge.items(), multiprocessors, stream);
}

// Which side is walked, or what speaks against the call.
inline bool walks_keys(const sca_semantic_cross_attention& call) { return call.key_tokens.order != nullptr; }
inline const char* refusal(const sca_semantic_cross_attention& call) {
  const bool pixels = call.query_tokens.order && call.key_tokens.order;
  return pixels ? "pixels that attend to pixels are not among what these kernels compute" : nullptr;
}
inline bool takes_means(const sca_semantic_cross_attention& call) { return call.empty_uniform && !call.empty_value; }

}  // namespace
}  // namespace sca::cuda
