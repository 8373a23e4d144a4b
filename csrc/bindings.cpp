// The Python module of the kernels for CPUs.
#include <sys/mman.h>

#include "calls.h"
#include "known_calls.h"

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
  // A small call would spend more time on asking PyTorch for memory than on parts of the kernel.
  template <typename Use>
  static void with_memory(int64_t bytes, const py::tuple& values, const Use& use) {
    if (uses_stack && bytes <= kMostOnStack) {
      alignas(64) char memory[kMostOnStack];
      use(memory);
    } else {
      const py::object memory = allocate(bytes, values);
      use(static_cast<char*>(describe(memory.ptr()).data));
    }
  }

  static constexpr int64_t kMostOnStack = 64 << 10;
  static inline bool uses_stack = true;
};

using SemanticPool = Operator<Library, sca_semantic_pool, sca_semantic_pool_gradients, sca_semantic_pool_workspace,
                              sca_semantic_pool_workspace, sca_semantic_pool_forward, sca_semantic_pool_backward>;
using SemanticModulate =
    Operator<Library, sca_semantic_modulate, sca_semantic_modulate_gradients, sca_semantic_modulate_workspace,
             sca_semantic_modulate_backward_workspace, sca_semantic_modulate_forward, sca_semantic_modulate_backward>;
using InstanceModulate =
    Operator<Library, sca_instance_modulate, sca_instance_modulate_gradients, sca_instance_modulate_workspace,
             sca_instance_modulate_backward_workspace, sca_instance_modulate_forward, sca_instance_modulate_backward>;
using SemanticCrossAttention =
    Operator<Library, sca_semantic_cross_attention, sca_semantic_cross_attention_gradients,
             sca_semantic_cross_attention_workspace, sca_semantic_cross_attention_backward_workspace,
             sca_semantic_cross_attention_forward, sca_semantic_cross_attention_backward>;

// The settings of the library, then the members of the structure in its order.
void label_plan(const py::tuple& values) {
  Arguments arguments(values);
  int32_t capability;
  int64_t threads, work_per_thread;
  sca_label_plan call;
  arguments.read_all(capability, threads, work_per_thread, call.batch, call.height, call.width, call.labels,
                     call.tile_height, call.tile_width, call.label_map, call.order, call.offsets, call.tile_counts,
                     call.tile_segments, call.workspace);
  arguments.finish();
  constexpr int64_t kWorkPerPixel = 16;
  call.threads = threads_for(call.batch * call.height * call.width * kWorkPerPixel, threads, work_per_thread);
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
  // Tests want all memory from PyTorch, which can fill it with what nobody should read.
  module.def("use_stack", [](bool uses_stack) { Library::uses_stack = uses_stack; });
  py::class_<KnownCalls>(module, "KnownCalls")
      .def(py::init<py::tuple, size_t>(), py::arg("tensor_classes"), py::arg("most"))
      .def("find", &KnownCalls::find)
      .def("add", &KnownCalls::add)
      .def("__len__", &KnownCalls::size);
  SemanticPool::bind(module, "semantic_pool");
  SemanticModulate::bind(module, "semantic_modulate");
  InstanceModulate::bind(module, "instance_modulate");
  SemanticCrossAttention::bind(module, "semantic_cross_attention");
}
