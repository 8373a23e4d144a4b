// Walking the tokens of an image label by label.
#pragma once

#include "../sca_kernels.h"
#include "rows.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The tokens of one image.
class ImageTokens {
 public:
  ImageTokens(const sca_tokens& tokens, int64_t image)
      : count_(tokens.count),
        labels_(tokens.labels),
        offsets_(tokens.offsets + image * tokens.offsets_stride),
        order_(tokens.order ? tokens.order + image * tokens.order_stride : nullptr) {}

  int64_t count() const { return count_; }
  int64_t labels() const { return labels_; }
  Positions at(int64_t position) const { return {order_, position}; }

  // The positions of a label's tokens; label == labels() stands for no label and has none that others could attend to.
  Range with_label(int64_t label) const {
    return label < labels_ ? Range{offsets_[label], offsets_[label + 1]} : Range{0, 0};
  }

  // The same, but as label labels() the tokens without a label.
  Range in_group(int64_t label) const { return label < labels_ ? with_label(label) : Range{offsets_[labels_], count_}; }

  // Calls visit(label, positions) for each label with tokens in `positions`, in order; unlabelled tokens come last, as
  // label labels().
  template <typename Visit>
  void for_each_label(Range positions, const Visit& visit) const {
    if (positions.size() <= 0) return;
    int64_t label = 0;  // the last label that begins at or before the first position
    for (int64_t above = labels_ + 1; above - label > 1;) {
      const int64_t middle = label + (above - label) / 2;
      (offsets_[middle] <= positions.begin ? label : above) = middle;
    }
    for (int64_t begin = positions.begin; begin < positions.end; ++label) {
      const int64_t label_end = label < labels_ ? offsets_[label + 1] : count_;
      const int64_t end = label_end < positions.end ? label_end : positions.end;
      if (begin < end) visit(label, Range{begin, end});
      begin = end;
    }
  }

  // Whether some token finds no token of its label among `others`.
  bool any_unmatched(const ImageTokens& others) const {
    for (int64_t label = 0; label < labels_; ++label) {
      if (with_label(label).size() > 0 && others.with_label(label).size() == 0) return true;
    }
    return offsets_[labels_] < count_;
  }

 private:
  int64_t count_, labels_;
  const int64_t* offsets_;
  const int32_t* order_;
};

inline bool are_latents(const sca_tokens& tokens) { return tokens.order == nullptr; }

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
