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
  sca_feature_map next_feature_map() {  // address, strides of batch, channel, row, column
    sca_feature_map map;
    map.data = next_pointer<void>();
    map.batch_stride = next();
    map.channel_stride = next();
    map.row_stride = next();
    map.column_stride = next();
    return map;
  }
  sca_noise next_noise() {  // address, strides of batch, row, column, addresses of seed and strength
    sca_noise noise;
    noise.values = next_pointer<const void>();
    noise.batch_stride = next();
    noise.row_stride = next();
    noise.column_stride = next();
    noise.seed = next_pointer<const int64_t>();
    noise.strength = next_pointer<const void>();
    return noise;
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
  // capability, threads, scalar type, batch, heads, key width, value width, empty_uniform, addresses of empty_value and
  // lse, tokens of query and key, tensors query, key, value, out
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
    call_.empty_value = integers.next_pointer<const void>();
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

  // addresses of grad_lse and grad_empty_value, tensors grad_out, grad_query, grad_key, grad_value
  void backward(Address workspace, const py::tuple& arguments) {
    call_.workspace = reinterpret_cast<void*>(workspace);
    Integers integers(arguments);
    sca_semantic_cross_attention_gradients gradients;
    gradients.grad_lse = integers.next_pointer<const void>();
    gradients.grad_empty_value = integers.next_pointer<void>();
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

class SemanticPool {
 public:
  // capability, threads, scalar type, empty_uniform, then the structure in its order up to second_moment
  explicit SemanticPool(const py::tuple& arguments) {
    Integers integers(arguments);
    capability_ = static_cast<int32_t>(integers.next());
    call_.threads = static_cast<int32_t>(integers.next());
    call_.scalar_type = static_cast<int32_t>(integers.next());
    call_.empty_uniform = static_cast<int32_t>(integers.next());
    call_.batch = integers.next();
    call_.heads = integers.next();
    call_.channels = integers.next();
    call_.height = integers.next();
    call_.width = integers.next();
    call_.tile_height = integers.next();
    call_.tile_width = integers.next();
    call_.latents = integers.next_tokens();
    call_.pixels = integers.next_tokens();
    call_.x = integers.next_feature_map();
    call_.queries = integers.next_pointer<const void>();
    call_.row_bias = integers.next_pointer<const void>();
    call_.col_bias = integers.next_pointer<const void>();
    call_.pooled = integers.next_pointer<void>();
    call_.lse = integers.next_pointer<void>();
    call_.row_mass = integers.next_pointer<void>();
    call_.col_mass = integers.next_pointer<void>();
    call_.mean = integers.next_pointer<void>();
    call_.second_moment = integers.next_pointer<void>();
    integers.finish();
    if (!sca_has_cpu_capability(capability_)) throw py::value_error("no kernels for this instruction set");
  }

  int64_t workspace_size() const { return sca_semantic_pool_workspace(&call_, capability_); }

  void forward(Address workspace) {
    call_.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    sca_semantic_pool_forward(&call_, capability_);
  }

  // the structure of the gradients in its order
  void backward(Address workspace, const py::tuple& arguments) {
    call_.workspace = reinterpret_cast<void*>(workspace);
    Integers integers(arguments);
    sca_semantic_pool_gradients gradients;
    gradients.grad_pooled = integers.next_pointer<const void>();
    gradients.grad_lse = integers.next_pointer<const void>();
    gradients.grad_row_mass = integers.next_pointer<const void>();
    gradients.grad_col_mass = integers.next_pointer<const void>();
    gradients.grad_mean = integers.next_pointer<const void>();
    gradients.grad_second_moment = integers.next_pointer<const void>();
    gradients.grad_x = integers.next_feature_map();
    gradients.grad_queries = integers.next_pointer<void>();
    gradients.grad_row_bias = integers.next_pointer<void>();
    gradients.grad_col_bias = integers.next_pointer<void>();
    integers.finish();
    py::gil_scoped_release release;
    sca_semantic_pool_backward(&call_, &gradients, capability_);
  }

 private:
  int32_t capability_ = 0;
  sca_semantic_pool call_ = {};
};

class SemanticModulate {
 public:
  // capability, threads, scalar type, empty_uniform, add_one, stats_given, then the structure in its order up to noise
  SemanticModulate(const py::tuple& arguments, double eps, double negative_slope) {
    Integers integers(arguments);
    capability_ = static_cast<int32_t>(integers.next());
    call_.threads = static_cast<int32_t>(integers.next());
    call_.scalar_type = static_cast<int32_t>(integers.next());
    call_.empty_uniform = static_cast<int32_t>(integers.next());
    call_.add_one = static_cast<int32_t>(integers.next());
    call_.stats_given = static_cast<int32_t>(integers.next());
    call_.batch = integers.next();
    call_.heads = integers.next();
    call_.channels = integers.next();
    call_.height = integers.next();
    call_.width = integers.next();
    call_.tile_height = integers.next();
    call_.tile_width = integers.next();
    call_.latents = integers.next_tokens();
    call_.pixels = integers.next_tokens();
    call_.x = integers.next_feature_map();
    call_.out = integers.next_feature_map();
    for (const void** pointer :
         {&call_.keys, &call_.scale, &call_.shift, &call_.key_bias, &call_.row_bias, &call_.col_bias, &call_.scale_bias,
          &call_.shift_bias, &call_.empty_scale, &call_.empty_shift}) {
      *pointer = integers.next_pointer<const void>();
    }
    call_.mean = integers.next_pointer<void>();
    call_.rstd = integers.next_pointer<void>();
    call_.noise = integers.next_noise();
    call_.eps = eps;
    call_.negative_slope = negative_slope;
    integers.finish();
    if (!sca_has_cpu_capability(capability_)) throw py::value_error("no kernels for this instruction set");
  }

  int64_t workspace_size() const { return sca_semantic_modulate_workspace(&call_, capability_); }
  int64_t backward_workspace_size() const { return sca_semantic_modulate_backward_workspace(&call_, capability_); }

  void forward(Address workspace) {
    call_.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    sca_semantic_modulate_forward(&call_, capability_);
  }

  // the structure of the gradients in its order
  void backward(Address workspace, const py::tuple& arguments) {
    call_.workspace = reinterpret_cast<void*>(workspace);
    Integers integers(arguments);
    sca_semantic_modulate_gradients gradients;
    gradients.grad_out = integers.next_feature_map();
    gradients.grad_x = integers.next_feature_map();
    for (void** pointer : {&gradients.grad_keys, &gradients.grad_scale, &gradients.grad_shift, &gradients.grad_key_bias,
                           &gradients.grad_row_bias, &gradients.grad_col_bias, &gradients.grad_scale_bias,
                           &gradients.grad_shift_bias, &gradients.grad_empty_scale, &gradients.grad_empty_shift,
                           &gradients.grad_mean, &gradients.grad_rstd, &gradients.grad_noise_strength}) {
      *pointer = integers.next_pointer<void>();
    }
    integers.finish();
    py::gil_scoped_release release;
    sca_semantic_modulate_backward(&call_, &gradients, capability_);
  }

 private:
  int32_t capability_ = 0;
  sca_semantic_modulate call_ = {};
};

class InstanceModulate {
 public:
  // capability, threads, scalar type, add_one, stats_given, unbiased, gamma_wide, beta_wide, then the structure in its
  // order up to the noise
  InstanceModulate(const py::tuple& arguments, double eps, double negative_slope) {
    Integers integers(arguments);
    capability_ = static_cast<int32_t>(integers.next());
    for (int32_t* setting : {&call_.threads, &call_.scalar_type, &call_.add_one, &call_.stats_given, &call_.unbiased,
                             &call_.gamma_wide, &call_.beta_wide}) {
      *setting = static_cast<int32_t>(integers.next());
    }
    call_.batch = integers.next();
    call_.channels = integers.next();
    call_.height = integers.next();
    call_.width = integers.next();
    for (sca_feature_map* map : {&call_.x, &call_.out, &call_.gamma, &call_.beta}) *map = integers.next_feature_map();
    call_.channel_gamma = integers.next_pointer<const void>();
    call_.channel_beta = integers.next_pointer<const void>();
    call_.mean = integers.next_pointer<double>();
    call_.rstd = integers.next_pointer<double>();
    call_.noise = integers.next_noise();
    call_.eps = eps;
    call_.negative_slope = negative_slope;
    integers.finish();
    if (!sca_has_cpu_capability(capability_)) throw py::value_error("no kernels for this instruction set");
  }

  int64_t workspace_size() const { return sca_instance_modulate_workspace(&call_, capability_); }
  int64_t backward_workspace_size() const { return sca_instance_modulate_backward_workspace(&call_, capability_); }

  void forward(Address workspace) {
    call_.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    sca_instance_modulate_forward(&call_, capability_);
  }

  // the structure of the gradients in its order
  void backward(Address workspace, const py::tuple& arguments) {
    call_.workspace = reinterpret_cast<void*>(workspace);
    Integers integers(arguments);
    sca_instance_modulate_gradients gradients;
    for (sca_feature_map* map : {&gradients.grad_x, &gradients.grad_gamma, &gradients.grad_beta}) {
      *map = integers.next_feature_map();
    }
    for (void** pointer : {&gradients.grad_channel_gamma, &gradients.grad_channel_beta, &gradients.grad_mean,
                           &gradients.grad_rstd, &gradients.grad_noise_strength}) {
      *pointer = integers.next_pointer<void>();
    }
    integers.finish();
    py::gil_scoped_release release;
    sca_instance_modulate_backward(&call_, &gradients, capability_);
  }

 private:
  int32_t capability_ = 0;
  sca_instance_modulate call_ = {};
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
  py::class_<SemanticPool>(module, "SemanticPool")
      .def(py::init<const py::tuple&>())
      .def("workspace_size", &SemanticPool::workspace_size)
      .def("forward", &SemanticPool::forward)
      .def("backward", &SemanticPool::backward);
  py::class_<SemanticModulate>(module, "SemanticModulate")
      .def(py::init<const py::tuple&, double, double>())
      .def("workspace_size", &SemanticModulate::workspace_size)
      .def("backward_workspace_size", &SemanticModulate::backward_workspace_size)
      .def("forward", &SemanticModulate::forward)
      .def("backward", &SemanticModulate::backward);
  py::class_<InstanceModulate>(module, "InstanceModulate")
      .def(py::init<const py::tuple&, double, double>())
      .def("workspace_size", &InstanceModulate::workspace_size)
      .def("backward_workspace_size", &InstanceModulate::backward_workspace_size)
      .def("forward", &InstanceModulate::forward)
      .def("backward", &InstanceModulate::backward);
  py::class_<SemanticCrossAttention>(module, "SemanticCrossAttention")
      .def(py::init<const py::tuple&, double>())
      .def("workspace_size", &SemanticCrossAttention::workspace_size)
      .def("forward", &SemanticCrossAttention::forward)
      .def("backward", &SemanticCrossAttention::backward);
}
