// What the forward and the backward of instance_modulate share.
//
// An image is walked in tiles, rows of channels or rows of pixels as x lies in memory. Sums over the pixels are taken
// tile by tile, in chunks of fixed size that are merged in order.
#pragma once

#include "moments.h"
#include "noise.h"
#include "parallel.h"
#include "tiles.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// One number for each channel, beside the rows of a tile: the same in all lanes of a channel's row, or one for each
// lane of a pixel's row.
template <typename T, bool kPixelRows>
class PerChannel {
 public:
  PerChannel(const T* values, int64_t row) : values_(values), of_row_(broadcast<T>(kPixelRows ? T(0) : values[row])) {}
  Vector<T> at(int64_t i) const { return kPixelRows ? load(values_ + i) : of_row_; }

 private:
  const T* values_;
  Vector<T> of_row_;
};

// For each channel of an image: x is normalised as ((x - mean) - mean_rest) times the scale, which holds the factor
// where that is not given per pixel, and shifted by the offset where that is not. A float holds the mean to a part of
// 10^-7 of itself, which may be much of a standard deviation: hence its rest. In the gradient of x, the statistics add
// `common` before the scale, and `proportional` times x - mean.
template <typename T>
struct Channels {
  T *mean, *mean_rest, *scale, *offset, *strength, *common, *proportional;
};

// The noise of a tile; null: none.
template <typename T>
struct TileNoise {
  TileRows<T> rows = {nullptr, 0};
  bool by_pixel = false;  // one number for each pixel, in a single row

  template <bool kPixelRows>
  Vector<T> at(int64_t row, int64_t i) const {
    return kPixelRows && by_pixel ? broadcast<T>(rows.data[row]) : load(rows.row(row) + i);
  }
};

// What forward and backward read of a tile; null where there is no such map.
template <typename Scalar>
struct TileInputs {
  using T = ComputeType<Scalar>;
  TileRows<Scalar> x;
  TileRows<T> gamma, offset;
  TileNoise<T> noise;
  int64_t rows, length;
  Channels<T> channels;
  T one;  // what is added to gamma
};

// The formula in a row of a tile.
template <typename Scalar, bool kPixelRows, bool kGamma, bool kOffset>
class RowFormula {
  using T = ComputeType<Scalar>;

 public:
  RowFormula(const TileInputs<Scalar>& in, int64_t row)
      : x_(in.x.row(row)),
        gamma_(in.gamma.row(row)),
        offset_(in.offset.row(row)),
        one_(in.one),
        mean_(in.channels.mean, row),
        mean_rest_(in.channels.mean_rest, row),
        scale_(in.channels.scale, row),
        channel_offset_(in.channels.offset, row) {}

  Vector<T> centred(int64_t i) const { return (load_widened(x_ + i) - mean_.at(i)) - mean_rest_.at(i); }
  Vector<T> scale(int64_t i) const { return scale_.at(i); }
  Vector<T> times_factor(int64_t i, Vector<T> value) const {
    return kGamma ? value * (load(gamma_ + i) + one_) : value;
  }
  Vector<T> before_activation(int64_t i, Vector<T> centred) const {
    return times_factor(i, centred * scale_.at(i)) + (kOffset ? load(offset_ + i) : channel_offset_.at(i));
  }

 private:
  const Scalar* x_;
  const T *gamma_, *offset_;
  const T one_;
  const PerChannel<T, kPixelRows> mean_, mean_rest_, scale_, channel_offset_;
};

// Writes a vector, past the caches if that is wanted.
template <typename Scalar>
inline void put(Scalar* target, Vector<ComputeType<Scalar>> value, bool streams) {
  if constexpr (std::is_same_v<Scalar, ComputeType<Scalar>>) {
    streams ? stream<Scalar>(target, value) : store<Scalar>(target, value);
  } else {
    store_narrowed(target, value);
  }
}

template <typename Scalar>
class InstanceModulate {
 public:
  using T = ComputeType<Scalar>;

  explicit InstanceModulate(const sca_instance_modulate& call)
      : call_(call), arena_(call.workspace), pixels_(call.height * call.width), pixel_rows_(adjacent_channels(call.x)) {
    // A map that lies the other way round is read in lines of the cache, of which every number should be used at once.
    bool across = false;
    for (const sca_feature_map* map : {&call.gamma, &call.beta, &call.out}) {
      across |= map->data && adjacent_channels(*map);
    }
    const int64_t together = across ? 64 / int64_t{sizeof(Scalar)} : call.noise.seed ? kNoiseChannels : 1;
    // Channels of few pixels are worked on together too, so that the way to each costs little.
    const int64_t few = kGroupSize / larger<int64_t>(pixels_, 1) / kNoiseChannels * kNoiseChannels;
    group_ = pixel_rows_ ? call.channels : smaller(larger(together, smaller(few, kMostChannels)), call.channels);
    groups_ = group_ > 0 ? (call.channels + group_ - 1) / group_ : 0;
    pitch_ = pixel_rows_ ? padded<T>(group_) : group_;
    tile_ = pixel_rows_ ? larger(smaller(kTileSize / larger<int64_t>(pitch_, 1), kMostPixels), kFewestPixels)
                        : smaller(kRowSize / (across ? together : 1), larger(padded<T>(pixels_), kPadding<T>));
    const int64_t most_chunks = 64, fewest_pixels = kChunkSize / larger<int64_t>(pixel_rows_ ? pitch_ : 1, 1);
    const int64_t wanted = larger((pixels_ + most_chunks - 1) / most_chunks, fewest_pixels);
    chunk_ = (wanted + tile_ - 1) / tile_ * tile_;
    chunks_ = (pixels_ + chunk_ - 1) / chunk_;
    sums_ = arena_.take<double>(call.batch * groups_ * chunks_ * kSums * pitch_);
    channel_pitch_ = padded<T>(call.channels);
    for (T** values : {&channels_.mean, &channels_.mean_rest, &channels_.scale, &channels_.offset, &channels_.strength,
                       &channels_.common, &channels_.proportional}) {
      *values = arena_.take<T>(call.batch * channel_pitch_);
    }
    Arena counter(nullptr);
    Scratch(counter, scratch_elements());
    scratch_size_ = counter.used();
  }

  int64_t workspace_size() const { return arena_.used() + scratch_size_ * call_.threads; }

 protected:
  static constexpr int64_t kSums = 4;  // as many as a chunk keeps for each channel

  // What one thread copies tiles into.
  struct Scratch {
    Scalar *x, *grad_out, *result;  // of the type of x
    T *wide_x, *gamma, *beta, *noise, *offset, *grad_gamma, *grad_beta;
    Scratch(Arena& arena, int64_t size)
        : x(arena.take<Scalar>(size)),
          grad_out(arena.take<Scalar>(size)),
          result(arena.take<Scalar>(size)),
          wide_x(arena.take<T>(size)),
          gamma(arena.take<T>(size)),
          beta(arena.take<T>(size)),
          noise(arena.take<T>(size + kNoiseSlack)),
          offset(arena.take<T>(size)),
          grad_gamma(arena.take<T>(size)),
          grad_beta(arena.take<T>(size)) {}
  };

  Scratch scratch(int thread) const {
    Arena arena(static_cast<char*>(call_.workspace) + arena_.used() + thread * scratch_size_);
    return Scratch(arena, scratch_elements());
  }

  // Which parts of a kernel there is something to do in.
  struct Parts {
    bool start, before, after;
  };

  // For each group: start(group), before(group, chunk, thread) for all chunks, middle(group), and after(group, chunk,
  // thread) for all chunks. Group by group, while it is in the caches, where that keeps the threads busy.
  template <typename Kernel>
  void run(const Kernel& kernel, Parts parts) const {
    const int64_t groups = call_.batch * groups_;
    const int64_t chunks_before = parts.before ? chunks_ : 0, chunks_after = parts.after ? chunks_ : 0;
    const auto start = [&](int64_t group, int) { kernel.start(group); };
    const auto before = [&](int64_t item, int thread) { kernel.before(item / chunks_, item % chunks_, thread); };
    const auto middle = [&](int64_t group, int) { kernel.middle(group); };
    const auto after = [&](int64_t item, int thread) { kernel.after(item / chunks_, item % chunks_, thread); };
    if (call_.threads <= 1 || chunks_ <= 1 || groups >= 4 * call_.threads) {
      parallel_for(groups, call_.threads, [&](int64_t group, int thread) {
        const int64_t first = group * chunks_;
        if (parts.start) run_task(start, group, thread);
        for (int64_t item = first; item < first + chunks_before; ++item) run_task(before, item, thread);
        run_task(middle, group, thread);
        for (int64_t item = first; item < first + chunks_after; ++item) run_task(after, item, thread);
      });
      return;
    }
    parallel_for(parts.start ? groups : 0, call_.threads, start);
    parallel_for(groups * chunks_before, call_.threads, before);
    parallel_for(groups, call_.threads, middle);
    parallel_for(groups * chunks_after, call_.threads, after);
  }

  // Calls visit(tile) for each tile of a chunk.
  template <typename Visit>
  void each_tile(int64_t group, int64_t chunk, const Visit& visit) const {
    Tile tile = all_of(group);
    const int64_t end = smaller((chunk + 1) * chunk_, pixels_);
    for (tile.pixel = chunk * chunk_; tile.pixel < end; tile.pixel += tile.pixels) {
      tile.pixels = smaller(tile_, end - tile.pixel);
      visit(tile);
    }
  }

  // All pixels of a group.
  Tile all_of(int64_t group) const {
    const int64_t channel = group % groups_ * group_;
    return {group / groups_, channel, smaller(group_, call_.channels - channel), 0, pixels_};
  }
  int64_t chunk_pixels(int64_t chunk) const { return smaller(chunk_, pixels_ - chunk * chunk_); }
  // The sums of a chunk: for each kind as many as a group has channels, padded.
  double* sums_of(int64_t group, int64_t chunk) const { return sums_ + (group * chunks_ + chunk) * kSums * pitch_; }

  Channels<T> channels_of(const Tile& tile) const {
    const int64_t first = tile.image * channel_pitch_ + tile.channel;
    return {channels_.mean + first,        channels_.mean_rest + first, channels_.scale + first,
            channels_.offset + first,      channels_.strength + first,  channels_.common + first,
            channels_.proportional + first};
  }

  // Fills in what the tiles of a group need of its channels; lanes past the last one are zero.
  void prepare(int64_t group) const {
    const Tile tile = all_of(group);
    const Channels<T> of = channels_of(tile);
    for (int64_t c = 0; c < (pixel_rows_ ? pitch_ : tile.channels); ++c) {
      const int64_t i = tile.image * call_.channels + tile.channel + c;
      const bool inside = c < tile.channels;
      const double mean = inside ? call_.mean[i] : 0, rstd = inside ? call_.rstd[i] : 0;
      of.mean[c] = static_cast<T>(mean);
      of.mean_rest[c] = static_cast<T>(mean - static_cast<double>(of.mean[c]));
      of.scale[c] = static_cast<T>(rstd * (inside ? static_cast<double>(factor(i)) : 0));
      of.offset[c] = inside ? value(call_.channel_beta, i) : T(0);
      of.strength[c] = inside ? value(call_.noise.strength, i) : T(0);
      of.common[c] = of.proportional[c] = 0;
    }
  }
  // What all pixels of a channel are multiplied by.
  T factor(int64_t i) const {
    return call_.channel_gamma ? value(call_.channel_gamma, i) + (call_.add_one ? T(1) : T(0)) : T(1);
  }

  TileRows<T> read_wide_x(const Tile& tile, const Scratch& scratch) const {
    return map<Scalar, T>(call_.x).read(tile, scratch.wide_x);
  }
  // With the offset, unless it is that of the channels.
  TileInputs<Scalar> read(const Tile& tile, const Scratch& scratch, bool with_offset, bool with_noise) const {
    TileInputs<Scalar> in = {};
    in.rows = pixel_rows_ ? tile.pixels : tile.channels;
    in.length = padded<T>(pixel_rows_ ? tile.channels : tile.pixels);
    in.channels = channels_of(tile);
    in.one = call_.add_one ? T(1) : T(0);
    in.x = map<Scalar, Scalar>(call_.x).read(tile, scratch.x);
    if (call_.gamma.data) in.gamma = read_parameter(call_.gamma, call_.gamma_wide, tile, scratch.gamma);
    if (with_noise || with_offset) in.noise = read_noise(tile, scratch.noise);
    if (!with_offset) return in;
    if (call_.beta.data) in.offset = read_parameter(call_.beta, call_.beta_wide, tile, scratch.beta);
    if (in.noise.rows.data) {
      pixel_rows_ ? add_noise<true>(in, scratch.offset) : add_noise<false>(in, scratch.offset);
    }
    return in;
  }

  // A gradient of gamma or beta, if it is wanted.
  TileRows<T> locate_parameter(const sca_feature_map& parameter, bool wide, const Tile& tile, T* scratch) const {
    if (!parameter.data) return {nullptr, 0};
    return wide ? map<T, T>(parameter).locate(tile, scratch) : map<Scalar, T>(parameter).locate(tile, scratch);
  }
  void write_parameter(const sca_feature_map& parameter, bool wide, const Tile& tile, const TileRows<T>& rows,
                       const T* scratch) const {
    if (!parameter.data) return;
    wide ? map<T, T>(parameter).write(tile, rows, scratch) : map<Scalar, T>(parameter).write(tile, rows, scratch);
  }

  template <typename Stored, typename Row>
  TiledMap<Stored, Row> map(const sca_feature_map& map) const {
    return {map, call_.width, pixel_rows_};
  }
  // Whether a map of so many numbers is better written past the caches.
  template <typename Row>
  bool streams(const TileRows<Row>& rows) const {
    return std::is_same_v<Row, T> && pixels_ * call_.channels * call_.batch * int64_t{sizeof(T)} >= kStreamedBytes &&
           reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0 && rows.pitch % kLanes<T> == 0;
  }

  const sca_instance_modulate& call_;
  Arena arena_;
  const int64_t pixels_;
  const bool pixel_rows_;
  int64_t pitch_;   // channels of a group, padded
  int64_t chunks_;  // of an image

 private:
  static constexpr int64_t kNoiseChannels = 4;  // channels that share a counter
  static constexpr int64_t kNoiseSlack = kNoiseChannels * kLanes<T> + kPadding<T>;
  static constexpr int64_t kRowSize = 1024, kTileSize = 16384;  // numbers in a row of pixels, in a tile of pixel rows
  static constexpr int64_t kGroupSize = 4096, kMostChannels = 64;  // numbers and channels of a group of small maps
  static constexpr int64_t kFewestPixels = 32, kMostPixels = 256;
  static constexpr int64_t kChunkSize = 32768;

  static bool adjacent_channels(const sca_feature_map& map) {
    return map.channel_stride == 1 && map.column_stride != 1;
  }
  static T value(const void* values, int64_t i) { return values ? static_cast<const T*>(values)[i] : T(0); }
  int64_t scratch_elements() const { return pixel_rows_ ? tile_ * pitch_ : group_ * tile_; }

  TileRows<T> read_parameter(const sca_feature_map& parameter, bool wide, const Tile& tile, T* scratch) const {
    return wide ? map<T, T>(parameter).read(tile, scratch) : map<Scalar, T>(parameter).read(tile, scratch);
  }

  TileNoise<T> read_noise(const Tile& tile, T* scratch) const {
    const sca_noise& noise = call_.noise;
    if (noise.values) {
      const sca_feature_map values = {const_cast<void*>(noise.values), noise.batch_stride, 0, noise.row_stride,
                                      noise.column_stride};
      TileRows<T> row =
          TiledMap<T, T>(values, call_.width, false).read({tile.image, 0, 1, tile.pixel, tile.pixels}, scratch);
      row.pitch = 0;
      return {row, true};
    }
    if (!noise.seed) return {};
    return {pixel_rows_ ? noise_by_pixel(tile, scratch) : noise_by_channel(tile, scratch), false};
  }

  TileRows<T> noise_by_channel(const Tile& tile, T* rows) const {
    const int64_t pitch = padded<T>(tile.pixels);
    for (int64_t c = 0; c < tile.channels; c += kNoiseChannels) {
      const Words<T> group = Words<T>{} + static_cast<uint32_t>((tile.channel + c) / kNoiseChannels);
      for (int64_t p = 0; p < pitch; p += kLanes<T>) {
        const Words<T> pixel = ascending<T>(static_cast<uint32_t>(tile.pixel + p));
        const Normals<T> numbers = normals<T>(*call_.noise.seed, pixel, group, static_cast<uint32_t>(tile.image));
        for (int64_t k = 0; k < smaller(kNoiseChannels, tile.channels - c); ++k) {
          store<T>(rows + (c + k) * pitch + p, numbers.values[k]);
        }
      }
    }
    return {rows, pitch};
  }

  // Lanes take the groups of channels of one pixel after another, so that none is idle whatever the channels.
  TileRows<T> noise_by_pixel(const Tile& tile, T* rows) const {
    using Bits = typename FloatTraits<T>::Bits;
    const int64_t groups = (tile.channels + kNoiseChannels - 1) / kNoiseChannels;
    Bits first_pixels[kLanes<T>], first_groups[kLanes<T>];
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      first_pixels[i] = static_cast<uint32_t>(tile.pixel + i / groups);
      first_groups[i] = static_cast<Bits>(i % groups);
    }
    Words<T> pixel = load(first_pixels), group = load(first_groups);
    const Bits count = static_cast<Bits>(groups), pixel_step = static_cast<Bits>(kLanes<T> / groups),
               group_step = static_cast<Bits>(kLanes<T> % groups);
    for (int64_t i = 0; i < tile.pixels * groups; i += kLanes<T>) {
      const Normals<T> numbers =
          by_lane<T>(normals<T>(*call_.noise.seed, pixel, group, static_cast<uint32_t>(tile.image)));
      for (int64_t k = 0; k < kNoiseChannels; ++k) {
        store<T>(rows + i * kNoiseChannels + k * kLanes<T>, numbers.values[k]);
      }
      group += group_step;
      const Words<T> over = reinterpret_cast<Words<T>>(group >= count);
      group -= over & count;
      pixel += pixel_step - over;
    }
    return {rows, groups * kNoiseChannels};
  }

  // The offset of each element: beta + strength * noise.
  template <bool kPixelRows>
  void add_noise(TileInputs<Scalar>& in, T* scratch) const {
    const TileRows<T> beta = in.offset;
    for (int64_t row = 0; row < in.rows; ++row) {
      const PerChannel<T, kPixelRows> channel_beta(in.channels.offset, row), strength(in.channels.strength, row);
      for (int64_t i = 0; i < in.length; i += kLanes<T>) {
        const Vector<T> base = beta.data ? load(beta.row(row) + i) : channel_beta.at(i);
        store<T>(scratch + row * in.length + i, base + strength.at(i) * in.noise.template at<kPixelRows>(row, i));
      }
    }
    in.offset = {scratch, in.length};
  }

  int64_t group_, groups_;  // channels worked on together, and how many such groups an image has
  int64_t tile_, chunk_;    // pixels of each
  int64_t channel_pitch_, scratch_size_;
  double* sums_;
  Channels<T> channels_;
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
