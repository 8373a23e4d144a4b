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
  sca_tensor out;           // forward: written; backward: read, and only where the keys are pixels
  void* lse;                // (batch, heads, queries), contiguous; forward: written; backward: read
  const void* empty_value;  // (batch, heads, value_width), contiguous, like lse in type: what a query without keys
                            // takes; null: see empty_uniform
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
  void* grad_empty_value;  // like empty_value
};

// A feature map of shape (batch, channels, height, width) with any strides.
struct sca_feature_map {
  void* data;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
};

// The latents of a label pool the raw features of its pixels. See semantic_pool in Python. Everything but x is
// contiguous and float, or double where x is; (...) stands for (batch, heads, latents).
struct sca_semantic_pool {
  int64_t batch, heads, channels, height, width;
  int64_t tile_height, tile_width;  // of the tiles by which the pixels of a label are sorted
  sca_tokens latents, pixels;
  sca_feature_map x;
  const void *queries, *row_bias, *col_bias;  // (..., channels), (..., height) or null, (..., width) or null
  void *pooled, *lse;                         // (..., channels), (...)
  void *row_mass, *col_mass;                  // (..., height), (..., width)
  void *mean, *second_moment;                 // (batch, channels)
  int32_t empty_uniform;                      // a latent without pixels: 1 pools the mean of all, 0 pools zero
  int32_t scalar_type;                        // of x
  int32_t threads;
  void* workspace;
};

// Gradients of the call above, whose results are read. Null: no such gradient came, or it is not wanted.
struct sca_semantic_pool_gradients {
  const void *grad_pooled, *grad_lse, *grad_row_mass, *grad_col_mass, *grad_mean, *grad_second_moment;
  sca_feature_map grad_x;
  void *grad_queries, *grad_row_bias, *grad_col_bias;
};

// Noise that is added to a modulated feature map: strength times one value per pixel, or one normal number per element.
struct sca_noise {
  const void* values;  // one per pixel; float, or double where x is; null: none
  int64_t batch_stride, row_stride, column_stride;
  const int64_t* seed;   // of a normal number per element, see noise.h; null: none
  const void* strength;  // (batch, channels); null only without noise
};

// Pixels attend to the latents of their label, whose rows scale and shift the normalised features. See
// semantic_modulate in Python. Tables are contiguous and float, or double where x is; (...) stands for
// (batch, heads, latents).
struct sca_semantic_modulate {
  int64_t batch, heads, channels, height, width;
  int64_t tile_height, tile_width;  // of the tiles by which the pixels of a label are sorted
  sca_tokens latents, pixels;
  sca_feature_map x, out;
  const void *keys, *scale, *shift;            // (..., channels)
  const void *key_bias, *row_bias, *col_bias;  // (...), (..., height), (..., width) or null
  const void *scale_bias, *shift_bias;         // (batch, channels) or null
  const void *empty_scale, *empty_shift;       // (batch, channels), of pixels without latents; null: see empty_uniform
  void *mean, *rstd;                           // (batch, channels); read where they are given, else forward writes them
  sca_noise noise;
  double eps, negative_slope;
  int32_t add_one;        // whether features are multiplied by 1 + scale
  int32_t stats_given;    // whether mean and rstd are inputs
  int32_t empty_uniform;  // a pixel without latents: 1 takes the mean of the rows of all latents, 0 takes zero
  int32_t scalar_type;    // of x, out and their gradients
  int32_t threads;
  void* workspace;
};

// Gradients of the call above. Null: it is not wanted. grad_mean and grad_rstd only where they are given.
struct sca_semantic_modulate_gradients {
  sca_feature_map grad_out, grad_x;
  void *grad_keys, *grad_scale, *grad_shift;
  void *grad_key_bias, *grad_row_bias, *grad_col_bias;
  void *grad_scale_bias, *grad_shift_bias, *grad_empty_scale, *grad_empty_shift;
  void *grad_mean, *grad_rstd;
  void* grad_noise_strength;  // (batch, channels)
};

// Normalised features are scaled and shifted by what is given, per pixel or per channel. See instance_modulate in
// Python. Contiguous tables are float, or double where x is.
struct sca_instance_modulate {
  int64_t batch, channels, height, width;
  sca_feature_map x, out;                    // out: backward reads its gradient there
  sca_feature_map gamma, beta;               // per pixel; of null data: not given per pixel
  const void *channel_gamma, *channel_beta;  // (batch, channels) or null
  double *mean, *rstd;                       // (batch, channels); read where they are given, else forward writes them
  sca_noise noise;
  double eps, negative_slope;
  int32_t gamma_wide, beta_wide;  // whether these maps are float although x has 16 bits
  int32_t add_one;                // whether features are multiplied by 1 + gamma
  int32_t stats_given;            // whether mean and rstd are inputs
  int32_t unbiased;               // whether the variance divides by one less than the number of pixels
  int32_t scalar_type;            // of x, out and their gradients
  int32_t threads;
  void* workspace;
};

// Gradients of the call above. Null: it is not wanted. grad_mean and grad_rstd only where they are given.
struct sca_instance_modulate_gradients {
  sca_feature_map grad_x;
  sca_feature_map grad_gamma, grad_beta;         // of maps, in their type
  void *grad_channel_gamma, *grad_channel_beta;  // (batch, channels), like the following
  void *grad_mean, *grad_rstd, *grad_noise_strength;
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
int64_t sca_semantic_cross_attention_backward_workspace(const sca_semantic_cross_attention* call, int32_t capability);
void sca_semantic_cross_attention_backward(const sca_semantic_cross_attention* call,
                                           const sca_semantic_cross_attention_gradients* gradients, int32_t capability);
int64_t sca_semantic_pool_workspace(const sca_semantic_pool* call, int32_t capability);
void sca_semantic_pool_forward(const sca_semantic_pool* call, int32_t capability);
void sca_semantic_pool_backward(const sca_semantic_pool* call, const sca_semantic_pool_gradients* gradients,
                                int32_t capability);
int64_t sca_semantic_modulate_workspace(const sca_semantic_modulate* call, int32_t capability);
void sca_semantic_modulate_forward(const sca_semantic_modulate* call, int32_t capability);
int64_t sca_semantic_modulate_backward_workspace(const sca_semantic_modulate* call, int32_t capability);
void sca_semantic_modulate_backward(const sca_semantic_modulate* call, const sca_semantic_modulate_gradients* gradients,
                                    int32_t capability);
int64_t sca_instance_modulate_workspace(const sca_instance_modulate* call, int32_t capability);
void sca_instance_modulate_forward(const sca_instance_modulate* call, int32_t capability);
int64_t sca_instance_modulate_backward_workspace(const sca_instance_modulate* call, int32_t capability);
void sca_instance_modulate_backward(const sca_instance_modulate* call, const sca_instance_modulate_gradients* gradients,
                                    int32_t capability);
void sca_label_plan_make(const sca_label_plan* call, int32_t capability);

// The kernels for NVIDIA GPUs are a library of their own. Its functions take calls whose pointers are those of the
// current device, with the number of its multiprocessors in the place of the threads, and enqueue kernels on a stream
// of that device (a cudaStream_t). They wait for nothing, and return what went wrong with a launch, or null.
int64_t sca_cuda_semantic_cross_attention_workspace(const sca_semantic_cross_attention* call);
const char* sca_cuda_semantic_cross_attention_forward(const sca_semantic_cross_attention* call, void* stream);
int64_t sca_cuda_semantic_cross_attention_backward_workspace(const sca_semantic_cross_attention* call);
const char* sca_cuda_semantic_cross_attention_backward(const sca_semantic_cross_attention* call,
                                                       const sca_semantic_cross_attention_gradients* gradients,
                                                       void* stream);
int64_t sca_cuda_semantic_pool_workspace(const sca_semantic_pool* call);
const char* sca_cuda_semantic_pool_forward(const sca_semantic_pool* call, void* stream);
int64_t sca_cuda_semantic_pool_backward_workspace(const sca_semantic_pool* call);
const char* sca_cuda_semantic_pool_backward(const sca_semantic_pool* call, const sca_semantic_pool_gradients* gradients,
                                            void* stream);
int64_t sca_cuda_semantic_modulate_workspace(const sca_semantic_modulate* call);
const char* sca_cuda_semantic_modulate_forward(const sca_semantic_modulate* call, void* stream);
int64_t sca_cuda_semantic_modulate_backward_workspace(const sca_semantic_modulate* call);
const char* sca_cuda_semantic_modulate_backward(const sca_semantic_modulate* call,
                                                const sca_semantic_modulate_gradients* gradients, void* stream);
int64_t sca_cuda_instance_modulate_workspace(const sca_instance_modulate* call);
const char* sca_cuda_instance_modulate_forward(const sca_instance_modulate* call, void* stream);
int64_t sca_cuda_instance_modulate_backward_workspace(const sca_instance_modulate* call);
const char* sca_cuda_instance_modulate_backward(const sca_instance_modulate* call,
                                                const sca_instance_modulate_gradients* gradients, void* stream);

}  // extern "C"
