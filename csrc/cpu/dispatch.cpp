// Chooses the kernels compiled for an instruction set. Built without any, so that it runs everywhere.
#include "../sca_kernels.h"

namespace {

struct Kernels {
  int64_t (*semantic_cross_attention_workspace)(const sca_semantic_cross_attention&);
  void (*semantic_cross_attention_forward)(const sca_semantic_cross_attention&);
  int64_t (*semantic_cross_attention_backward_workspace)(const sca_semantic_cross_attention&);
  void (*semantic_cross_attention_backward)(const sca_semantic_cross_attention&,
                                            const sca_semantic_cross_attention_gradients&);
  int64_t (*semantic_pool_workspace)(const sca_semantic_pool&);
  void (*semantic_pool_forward)(const sca_semantic_pool&);
  void (*semantic_pool_backward)(const sca_semantic_pool&, const sca_semantic_pool_gradients&);
  int64_t (*semantic_modulate_workspace)(const sca_semantic_modulate&);
  void (*semantic_modulate_forward)(const sca_semantic_modulate&);
  int64_t (*semantic_modulate_backward_workspace)(const sca_semantic_modulate&);
  void (*semantic_modulate_backward)(const sca_semantic_modulate&, const sca_semantic_modulate_gradients&);
  int64_t (*instance_modulate_workspace)(const sca_instance_modulate&);
  void (*instance_modulate_forward)(const sca_instance_modulate&);
  int64_t (*instance_modulate_backward_workspace)(const sca_instance_modulate&);
  void (*instance_modulate_backward)(const sca_instance_modulate&, const sca_instance_modulate_gradients&);
  void (*label_plan_make)(const sca_label_plan&);
};

}  // namespace

// A macro because a namespace cannot be a template parameter.
#define SCA_DECLARE_KERNELS(capability)                                                                      \
  namespace sca::capability {                                                                                \
  int64_t semantic_cross_attention_workspace(const sca_semantic_cross_attention&);                           \
  void semantic_cross_attention_forward(const sca_semantic_cross_attention&);                                \
  int64_t semantic_cross_attention_backward_workspace(const sca_semantic_cross_attention&);                  \
  void semantic_cross_attention_backward(const sca_semantic_cross_attention&,                                \
                                         const sca_semantic_cross_attention_gradients&);                     \
  int64_t semantic_pool_workspace(const sca_semantic_pool&);                                                 \
  void semantic_pool_forward(const sca_semantic_pool&);                                                      \
  void semantic_pool_backward(const sca_semantic_pool&, const sca_semantic_pool_gradients&);                 \
  int64_t semantic_modulate_workspace(const sca_semantic_modulate&);                                         \
  void semantic_modulate_forward(const sca_semantic_modulate&);                                              \
  int64_t semantic_modulate_backward_workspace(const sca_semantic_modulate&);                                \
  void semantic_modulate_backward(const sca_semantic_modulate&, const sca_semantic_modulate_gradients&);     \
  int64_t instance_modulate_workspace(const sca_instance_modulate&);                                         \
  void instance_modulate_forward(const sca_instance_modulate&);                                              \
  int64_t instance_modulate_backward_workspace(const sca_instance_modulate&);                                \
  void instance_modulate_backward(const sca_instance_modulate&, const sca_instance_modulate_gradients&);     \
  void label_plan_make(const sca_label_plan&);                                                               \
  }                                                                                                          \
  static const Kernels capability##_kernels = {sca::capability::semantic_cross_attention_workspace,          \
                                               sca::capability::semantic_cross_attention_forward,            \
                                               sca::capability::semantic_cross_attention_backward_workspace, \
                                               sca::capability::semantic_cross_attention_backward,           \
                                               sca::capability::semantic_pool_workspace,                     \
                                               sca::capability::semantic_pool_forward,                       \
                                               sca::capability::semantic_pool_backward,                      \
                                               sca::capability::semantic_modulate_workspace,                 \
                                               sca::capability::semantic_modulate_forward,                   \
                                               sca::capability::semantic_modulate_backward_workspace,        \
                                               sca::capability::semantic_modulate_backward,                  \
                                               sca::capability::instance_modulate_workspace,                 \
                                               sca::capability::instance_modulate_forward,                   \
                                               sca::capability::instance_modulate_backward_workspace,        \
                                               sca::capability::instance_modulate_backward,                  \
                                               sca::capability::label_plan_make};

SCA_DECLARE_KERNELS(baseline)
#ifdef SCA_HAVE_AVX2
SCA_DECLARE_KERNELS(avx2)
#endif
#ifdef SCA_HAVE_AVX512
SCA_DECLARE_KERNELS(avx512)
#endif

namespace {

const Kernels* kernels(int32_t capability) {
  switch (capability) {
    case SCA_CPU_BASELINE: return &baseline_kernels;
#ifdef SCA_HAVE_AVX2
    case SCA_CPU_AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2_kernels : nullptr;
#endif
#ifdef SCA_HAVE_AVX512
    case SCA_CPU_AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
                 ? &avx512_kernels
                 : nullptr;
#endif
    default: return nullptr;
  }
}

}  // namespace

int32_t sca_has_cpu_capability(int32_t capability) { return kernels(capability) != nullptr; }

int32_t sca_best_cpu_capability(void) {
  int32_t capability = SCA_CPU_AVX512;
  while (!kernels(capability)) --capability;
  return capability;
}

int64_t sca_semantic_cross_attention_workspace(const sca_semantic_cross_attention* call, int32_t capability) {
  return kernels(capability)->semantic_cross_attention_workspace(*call);
}

void sca_semantic_cross_attention_forward(const sca_semantic_cross_attention* call, int32_t capability) {
  kernels(capability)->semantic_cross_attention_forward(*call);
}

int64_t sca_semantic_cross_attention_backward_workspace(const sca_semantic_cross_attention* call, int32_t capability) {
  return kernels(capability)->semantic_cross_attention_backward_workspace(*call);
}

void sca_semantic_cross_attention_backward(const sca_semantic_cross_attention* call,
                                           const sca_semantic_cross_attention_gradients* gradients,
                                           int32_t capability) {
  kernels(capability)->semantic_cross_attention_backward(*call, *gradients);
}

int64_t sca_semantic_pool_workspace(const sca_semantic_pool* call, int32_t capability) {
  return kernels(capability)->semantic_pool_workspace(*call);
}

void sca_semantic_pool_forward(const sca_semantic_pool* call, int32_t capability) {
  kernels(capability)->semantic_pool_forward(*call);
}

void sca_semantic_pool_backward(const sca_semantic_pool* call, const sca_semantic_pool_gradients* gradients,
                                int32_t capability) {
  kernels(capability)->semantic_pool_backward(*call, *gradients);
}

int64_t sca_semantic_modulate_workspace(const sca_semantic_modulate* call, int32_t capability) {
  return kernels(capability)->semantic_modulate_workspace(*call);
}

void sca_semantic_modulate_forward(const sca_semantic_modulate* call, int32_t capability) {
  kernels(capability)->semantic_modulate_forward(*call);
}

int64_t sca_semantic_modulate_backward_workspace(const sca_semantic_modulate* call, int32_t capability) {
  return kernels(capability)->semantic_modulate_backward_workspace(*call);
}

void sca_semantic_modulate_backward(const sca_semantic_modulate* call, const sca_semantic_modulate_gradients* gradients,
                                    int32_t capability) {
  kernels(capability)->semantic_modulate_backward(*call, *gradients);
}

int64_t sca_instance_modulate_workspace(const sca_instance_modulate* call, int32_t capability) {
  return kernels(capability)->instance_modulate_workspace(*call);
}

void sca_instance_modulate_forward(const sca_instance_modulate* call, int32_t capability) {
  kernels(capability)->instance_modulate_forward(*call);
}

int64_t sca_instance_modulate_backward_workspace(const sca_instance_modulate* call, int32_t capability) {
  return kernels(capability)->instance_modulate_backward_workspace(*call);
}

void sca_instance_modulate_backward(const sca_instance_modulate* call, const sca_instance_modulate_gradients* gradients,
                                    int32_t capability) {
  kernels(capability)->instance_modulate_backward(*call, *gradients);
}

void sca_label_plan_make(const sca_label_plan* call, int32_t capability) {
  kernels(capability)->label_plan_make(*call);
}
