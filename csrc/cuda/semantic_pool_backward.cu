// Gradients of semantic_pool. With a = exp(logits - lse), over the pixels p of a latent's label, and
// dA = <dO, x_p> + dR[row] + dC[column]:
//     dS = a (dA - delta),  delta = <dO, O> + <dR, R> + <dC, C> - dlse,
//     dx_p = sum over the latents of a dO + dS query, and what the moments and the latents without pixels add,
//     dquery = sum over p of dS x_p, and dS summed over the rows and columns of the image gives those of the biases.
#include "folded_attention.h"

namespace sca::cuda {
namespace {

constexpr int kChannels = 32;  // that are worked on at once

SCA_DEVICE float number(const void* table, int64_t index) {
  return table ? static_cast<const float*>(table)[index] : 0.0f;
}

// delta of each latent.
struct Deltas {
  sca_semantic_pool call;
  sca_semantic_pool_gradients gradients;
  float* delta;
  struct Shared {
    float sums[kThreads];
  };

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    run.each_thread([&](int thread) {
      const int step = run.threads();
      shared.sums[thread] = inner(gradients.grad_pooled, call.pooled, item, call.channels, thread, step) +
                            inner(gradients.grad_row_mass, call.row_mass, item, call.height, thread, step) +
                            inner(gradients.grad_col_mass, call.col_mass, item, call.width, thread, step);
    });
    reduce(run, run.threads(), 1, [&](int a, int b) { shared.sums[a] += shared.sums[b]; });
    run.each_thread([&](int thread) {
      if (thread == 0) delta[item] = shared.sums[0] - number(gradients.grad_lse, item);
    });
  }

  SCA_DEVICE static float inner(const void* a, const void* b, int64_t row, int64_t size, int first, int step) {
    float sum = 0;
    if (!a) return sum;
    for (int64_t i = first; i < size; i += step) sum += number(a, row * size + i) * number(b, row * size + i);
    return sum;
  }
};

// What each pixel of a channel gets through the mean of x: its own gradient, and those of latents that pooled the mean.
struct Offsets {
  sca_semantic_pool call;
  sca_semantic_pool_gradients gradients;
  float* offset;
  int lanes;
  struct Shared {
    float sums[kThreads];
  };

  Offsets(const sca_semantic_pool& call, const sca_semantic_pool_gradients& gradients, float* offset)
      : call(call), gradients(gradients), offset(offset), lanes(smaller(block_threads(), 32)) {}
  int64_t items() const { return call.batch * divide_up(call.channels, lanes); }

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    const int64_t groups = divide_up(call.channels, lanes), image = item / groups, first = item % groups * lanes;
    const int64_t rows = call.heads * call.latents.count;
    const int parts = run.threads() / lanes;
    run.each_thread([&](int thread) {
      const int64_t channel = first + thread % lanes;
      float sum = 0;
      if (call.empty_uniform && gradients.grad_pooled && channel < call.channels) {
        for (int64_t row = image * rows + thread / lanes; row < (image + 1) * rows; row += parts) {
          if (number(call.lse, row) == -INFINITY) sum += number(gradients.grad_pooled, row * call.channels + channel);
        }
      }
      shared.sums[thread] = sum;
    });
    reduce(run, parts, lanes, [&](int a, int b) { shared.sums[a] += shared.sums[b]; });
    run.each_thread([&](int thread) {
      const int64_t channel = first + thread, index = image * call.channels + channel;
      if (thread >= lanes || channel >= call.channels) return;
      const float sum = shared.sums[thread] + number(gradients.grad_mean, index);
      offset[index] = sum / static_cast<float>(larger<int64_t>(call.pixels.count, 1));
    });
  }
};

// Writes the gradient of x, and leaves for each label block the gradients of its latents' queries.
template <typename Scalar>
struct Backward {
  sca_semantic_pool call;
  sca_semantic_pool_gradients gradients;
  Logits<Scalar> logits, grad_weights;
  const float *delta, *offset;
  PixelValues position;  // gradients of the logits, for the sums over rows and columns; values null: not wanted
  float *spilled, *partial;

  struct Shared {
    float sums[kRowGroup][kThreads];
    float weights[2][kSharedRows * kTilePixels];  // and the gradients of the logits
    float x[kChannels][kTilePixels + 1];
  };

  SCA_DEVICE float* numbers(int64_t item, Shared& shared, int set) const {
    const int64_t most_rows = call.heads * call.latents.max_per_label;
    return spilled ? spilled + (2 * item + set) * most_rows * kTilePixels : shared.weights[set];
  }
  SCA_DEVICE float* partial_row(const Tile& tile, int row) const {
    const int64_t of_head = tile.block.image * call.heads + row / tile.block.latents;
    return partial + (of_head * logits.blocks.rows + tile.block.partial_row + row % tile.block.latents) * call.channels;
  }

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    const LabelBlock block = logits.blocks.at(item);
    float *const weights = numbers(item, shared, 0), *const grad_logits = numbers(item, shared, 1);
    for (int64_t begin = block.begin; begin < block.end; begin += logits.lanes.pixels) {
      const Tile tile = logits.tile(block, begin);
      logits.compute(run, tile, shared, weights);
      grad_weights.compute(run, tile, shared, grad_logits);
      run.each_thread([&](int thread) {
        for (int index = thread; index < tile.rows * kTilePixels; index += run.threads()) {
          if (index % kTilePixels >= tile.pixels) continue;
          const int64_t row = logits.rows.index(tile, index / kTilePixels);
          weights[index] = expf(weights[index] - static_cast<const float*>(call.lse)[row]);
          grad_logits[index] = weights[index] * (grad_logits[index] - delta[row]);
        }
      });
      if (position.values) {
        run.each_thread([&](int thread) {
          if (thread < tile.pixels) position.store_tile(tile, thread, logits.pixel(tile, thread), grad_logits);
        });
      }
      for (int64_t first = 0; first < call.channels; first += kChannels) {
        run.each_thread([&](int thread) { fill(tile, thread, first, shared, weights, grad_logits); });
        run.each_thread([&](int thread) {
          for (int index = thread; index < tile.rows * kChannels; index += run.threads()) {
            const int row = index / kChannels, c = index % kChannels;
            if (first + c >= call.channels) continue;
            float sum = 0;
            for (int p = 0; p < tile.pixels; ++p) sum += grad_logits[row * kTilePixels + p] * shared.x[c][p];
            float& target = partial_row(tile, row)[first + c];
            target = begin == block.begin ? sum : target + sum;
          }
        });
      }
    }
  }

  SCA_DEVICE void fill(const Tile& tile, int thread, int64_t begin, Shared& shared, const float* weights,
                       const float* grad_logits) const {
    const TileLanes& lanes = logits.lanes;
    const int p = lanes.pixel(thread);
    if (!lanes.inside(thread) || p >= tile.pixels) return;
    const int64_t base = logits.offset(call.x, tile, p);
    for (int c = lanes.channel(thread); c < kChannels && begin + c < call.channels; c += lanes.channels) {
      const int64_t channel = begin + c, index = tile.block.image * call.channels + channel;
      shared.x[c][p] = logits.feature(call.x, base, channel);
      if (!gradients.grad_x.data) continue;
      const float share = 2 / static_cast<float>(call.pixels.count);
      const float deviation = shared.x[c][p] - static_cast<const float*>(call.mean)[index];
      float sum = offset[index] + share * number(gradients.grad_second_moment, index) * deviation;
      for (int row = 0; row < tile.rows; ++row) {
        const int64_t place = logits.rows.index(tile, row) * call.channels + channel;
        sum += weights[row * kTilePixels + p] * number(gradients.grad_pooled, place) +
               grad_logits[row * kTilePixels + p] * logits.keys[place];
      }
      const int64_t target = logits.offset(gradients.grad_x, tile, p) + channel * gradients.grad_x.channel_stride;
      narrow(sum, static_cast<Scalar*>(gradients.grad_x.data)[target]);
    }
  }
};

struct FinishQueries {
  float* grad_queries;
  int64_t channels;

  SCA_DEVICE void operator()(int64_t row, int64_t channel, float sum) const {
    grad_queries[row * channels + channel] = sum;
  }
};

struct Workspace {
  float *delta, *offset, *partial, *spilled;
  PixelValues position;

  Workspace(const sca_semantic_pool& call, const LabelBlocks& blocks, Arena& arena) {
    const int64_t most_rows = call.heads * call.latents.max_per_label;
    delta = arena.take<float>(call.batch * call.heads * call.latents.count);
    offset = arena.take<float>(call.batch * call.channels);
    partial = arena.take<float>(call.batch * call.heads * blocks.rows * call.channels);
    const bool biased = call.row_bias || call.col_bias, spills = most_rows > kSharedRows;
    position =
        PixelValues::take(arena, biased ? call.batch : 0, call.heads, call.latents.max_per_label, call.pixels.count);
    spilled = arena.take<float>(spills ? 2 * call.batch * blocks.per_image * most_rows * kTilePixels : 0);
    if (!spills) spilled = nullptr;
  }
};

template <typename Scalar>
const char* backward(const sca_semantic_pool& call, const sca_semantic_pool_gradients& gradients, void* stream) {
  Arena arena(call.workspace);
  const Logits<Scalar> logits(call, block_of_tiles(call.x, call.pixels.count), call.queries, nullptr);
  const LabelBlocks& blocks = logits.blocks;
  Workspace workspace(call, blocks, arena);
  const Deltas deltas = {call, gradients, workspace.delta};
  const int64_t rows = call.batch * call.heads * call.latents.count;
  if (const char* error = launch(deltas, rows, call.threads, stream)) return error;
  const Offsets offsets(call, gradients, workspace.offset);
  if (const char* error = launch(offsets, offsets.items(), call.threads, stream)) return error;

  if (!gradients.grad_row_bias && !gradients.grad_col_bias) workspace.position.values = nullptr;
  Logits<Scalar> grad_weights = logits;  // logits of the rows of gradients are the gradients of the weights
  grad_weights.keys = static_cast<const float*>(gradients.grad_pooled);
  grad_weights.row_bias = static_cast<const float*>(gradients.grad_row_mass);
  grad_weights.col_bias = static_cast<const float*>(gradients.grad_col_mass);
  const Backward<Scalar> kernel = {call,
                                   gradients,
                                   logits,
                                   grad_weights,
                                   workspace.delta,
                                   workspace.offset,
                                   workspace.position,
                                   workspace.spilled,
                                   workspace.partial};
  if (const char* error = launch(kernel, call.batch * blocks.per_image, call.threads, stream)) return error;
  if (gradients.grad_queries) {
    const FinishQueries finish = {static_cast<float*>(gradients.grad_queries), call.channels};
    const MergeLatents<FinishQueries> merge = {blocks, workspace.partial, call.heads, call.channels, finish};
    if (const char* error = launch(merge, merge.items(call.batch), call.threads, stream)) return error;
  }
  for (const bool over_rows : {true, false}) {
    auto* const target = static_cast<float*>(over_rows ? gradients.grad_row_bias : gradients.grad_col_bias);
    if (!target) continue;
    const LineSums sums(workspace.position, call.latents.count, call.height, call.width, over_rows, target);
    if (const char* error = launch(sums, sums.items(call.batch), call.threads, stream)) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace sca::cuda

using namespace sca::cuda;

int64_t sca_cuda_semantic_pool_backward_workspace(const sca_semantic_pool* call) {
  Arena arena(nullptr);
  Workspace(*call, LabelBlocks(call->pixels, call->latents, block_of_tiles(call->x, call->pixels.count)), arena);
  return arena.used();
}

const char* sca_cuda_semantic_pool_backward(const sca_semantic_pool* call, const sca_semantic_pool_gradients* gradients,
                                            void* stream) {
  return with_scalar_type(call->scalar_type,
                          [&](auto scalar) { return backward<decltype(scalar)>(*call, *gradients, stream); });
}
