// Calls of kernels as Python makes them: unpacks integers and tensors into the structures of the C interface and
// releases the GIL around kernels. Each library has a module of its own, whose classes are made from the template at
// the end.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "dlpack.h"
#include "sca_kernels.h"

namespace sca::python {

namespace py = pybind11;

using Address = std::uintptr_t;

// The class of tensors, and how they are read; `load` below sets them.
inline PyTypeObject* tensor_class = nullptr;
inline const dlpack::ExchangeInterface* exchange = nullptr;

// To be called once, when a module is imported: PyTorch must be there before any of its tensors.
inline void load() {
  const py::object found = py::module_::import("torch").attr("Tensor");
  const py::object capsule = found.attr(dlpack::kAttribute);
  const auto* offered =
      static_cast<const dlpack::ExchangeInterface*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  if (!offered) throw py::error_already_set();
  while (offered && offered->major_version != dlpack::kMajorVersion) offered = offered->older;
  if (!offered || !offered->describe) throw py::import_error("PyTorch offers no DLPack 1 that describes tensors");
  exchange = offered;
  tensor_class = reinterpret_cast<PyTypeObject*>(found.ptr());  // PyTorch keeps it as long as the process lives
}

// What a Python object says of its memory, for as long as it is there; null data: it is None, or has no elements.
inline dlpack::Tensor describe(PyObject* object) {
  dlpack::Tensor tensor = {};
  if (object == Py_None) return tensor;
  if (!PyObject_TypeCheck(object, tensor_class)) throw py::type_error("expected a tensor or None");
  if (exchange->describe(object, &tensor) != 0) throw py::error_already_set();
  tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return tensor;
}

// Reads a flat tuple of integers and tensors in order; None stands for a tensor that is not there. A call takes some
// forty of them, and the usual conversion of nested tuples would cost more than a small kernel.
class Arguments {
 public:
  explicit Arguments(const py::tuple& values) : values_(values) {}

  void read(int64_t& value) {
    value = PyLong_AsLongLong(next());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  void read(int32_t& value) {
    int64_t wide;
    read(wide);
    value = static_cast<int32_t>(wide);
  }
  template <typename T>
  void read(T*& pointer) {  // a contiguous tensor
    pointer = static_cast<T*>(tensor().data);
  }
  void read(sca_tensor& tensor) {
    read_strided(tensor.data, tensor.batch_stride, tensor.head_stride, tensor.token_stride, tensor.channel_stride);
  }
  void read(sca_feature_map& map) {
    read_strided(map.data, map.batch_stride, map.channel_stride, map.row_stride, map.column_stride);
  }
  // How many tokens; their offsets, for each image or for all; their order, None for latents; the most of a label.
  void read(sca_tokens& tokens) {
    read(tokens.count);
    const dlpack::Tensor offsets = tensor();
    if (offsets.dimensions < 1) throw py::type_error("expected offsets of tokens");
    const int64_t places = offsets.shape[offsets.dimensions - 1];
    const bool same_for_all = offsets.dimensions == 1 || offsets.shape[0] == 1;
    tokens.labels = places - 1;
    tokens.offsets = static_cast<const int64_t*>(offsets.data);
    tokens.offsets_stride = same_for_all ? 0 : places;
    read_all(tokens.order, tokens.max_per_label);
    tokens.order_stride = same_for_all || !tokens.order ? 0 : tokens.count;
  }
  void read(sca_noise& noise) {
    int64_t channel_stride;
    read_strided(noise.values, noise.batch_stride, channel_stride, noise.row_stride, noise.column_stride);
    read_all(noise.seed, noise.strength);
  }
  // The halves of a contiguous tensor.
  template <typename T>
  void read_halves(T*& first, T*& second) {
    const dlpack::Tensor both = tensor();
    int64_t bytes = both.scalar.bits / 8;
    for (int32_t i = 0; i < both.dimensions; ++i) bytes *= both.shape[i];
    first = static_cast<T*>(both.data);
    second = reinterpret_cast<T*>(static_cast<char*>(both.data) + bytes / 2);
  }
  template <typename... Values>
  void read_all(Values&... values) {
    (read(values), ...);
  }
  void finish() const {
    if (index_ != static_cast<Py_ssize_t>(values_.size())) throw py::index_error("too many arguments");
  }

 private:
  PyObject* next() {
    if (index_ >= static_cast<Py_ssize_t>(values_.size())) throw py::index_error("too few arguments");
    return PyTuple_GET_ITEM(values_.ptr(), index_++);
  }

  dlpack::Tensor tensor() { return describe(next()); }

  // A tensor of four dimensions with any strides.
  template <typename T, typename... Strides>
  void read_strided(T*& pointer, Strides&... strides) {
    const dlpack::Tensor found = tensor();
    constexpr int kDimensions = sizeof...(Strides);
    if (found.data && found.dimensions != kDimensions) throw py::type_error("expected a tensor of four dimensions");
    pointer = static_cast<T*>(found.data);
    int dimension = 0;
    ((strides = found.data ? found.strides[dimension++] : 0), ...);
  }

  const py::tuple& values_;
  Py_ssize_t index_ = 0;
};

inline void read(Arguments& arguments, sca_semantic_cross_attention& call) {
  arguments.read_all(call.scalar_type, call.batch, call.heads, call.key_width, call.value_width, call.empty_uniform,
                     call.empty_value, call.lse, call.query_tokens, call.key_tokens, call.query, call.key, call.value,
                     call.out);
}
inline void read(Arguments& arguments, sca_semantic_cross_attention_gradients& gradients) {
  arguments.read_all(gradients.grad_lse, gradients.grad_empty_value, gradients.grad_out, gradients.grad_query,
                     gradients.grad_key, gradients.grad_value);
}

inline void read(Arguments& arguments, sca_semantic_pool& call) {
  arguments.read_all(call.scalar_type, call.empty_uniform, call.batch, call.heads, call.channels, call.height,
                     call.width, call.tile_height, call.tile_width, call.latents, call.pixels, call.x, call.queries,
                     call.row_bias, call.col_bias, call.pooled, call.lse, call.row_mass, call.col_mass, call.mean,
                     call.second_moment);
}
inline void read(Arguments& arguments, sca_semantic_pool_gradients& gradients) {
  arguments.read_all(gradients.grad_pooled, gradients.grad_lse, gradients.grad_row_mass, gradients.grad_col_mass,
                     gradients.grad_mean, gradients.grad_second_moment, gradients.grad_x, gradients.grad_queries,
                     gradients.grad_row_bias, gradients.grad_col_bias);
}

inline void read(Arguments& arguments, sca_semantic_modulate& call) {
  arguments.read_all(call.scalar_type, call.empty_uniform, call.add_one, call.stats_given, call.batch, call.heads,
                     call.channels, call.height, call.width, call.tile_height, call.tile_width, call.latents,
                     call.pixels, call.x, call.out, call.keys, call.scale, call.shift, call.key_bias, call.row_bias,
                     call.col_bias, call.scale_bias, call.shift_bias, call.empty_scale, call.empty_shift);
  arguments.read_halves(call.mean, call.rstd);
  arguments.read(call.noise);
}
inline void read(Arguments& arguments, sca_semantic_modulate_gradients& gradients) {
  arguments.read_all(gradients.grad_out, gradients.grad_x, gradients.grad_keys, gradients.grad_scale,
                     gradients.grad_shift, gradients.grad_key_bias, gradients.grad_row_bias, gradients.grad_col_bias,
                     gradients.grad_scale_bias, gradients.grad_shift_bias, gradients.grad_empty_scale,
                     gradients.grad_empty_shift, gradients.grad_mean, gradients.grad_rstd,
                     gradients.grad_noise_strength);
}

inline void read(Arguments& arguments, sca_instance_modulate& call) {
  arguments.read_all(call.scalar_type, call.add_one, call.stats_given, call.unbiased, call.gamma_wide, call.beta_wide,
                     call.batch, call.channels, call.height, call.width, call.x, call.out, call.gamma, call.beta,
                     call.channel_gamma, call.channel_beta);
  arguments.read_halves(call.mean, call.rstd);
  arguments.read(call.noise);
}
inline void read(Arguments& arguments, sca_instance_modulate_gradients& gradients) {
  arguments.read_all(gradients.grad_x, gradients.grad_gamma, gradients.grad_beta, gradients.grad_channel_gamma,
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
        .def(py::init([](const py::tuple& values, Numbers... numbers) { return Operator(values, numbers...); }))
        .def("workspace_size", [](const Operator& self) { return self.size(kWorkspace); })
        .def("backward_workspace_size", [](const Operator& self) { return self.size(kBackwardWorkspace); })
        .def("forward", &Operator::forward, py::arg("workspace"), py::arg("stream") = 0)
        .def("backward", &Operator::backward, py::arg("workspace"), py::arg("gradients"), py::arg("stream") = 0);
  }

 private:
  template <typename... Numbers>
  Operator(const py::tuple& values, Numbers... numbers) : values_(values) {
    Arguments arguments(values);
    arguments.read_all(capability_, call_.threads);
    read(arguments, call_);
    arguments.finish();
    set_numbers(call_, numbers...);
    if (!Library::has(capability_)) throw py::value_error("no kernels for this instruction set");
  }

  template <typename Size>
  int64_t size(Size workspace_size) const {
    return Library::size(workspace_size, &call_, capability_);
  }

  void forward(const py::object& workspace, Address stream) {
    call_.workspace = describe(workspace.ptr()).data;
    Library::run([&](auto... where) { return kForward(&call_, where...); }, capability_, stream);
  }

  void backward(const py::object& workspace, const py::tuple& values, Address stream) {
    call_.workspace = describe(workspace.ptr()).data;
    Arguments arguments(values);
    Gradients gradients;
    read(arguments, gradients);
    arguments.finish();
    Library::run([&](auto... where) { return kBackward(&call_, &gradients, where...); }, capability_, stream);
  }

  const py::tuple values_;  // keeps the tensors alive whose memory the call points to
  int32_t capability_ = 0;
  Call call_ = {};
};

}  // namespace sca::python
