// The C interface of the compiled kernels.
//
// Everything crosses it as plain pointers, sizes and strides, so the library depends on no version of PyTorch. All
// sizes, strides and offsets are 64 bit and count elements, not bytes. No function allocates: the caller asks for the
// workspace size of a call, allocates it, and passes it in. No function keeps a pointer after it returns.
#pragma once

#include <cstdint>

extern "C" {

enum sca_scalar_type { SCA_FLOAT32 = 0, SCA_FLOAT64 = 1, SCA_BFLOAT16 = 2, SCA_FLOAT16 = 3 };

// Tensors of shape (batch, heads, tokens, channels) with any strides, zero (expanded) and negative ones included.
struct sca_tensor {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
  int64_t channel_stride;
};

// How the tokens of one side are grouped by label. The tokens of label l in image b are
// order[b][offsets[b][l] .. offsets[b][l + 1]); positions from offsets[b][labels] on carry no label.
struct sca_tokens {
  int64_t count;           // tokens per image
  int64_t labels;          // number of labels
  const int64_t* offsets;  // (batch, labels + 1) prefix sums
  int64_t offsets_stride;  // between images; 0 when all images share them
  const int32_t* order;    // (batch, count) token at each position; null: latents, position i holds token i
  int64_t order_stride;    // between images; 0 when all images share it
  int64_t max_per_label;   // latents: the largest number owned by one label; unused for pixels
};

// softmax(scale * query key^T, over the keys of the query's label) value. See semantic_cross_attention in Python.
struct sca_semantic_cross_attention {
  int64_t batch, heads, key_width, value_width;
  sca_tokens query_tokens, key_tokens;
  sca_tensor query, key, value;
  sca_tensor out;  // forward: written; backward: read, and only where the keys are pixels
  void* lse;       // (batch, heads, queries), contiguous; forward: written; backward: read
  double scale;
  int32_t empty_uniform;  // a query without keys: 1 takes the mean of all values, 0 takes zero
  int32_t scalar_type;    // of query, key, value, out and their gradients; lse is float, or double with SCA_FLOAT64
  int32_t threads;
  void* workspace;
};

// Gradients of the call above. A null `data` of a gradient means that it is not wanted.
struct sca_semantic_cross_attention_gradients {
  sca_tensor grad_out;
  const void* grad_lse;  // like lse; null when lse took no gradient
  sca_tensor grad_query, grad_key, grad_value;
};

// Groups the pixels of label maps: see label_plan in Python.
struct sca_label_plan {
  int64_t batch, height, width, labels, tile_height, tile_width;
  const int32_t* label_map;  // (batch, height, width), contiguous; values outside [0, labels) carry no label
  int32_t* order;            // (batch, height * width): the pixels sorted by label, then tile, then raster position
  int64_t* offsets;          // (batch, labels + 1): where each label begins in `order`
  int32_t* tile_counts;      // (batch, tiles): segments in each tile
  int32_t* tile_segments;    // (batch, tiles, segments, 3): label (-1: none), first position in `order`, pixels
  int32_t threads;
  int32_t* workspace;  // max(threads, batch) * (labels + 1)
};

// Instruction sets, weakest first. A kernel exists for each that the library was built with.
enum sca_cpu_capability { SCA_CPU_BASELINE = 0, SCA_CPU_AVX2 = 1, SCA_CPU_AVX512 = 2 };

// The strongest instruction set that both this machine and this build have.
int32_t sca_best_cpu_capability(void);
// Whether a call with this capability can be served: only then may it be passed to the functions below.
int32_t sca_has_cpu_capability(int32_t capability);

int64_t sca_semantic_cross_attention_workspace(const sca_semantic_cross_attention* call, int32_t capability);
void sca_semantic_cross_attention_forward(const sca_semantic_cross_attention* call, int32_t capability);
void sca_semantic_cross_attention_backward(const sca_semantic_cross_attention* call,
                                           const sca_semantic_cross_attention_gradients* gradients, int32_t capability);
void sca_label_plan_make(const sca_label_plan* call, int32_t capability);

}  // extern "C"
