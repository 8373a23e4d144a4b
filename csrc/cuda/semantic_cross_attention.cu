// Semantic cross-attention where one side of it are latents. Tokens that attend to latents get their results at once;
// where latents attend to pixels, blocks of these leave partial results, which are merged in order.
#include "semantic_cross_attention.h"

namespace sca::cuda {
namespace {

// Tokens attend to latents.
template <typename Scalar>
struct AttendToLatents {
  Attention<Scalar> attention;
  const float* empty_value;  // (batch, heads, value width), of tokens without latents; null: zero
  using Shared = AttentionShared<1>;

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    const sca_semantic_cross_attention& call = attention.call;
    float* const weights = attention.numbers(item, shared, 0, 1);
    attention.each_tile(item, [&](const AttentionTile& tile, bool) {
      attention.logits(run, tile, shared, weights);
      run.each_thread([&](int thread) {
        for (int p = thread; p < tile.tokens; p += run.threads()) normalize(tile, p, weights + p);
      });
      attention.write_rows(run, tile, call.out, call.value_width, [&](int p, int64_t c) {
        if (tile.latents == 0) return empty_value ? empty_value[attention.index(tile, call.value_width, c)] : 0.0f;
        float sum = 0;
        for (int j = 0; j < tile.latents; ++j) {
          const int64_t base = attention.offset(call.value, tile, tile.first_latent + j);
          sum += weights[j * kTilePixels + p] * attention.value(call.value, base, c);
        }
        return sum;
      });
    });
  }

  // From the logits of a token to weights.
  SCA_DEVICE void normalize(const AttentionTile& tile, int p, float* numbers) const {
    float maximum = -INFINITY, sum = 0;
    for (int j = 0; j < tile.latents; ++j) maximum = larger(maximum, numbers[j * kTilePixels]);
    for (int j = 0; j < tile.latents; ++j) sum += numbers[j * kTilePixels] = expf(numbers[j * kTilePixels] - maximum);
    for (int j = 0; j < tile.latents; ++j) numbers[j * kTilePixels] /= sum;
    const int64_t row = attention.index(tile, attention.blocks.pixels.count, attention.token(tile, p));
    static_cast<float*>(attention.call.lse)[row] = tile.latents > 0 ? maximum + logf(sum) : -INFINITY;
  }
};

// Latents attend to pixels: partial results of a block, as partial_softmax.h has them.
template <typename Scalar>
struct AttendToPixels {
  Attention<Scalar> attention;
  float* partial;
  using Shared = AttentionShared<1>;

  SCA_HOST_DEVICE int64_t row_size() const { return attention.call.value_width + kSoftmaxExtra; }

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    const int64_t width = attention.call.value_width;
    float* const weights = attention.numbers(item, shared, 0, 1);
    attention.each_tile(item, [&](const AttentionTile& tile, bool first_tile) {
      attention.logits(run, tile, shared, weights);
      run.each_thread([&](int thread) {
        for (int j = thread; j < tile.latents; j += run.threads()) {
          float* const row = attention.partial_row(partial, tile, j, row_size());
          update_softmax(row + width, weights + j * kTilePixels, tile.tokens, first_tile);
        }
      });
      attention.weighted_sums(run, tile, attention.call.value, width, shared, weights,
                              [&](int j, int64_t c, float sum) {
                                float* const row = attention.partial_row(partial, tile, j, row_size());
                                row[c] = first_tile ? sum : row[c] * row[width + kFactor] + sum;
                              });
    });
  }
};

template <typename Scalar>
struct FinishAttention {
  sca_semantic_cross_attention call;
  const float* empty_value;

  SCA_DEVICE void lse(int64_t row, float value) const { static_cast<float*>(call.lse)[row] = value; }
  SCA_DEVICE void result(int64_t row, int64_t channel, float value) const {
    const int64_t of_head = row / call.query_tokens.count, query = row % call.query_tokens.count;
    const int64_t offset = of_head / call.heads * call.out.batch_stride + of_head % call.heads * call.out.head_stride;
    Attention<Scalar>::write(call.out, offset + query * call.out.token_stride, channel, value);
  }
  SCA_DEVICE void empty(int64_t row, int64_t channel) const {
    const int64_t of_head = row / call.query_tokens.count;
    result(row, channel, empty_value ? empty_value[of_head * call.value_width + channel] : 0.0f);
  }
};

template <typename Scalar>
struct Workspace {
  Attention<Scalar> attention;
  TokenSums<Scalar> value_sums;
  float *mean, *partial;

  Workspace(const sca_semantic_cross_attention& call, Arena& arena)
      : attention(call, walks_keys(call)),
        value_sums(call.value, nullptr, call.heads, call.key_tokens.count, call.value_width) {
    mean = arena.take<float>(attention.heads() * call.value_width);
    value_sums.partial = arena.take<Sum<float>>(takes_means(call) ? value_sums.size(call.batch) : 0);
    const int64_t rows = walks_keys(call) ? attention.heads() * attention.blocks.rows : 0;
    partial = arena.take<float>(rows * (call.value_width + kSoftmaxExtra));
    attention.take_spilled(arena, 1);
  }
};

template <typename Scalar>
const char* forward(const sca_semantic_cross_attention& call, void* stream) {
  Arena arena(call.workspace);
  const Workspace<Scalar> workspace(call, arena);
  const Attention<Scalar>& attention = workspace.attention;
  const auto* empty_value = static_cast<const float*>(call.empty_value);
  if (takes_means(call)) {
    const float share = 1 / static_cast<float>(larger<int64_t>(call.key_tokens.count, 1));
    const FinishTokenSums finish = {workspace.mean, nullptr, share};
    const char* error = sum_tokens(workspace.value_sums, call.batch, finish, call.threads, stream);
    if (error) return error;
    empty_value = workspace.mean;
  }
  if (!walks_keys(call)) {
    return launch(AttendToLatents<Scalar>{attention, empty_value}, attention.items(), call.threads, stream);
  }
  const AttendToPixels<Scalar> kernel = {attention, workspace.partial};
  if (const char* error = launch(kernel, attention.items(), call.threads, stream)) return error;
  const FinishAttention<Scalar> finish = {call, empty_value};
  const MergeSoftmax<FinishAttention<Scalar>> merge = {attention.blocks, workspace.partial, call.heads,
                                                       call.value_width, finish};
  return launch(merge, merge.items(call.batch), call.threads, stream);
}

}  // namespace
}  // namespace sca::cuda

using namespace sca::cuda;

int64_t sca_cuda_semantic_cross_attention_workspace(const sca_semantic_cross_attention* call) {
  Arena arena(nullptr);
  Workspace<float>(*call, arena);
  return arena.used();
}

const char* sca_cuda_semantic_cross_attention_forward(const sca_semantic_cross_attention* call, void* stream) {
  if (const char* reason = refusal(*call)) return reason;
  return with_scalar_type(call->scalar_type, [&](auto scalar) { return forward<decltype(scalar)>(*call, stream); });
}
