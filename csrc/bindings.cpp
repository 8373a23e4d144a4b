// The Python module: unpacks integers into the structures of the C interface and releases the GIL around kernels.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <cstdint>

#include "sca_kernels.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

// Reads a flat tuple of integers in order. A call takes some fifty of them, and the usual conversion of nested tuples
// would cost more than a small kernel.
class Integers {
 public:
  explicit Integers(const py::tuple& values) : values_(values) {}

  int64_t next() {
    if (index_ >= static_cast<Py_ssize_t>(values_.size())) throw py::index_error("too few integers");
    const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(values_.ptr(), index_++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  template <typename T>
  T* next_pointer() {
    return reinterpret_cast<T*>(next());
  }
  sca_tensor next_tensor() {  // address, strides of batch, head, token, channel
    sca_tensor tensor;
    tensor.data = next_pointer<void>();
    tensor.batch_stride = next();
    tensor.head_stride = next();
    tensor.token_stride = next();
    tensor.channel_stride = next();
    return tensor;
  }
  sca_tokens next_tokens() {  // in the order of the structure
    sca_tokens tokens;
    tokens.count = next();
    tokens.labels = next();
    tokens.offsets = next_pointer<const int64_t>();
    tokens.offsets_stride = next();
    tokens.order = next_pointer<const int32_t>();
    tokens.order_stride = next();
    tokens.max_per_label = next();
    return tokens;
  }
  void finish() const {
    if (index_ != static_cast<Py_ssize_t>(values_.size())) throw py::index_error("too many integers");
  }

 private:
  const py::tuple& values_;
  Py_ssize_t index_ = 0;
};

class SemanticCrossAttention {
 public:
  // capability, threads, scalar type, batch, heads, key width, value width, empty_uniform, lse address, tokens of
  // query and key, tensors query, key, value, out
  SemanticCrossAttention(const py::tuple& arguments, double scale) {
    Integers integers(arguments);
    capability_ = static_cast<int32_t>(integers.next());
    call_.threads = static_cast<int32_t>(integers.next());
    call_.scalar_type = static_cast<int32_t>(integers.next());
    call_.batch = integers.next();
    call_.heads = integers.next();
    call_.key_width = integers.next();
    call_.value_width = integers.next();
    call_.empty_uniform = static_cast<int32_t>(integers.next());
    call_.lse = integers.next_pointer<void>();
    call_.query_tokens = integers.next_tokens();
    call_.key_tokens = integers.next_tokens();
    call_.query = integers.next_tensor();
    call_.key = integers.next_tensor();
    call_.value = integers.next_tensor();
    call_.out = integers.next_tensor();
    call_.scale = scale;
    integers.finish();
    if (!sca_has_cpu_capability(capability_)) throw py::value_error("no kernels for this instruction set");
  }

  int64_t workspace_size() const { return sca_semantic_cross_attention_workspace(&call_, capability_); }

  void forward(Address workspace) {
    call_.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    sca_semantic_cross_attention_forward(&call_, capability_);
  }

  // lse gradient address, tensors grad_out, grad_query, grad_key, grad_value
  void backward(Address workspace, const py::tuple& arguments) {
    call_.workspace = reinterpret_cast<void*>(workspace);
    Integers integers(arguments);
    sca_semantic_cross_attention_gradients gradients;
    gradients.grad_lse = integers.next_pointer<const void>();
    gradients.grad_out = integers.next_tensor();
    gradients.grad_query = integers.next_tensor();
    gradients.grad_key = integers.next_tensor();
    gradients.grad_value = integers.next_tensor();
    integers.finish();
    py::gil_scoped_release release;
    sca_semantic_cross_attention_backward(&call_, &gradients, capability_);
  }

 private:
  int32_t capability_ = 0;
  sca_semantic_cross_attention call_ = {};
};

// capability, threads, then the integers of the structure in its order
void label_plan(const py::tuple& arguments) {
  Integers integers(arguments);
  const auto capability = static_cast<int32_t>(integers.next());
  sca_label_plan call;
  call.threads = static_cast<int32_t>(integers.next());
  call.batch = integers.next();
  call.height = integers.next();
  call.width = integers.next();
  call.labels = integers.next();
  call.tile_height = integers.next();
  call.tile_width = integers.next();
  call.label_map = integers.next_pointer<const int32_t>();
  call.order = integers.next_pointer<int32_t>();
  call.offsets = integers.next_pointer<int64_t>();
  call.tile_counts = integers.next_pointer<int32_t>();
  call.tile_segments = integers.next_pointer<int32_t>();
  call.workspace = integers.next_pointer<int32_t>();
  integers.finish();
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
  module.def("best_cpu_capability", &sca_best_cpu_capability);
  module.def("has_cpu_capability", [](int32_t capability) { return sca_has_cpu_capability(capability) != 0; });
  module.def("advise_huge_pages", &advise_huge_pages);
  module.def("label_plan", &label_plan);
  py::class_<SemanticCrossAttention>(module, "SemanticCrossAttention")
      .def(py::init<const py::tuple&, double>())
      .def("workspace_size", &SemanticCrossAttention::workspace_size)
      .def("forward", &SemanticCrossAttention::forward)
      .def("backward", &SemanticCrossAttention::backward);
}
