// What the kernels of folded attention share: pixels of a feature map on one side, rows of latents on the other.
//
// The tiles of an image are cut into chunks. A chunk is walked label by label in blocks of pixels, so that every loop
// sees one label, and what two labels share of a line of the cache is still there for the second. Where tiles can be
// turned it is walked tile by tile, and those with several labels are turned. A chunk keeps for each latent it meets a
// partial row. Partial rows are merged in the order of the chunks, so the bits do not depend on the number of threads.
#pragma once

#include "partial_rows.h"
#include "turned_tile.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// Positions of one label.
struct Segment {
  int64_t label;
  Range positions;
};

// The labels of a chunk, and those of a tile in it.
struct ChunkLabels {
  Segment *list, *of_tile;
  int64_t count = 0;

  ChunkLabels(Arena& arena, int64_t labels) : list(arena.take<Segment>(labels)), of_tile(arena.take<Segment>(labels)) {}
};

template <typename Scalar, typename Call>
class FoldedAttention {
 public:
  using T = ComputeType<Scalar>;

 protected:
  static constexpr int64_t kMostChunks = 16;
  // The same where chunks keep partial rows, which shall not outweigh the map; some chunks remain for several threads.
  static int64_t most_chunks_of_partials(const Call& call) {
    constexpr int64_t kFewestChunks = 4;
    const int64_t rows = larger<int64_t>(call.heads * call.latents.count, 1);
    return smaller(kMostChunks, larger(kFewestChunks, call.pixels.count / rows));
  }
  // Channels from which on lane sums over a row of them cost less than what they save; more where a map is too large
  // for its tiles to be in the caches.
  static constexpr int64_t kFewestTurned = smaller<int64_t>(4 * kLanes<T>, 32);
  static constexpr int64_t kFewestTurnedOfLarge = smaller<int64_t>(8 * kLanes<T>, 64);

  // `blocks`: how many blocks of pixels a thread holds at once.
  FoldedAttention(const Call& call, int64_t blocks, int64_t most_chunks)
      : call_(call),
        arena_(call.workspace),
        channel_width_(padded<T>(call.channels)),
        block_(block_pixels<T>(call.channels, blocks)),
        tiles_across_((call.width + call.tile_width - 1) / call.tile_width),
        tiles_(tiles_across_ * ((call.height + call.tile_height - 1) / call.tile_height)),
        chunks_(smaller(tiles_, most_chunks)),
        turned_(has_planes(call.x) && call.channels % kLanes<T> == 0 &&
                call.channels >= (tiles_ <= kMostChunks ? kFewestTurned : kFewestTurnedOfLarge)),
        occurs_(arena_.template take<int8_t>(call.batch * chunks_ * (call.latents.labels + 1))),
        reached_(arena_.template take<Range>(call.batch * chunks_ * (call.latents.labels + 1))) {}

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
  // Runs visit(image, channels) for all of them, some channels at a time.
  template <typename Visit>
  void each_channels(const Visit& visit) const {
    constexpr int64_t kChannels = 64;
    const int64_t per_image = (call_.channels + kChannels - 1) / kChannels;
    parallel_for(call_.batch * per_image, call_.threads, [&](int64_t item, int) {
      const int64_t begin = item % per_image * kChannels;
      visit(item / per_image, Range{begin, smaller(begin + kChannels, call_.channels)});
    });
  }

  Range latents_of(int64_t image, int64_t label) const {
    const ImageTokens latents(call_.latents, image);
    return latents.in_group(label);
  }
  // Sums for each channel, and as many for rows and columns as a chunk can have.
  PartialRows<T> make_partials(int64_t channel_sums) {
    int64_t rows = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) rows = larger(rows, rows_of_chunk(chunk).size());
    return {arena_, call_.batch * call_.heads * chunks_ * call_.latents.count, channel_sums, rows, call_.width};
  }
  Range rows_of_chunk(int64_t chunk) const {
    const Range tiles = tiles_of_chunk(chunk);
    return {tiles.begin / tiles_across_ * call_.tile_height,
            smaller(call_.height, ((tiles.end - 1) / tiles_across_ + 1) * call_.tile_height)};
  }
  // The columns that a label has reached in a chunk.
  Range& reached(int64_t image, int64_t chunk, int64_t label) const {
    return reached_[(image * chunks_ + chunk) * (call_.latents.labels + 1) + label];
  }

  // Finds the labels in a chunk, unlabelled pixels last as label labels, and notes which occur.
  void find_labels(int64_t image, int64_t chunk, ChunkLabels& labels) const {
    const ImageTokens pixels(call_.pixels, image);
    int8_t* occurs = occurs_ + (image * chunks_ + chunk) * (pixels.labels() + 1);
    labels.count = 0;
    for (int64_t label = 0; label <= pixels.labels(); ++label) {
      const Range positions = positions_in_chunk(pixels, label, chunk);
      occurs[label] = positions.size() > 0;
      reached(image, chunk, label) = {0, 0};
      if (positions.size() > 0) labels.list[labels.count++] = {label, positions};
    }
  }

  // What is fetched from one map or two while a label is visited: the block after the one at hand, and at last these.
  struct Ahead {
    FeatureMap<Scalar> first, second;
    Range positions;
    Rectangle place;
  };

  // Walks through the labels of a chunk that find_labels() found: calls visit(segment, ahead) for each, or tile by tile
  // for the label of a tile that has only one, and visit_tile(place, segments, their number) for other tiles: turning
  // them reads enough lines at once for nothing to be fetched before. `second` is a map with the strides of `first`, or
  // one without data.
  template <typename Visit, typename VisitTile>
  void walk_chunk(int64_t image, int64_t chunk, bool turned, const FeatureMap<Scalar>& first,
                  const FeatureMap<Scalar>& second, ChunkLabels& labels, const Visit& visit,
                  const VisitTile& visit_tile) const {
    if (!turned) {
      for (int64_t i = 0; i < labels.count; ++i) {
        const Range next = i + 1 < labels.count ? labels.list[i + 1].positions : Range{0, 0};
        visit(labels.list[i], Ahead{first, second, next, {}});
      }
      return;
    }
    const ImageTokens pixels(call_.pixels, image);
    const Range tiles = tiles_of_chunk(chunk);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const Rectangle place = place_of(tile);
      const int64_t found = find_labels_of_tile(pixels, tile, labels);
      if (found == 1 && place.width % kLanes<T> == 0) {
        const Rectangle next = tile + 1 < tiles_ ? place_of(tile + 1) : Rectangle{};
        visit(labels.of_tile[0], Ahead{first, second, {0, 0}, next});
      } else {
        visit_tile(place, labels.of_tile, found);
      }
    }
  }

  // Calls visit(chunk) for the chunks in which a label occurs, in their order.
  template <typename Visit>
  void each_chunk_of_label(int64_t image, int64_t label, const Visit& visit) const {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      if (occurs_[(image * chunks_ + chunk) * (call_.latents.labels + 1) + label]) visit(chunk);
    }
  }

  // Calls visit(runs, upcoming) for each block of a label's pixels.
  template <typename Visit>
  void each_block(const ImageTokens& pixels, Range positions, const Ahead& ahead, const Visit& visit) const {
    const auto find = [&](Runs& runs, Range range) {
      runs.find(pixels.at(range.begin), smaller(block_, range.size()), call_.width, kLanes<T>);
    };
    // The block at hand and the next change places: a copy would drive much else out of the nearest cache.
    Runs blocks[2];
    Runs *runs = blocks, *following = blocks + 1;
    find(*runs, positions);
    for (int64_t p = positions.begin; p < positions.end; p += block_) {
      const bool last = p + block_ >= positions.end;
      find(*following, last ? ahead.positions : Range{p + block_, positions.end});
      Upcoming<Scalar> upcoming(ahead.first, ahead.second, runs->pixels);
      if (ahead.first.data) upcoming.add(*following);
      if (last) upcoming.add(ahead.place);
      visit(*runs, upcoming);
      Runs* visited = runs;
      runs = following;
      following = visited;
    }
  }

  // Whether a map of the size of x is written past the caches: from half the usual size on, since these kernels read
  // and write a map in pieces that come from all over it.
  bool streamed() const {
    return call_.batch * call_.pixels.count * call_.channels * int64_t{sizeof(Scalar)} >= kStreamedBytes / 2;
  }

  ChunkLabels make_labels(Arena& arena) const { return {arena, call_.pixels.labels + 1}; }
  TurnedTile<Scalar> make_tile(Arena& arena) const {
    return {arena, call_.channels, turned_ ? call_.tile_height * call_.tile_width : 0};
  }

  // Number of a latent among those of all images and heads.
  int64_t row(int64_t image, int64_t head, int64_t latent) const {
    return (image * call_.heads + head) * call_.latents.count + latent;
  }
  // Where a chunk keeps a latent's partial row.
  int64_t partial(int64_t image, int64_t head, int64_t chunk, int64_t latent) const {
    return ((image * call_.heads + head) * chunks_ + chunk) * call_.latents.count + latent;
  }

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
    // All rows in turns: what is added to a part of a vector waits for what was added to the part before.
    for (const Run& run : runs) {
      each_piece<T>(run, [&](int64_t i, auto size) {
        each_row(latents, [&](int64_t j, int64_t head, int64_t latent) {
          const int64_t table_row = row(image, head, latent);
          T* target = table.rows[j] + run.begin + i;
          Vector<T> sum = load_some(target, size);
          if (by_column) {
            sum += load_some(static_cast<const T*>(by_column) + table_row * call_.width + run.column + i, size);
          }
          if (by_row) sum += static_cast<const T*>(by_row)[table_row * call_.height + run.row];
          store_some<T>(target, sum, size);
        });
      });
    }
  }

  const Call& call_;
  Arena arena_;
  const int64_t channel_width_, block_, tiles_across_, tiles_, chunks_;
  const bool turned_;  // whether tiles of x can be turned

 private:
  Rectangle place_of(int64_t tile) const {
    const int64_t row = tile / tiles_across_ * call_.tile_height, column = tile % tiles_across_ * call_.tile_width;
    return {row, column, smaller(call_.tile_height, call_.height - row),
            smaller(call_.tile_width, call_.width - column)};
  }
  // Whether a pixel is in a tile that comes before the one whose first pixel is at a row and a column, or would be: a
  // column behind the last is after all tiles of that row.
  bool comes_before(int64_t pixel, int64_t row, int64_t column) const {
    const int64_t from_row = pixel - row * call_.width;
    if (from_row < 0) return true;
    return from_row < call_.tile_height * call_.width &&
           static_cast<uint32_t>(from_row) % static_cast<uint32_t>(call_.width) < static_cast<uint64_t>(column);
  }
  // Where the pixels of a label, which are sorted by tile, reach a tile.
  int64_t first_in_tile(const ImageTokens& pixels, Range range, int64_t tile) const {
    const Rectangle place = place_of(tile);
    while (range.size() > 0) {
      const int64_t middle = range.begin + range.size() / 2;
      if (comes_before(pixels.at(middle)[0], place.row, place.column)) {
        range.begin = middle + 1;
      } else {
        range.end = middle;
      }
    }
    return range.begin;
  }
  Range tiles_of_chunk(int64_t chunk) const { return {tiles_ * chunk / chunks_, tiles_ * (chunk + 1) / chunks_}; }
  Range positions_in_chunk(const ImageTokens& pixels, int64_t label, int64_t chunk) const {
    const Range all = pixels.in_group(label);
    if (all.size() <= 0) return {0, 0};
    const Range tiles = tiles_of_chunk(chunk);
    const int64_t begin = first_in_tile(pixels, all, tiles.begin);
    return {begin, chunk + 1 < chunks_ ? first_in_tile(pixels, {begin, all.end}, tiles.end) : all.end};
  }
  // Lists the labels of the next tile of a chunk, and returns how many; what is left of their positions begins after
  // it.
  int64_t find_labels_of_tile(const ImageTokens& pixels, int64_t tile, ChunkLabels& labels) const {
    const Rectangle place = place_of(tile);
    int64_t found = 0;
    for (int64_t i = 0; i < labels.count; ++i) {
      Range& rest = labels.list[i].positions;
      int64_t end = rest.begin, step = 1;
      // Few positions are in one tile, if any: their end is searched in steps that grow and then shrink.
      const auto in_tile = [&](int64_t position) {
        return position < rest.end && comes_before(pixels.at(position)[0], place.row, place.column + call_.tile_width);
      };
      for (; in_tile(end + step - 1); step *= 2) end += step;
      for (; step > 0; step /= 2) {
        if (in_tile(end + step - 1)) end += step;
      }
      if (end > rest.begin) labels.of_tile[found++] = {labels.list[i].label, {rest.begin, end}};
      rest.begin = end;
    }
    return found;
  }

  // (batch, chunks, labels + 1): whether a label occurs in a chunk, and the columns it has reached there
  int8_t* occurs_;
  Range* reached_;
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
