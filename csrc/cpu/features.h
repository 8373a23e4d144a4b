// Blocks of pixels of a feature map, whatever its type and strides, and their products with vectors of channels.
//
// A block is kept the way the map lies in memory: adjacent channels as one row for each pixel, anything else as one row
// for each channel. The two products of attention swap their parts between the two ways, so no block is transposed.
#pragma once

#include "moments.h"
#include "parallel.h"
#include "products.h"
#include "tokens.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

constexpr int64_t kMostPixels = 256;

// Pixels in a block: as many as keep the blocks that a kernel holds at once in the cache of one core.
template <typename T>
constexpr int64_t block_pixels(int64_t channels, int64_t blocks) {
  constexpr int64_t kCacheBytes = 512 << 10, kFewestPixels = 64;
  int64_t pixels = kMostPixels;
  while (pixels > kFewestPixels && pixels * channels * blocks * int64_t{sizeof(T)} > kCacheBytes) pixels /= 2;
  return pixels;
}

// Pixels of one image row that are adjacent in a block.
struct Run {
  int64_t begin, size;  // positions in the block
  int64_t row, column;  // of the first pixel in the image
};

// Calls visit(i, size) for pieces of a run of at most a vector: the first pixel, counted from that of the run, and how
// many. For whole vectors that is a constant.
template <typename T, typename Visit>
inline void each_piece(const Run& run, const Visit& visit) {
  int64_t i = 0;
  for (; i + kLanes<T> <= run.size; i += kLanes<T>) visit(i, std::integral_constant<int64_t, kLanes<T>>{});
  if (i < run.size) visit(i, run.size - i);
}

// The pixels of a block. First come `lines`: whole vectors of `line` adjacent pixels, from a multiple of it in the
// image. They need no masks, and results for them can be stored from registers to where they belong. Then what is left.
struct Runs {
  int64_t pixels, count, lines;
  Run list[kMostPixels];

  // Those of the first `size` tokens.
  void find(const Positions& tokens, int64_t size, int64_t image_width, int64_t line) {
    Run rest[kMostPixels];
    pixels = size;
    lines = 0;
    int64_t rest_count = 0;
    const auto leave = [&](int64_t row, int64_t column, int64_t end) {
      if (column < end) rest[rest_count++] = {0, end - column, row, column};
    };
    for (int64_t p = 0; p < size;) {
      const int64_t token = tokens[p], row = token / image_width, column = token - row * image_width;
      const int64_t most = smaller(size - p, image_width - column);
      int64_t length = 1;
      while (length < most && tokens[p + length] == token + length) ++length;
      const int64_t end = column + length, first_line = column + (token + line - 1) / line * line - token;
      int64_t next = column;
      for (int64_t c = first_line; c + line <= end; c += line) {
        leave(row, next, c);
        list[lines] = {lines * line, line, row, c};
        ++lines;
        next = c + line;
      }
      leave(row, next, end);
      p += length;
    }
    count = lines;
    for (int64_t begin = lines * line, r = 0; r < rest_count; begin += rest[r++].size) {
      list[count++] = {begin, rest[r].size, rest[r].row, rest[r].column};
    }
  }
  const Run* begin() const { return list; }
  const Run* end() const { return list + count; }
};

// One image of a feature map.
template <typename Scalar>
struct FeatureMap {
  Scalar* data;
  int64_t channels, channel_stride, row_stride, column_stride;

  bool adjacent_channels() const { return channel_stride == 1 && column_stride != 1; }
  bool same_strides(const FeatureMap& other) const {
    return channel_stride == other.channel_stride && row_stride == other.row_stride &&
           column_stride == other.column_stride;
  }
  Scalar* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

// Whether an address, and all that are a stride or two away from it, are multiples of so many bytes.
template <typename T>
inline bool aligned(const T* address, int64_t stride, int64_t other_stride, int64_t bytes) {
  const int64_t numbers = bytes / int64_t{sizeof(T)};
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0 && stride % numbers == 0 &&
         other_stride % numbers == 0;
}

template <typename Scalar>
FeatureMap<Scalar> image_of(const sca_feature_map& map, int64_t image, int64_t channels) {
  return {static_cast<Scalar*>(map.data) + image * map.batch_stride, channels, map.channel_stride, map.row_stride,
          map.column_stride};
}

// The lines of a block where they lie in a map.
template <typename Scalar>
class Lines {
 public:
  using T = ComputeType<Scalar>;

  // With `streamed`, what is stored goes past the caches where the map's memory allows it.
  Lines(const FeatureMap<Scalar>& map, const Runs& runs, bool streamed = false)
      : map_(map),
        count_(map.column_stride == 1 && !map.adjacent_channels() ? runs.lines : 0),
        streamed_(streamed && std::is_same_v<Scalar, T> && reinterpret_cast<uintptr_t>(map.data) % kVectorBytes == 0 &&
                  map.channel_stride % kLanes<T> == 0) {
    for (int64_t l = 0; l < count_; ++l) {
      offsets_[l] = map.at(runs.list[l].row, runs.list[l].column) - map.data;
      streamed_ &= offsets_[l] % kLanes<T> == 0;
    }
  }

  int64_t count() const { return count_; }
  Scalar* at(int64_t channel, int64_t line) const { return map_.data + channel * map_.channel_stride + offsets_[line]; }
  Vector<T> load(int64_t channel, int64_t line) const { return load_widened(at(channel, line)); }
  void store(int64_t channel, int64_t line, Vector<T> value) const {
    if constexpr (std::is_same_v<Scalar, T>) {
      if (streamed_) return stream<T>(at(channel, line), value);
    }
    store_narrowed(at(channel, line), value);
  }

 private:
  const FeatureMap<Scalar> map_;
  const int64_t count_;
  bool streamed_;
  int64_t offsets_[kMostPixels / kLanes<T>];
};

// A rectangle of an image.
struct Rectangle {
  int64_t row, column, height, width;
};

// What of one map or two is needed after the block at hand. Blocks come from all over a map, which defeats the
// hardware's prefetching; so while one is computed the next is fetched, a few lines of the cache at a time.
template <typename Scalar>
class Upcoming {
 public:
  // `second` is a map with the strides of `first`, or one without data; `pixels` those of the block at hand.
  Upcoming(const FeatureMap<Scalar>& first, const FeatureMap<Scalar>& second, int64_t pixels)
      : first_(first), second_(second), vectors_(padded<T>(pixels) / kLanes<T>) {}

  void add(const Runs& runs) {
    for (const Run& run : runs) add(run.row, run.column, run.size);
  }
  void add(const Rectangle& place) {
    for (int64_t r = 0; r < place.height; ++r) add(place.row + r, place.column, place.width);
  }

  // Fetches a part of a row of what was added, kept as the map lies in memory: all of a row of channels if it is called
  // for each vector of that row at hand, of a row of pixels about the line that `vector` stands for.
  template <bool kPixelRows>
  void fetch(int64_t row, int64_t vector) const {
    if constexpr (kPixelRows) {
      if (row < count_) fetch(offsets_[row] + vector * kLine);
    } else {
      for (int64_t line = vector; line < count_; line += vectors_) fetch(row * first_.channel_stride + offsets_[line]);
    }
  }

 private:
  using T = ComputeType<Scalar>;
  static constexpr int64_t kLine = 64 / int64_t{sizeof(Scalar)};

  void add(int64_t row, int64_t column, int64_t size) {
    const bool by_pixel = first_.adjacent_channels();
    if (!by_pixel && first_.column_stride != 1) return;
    for (int64_t i = 0; i < size; i += by_pixel ? 1 : kLine) {
      offsets_[count_++] = first_.at(row, column + i) - first_.data;
    }
  }
  void fetch(int64_t offset) const {
    prefetch(first_.data + offset);
    if (second_.data) prefetch(second_.data + offset);
  }

  const FeatureMap<Scalar> first_, second_;
  const int64_t vectors_;
  int64_t count_ = 0;
  int64_t offsets_[kMostPixels];
};

// Rows of some width, one after another, with pointers to them.
template <typename T>
struct RowTable {
  T* memory;
  T** rows;
  int64_t pitch;

  RowTable(Arena& arena, int64_t count, int64_t width)
      : memory(arena.take<T>(count * width)), rows(arena.take<T*>(count)), pitch(width), own_(memory) {
    if (memory) point_to(memory, count);
  }
  // Rows that lie elsewhere in the same way, and are only read.
  void point_to(const T* first, int64_t count) {
    memory = const_cast<T*>(first);
    for (int64_t i = 0; i < count; ++i) rows[i] = memory + i * pitch;
  }
  void point_to_own(int64_t count) { point_to(own_, count); }

 private:
  T* own_;
};

// One number for each channel, as vectors beside row `row` of a block: the same in all lanes of a channel's row, or one
// for each lane of a pixel's row.
template <bool kPixelRows, typename T>
inline Vector<T> beside_row(const T* channel_values, int64_t row, int64_t i) {
  return kPixelRows ? load(channel_values + i) : broadcast<T>(channel_values[row]);
}

// The same of one number for each pixel.
template <bool kPixelRows, typename T>
inline Vector<T> beside_pixels(const T* pixel_values, int64_t row, int64_t i) {
  return beside_row<!kPixelRows>(pixel_values, row, i);
}

// T is the type that is computed in; a map may be of a narrower one.
template <typename T>
class FeatureBlock {
 public:
  FeatureBlock(Arena& arena, int64_t channels, int64_t pixels)
      : pixel_pitch_(pixels),
        channel_pitch_(padded<T>(channels)),
        memory_(arena.take<T>(pixel_pitch_ * channel_pitch_ + kLanes<T>)),  // a vector may begin at any pixel
        rows_(arena.take<T*>(larger(channel_pitch_, pixel_pitch_))) {}

  bool pixel_rows() const { return pixel_rows_; }
  bool is_copy() const { return !in_place_; }
  // Whether the rows lie in the map itself and all begin where a vector may be streamed to.
  template <typename Scalar>
  bool streamable(const FeatureMap<Scalar>& map) const {
    return in_place_ && aligned(map.data, map.column_stride, map.row_stride, kVectorBytes);
  }
  int64_t row_count() const { return pixel_rows_ ? pixels_ : channels_; }
  int64_t width() const { return pixel_rows_ ? channel_pitch_ : width_; }
  T* const* rows() const { return rows_; }

  // Takes pixels of a map to be read, kept as it lies in memory.
  template <typename Scalar>
  void gather(const FeatureMap<Scalar>& map, const Runs& runs) {
    locate(map, runs, map.adjacent_channels());
    if (!in_place_) copy_from(map, runs);
  }
  // Copies pixels of a map to be changed.
  template <typename Scalar>
  void gather_copy(const FeatureMap<Scalar>& map, const Runs& runs, bool pixel_rows) {
    make_room(pixel_rows, map.channels, runs.pixels);
    copy_from(map, runs);
  }

  // Makes room for pixels that are to be written to a map by scatter().
  template <typename Scalar>
  void locate(const FeatureMap<Scalar>& map, const Runs& runs, bool pixel_rows) {
    make_room(pixel_rows, map.channels, runs.pixels);
    if constexpr (std::is_same_v<Scalar, T>) {
      in_place_ = pixel_rows_ && map.channel_stride == 1 && map.channels == channel_pitch_;
      if (!in_place_) return;
      for (const Run& run : runs) {
        for (int64_t i = 0; i < run.size; ++i) rows_[run.begin + i] = map.at(run.row, run.column + i);
      }
    }
  }

  // With `streamed`, past the caches where whole vectors allow it.
  template <typename Scalar>
  void scatter(const FeatureMap<Scalar>& map, const Runs& runs, bool streamed = false) const {
    if (in_place_) return;
    if (pixel_rows_) {
      each_pixel(map, runs, [&](Scalar* target, const T* row) {
        copy(
            channels_, [&](int64_t c, int64_t stride) { target[c * stride] = narrow<Scalar>(row[c]); },
            map.channel_stride);
      });
      return;
    }
    const Lines<Scalar> lines(map, runs, streamed);
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t l = 0; l < lines.count(); ++l) lines.store(c, l, load(rows_[c] + l * kLanes<T>));
    }
    scatter_rest(map, runs, lines);
  }
  // The same of rows of channels whose lines are already in the map.
  template <typename Scalar>
  void scatter_rest(const FeatureMap<Scalar>& map, const Runs& runs, const Lines<Scalar>& lines) const {
    Piece<Scalar> pieces[kMostPixels];
    const int64_t count = find_pieces(map, runs, lines.count(), pieces);
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t i = 0; i < count; ++i) {
        Scalar* to = pieces[i].first + c * map.channel_stride;
        const T* row = rows_[c] + pieces[i].begin;
        if (map.column_stride == 1) {
          store_narrowed(to, load(row), pieces[i].size);
        } else {
          for (int64_t p = 0; p < pieces[i].size; ++p) to[p * map.column_stride] = narrow<Scalar>(row[p]);
        }
      }
    }
  }

  // Makes room for as many values as another block has, kept in the same way.
  void make_room_like(const FeatureBlock& other) { make_room(other.pixel_rows_, other.channels_, other.pixels_); }

  // table[j][p] = <vectors[j], pixel p>
  void multiply(const RowTable<T>& vectors, int64_t count, const RowTable<T>& table) const {
    if (pixel_rows_) {
      dots(rows_, pixels_, vectors.rows, count, channel_pitch_, table.memory, table.pitch, FetchNothing{});
    } else {
      weighted_sum(Write::kReplace, Weights<T>{vectors.memory, vectors.pitch, 1}, rows_, channels_, table.rows, count,
                   width_);
    }
  }

  // sums[j] += sum_p table[j][p] * pixel p. The table is zero past the last pixel.
  // On the way calls fetch(row, i) for each vector of each row of channels.
  template <typename Fetch>
  void pool(const RowTable<T>& table, int64_t count, T* const* sums, const Fetch& fetch) const {
    if (pixel_rows_) {
      weighted_sum(Write::kAccumulate, Weights<T>{table.memory, table.pitch, 1}, rows_, pixels_, sums, count,
                   channel_pitch_);
    } else {
      add_dots(rows_, channels_, table.rows, count, width_, sums, fetch);
    }
  }

  // pixel p (=, or += with kAccumulate) sum_j table[j][p] * vectors[j]
  void spread(Write write, const RowTable<T>& table, const RowTable<T>& vectors, int64_t count) {
    if (pixel_rows_) {
      weighted_sum(write, Weights<T>{table.memory, 1, table.pitch}, vectors.rows, count, rows_, pixels_,
                   channel_pitch_);
    } else {
      weighted_sum(write, Weights<T>{vectors.memory, 1, vectors.pitch}, table.rows, count, rows_, channels_, width_);
    }
  }

  // pixel p += offset + factor * (pixel p of other - centre), channel by channel
  void add_affine(const T* offset, const T* factor, const T* centre, const FeatureBlock& other) {
    if (pixel_rows_) {
      add_affine_as<true>(offset, factor, centre, other);
    } else {
      add_affine_as<false>(offset, factor, centre, other);
    }
  }

  // The channels of the first pixel.
  void copy_first_pixel(T* target) const {
    for (int64_t c = 0; c < channel_pitch_; ++c) {
      target[c] = pixel_rows_ ? rows_[0][c] : rows_[smaller(c, channels_ - 1)][0];
    }
  }
  // Adds the pixels' differences from `shift`, and the squares of those, to sums for each channel.
  void sum_differences(const T* shift, T* sums, T* sums_of_squares) const {
    if (pixel_rows_) {
      sum_differences_of_pixels(shift, sums, sums_of_squares);
      return;
    }
    for (int64_t c = 0; c < channels_; c += kSummedRows<T>) {
      const T* rows[kSummedRows<T>];
      T more[kSummedRows<T>], more_squares[kSummedRows<T>];
      for (int64_t r = 0; r < kSummedRows<T>; ++r) rows[r] = rows_[smaller(c + r, channels_ - 1)];
      sum_differences_of_rows(rows, 1, pixels_, shift + c, more, more_squares);
      for (int64_t r = 0; r < kSummedRows<T>; ++r) {
        sums[c + r] += more[r];
        sums_of_squares[c + r] += more_squares[r];
      }
    }
  }

 private:
  template <typename Scalar>
  void copy_from(const FeatureMap<Scalar>& map, const Runs& runs) {
    if (pixel_rows_) {
      each_pixel(map, runs, [&](const Scalar* source, T* row) {
        copy(channels_, [&](int64_t c, int64_t stride) { row[c] = widen(source[c * stride]); }, map.channel_stride);
        for (int64_t c = channels_; c < channel_pitch_; ++c) row[c] = 0;
      });
      return;
    }
    const Lines<Scalar> lines(map, runs);
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t l = 0; l < lines.count(); ++l) store<T>(rows_[c] + l * kLanes<T>, lines.load(c, l));
    }
    Piece<Scalar> pieces[kMostPixels];
    const int64_t count = find_pieces(map, runs, lines.count(), pieces);
    for (int64_t i = 0; i < count; ++i) {
      const Piece<Scalar> piece = pieces[i];
      for (int64_t c = 0; c < channels_; ++c) {
        const Scalar* from = piece.first + c * map.channel_stride;
        T* row = rows_[c] + piece.begin;
        if (map.column_stride == 1) {
          store_some<T>(row, load_widened(from, piece.size), piece.size);
        } else {
          for (int64_t p = 0; p < piece.size; ++p) row[p] = widen(from[p * map.column_stride]);
        }
      }
    }
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t p = pixels_; p < width_; ++p) rows_[c][p] = 0;
    }
  }

  void make_room(bool pixel_rows, int64_t channels, int64_t pixels) {
    in_place_ = false;
    pixel_rows_ = pixel_rows;
    channels_ = channels;
    pixels_ = pixels;
    width_ = padded<T>(pixels);
    for (int64_t i = 0; i < row_count(); ++i) rows_[i] = memory_ + i * (pixel_rows_ ? channel_pitch_ : pixel_pitch_);
  }

  // Calls assign(i, stride) for each i, in a loop that can be vectorised where the stride is 1.
  template <typename Assign>
  static void copy(int64_t count, const Assign& assign, int64_t stride) {
    if (stride == 1) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) assign(i, 1);
    } else {
      for (int64_t i = 0; i < count; ++i) assign(i, stride);
    }
  }

  template <typename Scalar, typename Visit>
  void each_pixel(const FeatureMap<Scalar>& map, const Runs& runs, const Visit& visit) const {
    for (const Run& run : runs) {
      for (int64_t i = 0; i < run.size; ++i) visit(map.at(run.row, run.column + i), rows_[run.begin + i]);
    }
  }
  // At most a vector of adjacent pixels: where the first lies in the map, their place in the block, how many.
  template <typename Scalar>
  struct Piece {
    Scalar* first;
    int64_t begin, size;
  };
  // Of all runs but the first few; returns how many.
  template <typename Scalar>
  static int64_t find_pieces(const FeatureMap<Scalar>& map, const Runs& runs, int64_t first, Piece<Scalar>* pieces) {
    int64_t count = 0;
    for (int64_t r = first; r < runs.count; ++r) {
      const Run& run = runs.list[r];
      for (int64_t i = 0; i < run.size; i += kLanes<T>) {
        pieces[count++] = {map.at(run.row, run.column + i), run.begin + i, smaller(kLanes<T>, run.size - i)};
      }
    }
    return count;
  }

  void sum_differences_of_pixels(const T* shift, T* sums, T* sums_of_squares) const {
    constexpr int64_t kVectors = 4;  // as many additions as the latency of one can hide
    for (int64_t begin = 0; begin < channel_pitch_; begin += kVectors * kLanes<T>) {
      // Behind the last vector that one is computed again.
      int64_t channel[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) channel[v] = smaller(begin + v * kLanes<T>, channel_pitch_ - kLanes<T>);
      Vector<T> first[kVectors] = {}, second[kVectors] = {};
      for (int64_t p = 0; p < pixels_; ++p) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) {
          const Vector<T> difference = load(rows_[p] + channel[v]) - load(shift + channel[v]);
          first[v] += difference;
          second[v] += difference * difference;
        }
      }
      // The block's sums are added to the others at last: long chains of additions would lose digits.
      for (int64_t v = 0; v < kVectors; ++v) {
        first[v] += load(sums + channel[v]);
        second[v] += load(sums_of_squares + channel[v]);
      }
      for (int64_t v = 0; v < kVectors; ++v) {
        store<T>(sums + channel[v], first[v]);
        store<T>(sums_of_squares + channel[v], second[v]);
      }
    }
  }

  template <bool kPixelRows>
  void add_affine_as(const T* offset, const T* factor, const T* centre, const FeatureBlock& other) {
    for (int64_t r = 0; r < row_count(); ++r) {
      T* row = rows_[r];
      for (int64_t i = 0; i < width(); i += kLanes<T>) {
        const Vector<T> centred = load(other.rows_[r] + i) - beside_row<kPixelRows>(centre, r, i);
        const Vector<T> change = beside_row<kPixelRows>(offset, r, i) + beside_row<kPixelRows>(factor, r, i) * centred;
        store<T>(row + i, load(row + i) + change);
      }
    }
  }

  bool pixel_rows_ = false, in_place_ = false;
  int64_t channels_ = 0, pixels_ = 0, width_ = 0;
  int64_t pixel_pitch_, channel_pitch_;
  T* memory_;
  T** rows_;
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
