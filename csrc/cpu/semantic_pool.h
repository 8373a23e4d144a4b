// What the forward and the backward of semantic_pool share.
#pragma once

#include "folded_attention.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

template <typename Scalar>
class SemanticPool : public FoldedAttention<Scalar, sca_semantic_pool> {
  using Base = FoldedAttention<Scalar, sca_semantic_pool>;

 public:
  using typename Base::T;

  explicit SemanticPool(const sca_semantic_pool& call)
      : Base(call, 2, Base::most_chunks_of_partials(call)), partials_(Base::make_partials(Base::channel_width_)) {
    const int64_t chunks = call.batch * Base::chunks_, moments = chunks * call.channels;
    const int64_t rows = chunks * call.heads * call.latents.count;
    max_ = arena_.template take<T>(rows);
    sum_ = arena_.template take<T>(rows);
    mean_ = arena_.template take<double>(moments);
    seen_ = arena_.template take<double>(chunks);
    squares_ = arena_.template take<double>(moments);
    offset_ = arena_.template take<T>(call.batch * Base::channel_width_);
    factor_ = arena_.template take<T>(call.batch * Base::channel_width_);
    centre_ = arena_.template take<T>(call.batch * Base::channel_width_);
    delta_ = arena_.template take<T>(call.batch * call.heads * call.latents.count);
  }

  int64_t workspace_size() const { return arena_.used() + call_.threads * Base::template scratch_size<Scratch>(*this); }

 protected:
  using Base::arena_;
  using Base::call_;

  // What one thread works in; rows are of all heads of a label's latents.
  struct Scratch {
    ChunkLabels labels;
    TurnedTile<Scalar> x_tile, gradient_tile;
    FeatureBlock<T> x, gradient;
    RowTable<T> queries, gradients;        // (rows, channels)
    RowTable<T> moments;                   // rows of channels: a shift, the sums of differences from it, of squares
    RowTable<T> weights, logit_gradients;  // (rows, pixels of a block)
    T** sums;                              // the partial rows

    Scratch(Arena& arena, const SemanticPool& kernel)
        : labels(kernel.make_labels(arena)),
          x_tile(kernel.make_tile(arena)),
          gradient_tile(kernel.make_tile(arena)),
          x(arena, kernel.call_.channels, kernel.block_),
          gradient(arena, kernel.call_.channels, kernel.block_),
          queries(arena, kernel.most_rows(), kernel.channel_width_),
          gradients(arena, kernel.most_rows(), kernel.channel_width_),
          moments(arena, 3, kernel.channel_width_),
          weights(arena, kernel.most_rows(), kernel.block_),
          logit_gradients(arena, kernel.most_rows(), kernel.block_),
          sums(arena.take<T*>(kernel.most_rows())) {}
  };

  // Clears the partial rows of the labels in a chunk.
  void clear_partials(int64_t image, int64_t chunk, const ChunkLabels& labels) const {
    for (int64_t i = 0; i < labels.count; ++i) {
      Base::each_row(labelled_latents(image, labels.list[i].label), [&](int64_t, int64_t head, int64_t latent) {
        const int64_t index = Base::partial(image, head, chunk, latent);
        max_[index] = -std::numeric_limits<T>::infinity();
        sum_[index] = 0;
        partials_.clear(partials_.at(index));
      });
    }
  }
  void point_to_partials(int64_t image, int64_t chunk, Range latents, T** sums) const {
    Base::each_row(latents, [&](int64_t j, int64_t head, int64_t latent) {
      sums[j] = partials_.at(Base::partial(image, head, chunk, latent));
    });
  }
  // None for pixels without label.
  Range labelled_latents(int64_t image, int64_t label) const {
    return ImageTokens(call_.latents, image).with_label(label);
  }

  // table[j][p] = <queries[j], pixel p> + row_bias + col_bias
  void make_logits(const Scratch& scratch, const Runs& runs, int64_t image, Range latents) const {
    scratch.x.multiply(scratch.queries, latents.size() * call_.heads, scratch.weights);
    Base::add_by_position(runs, image, latents, call_.row_bias, call_.col_bias, scratch.weights);
  }

  const PartialRows<T> partials_;
  T *max_, *sum_;
  double *mean_, *squares_, *seen_;  // of the chunks; the last is their pixels
  // (batch, padded channels), backward: moments and absent labels add offset + factor (x - centre) to the gradient of
  // x.
  T *offset_, *factor_, *centre_;
  T* delta_;  // (batch, heads, latents), backward
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
