// A tile of an image with adjacent pixels, turned: kept with adjacent channels.
//
// Where a tile holds many labels, each has few pixels in it, and rows of pixels waste most of a vector. With rows of
// channels no lane is wasted, and a label takes its pixels where they lie; each square is turned once in each
// direction.
#pragma once

#include "features.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// Whether pixels of a row are adjacent, and channels are not.
inline bool has_planes(const sca_feature_map& map) { return map.column_stride == 1 && map.channel_stride != 1; }

// Of a map of Scalar, kept as numbers of another type: that which is computed in, unless it is only turned.
template <typename Scalar, typename Kept = ComputeType<Scalar>>
class TurnedTile {
 public:
  using T = ComputeType<Scalar>;

  // Whole vectors of channels, at most `pixels` pixels.
  TurnedTile(Arena& arena, int64_t channels, int64_t pixels)
      : channels_(channels), memory_(arena.take<Kept>(channels * pixels)) {}

  // The image with its pixels in this place where they lie here.
  FeatureMap<Kept> map(const Rectangle& place) const {
    const int64_t row_stride = place.width * channels_;
    return {memory_ - place.row * row_stride - place.column * channels_, channels_, 1, row_stride, channels_};
  }

  void load(const FeatureMap<Scalar>& map, const Rectangle& place) const {
    each_square(map, place, [&](const Scalar* pixels, Kept* turned, int64_t channel, auto count) {
      Vector<T> square[kLanes<T>];
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes<T>; ++k) {
        const Scalar* source = pixels + (channel + k) * map.channel_stride;
        prefetch(source + map.row_stride);  // the row below follows, a few squares later
        square[k] = load_widened(source, count);
      }
      transpose<T>(square);
      for (int64_t k = 0; k < count; ++k) store_narrowed(turned + k * channels_ + channel, square[k]);
    });
  }

  // With `streamed`, past the caches where the map's memory allows it.
  void store_to(const FeatureMap<Scalar>& map, const Rectangle& place, bool streamed) const {
    if constexpr (std::is_same_v<Scalar, T>) {
      const T* first = map.at(place.row, place.column);
      if (streamed && place.width % kLine == 0 && aligned(first, map.channel_stride, map.row_stride, kLineBytes)) {
        stream_to(map, place);
        return;
      }
    }
    each_square(map, place, [&](Scalar* pixels, const Kept* turned, int64_t channel, auto count) {
      Vector<T> square[kLanes<T>] = {};
      for (int64_t k = 0; k < count; ++k) square[k] = load_widened(turned + k * channels_ + channel);
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes<T>; ++k) {
        store_narrowed(pixels + (channel + k) * map.channel_stride, square[k], count);
      }
    });
  }

 private:
  static constexpr int64_t kLineBytes = 64, kLine = kLineBytes / int64_t{sizeof(T)};  // of the caches

  // Squares side by side that make whole lines of the caches: a part of one would be written by itself.
  void stream_to(const FeatureMap<T>& map, const Rectangle& place) const {
    constexpr int64_t kSquares = kLine / kLanes<T>;
    each_square<kLine>(map, place, [&](T* pixels, const T* turned, int64_t channel, auto) {
      Vector<T> squares[kSquares][kLanes<T>];
      for (int64_t s = 0; s < kSquares; ++s) {
#pragma GCC unroll 16
        for (int64_t k = 0; k < kLanes<T>; ++k) {
          squares[s][k] = sca::SCA_CPU_CAPABILITY::load(turned + (s * kLanes<T> + k) * channels_ + channel);
        }
        transpose<T>(squares[s]);
      }
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes<T>; ++k) {
        for (int64_t s = 0; s < kSquares; ++s) {
          stream<T>(pixels + (channel + k) * map.channel_stride + s * kLanes<T>, squares[s][k]);
        }
      }
    });
  }

  // Calls visit(pixels in the map, the first of them here, first channel, number of pixels) for kLanes channels of each
  // `kPixels` pixels: a square, or squares side by side. That number is a constant but for the last pixels. All of a
  // few planes come before the next: planes a power of two apart share sets of the caches, which hold the lines of a
  // few, and each has pages of its own.
  template <int64_t kPixels = kLanes<T>, typename Visit>
  void each_square(const FeatureMap<Scalar>& map, const Rectangle& place, const Visit& visit) const {
    const bool one_line = map.row_stride == place.width;
    const int64_t lines = one_line ? 1 : place.height, size = one_line ? place.height * place.width : place.width;
    for (int64_t channel = 0; channel < channels_; channel += kLanes<T>) {
      for (int64_t line = 0; line < lines; ++line) {
        Scalar* pixels = map.at(place.row + line, place.column);
        Kept* turned = memory_ + line * size * channels_;
        int64_t i = 0;
        for (; i + kPixels <= size; i += kPixels) {
          visit(pixels + i, turned + i * channels_, channel, std::integral_constant<int64_t, kPixels>{});
        }
        if (i < size) visit(pixels + i, turned + i * channels_, channel, size - i);
      }
    }
  }

  int64_t channels_;
  Kept* memory_;
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
