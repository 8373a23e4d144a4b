// The Python module of the kernels for NVIDIA GPUs, and that of the same kernels compiled for the host.
#include <stdexcept>

#include "../calls.h"

#ifdef SCA_CUDA_EMULATION
#include "execution.h"
#endif

namespace {

using namespace sca::python;

// The functions of the C interface for GPUs take a stream behind their other arguments, and say what went wrong.
struct Library {
  static bool has(int32_t) { return true; }
  template <typename Size, typename Call>
  static int64_t size(Size workspace_size, const Call* call, int32_t) {
    return workspace_size(call);
  }
  template <typename Run>
  static void run(const Run& kernel, int32_t, Address stream) {
    const char* error;
    {
      py::gil_scoped_release release;
      error = kernel(reinterpret_cast<void*>(stream));
    }
    if (error) throw std::runtime_error(error);
  }
  template <typename Use>
  static void with_memory(int64_t bytes, const py::tuple& values, const Use& use) {
    const py::object memory = allocate(bytes, values);
    use(static_cast<char*>(describe(memory.ptr()).data));
  }
};

using SemanticCrossAttention =
    Operator<Library, sca_semantic_cross_attention, sca_semantic_cross_attention_gradients,
             sca_cuda_semantic_cross_attention_workspace, sca_cuda_semantic_cross_attention_backward_workspace,
             sca_cuda_semantic_cross_attention_forward, sca_cuda_semantic_cross_attention_backward>;
using SemanticPool = Operator<Library, sca_semantic_pool, sca_semantic_pool_gradients, sca_cuda_semantic_pool_workspace,
                              sca_cuda_semantic_pool_backward_workspace, sca_cuda_semantic_pool_forward,
                              sca_cuda_semantic_pool_backward>;
using SemanticModulate = Operator<Library, sca_semantic_modulate, sca_semantic_modulate_gradients,
                                  sca_cuda_semantic_modulate_workspace, sca_cuda_semantic_modulate_backward_workspace,
                                  sca_cuda_semantic_modulate_forward, sca_cuda_semantic_modulate_backward>;
using InstanceModulate = Operator<Library, sca_instance_modulate, sca_instance_modulate_gradients,
                                  sca_cuda_instance_modulate_workspace, sca_cuda_instance_modulate_backward_workspace,
                                  sca_cuda_instance_modulate_forward, sca_cuda_instance_modulate_backward>;

}  // namespace

PYBIND11_MODULE(SCA_MODULE, module) {
  load();
  SemanticCrossAttention::bind(module, "semantic_cross_attention");
  SemanticPool::bind(module, "semantic_pool");
  SemanticModulate::bind(module, "semantic_modulate");
  InstanceModulate::bind(module, "instance_modulate");
#ifdef SCA_CUDA_EMULATION
  module.def("emulate", [](int threads, bool backwards, int cluster_blocks, int64_t extra_memory) {
    sca::cuda::emulation() = {threads, backwards, cluster_blocks, extra_memory};
  });
#endif
}
