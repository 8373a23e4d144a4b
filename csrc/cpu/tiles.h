// Tiles of a feature map, whatever its type and strides, as rows of vectors.
//
// A tile is kept the way the map lies in memory: where channels are adjacent, it is one row of channels for each of
// some pixels, else one row of pixels for each of some channels. It is used where it lies if it has the type that is
// wanted and whole vectors, and copied otherwise.
#pragma once

#include "rows.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// Adjacent channels of adjacent pixels (in raster order) of an image.
struct Tile {
  int64_t image, channel, channels, pixel, pixels;
};

// Rows of a tile, whole vectors of the compute type long.
template <typename T>
struct TileRows {
  T* data;
  int64_t pitch;
  T* row(int64_t i) const { return data + i * pitch; }
};

struct Steps {
  int64_t channel, pixel;
};

template <typename To, typename From>
inline To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    return narrow<To>(widen(value));
  }
}

// Of the conversions of whole vectors in rows.h, those for which a compiler finds no instructions by itself.
inline void store_narrowed(BFloat16* target, Vector<float> value) {
  const Vector<uint32_t> bits = reinterpret_cast<Vector<uint32_t>>(value);
  const Vector<uint32_t> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet_nan = bits >> 16 | 0x40u;
  typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2)));
  const HalfVector result =
      __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded, HalfVector);
  __builtin_memcpy(target, &result, sizeof(result));
}
#if defined(__AVX512F__)
inline Vector<float> load_widened(const Float16* source) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
inline void store_narrowed(Float16* target, Vector<float> value) {
  const __m256i result = _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), result);
}
#elif defined(__F16C__)
inline Vector<float> load_widened(const Float16* source) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
inline void store_narrowed(Float16* target, Vector<float> value) {
  const __m128i result = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), result);
}
#endif

template <typename To, typename From>
inline void copy_line(const From* source, int64_t source_step, To* __restrict target, int64_t target_step,
                      int64_t count) {
  int64_t i = 0;
  if (source_step == 1 && target_step == 1) {
    constexpr int64_t kCount = kLanes<ComputeType<To>>;
    for (; i + kCount <= count; i += kCount) store_narrowed(target + i, load_widened(source + i));
  }
  for (; i < count; ++i) target[i * target_step] = convert<To>(source[i * source_step]);
}

// Copies channels of pixels that are evenly spaced on both sides, along what is adjacent in `outer`, the memory that is
// not in the caches yet.
template <typename To, typename From>
inline void copy_plane(const From* source, Steps from, To* target, Steps to, Steps outer, int64_t channels,
                       int64_t pixels) {
  if (outer.channel == 1 && outer.pixel != 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      copy_line(source + p * from.pixel, from.channel, target + p * to.pixel, to.channel, channels);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      copy_line(source + c * from.channel, from.pixel, target + c * to.channel, to.pixel, pixels);
    }
  }
}

// A map whose numbers are of one type, and tiles of it as rows of that type or of the one that is computed in.
template <typename Scalar, typename T>
class TiledMap {
 public:
  TiledMap(const sca_feature_map& map, int64_t width, bool pixel_rows)
      : map_(map), width_(width), pixel_rows_(pixel_rows) {}

  // A tile's rows, in place or copied into `scratch`.
  TileRows<T> read(const Tile& tile, T* scratch) const {
    const TileRows<T> rows = locate(tile, scratch);
    if (rows.data != scratch) return rows;
    each_run(tile, [&](Scalar* source, int64_t begin, int64_t size) {
      copy_plane<T>(source, steps(), scratch + begin * inside(rows).pixel, inside(rows), steps(), tile.channels, size);
    });
    const int64_t count = pixel_rows_ ? tile.pixels : tile.channels, length = pixel_rows_ ? tile.channels : tile.pixels;
    if (length < rows.pitch) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = length; k < rows.pitch; ++k) scratch[i * rows.pitch + k] = T{};
      }
    }
    return rows;
  }

  // Where a tile's rows are to be written: in place, or in `scratch` until write().
  TileRows<T> locate(const Tile& tile, T* scratch) const {
    if constexpr (std::is_same_v<Scalar, T>) {
      const int64_t length = pixel_rows_ ? tile.channels : tile.pixels;
      const bool adjacent = (pixel_rows_ ? map_.channel_stride : map_.column_stride) == 1;
      if (adjacent && evenly_spaced(tile) && length % kPadding<ComputeType<Scalar>> == 0) {
        return {at(tile, tile.pixel), pixel_rows_ ? map_.column_stride : map_.channel_stride};
      }
    }
    return {scratch, padded<ComputeType<Scalar>>(pixel_rows_ ? tile.channels : tile.pixels)};
  }

  void write(const Tile& tile, const TileRows<T>& rows, const T* scratch) const {
    if (rows.data != scratch) return;
    each_run(tile, [&](Scalar* target, int64_t begin, int64_t size) {
      copy_plane<Scalar>(scratch + begin * inside(rows).pixel, inside(rows), target, steps(), steps(), tile.channels,
                         size);
    });
  }

 private:
  Scalar* at(const Tile& tile, int64_t pixel) const {
    return static_cast<Scalar*>(map_.data) + tile.image * map_.batch_stride + tile.channel * map_.channel_stride +
           pixel / width_ * map_.row_stride + pixel % width_ * map_.column_stride;
  }
  // Whether one step leads from each pixel to the next.
  bool evenly_spaced(const Tile& tile) const {
    return map_.row_stride == width_ * map_.column_stride || tile.pixel % width_ + tile.pixels <= width_;
  }
  Steps steps() const { return {map_.channel_stride, map_.column_stride}; }
  Steps inside(const TileRows<T>& rows) const { return pixel_rows_ ? Steps{1, rows.pitch} : Steps{rows.pitch, 1}; }

  // Calls visit(address, first pixel in the tile, size) for runs of pixels that are evenly spaced.
  template <typename Visit>
  void each_run(const Tile& tile, const Visit& visit) const {
    int64_t size = evenly_spaced(tile) ? tile.pixels : width_ - tile.pixel % width_;
    for (int64_t begin = 0; begin < tile.pixels; begin += size, size = smaller(width_, tile.pixels - begin)) {
      visit(at(tile, tile.pixel + begin), begin, size);
    }
  }

  const sca_feature_map& map_;
  const int64_t width_;
  const bool pixel_rows_;
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
