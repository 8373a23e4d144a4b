// Sums over the pixels of each channel, and the channels' moments, in two stages: chunks of pixels leave partial
// results in rows of their own, which a second kernel merges in the order of the chunks.
#pragma once

#include "tiling.h"

namespace sca::cuda {

// The number of some values, their mean, and the sum of their squared deviations from it.
struct Moments {
  double count, mean, squares;

  // Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
  SCA_DEVICE void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, step = other.mean - mean, share = other.count / total;
    mean += step * share;
    squares += other.squares + step * step * (count * share);
    count = total;
  }
};

template <typename T>
struct Sum {
  T value;
  SCA_DEVICE void merge(const Sum& other) { value += other.value; }
};

// Partial moments of each channel: partial[row * chunks + chunk], where a row is a channel of an image.
template <typename Scalar, int kWidth>
struct ChannelMoments {
  sca_feature_map x;
  Pixels pixels;
  Tiling tiling;
  Moments* partial;

  struct Shared {
    Moments moments[kWidth][kThreads];
  };

  SCA_DEVICE void operator()(const Block& block, int64_t item, Shared& shared) const {
    compute(block, item, shared, [](int, int64_t, const float (&)[kWidth]) {});
    block.each_thread([&](int thread) {
      const Lane lane = tiling.lane(item, thread);
      if (!lane.active || lane.entry >= tiling.channel_lanes) return;
      const int64_t row = lane.image * tiling.channels + lane.channel;
      for (int i = 0; i < rows(); ++i) partial[(row + i) * tiling.chunks + lane.chunk] = shared.moments[i][lane.entry];
    });
  }

  // Channels of a thread.
  SCA_DEVICE int rows() const { return tiling.along_channels ? kWidth : 1; }

  // The moments of an item, in the first entries of `shared`. Calls visit(thread, step, values) for all that is read.
  //
  // Welford's algorithm for each place of a pack, on differences from the first value of the place: a mean that is
  // large beside the deviations costs nothing.
  template <typename Visit>
  SCA_DEVICE void compute(const Block& block, int64_t item, Shared& shared, const Visit& visit) const {
    block.each_thread([&](int thread) {
      const Lane lane = tiling.lane(item, thread);
      float count = 0, shift[kWidth] = {}, mean[kWidth] = {}, squares[kWidth] = {};
      const int64_t base = offset_of(x, lane.image, lane.channel);
      int64_t step = 0;
      for (int64_t pixel = lane.pixel; lane.active && pixel < lane.end; pixel += lane.step, ++step) {
        float values[kWidth];
        load<Scalar>(x.data, base + pixels.offset(x, static_cast<uint32_t>(pixel)), values);
        visit(thread, step, values);
        count += 1;
        const float share = 1 / count;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          if (count == 1) shift[i] = values[i];
          const float difference = values[i] - shift[i], change = difference - mean[i];
          mean[i] += change * share;
          squares[i] += change * (difference - mean[i]);
        }
      }
      if (lane.entry >= tiling.entries()) return;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Moments moments = {count, double{shift[i]} + double{mean[i]}, squares[i]};
        if (i < rows()) {
          shared.moments[i][lane.entry] = moments;
        } else {
          shared.moments[0][lane.entry].merge(moments);
        }
      }
    });
    reduce(block, tiling.pixel_lanes, tiling.channel_lanes, [&](int a, int b) {
      for (int i = 0; i < rows(); ++i) shared.moments[i][a].merge(shared.moments[i][b]);
    });
  }
};

// Merges the entries of each row in a fixed order and calls finish(row, merged). An item is as many rows as there are
// groups of lanes in a block. `Entry` has a function merge(entry), and all zeros is the entry of nothing.
template <typename Entry, typename Finish>
struct MergeRows {
  const Entry* partial;
  int64_t rows, chunks;
  Finish finish;
  int lanes, groups;

  struct Shared {
    Entry entries[kThreads];
  };

  MergeRows(const Entry* partial, int64_t rows, int64_t chunks, const Finish& finish)
      : partial(partial), rows(rows), chunks(chunks), finish(finish) {
    lanes = smaller(block_threads(), 32);
    groups = block_threads() / lanes;
  }
  int64_t items() const { return divide_up(rows, groups); }

  SCA_DEVICE void operator()(const Block& block, int64_t item, Shared& shared) const {
    block.each_thread([&](int thread) {
      const int lane = thread % lanes, group = thread / lanes;
      const int64_t row = item * groups + group;
      if (group >= groups) return;
      Entry merged = {};
      for (int64_t chunk = lane; row < rows && chunk < chunks; chunk += lanes) {
        merged.merge(partial[row * chunks + chunk]);
      }
      shared.entries[lane * groups + group] = merged;
    });
    reduce(block, lanes, groups, [&](int a, int b) { shared.entries[a].merge(shared.entries[b]); });
    block.each_thread([&](int thread) {
      const int64_t row = item * groups + thread;
      if (thread < groups && row < rows) finish(row, shared.entries[thread]);
    });
  }
};

// Writes mean and 1 / sqrt(variance + eps).
template <typename T>
struct FinishStatistics {
  T *mean, *rstd;
  double eps;
  bool unbiased;

  SCA_DEVICE void operator()(int64_t row, const Moments& moments) const {
    const double freedom = larger(unbiased ? moments.count - 1 : moments.count, 1.0);
    mean[row] = static_cast<T>(moments.mean);
    rstd[row] = static_cast<T>(1 / sqrt(moments.squares / freedom + eps));
  }
};

// The moments of every channel of every image, given to finish(row, moments).
template <typename Scalar, int kWidth, typename Finish>
const char* channel_moments(const sca_feature_map& x, int64_t batch, int64_t channels, int64_t height, int64_t width,
                            Moments* partial, const Finish& finish, int32_t multiprocessors, void* stream) {
  const Tiling tiling(batch, channels, height * width, adjacent_channels(x), kWidth);
  const ChannelMoments<Scalar, kWidth> kernel = {x, {static_cast<uint32_t>(width)}, tiling, partial};
  if (const char* error = launch(kernel, tiling.items, multiprocessors, stream)) return error;
  const MergeRows<Moments, Finish> merge(partial, batch * channels, tiling.chunks, finish);
  return launch(merge, merge.items(), multiprocessors, stream);
}

}  // namespace sca::cuda
