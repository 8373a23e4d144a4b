// Softmax over tokens that come block by block. A partial row has sums of numbers with the weight exp(logit - maximum),
// and behind them the maximum, the sum of the weights, and what the sums of earlier tiles are multiplied by.
#pragma once

#include "folded_attention.h"

namespace sca::cuda {

enum { kMaximum, kSum, kFactor, kSoftmaxExtra };

// Turns the logits of a tile into weights, by the maximum so far. `extra` is what is behind the sums.
SCA_DEVICE void update_softmax(float* extra, float* logits, int tokens, bool first_tile) {
  const float before = first_tile ? -INFINITY : extra[kMaximum];
  float maximum = before, sum = 0;
  for (int p = 0; p < tokens; ++p) maximum = larger(maximum, logits[p]);
  const float finite = maximum == -INFINITY ? 0.0f : maximum;
  for (int p = 0; p < tokens; ++p) sum += logits[p] = expf(logits[p] - finite);
  const float factor = expf(before - finite);
  extra[kSum] = first_tile ? sum : extra[kSum] * factor + sum;
  extra[kMaximum] = maximum;
  extra[kFactor] = factor;
}

// The results of the latents from the partial rows, in the order of the label blocks: finish.lse(latent row, lse) and
// finish.result(latent row, place, value), or finish.empty(latent row, place) where there is no token of the label.
// Every thread makes the sum of weights itself.
template <typename Finish>
struct MergeSoftmax {
  LabelBlocks blocks;
  const float* partial;
  int64_t heads, width;
  Finish finish;
  struct Shared {};

  int64_t items(int64_t batch) const { return batch * heads * blocks.latents.count; }

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared&) const {
    const int64_t latents = blocks.latents.count, of_head = item / latents, size = width + kSoftmaxExtra;
    const auto each = [&](const auto& visit) {
      blocks.each_partial_row(of_head / heads, item % latents,
                              [&](int64_t row) { visit(partial + (of_head * blocks.rows + row) * size); });
    };
    run.each_thread([&](int thread) {
      bool empty = true;
      float maximum = -INFINITY, total = 0;
      each([&](const float* row) {
        empty = false;
        maximum = larger(maximum, row[width + kMaximum]);
      });
      const float finite = maximum == -INFINITY ? 0.0f : maximum;
      each([&](const float* row) { total += row[width + kSum] * expf(row[width + kMaximum] - finite); });
      if (thread == 0) finish.lse(item, empty ? -INFINITY : finite + logf(total));
      for (int64_t i = thread; i < width; i += run.threads()) {
        float sum = 0;
        each([&](const float* row) { sum += row[i] * expf(row[width + kMaximum] - finite); });
        if (empty) {
          finish.empty(item, i);
        } else {
          finish.result(item, i, sum / total);
        }
      }
    });
  }
};

}  // namespace sca::cuda
