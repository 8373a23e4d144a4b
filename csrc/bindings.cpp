// The Python module of the kernels for CPUs.
#include <sys/mman.h>

#include "calls.h"

namespace {

using namespace sca::python;

// The functions of the C interface for CPUs take the instruction set behind their other arguments.
struct Library {
  static bool has(int32_t capability) { return sca_has_cpu_capability(capability) != 0; }
  template <typename Size, typename Call>
  static int64_t size(Size workspace_size, const Call* call, int32_t capability) {
    return workspace_size(call, capability);
  }
  template <typename Run>
  static void run(const Run& kernel, int32_t capability, Address) {
    py::gil_scoped_release release;
    kernel(capability);
  }
};

using SemanticPool = Operator<Library, sca_semantic_pool, sca_semantic_pool_gradients, sca_semantic_pool_workspace,
                              sca_semantic_pool_workspace, sca_semantic_pool_forward, sca_semantic_pool_backward>;
using SemanticModulate =
    Operator<Library, sca_semantic_modulate, sca_semantic_modulate_gradients, sca_semantic_modulate_workspace,
             sca_semantic_modulate_backward_workspace, sca_semantic_modulate_forward, sca_semantic_modulate_backward>;
using InstanceModulate =
    Operator<Library, sca_instance_modulate, sca_instance_modulate_gradients, sca_instance_modulate_workspace,
             sca_instance_modulate_backward_workspace, sca_instance_modulate_forward, sca_instance_modulate_backward>;
using SemanticCrossAttention = Operator<Library, sca_semantic_cross_attention, sca_semantic_cross_attention_gradients,
                                        sca_semantic_cross_attention_workspace, sca_semantic_cross_attention_workspace,
                                        sca_semantic_cross_attention_forward, sca_semantic_cross_attention_backward>;

// capability, threads, then the members of the structure in its order
void label_plan(const py::tuple& values) {
  Arguments arguments(values);
  int32_t capability;
  sca_label_plan call;
  arguments.read_all(capability, call.threads, call.batch, call.height, call.width, call.labels, call.tile_height,
                     call.tile_width, call.label_map, call.order, call.offsets, call.tile_counts, call.tile_segments,
                     call.workspace);
  arguments.finish();
  if (!sca_has_cpu_capability(capability)) throw py::value_error("no kernels for this instruction set");
  py::gil_scoped_release release;
  sca_label_plan_make(&call, capability);
}

// Asks the system to back fresh memory with 2 MiB pages: a large result is written once, and most of that time would go
// into 4 KiB page faults. A hint; where it is not followed nothing changes.
void advise_huge_pages(Address address, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr Address kHugePage = Address{2} << 20;
  const Address begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const Address end = (address + static_cast<Address>(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  load();
  module.def("best_cpu_capability", &sca_best_cpu_capability);
  module.def("has_cpu_capability", [](int32_t capability) { return sca_has_cpu_capability(capability) != 0; });
  module.def("advise_huge_pages", &advise_huge_pages);
  module.def("label_plan", &label_plan);
  SemanticPool::bind<>(module, "SemanticPool");
  SemanticModulate::bind<double, double>(module, "SemanticModulate");
  InstanceModulate::bind<double, double>(module, "InstanceModulate");
  SemanticCrossAttention::bind<double>(module, "SemanticCrossAttention");
}
