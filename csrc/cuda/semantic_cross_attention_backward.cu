// Gradients of semantic cross-attention where one side of it are latents. With P = exp(scale * <query, key> - lse) over
// the pairs of equal label and dP = <dO, value>:
//     delta = rowsum(P * dP),  dS = scale * P * (dP - delta + dlse),  dQ = dS K,  dK = dS^T Q,  dV = P^T dO.
// What queries without keys pass on, E = the sum of their dO, goes to what they got: all values, or what was given.
#include "semantic_cross_attention.h"

namespace sca::cuda {
namespace {

// P and dP of a tile.
template <bool kWalksKeys, typename Scalar, typename Shared>
SCA_DEVICE void find_weights(const Block& run, const Attention<Scalar>& attention,
                             const sca_semantic_cross_attention_gradients& gradients, const AttentionTile& tile,
                             Shared& shared, float* weights, float* grads) {
  const sca_semantic_cross_attention& call = attention.call;
  const auto scale = static_cast<float>(call.scale);
  attention.products(run, tile, attention.walked_key, attention.latent_key, call.key_width, shared, weights,
                     [&](int j, int p, float sum) {
                       const int64_t query = kWalksKeys ? tile.first_latent + j : attention.token(tile, p);
                       const int64_t row = attention.index(tile, call.query_tokens.count, query);
                       return expf(sum * scale - static_cast<const float*>(call.lse)[row]);
                     });
  attention.products(run, tile, kWalksKeys ? call.value : gradients.grad_out,
                     kWalksKeys ? gradients.grad_out : call.value, call.value_width, shared, grads,
                     [](int, int, float sum) { return sum; });
}

// Writes the gradients of the walked tokens, and leaves those of the latents for each block.
template <typename Scalar, bool kWalksKeys>
struct Backward {
  Attention<Scalar> attention;
  sca_semantic_cross_attention_gradients gradients;
  const float* delta;   // of latent queries
  const float* shares;  // (batch, heads, value width), what each value gets of E; null: nothing
  float* partial;
  using Shared = AttentionShared<2>;

  // Of a latent query: the gradient of its row. Of a latent key: that, and that of its value.
  SCA_HOST_DEVICE int64_t row_size() const {
    return attention.call.key_width + (kWalksKeys ? 0 : attention.call.value_width);
  }

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    const sca_semantic_cross_attention& call = attention.call;
    float *const weights = attention.numbers(item, shared, 0, 2), *const grads = attention.numbers(item, shared, 1, 2);
    attention.each_tile(item, [&](const AttentionTile& tile, bool first_tile) {
      differentiate(run, tile, shared, weights, grads);
      const auto add = [&](int64_t begin) {
        return [&, begin](int j, int64_t c, float sum) {
          float& target = attention.partial_row(partial, tile, j, row_size())[begin + c];
          target = first_tile ? sum : target + sum;
        };
      };
      attention.weighted_sums(run, tile, attention.walked_key, call.key_width, shared, grads, add(0));
      if constexpr (kWalksKeys) {
        attention.write_rows(run, tile, gradients.grad_value, call.value_width, [&](int p, int64_t c) {
          const float share = shares ? shares[attention.index(tile, call.value_width, c)] : 0.0f;
          return share + latents_sum(tile, gradients.grad_out, weights + p, c);
        });
      } else {
        attention.weighted_sums(run, tile, gradients.grad_out, call.value_width, shared, weights, add(call.key_width));
      }
      const sca_tensor& target = kWalksKeys ? gradients.grad_key : gradients.grad_query;
      attention.write_rows(run, tile, target, call.key_width,
                           [&](int p, int64_t c) { return latents_sum(tile, attention.latent_key, grads + p, c); });
    });
  }

  // The weights P and dS of a tile.
  SCA_DEVICE void differentiate(const Block& run, const AttentionTile& tile, Shared& shared, float* weights,
                                float* grads) const {
    const sca_semantic_cross_attention& call = attention.call;
    const auto scale = static_cast<float>(call.scale);
    find_weights<kWalksKeys>(run, attention, gradients, tile, shared, weights, grads);
    run.each_thread([&](int thread) {
      for (int p = thread; p < tile.tokens; p += run.threads()) {
        const int64_t queries = call.query_tokens.count;
        float shift = 0;
        if constexpr (!kWalksKeys) {
          for (int j = 0; j < tile.latents; ++j) shift += weights[j * kTilePixels + p] * grads[j * kTilePixels + p];
          shift -= grad_lse(attention.index(tile, queries, attention.token(tile, p)));
        }
        for (int j = 0; j < tile.latents; ++j) {
          if constexpr (kWalksKeys) {
            const int64_t row = attention.index(tile, queries, tile.first_latent + j);
            shift = delta[row] - grad_lse(row);
          }
          grads[j * kTilePixels + p] = scale * weights[j * kTilePixels + p] * (grads[j * kTilePixels + p] - shift);
        }
      }
    });
  }

  SCA_DEVICE float grad_lse(int64_t row) const {
    return gradients.grad_lse ? static_cast<const float*>(gradients.grad_lse)[row] : 0.0f;
  }
  SCA_DEVICE float latents_sum(const AttentionTile& tile, const sca_tensor& latent, const float* numbers,
                               int64_t c) const {
    float sum = 0;
    for (int j = 0; j < tile.latents; ++j) {
      const int64_t base = attention.offset(latent, tile, tile.first_latent + j);
      sum += numbers[j * kTilePixels] * attention.value(latent, base, c);
    }
    return sum;
  }
};

// Leaves rowsum(P * dP) of latent queries for each block of pixel keys.
template <typename Scalar>
struct PartialDeltas {
  Attention<Scalar> attention;
  sca_semantic_cross_attention_gradients gradients;
  float* partial;
  using Shared = AttentionShared<2>;

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    float *const weights = attention.numbers(item, shared, 0, 2), *const grads = attention.numbers(item, shared, 1, 2);
    attention.each_tile(item, [&](const AttentionTile& tile, bool first_tile) {
      find_weights<true>(run, attention, gradients, tile, shared, weights, grads);
      run.each_thread([&](int thread) {
        for (int j = thread; j < tile.latents; j += run.threads()) {
          float sum = 0;
          for (int p = 0; p < tile.tokens; ++p) sum += weights[j * kTilePixels + p] * grads[j * kTilePixels + p];
          float& target = *attention.partial_row(partial, tile, j, 1);
          target = first_tile ? sum : target + sum;
        }
      });
    });
  }
};

struct FinishDeltas {
  float* delta;
  SCA_DEVICE void operator()(int64_t row, int64_t, float sum) const { delta[row] = sum; }
};

// Writes the gradients of the latents: of their queries, or of their keys and values.
template <typename Scalar>
struct FinishLatents {
  sca_tensor key, value;  // value's data null: there is none, or it is not wanted
  const float* shares;
  int64_t heads, latents, key_width, value_width;

  SCA_DEVICE void operator()(int64_t row, int64_t place, float sum) const {
    const bool of_value = place >= key_width;
    const sca_tensor& target = of_value ? value : key;
    if (!target.data) return;
    const int64_t channel = of_value ? place - key_width : place, of_head = row / latents;
    if (of_value && shares) sum += shares[of_head * value_width + channel];
    const int64_t base = of_head / heads * target.batch_stride + of_head % heads * target.head_stride;
    Attention<Scalar>::write(target, base + row % latents * target.token_stride, channel, sum);
  }
};

template <typename Scalar>
struct Workspace {
  Attention<Scalar> attention;
  TokenSums<Scalar> empty_sums;
  float *shares, *partial, *delta;

  Workspace(const sca_semantic_cross_attention& call, const sca_tensor& grad_out, Arena& arena)
      : attention(call, walks_keys(call)),
        empty_sums(grad_out, static_cast<const float*>(call.lse), call.heads, call.query_tokens.count,
                   call.value_width) {
    shares = arena.take<float>(attention.heads() * call.value_width);
    empty_sums.partial = arena.take<Sum<float>>(empty_sums.size(call.batch));
    partial = arena.take<float>(attention.heads() * attention.blocks.rows * (call.key_width + call.value_width));
    delta = arena.take<float>(attention.heads() * call.query_tokens.count);
    attention.take_spilled(arena, 2);
  }
};

template <typename Scalar, bool kWalksKeys>
const char* backward(const sca_semantic_cross_attention& call, const sca_semantic_cross_attention_gradients& gradients,
                     void* stream) {
  Arena arena(call.workspace);
  const Workspace<Scalar> workspace(call, gradients.grad_out, arena);
  const Attention<Scalar>& attention = workspace.attention;
  const LabelBlocks& blocks = attention.blocks;
  const float share = 1 / static_cast<float>(larger<int64_t>(call.key_tokens.count, 1));
  const FinishTokenSums finish_empty = {workspace.shares, static_cast<float*>(gradients.grad_empty_value), share};
  if (const char* error = sum_tokens(workspace.empty_sums, call.batch, finish_empty, call.threads, stream))
    return error;
  const float* const shares = takes_means(call) ? workspace.shares : nullptr;

  if (kWalksKeys) {
    const PartialDeltas<Scalar> deltas = {attention, gradients, workspace.partial};
    if (const char* error = launch(deltas, attention.items(), call.threads, stream)) return error;
    const MergeLatents<FinishDeltas> merge = {blocks, workspace.partial, call.heads, 1, {workspace.delta}};
    if (const char* error = launch(merge, merge.items(call.batch), call.threads, stream)) return error;
  }
  const Backward<Scalar, kWalksKeys> kernel = {attention, gradients, workspace.delta, shares, workspace.partial};
  if (const char* error = launch(kernel, attention.items(), call.threads, stream)) return error;
  const FinishLatents<Scalar> finish = {kWalksKeys ? gradients.grad_query : gradients.grad_key,
                                        kWalksKeys ? sca_tensor{} : gradients.grad_value,
                                        shares,
                                        call.heads,
                                        blocks.latents.count,
                                        call.key_width,
                                        call.value_width};
  const MergeLatents<FinishLatents<Scalar>> merge = {blocks, workspace.partial, call.heads, kernel.row_size(), finish};
  return launch(merge, merge.items(call.batch), call.threads, stream);
}

}  // namespace
}  // namespace sca::cuda

using namespace sca::cuda;

int64_t sca_cuda_semantic_cross_attention_backward_workspace(const sca_semantic_cross_attention* call) {
  Arena arena(nullptr);
  Workspace<float>(*call, {}, arena);
  return arena.used();
}

const char* sca_cuda_semantic_cross_attention_backward(const sca_semantic_cross_attention* call,
                                                       const sca_semantic_cross_attention_gradients* gradients,
                                                       void* stream) {
  if (const char* reason = refusal(*call)) return reason;
  return with_scalar_type(call->scalar_type, [&](auto scalar) {
    using Scalar = decltype(scalar);
    return walks_keys(*call) ? backward<Scalar, true>(*call, *gradients, stream)
                             : backward<Scalar, false>(*call, *gradients, stream);
  });
}
