// Means and sums of squared deviations of the channels of a feature map.
//
// Sums are taken of differences from a value of the same few numbers, and parts are merged by Chan's formula in double
// precision: a mean that is large beside the deviations costs no accuracy, as it would in sums of squares.
#pragma once

#include "parallel.h"
#include "rows.h"
#include "tokens.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// Numbers summed before they go into double precision.
constexpr int64_t kMostSummed = 4096;

// Adds `count` numbers with their mean and sum of squared deviations to those of `seen` numbers.
inline void merge_moments(double seen, double& mean, double& squares, double count, double count_mean,
                          double count_squares) {
  if (seen == 0) {  // the usual case, whose division small maps would notice
    mean = count_mean;
    squares = count_squares;
    return;
  }
  const double total = seen + count, step = count_mean - mean;
  mean += step * (count / total);
  squares += count_squares + step * step * (count * (seen / total));
}

// The moments of `count` numbers from the sums of their differences from `shift` and of the squares of those.
template <typename T>
inline void merge_sums(double seen, double& mean, double& squares, double count, T shift, T sum, T sum_of_squares) {
  const double correction = static_cast<double>(sum) * (static_cast<double>(sum) / count);
  const double deviations = static_cast<double>(sum_of_squares) - correction;
  merge_moments(seen, mean, squares, count, static_cast<double>(shift) + static_cast<double>(sum) / count,
                deviations > 0 || deviations != deviations ? deviations : 0);
}

// Sums of the differences of `count` numbers from `shift`, and of their squares.
template <typename Scalar, typename T>
inline void sum_differences(const Scalar* values, int64_t stride, int64_t count, T shift, T& sum, T& sum_of_squares) {
  constexpr int64_t kChains = 4;  // as many additions as the latency of one can hide
  Vector<T> sums[kChains] = {}, squares[kChains] = {};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kChains * kLanes<T> <= count; i += kChains * kLanes<T>) {
#pragma GCC unroll 4
      for (int64_t chain = 0; chain < kChains; ++chain) {
        const Vector<T> difference = load_widened(values + i + chain * kLanes<T>) - shift;
        sums[chain] += difference;
        squares[chain] += difference * difference;
      }
    }
  }
  sum = sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  sum_of_squares = sum_lanes<T>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < count; ++i) {
    const T difference = widen(values[i * stride]) - shift;
    sum += difference;
    sum_of_squares += difference * difference;
  }
}

// Of several rows of numbers, the sums of the differences from a shift for each row and of their squares. The rows are
// as many as make whole vectors of the results.
template <typename T>
constexpr int64_t kSummedRows = kLanes<T> / 2;

template <typename Scalar, typename T>
inline void sum_differences_of_rows(const Scalar* const* rows, int64_t stride, int64_t count, const T* row_shifts,
                                    T* sums, T* sums_of_squares) {
  constexpr int64_t kRows = kSummedRows<T>;
  Vector<T> totals[2 * kRows], shifts[kRows];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
    totals[r] = totals[kRows + r] = Vector<T>{};
    shifts[r] = broadcast<T>(row_shifts[r]);
  }
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes<T> <= count; i += kLanes<T>) {
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        const Vector<T> difference = load_widened(rows[r] + i) - shifts[r];
        totals[r] += difference;
        totals[kRows + r] += difference * difference;
      }
    }
  }
  T results[kLanes<T>];
  store(results, sum_each<T>(totals));
  for (int64_t r = 0; r < kRows; ++r) {
    sums[r] = results[r];
    sums_of_squares[r] = results[kRows + r];
    for (int64_t k = i; k < count; ++k) {
      const T difference = widen(rows[r][k * stride]) - row_shifts[r];
      sums[r] += difference;
      sums_of_squares[r] += difference * difference;
    }
  }
}

// The moments of every channel of every image. Work is cut by sizes alone and merged in order, so the bits do not
// depend on the number of threads.
template <typename Scalar>
class MapMoments {
 public:
  using T = ComputeType<Scalar>;

  MapMoments(Arena& arena, const sca_feature_map& map, int64_t batch, int64_t channels, int64_t height, int64_t width)
      : map_(map), batch_(batch), channels_(channels), height_(height), width_(width) {
    by_pixel_ = map.channel_stride == 1 && map.column_stride != 1;
    chunks_ = by_pixel_ ? smaller(height, kMostChunks) : 1;
    mean_ = arena.take<double>(batch * chunks_ * channels);
    squares_ = arena.take<double>(batch * chunks_ * channels);
    sums_ = arena.take<T>(by_pixel_ ? batch * chunks_ * 2 * channels : 0);
  }

  // Calls visit(image, channel, mean, sum of squared deviations) for each channel; zero, zero without pixels.
  template <typename Visit>
  void run(int32_t threads, const Visit& visit) const {
    if (by_pixel_) {
      parallel_for(batch_ * chunks_, threads, [&](int64_t item, int) { sum_rows(item); });
    } else {
      parallel_for(batch_ * channel_groups(), threads, [&](int64_t item, int) { sum_channels(item); });
    }
    for (int64_t image = 0; image < batch_; ++image) {
      for (int64_t channel = 0; channel < channels_; ++channel) merge(image, channel, visit);
    }
  }

 private:
  static constexpr int64_t kMostChunks = 32;

  Range rows_of(int64_t chunk) const { return {height_ * chunk / chunks_, height_ * (chunk + 1) / chunks_}; }
  const Scalar* image(int64_t index) const { return static_cast<const Scalar*>(map_.data) + index * map_.batch_stride; }

  // A few channels at once.
  void sum_channels(int64_t item) const {
    const int64_t groups = channel_groups(), image_index = item / groups, first = item % groups * kSummedRows<T>;
    const int64_t some = smaller(kSummedRows<T>, channels_ - first);
    const bool one_line = map_.row_stride == width_ * map_.column_stride;
    const int64_t lines = one_line ? 1 : height_, length = one_line ? height_ * width_ : width_;
    double *mean = mean_ + image_index * channels_ + first, *squares = squares_ + image_index * channels_ + first;
    for (int64_t r = 0; r < some; ++r) mean[r] = squares[r] = 0;
    double seen = 0;
    for (int64_t line = 0; line < lines; ++line) {
      for (int64_t begin = 0; begin < length; begin += kMostSummed) {
        const Scalar* rows[kSummedRows<T>];
        T shifts[kSummedRows<T>], sums[kSummedRows<T>], sums_of_squares[kSummedRows<T>];
        for (int64_t r = 0; r < kSummedRows<T>; ++r) {
          rows[r] = image(image_index) + smaller(first + r, channels_ - 1) * map_.channel_stride +
                    line * map_.row_stride + begin * map_.column_stride;
          shifts[r] = widen(rows[r][0]);
        }
        const int64_t count = smaller(kMostSummed, length - begin);
        sum_differences_of_rows(rows, map_.column_stride, count, shifts, sums, sums_of_squares);
        for (int64_t r = 0; r < some; ++r) {
          merge_sums(seen, mean[r], squares[r], static_cast<double>(count), shifts[r], sums[r], sums_of_squares[r]);
        }
        seen += static_cast<double>(count);
      }
    }
  }
  int64_t channel_groups() const { return (channels_ + kSummedRows<T> - 1) / kSummedRows<T>; }

  // Rows of pixels with adjacent channels.
  void sum_rows(int64_t item) const {
    double *mean = mean_ + item * channels_, *squares = squares_ + item * channels_;
    T* __restrict sums = sums_ + item * 2 * channels_;
    T* __restrict sums_of_squares = sums + channels_;
    for (int64_t c = 0; c < channels_; ++c) mean[c] = squares[c] = 0;
    const Range rows = rows_of(item % chunks_);
    double seen = 0;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      for (int64_t begin = 0; begin < width_; begin += kMostSummed) {
        const Scalar* first = image(item / chunks_) + row * map_.row_stride + begin * map_.column_stride;
        const int64_t count = smaller(kMostSummed, width_ - begin);
        for (int64_t c = 0; c < channels_; ++c) sums[c] = sums_of_squares[c] = 0;
        for (int64_t p = 1; p < count; ++p) {
          const Scalar* pixel = first + p * map_.column_stride;
          for (int64_t c = 0; c < channels_; ++c) {
            const T difference = widen(pixel[c]) - widen(first[c]);
            sums[c] += difference;
            sums_of_squares[c] += difference * difference;
          }
        }
        for (int64_t c = 0; c < channels_; ++c) {
          merge_sums(seen, mean[c], squares[c], static_cast<double>(count), T(widen(first[c])), sums[c],
                     sums_of_squares[c]);
        }
        seen += static_cast<double>(count);
      }
    }
  }

  template <typename Visit>
  void merge(int64_t image_index, int64_t channel, const Visit& visit) const {
    double mean = 0, squares = 0, seen = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t index = (image_index * chunks_ + chunk) * channels_ + channel;
      const double count = static_cast<double>((by_pixel_ ? rows_of(chunk).size() : height_) * width_);
      if (count > 0) merge_moments(seen, mean, squares, count, mean_[index], squares_[index]);
      seen += count;
    }
    visit(image_index, channel, mean, squares);
  }

  const sca_feature_map map_;
  const int64_t batch_, channels_, height_, width_;
  bool by_pixel_;
  int64_t chunks_;
  double *mean_, *squares_;
  T* sums_;
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
