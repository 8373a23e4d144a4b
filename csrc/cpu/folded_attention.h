// What the kernels of folded attention share: pixels of a feature map on one side, rows of latents on the other.
//
// The pixels of an image, in label order, are cut into chunks of fixed size; a chunk is walked label by label in blocks
// of pixels, and keeps for each latent it meets a partial row. Partial rows are merged in the order of the chunks, so
// the bits do not depend on the number of threads.
#pragma once

#include "features.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

template <typename Scalar, typename Call>
class FoldedAttention {
 public:
  using T = ComputeType<Scalar>;

 protected:
  static constexpr int64_t kMostChunks = 32;

  // `blocks`: how many blocks of pixels a thread holds at once.
  FoldedAttention(const Call& call, int64_t blocks)
      : call_(call),
        arena_(call.workspace),
        channel_width_(padded<T>(call.channels)),
        block_(block_pixels<T>(call.channels, blocks)) {
    const int64_t pixels = call.pixels.count;
    chunk_size_ = larger(block_, (pixels / kMostChunks + block_ - 1) / block_ * block_);
    chunks_ = (pixels + chunk_size_ - 1) / chunk_size_;
    partials_per_head_ = chunks_ * call.latents.max_per_label + call.latents.count;
  }

  // Runs visit(image, chunk, scratch) for every chunk of every image; each thread has a Scratch(arena, kernel).
  template <typename Scratch, typename Kernel, typename Visit>
  void each_chunk(const Kernel& kernel, const Visit& visit) const {
    const int64_t size = scratch_size<Scratch>(kernel);
    parallel_for(call_.batch * chunks_, call_.threads, [&](int64_t item, int thread) {
      Arena arena(static_cast<char*>(call_.workspace) + arena_.used() + thread * size);
      Scratch scratch(arena, kernel);
      visit(item / chunks_, item % chunks_, scratch);
      if (streamed()) stream_fence();
    });
  }
  template <typename Scratch, typename Kernel>
  static int64_t scratch_size(const Kernel& kernel) {
    Arena counter(nullptr);
    Scratch(counter, kernel);
    return counter.used();
  }
  // Runs visit(image, head, label) for all of them; label == labels stands for the latents that no label owns.
  template <typename Visit>
  void each_label(const Visit& visit) const {
    const int64_t labels = call_.latents.labels + 1, per_image = call_.heads * labels;
    parallel_for(call_.batch * per_image, call_.threads,
                 [&](int64_t item, int) { visit(item / per_image, item % per_image / labels, item % labels); });
  }

  Range latents_of(int64_t image, int64_t label) const {
    const ImageTokens latents(call_.latents, image);
    return label < latents.labels() ? latents.with_label(label) : latents.without_label();
  }
  Range chunk(int64_t index) const {
    return {index * chunk_size_, smaller((index + 1) * chunk_size_, call_.pixels.count)};
  }
  Range chunks_of(Range positions) const {
    if (positions.size() <= 0) return {0, 0};
    return {positions.begin / chunk_size_, (positions.end + chunk_size_ - 1) / chunk_size_};
  }
  // Calls visit(runs, following) for each block of the pixels at some positions of a chunk; `following` is where the
  // block after it begins.
  template <typename Visit>
  void each_block(const ImageTokens& pixels, Range positions, Range chunk_positions, const Visit& visit) const {
    const auto runs_at = [&](int64_t p, int64_t end) {
      return Runs(pixels.at(p), smaller(block_, end - p), call_.width);
    };
    Runs runs = runs_at(positions.begin, positions.end);
    for (int64_t p = positions.begin; p < positions.end; p += block_) {
      const bool last = p + block_ >= positions.end;
      const Runs following = runs_at(smaller(p + block_, positions.end), last ? chunk_positions.end : positions.end);
      visit(runs, following);
      runs = following;
    }
  }

  // Whether a map of the size of x is written past the caches.
  bool streamed() const {
    return call_.batch * call_.pixels.count * call_.channels * int64_t{sizeof(Scalar)} >= kStreamedBytes;
  }

  // Number of a latent among those of all images and heads.
  int64_t row(int64_t image, int64_t head, int64_t latent) const {
    return (image * call_.heads + head) * call_.latents.count + latent;
  }
  // Where a chunk keeps a latent's partial row; see Partials in semantic_cross_attention.h for why none is shared.
  int64_t partial(int64_t image, int64_t head, int64_t chunk_index, int64_t latent) const {
    return (image * call_.heads + head) * partials_per_head_ + chunk_index * call_.latents.max_per_label + latent;
  }
  int64_t partial_count() const { return call_.batch * call_.heads * partials_per_head_; }

  // Most rows of a label: its latents in all heads.
  int64_t most_rows() const { return call_.heads * call_.latents.max_per_label; }

  // Calls visit(j, head, latent) for the rows of a label's latents.
  template <typename Visit>
  void each_row(Range latents, const Visit& visit) const {
    int64_t j = 0;
    for (int64_t head = 0; head < call_.heads; ++head) {
      for (int64_t latent = latents.begin; latent < latents.end; ++latent) visit(j++, head, latent);
    }
  }

  // A label's rows of (batch, heads, latents, channels), zero where there are none: where they lie if all of them
  // follow one another there, otherwise copied.
  void load_rows(const void* source, int64_t image, Range latents, RowTable<T>& rows) const {
    if (source && call_.heads == 1 && call_.channels == channel_width_) {
      rows.point_to(static_cast<const T*>(source) + row(image, 0, latents.begin) * channel_width_, latents.size());
      return;
    }
    rows.point_to_own(most_rows());
    each_row(latents, [&](int64_t j, int64_t head, int64_t latent) {
      T* __restrict to = rows.rows[j];
      const int64_t count = source ? call_.channels : 0;
      if (source) {
        const T* from = static_cast<const T*>(source) + row(image, head, latent) * call_.channels;
        for (int64_t c = 0; c < count; ++c) to[c] = from[c];
      }
      for (int64_t c = count; c < channel_width_; ++c) to[c] = 0;
    });
  }

  // table[j][p] += by_row[latent][row of p] + by_column[latent][column of p]; either may be null
  void add_by_position(const Runs& runs, int64_t image, Range latents, const void* by_row, const void* by_column,
                       const RowTable<T>& table) const {
    if (!by_row && !by_column) return;
    each_row(latents, [&](int64_t j, int64_t head, int64_t latent) {
      const T* rows = static_cast<const T*>(by_row) + row(image, head, latent) * call_.height;
      const T* columns = static_cast<const T*>(by_column) + row(image, head, latent) * call_.width;
      for (const Run& run : runs) {
        T* __restrict target = table.rows[j] + run.begin;
        const T row_value = by_row ? rows[run.row] : T(0);
        if (by_column) {
          for (int64_t i = 0; i < run.size; ++i) target[i] += row_value + columns[run.column + i];
        } else {
          for (int64_t i = 0; i < run.size; ++i) target[i] += row_value;
        }
      }
    });
  }

  // Adds up a table by the rows and by the columns of the image, into the two places in each of `sums`.
  static void sum_by_position(const Runs& runs, const RowTable<T>& table, int64_t count, T* const* sums,
                              int64_t row_begin, int64_t column_begin) {
    for (int64_t j = 0; j < count; ++j) {
      for (const Run& run : runs) {
        const T* values = table.rows[j] + run.begin;
        T* __restrict columns = sums[j] + column_begin + run.column;
        T total = 0;
        for (int64_t i = 0; i < run.size; ++i) {
          columns[i] += values[i];
          total += values[i];
        }
        sums[j][row_begin + run.row] += total;
      }
    }
  }

  const Call& call_;
  Arena arena_;
  const int64_t channel_width_, block_;
  int64_t chunk_size_, chunks_, partials_per_head_;
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
