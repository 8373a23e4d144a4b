#include "../sca_kernels.h"
#include "parallel.h"
#include "simd.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// A counting sort of the pixels by (label, tile, raster position) in three steps, linear in the number of pixels:
// count the labels of each tile, add up where each segment (a label in a tile) begins, put each pixel in its place.
class LabelPlan {
 public:
  explicit LabelPlan(const sca_label_plan& call)
      : call_(call),
        tiles_across_(divide_up(call.width, call.tile_width)),
        tiles_(divide_up(call.height, call.tile_height) * tiles_across_),
        room_(smaller(call.tile_height * call.tile_width, call.labels + 1)) {}

  void run() const {
    const int64_t places = call_.labels + 1;
    for (int64_t i = 0; i < larger<int64_t>(call_.threads, call_.batch) * places; ++i) call_.workspace[i] = 0;
    const int64_t items = call_.batch * tiles_;
    parallel_for(items, call_.threads,
                 [&](int64_t item, int thread) { count_labels(item, call_.workspace + thread * places); });
    parallel_for(call_.batch, call_.threads,
                 [&](int64_t image, int) { place_segments(image, call_.workspace + image * places); });
    parallel_for(items, call_.threads,
                 [&](int64_t item, int thread) { place_pixels(item, call_.workspace + thread * places); });
  }

 private:
  struct Segment {
    int32_t label, begin, count;
  };

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
  Segment* segments(int64_t item) const { return reinterpret_cast<Segment*>(call_.tile_segments) + item * room_; }
  const int32_t* label_map(int64_t image) const { return call_.label_map + image * call_.height * call_.width; }
  // Pixels without a label take the place after the last label.
  int64_t place(int32_t label) const {
    return label >= 0 && label < call_.labels ? static_cast<int64_t>(label) : call_.labels;
  }

  // Calls visit(pixel) for each pixel of a tile in raster order.
  template <typename Visit>
  void each_pixel(int64_t tile, const Visit& visit) const {
    const int64_t top = tile / tiles_across_ * call_.tile_height, left = tile % tiles_across_ * call_.tile_width;
    const int64_t bottom = smaller(top + call_.tile_height, call_.height);
    const int64_t right = smaller(left + call_.tile_width, call_.width);
    for (int64_t row = top; row < bottom; ++row) {
      for (int64_t column = left; column < right; ++column) visit(row * call_.width + column);
    }
  }

  // Lists the tile's labels, in ascending order, with their pixel counts. `counts` is zero before and after.
  void count_labels(int64_t item, int32_t* counts) const {
    const int32_t* labels = label_map(item / tiles_);
    Segment* list = segments(item);
    int32_t found = 0;
    each_pixel(item % tiles_, [&](int64_t pixel) {
      const int64_t label = place(labels[pixel]);
      if (counts[label]++ == 0) {
        int32_t i = found++;
        for (; i > 0 && list[i - 1].label > label; --i) list[i] = list[i - 1];
        list[i].label = static_cast<int32_t>(label);
      }
    });
    for (int32_t i = 0; i < found; ++i) {
      list[i].count = counts[list[i].label];
      counts[list[i].label] = 0;
    }
    call_.tile_counts[item] = found;
  }

  // Sums up where each label and each segment begins. `next` is zero before and after.
  void place_segments(int64_t image, int32_t* next) const {
    int64_t* offsets = call_.offsets + image * (call_.labels + 1);
    const auto each_segment = [&](const auto& visit) {
      for (int64_t item = image * tiles_; item < (image + 1) * tiles_; ++item) {
        for (int32_t i = 0; i < call_.tile_counts[item]; ++i) visit(segments(item)[i]);
      }
    };
    each_segment([&](const Segment& segment) { next[segment.label] += segment.count; });
    int64_t total = 0;
    for (int64_t label = 0; label <= call_.labels; ++label) {
      offsets[label] = total;
      total += next[label];
      next[label] = static_cast<int32_t>(offsets[label]);
    }
    each_segment([&](Segment& segment) {
      segment.begin = next[segment.label];
      next[segment.label] += segment.count;
    });
    for (int64_t label = 0; label <= call_.labels; ++label) next[label] = 0;
  }

  void place_pixels(int64_t item, int32_t* next) const {
    const int64_t image = item / tiles_;
    const int32_t* labels = label_map(image);
    int32_t* order = call_.order + image * call_.height * call_.width;
    Segment* list = segments(item);
    const int32_t found = call_.tile_counts[item];
    for (int32_t i = 0; i < found; ++i) next[list[i].label] = list[i].begin;
    each_pixel(item % tiles_,
               [&](int64_t pixel) { order[next[place(labels[pixel])]++] = static_cast<int32_t>(pixel); });
    if (found > 0 && list[found - 1].label == call_.labels) list[found - 1].label = -1;
  }

  const sca_label_plan& call_;
  const int64_t tiles_across_, tiles_, room_;
};

}  // namespace

void label_plan_make(const sca_label_plan& call) { LabelPlan(call).run(); }

}  // namespace sca::SCA_CPU_CAPABILITY
