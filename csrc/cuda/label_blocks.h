// Blocks of the pixels of one label, found in a plan on the device, and the latents of that label.
#pragma once

#include "features.h"

namespace sca::cuda {

// Pixels at the positions begin to end of a plan's order, and their latents; pixels without a label have none.
struct LabelBlock {
  int64_t image, label, begin, end;
  int64_t first_latent, latents;
  int64_t partial_row;  // see LabelBlocks
};

// The pixels of each label are cut into blocks of `size`, the last of which may have fewer. Block v of an image belongs
// to the label l with offsets[l] / size + l <= v that is the last. So the number of blocks depends on sizes alone, some
// have no pixels, and none has two labels, however many there are.
//
// Each block leaves partial results for its latents in `rows` rows per image, from `partial_row` on. They never
// overlap: from one block to the next offsets[l] / size + i grows by one, or the label does.
struct LabelBlocks {
  sca_tokens pixels, latents;
  int64_t size, per_image, rows;

  LabelBlocks(const sca_tokens& pixels, const sca_tokens& latents, int64_t size)
      : pixels(pixels),
        latents(latents),
        size(size),
        per_image(pixels.count / size + pixels.labels + 1),
        rows((pixels.count / size + 1) * latents.max_per_label + latents.count) {}

  SCA_DEVICE const int64_t* offsets(int64_t image) const { return pixels.offsets + image * pixels.offsets_stride; }
  SCA_DEVICE const int64_t* cu_latents(int64_t image) const { return latents.offsets + image * latents.offsets_stride; }
  SCA_DEVICE uint32_t pixel(int64_t image, int64_t position) const {
    return static_cast<uint32_t>(pixels.order[image * pixels.order_stride + position]);
  }

  SCA_DEVICE LabelBlock at(int64_t item) const {
    LabelBlock block;
    block.image = item / per_image;
    const int64_t index = item % per_image, *const begins = offsets(block.image);
    block.label = last_not_above(pixels.labels, index, [&](int64_t label) { return begins[label] / size + label; });
    const int64_t first = begins[block.label] / size, i = index - first - block.label;
    const bool labelled = block.label < pixels.labels;
    const int64_t end = labelled ? begins[block.label + 1] : pixels.count;
    block.begin = smaller(begins[block.label] + i * size, end);
    block.end = smaller(block.begin + size, end);
    const int64_t* const cu = cu_latents(block.image);
    block.first_latent = labelled ? cu[block.label] : 0;
    block.latents = labelled ? smaller(cu[block.label + 1] - cu[block.label], latents.max_per_label) : 0;
    block.partial_row = (first + i) * latents.max_per_label + block.first_latent;
    return block;
  }

  // Calls visit(row) for the partial rows of a latent, in the order of the blocks; for none if it has no label.
  template <typename Visit>
  SCA_DEVICE void each_partial_row(int64_t image, int64_t latent, const Visit& visit) const {
    const int64_t *const cu = cu_latents(image), *const begins = offsets(image);
    if (latent >= cu[pixels.labels]) return;
    const int64_t label = last_not_above(pixels.labels - 1, latent, [&](int64_t l) { return cu[l]; });
    const int64_t first = begins[label] / size, blocks = divide_up(begins[label + 1] - begins[label], size);
    for (int64_t i = 0; i < blocks; ++i) visit((first + i) * latents.max_per_label + latent);
  }

  // The last index up to `most` with value(index) <= bound; values do not fall, and the first is not above.
  template <typename Value>
  SCA_DEVICE static int64_t last_not_above(int64_t most, int64_t bound, const Value& value) {
    int64_t low = 0, high = most;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (value(middle) <= bound) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

}  // namespace sca::cuda
