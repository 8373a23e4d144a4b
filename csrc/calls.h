// Calls of kernels as Python makes them: unpacks integers into the structures of the C interface and releases the GIL
// around kernels. Each library has a module of its own, whose classes are made from the template at the end.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "sca_kernels.h"

namespace sca::python {

namespace py = pybind11;

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
  void read(T*& pointer) {
    pointer = reinterpret_cast<T*>(next());
  }
  void read(int64_t& value) { value = next(); }
  void read(int32_t& value) { value = static_cast<int32_t>(next()); }
  void read(sca_tensor& tensor) {  // address, strides of batch, head, token, channel
    read_all(tensor.data, tensor.batch_stride, tensor.head_stride, tensor.token_stride, tensor.channel_stride);
  }
  void read(sca_tokens& tokens) {
    read_all(tokens.count, tokens.labels, tokens.offsets, tokens.offsets_stride, tokens.order, tokens.order_stride,
             tokens.max_per_label);
  }
  void read(sca_feature_map& map) {  // address, strides of batch, channel, row, column
    read_all(map.data, map.batch_stride, map.channel_stride, map.row_stride, map.column_stride);
  }
  void read(sca_noise& noise) {
    read_all(noise.values, noise.batch_stride, noise.row_stride, noise.column_stride, noise.seed, noise.strength);
  }
  template <typename... Values>
  void read_all(Values&... values) {
    (read(values), ...);
  }
  void finish() const {
    if (index_ != static_cast<Py_ssize_t>(values_.size())) throw py::index_error("too many integers");
  }

 private:
  const py::tuple& values_;
  Py_ssize_t index_ = 0;
};

inline void read(Integers& integers, sca_semantic_cross_attention& call) {
  integers.read_all(call.scalar_type, call.batch, call.heads, call.key_width, call.value_width, call.empty_uniform,
                    call.empty_value, call.lse, call.query_tokens, call.key_tokens, call.query, call.key, call.value,
                    call.out);
}
inline void read(Integers& integers, sca_semantic_cross_attention_gradients& gradients) {
  integers.read_all(gradients.grad_lse, gradients.grad_empty_value, gradients.grad_out, gradients.grad_query,
                    gradients.grad_key, gradients.grad_value);
}

inline void read(Integers& integers, sca_semantic_pool& call) {
  integers.read_all(call.scalar_type, call.empty_uniform, call.batch, call.heads, call.channels, call.height,
                    call.width, call.tile_height, call.tile_width, call.latents, call.pixels, call.x, call.queries,
                    call.row_bias, call.col_bias, call.pooled, call.lse, call.row_mass, call.col_mass, call.mean,
                    call.second_moment);
}
inline void read(Integers& integers, sca_semantic_pool_gradients& gradients) {
  integers.read_all(gradients.grad_pooled, gradients.grad_lse, gradients.grad_row_mass, gradients.grad_col_mass,
                    gradients.grad_mean, gradients.grad_second_moment, gradients.grad_x, gradients.grad_queries,
                    gradients.grad_row_bias, gradients.grad_col_bias);
}

inline void read(Integers& integers, sca_semantic_modulate& call) {
  integers.read_all(call.scalar_type, call.empty_uniform, call.add_one, call.stats_given, call.batch, call.heads,
                    call.channels, call.height, call.width, call.tile_height, call.tile_width, call.latents,
                    call.pixels, call.x, call.out, call.keys, call.scale, call.shift, call.key_bias, call.row_bias,
                    call.col_bias, call.scale_bias, call.shift_bias, call.empty_scale, call.empty_shift, call.mean,
                    call.rstd, call.noise);
}
inline void read(Integers& integers, sca_semantic_modulate_gradients& gradients) {
  integers.read_all(gradients.grad_out, gradients.grad_x, gradients.grad_keys, gradients.grad_scale,
                    gradients.grad_shift, gradients.grad_key_bias, gradients.grad_row_bias, gradients.grad_col_bias,
                    gradients.grad_scale_bias, gradients.grad_shift_bias, gradients.grad_empty_scale,
                    gradients.grad_empty_shift, gradients.grad_mean, gradients.grad_rstd,
                    gradients.grad_noise_strength);
}

inline void read(Integers& integers, sca_instance_modulate& call) {
  integers.read_all(call.scalar_type, call.add_one, call.stats_given, call.unbiased, call.gamma_wide, call.beta_wide,
                    call.batch, call.channels, call.height, call.width, call.x, call.out, call.gamma, call.beta,
                    call.channel_gamma, call.channel_beta, call.mean, call.rstd, call.noise);
}
inline void read(Integers& integers, sca_instance_modulate_gradients& gradients) {
  integers.read_all(gradients.grad_x, gradients.grad_gamma, gradients.grad_beta, gradients.grad_channel_gamma,
                    gradients.grad_channel_beta, gradients.grad_mean, gradients.grad_rstd,
                    gradients.grad_noise_strength);
}

// The numbers of a call that are no integers.
inline void set_numbers(sca_semantic_pool&) {}
inline void set_numbers(sca_semantic_cross_attention& call, double scale) { call.scale = scale; }
template <typename Call>
inline void set_numbers(Call& call, double eps, double negative_slope) {
  call.eps = eps;
  call.negative_slope = negative_slope;
}

// An operator of a library. `Library` says whether it has kernels for a capability, and passes the capability or a
// stream on to the functions of the C interface.
template <typename Library, typename Call, typename Gradients, auto kWorkspace, auto kBackwardWorkspace, auto kForward,
          auto kBackward>
class Operator {
 public:
  // Python's constructor takes a tuple of the capability, the number of threads, and what `read` above reads, in that
  // order, and then the numbers.
  template <typename... Numbers>
  static void bind(py::module_& module, const char* name) {
    py::class_<Operator>(module, name)
        .def(py::init([](const py::tuple& arguments, Numbers... numbers) { return Operator(arguments, numbers...); }))
        .def("workspace_size", [](const Operator& self) { return self.size(kWorkspace); })
        .def("backward_workspace_size", [](const Operator& self) { return self.size(kBackwardWorkspace); })
        .def("forward", &Operator::forward, py::arg("workspace"), py::arg("stream") = 0)
        .def("backward", &Operator::backward, py::arg("workspace"), py::arg("gradients"), py::arg("stream") = 0);
  }

 private:
  template <typename... Numbers>
  Operator(const py::tuple& arguments, Numbers... numbers) {
    Integers integers(arguments);
    integers.read_all(capability_, call_.threads);
    read(integers, call_);
    integers.finish();
    set_numbers(call_, numbers...);
    if (!Library::has(capability_)) throw py::value_error("no kernels for this instruction set");
  }

  template <typename Size>
  int64_t size(Size workspace_size) const {
    return Library::size(workspace_size, &call_, capability_);
  }

  void forward(Address workspace, Address stream) {
    call_.workspace = reinterpret_cast<void*>(workspace);
    Library::run([&](auto... where) { return kForward(&call_, where...); }, capability_, stream);
  }

  void backward(Address workspace, const py::tuple& arguments, Address stream) {
    call_.workspace = reinterpret_cast<void*>(workspace);
    Integers integers(arguments);
    Gradients gradients;
    read(integers, gradients);
    integers.finish();
    Library::run([&](auto... where) { return kBackward(&call_, &gradients, where...); }, capability_, stream);
  }

  int32_t capability_ = 0;
  Call call_ = {};
};

}  // namespace sca::python
