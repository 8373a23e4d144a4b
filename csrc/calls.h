// Calls of kernels as Python makes them: unpacks numbers and tensors into the structures of the C interface, finds
// memory for the workspace and releases the GIL around kernels. Each library has a module of its own, whose functions
// are made from the template at the end.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

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

// Whether the elements of a tensor lie one after another.
inline bool is_contiguous(const dlpack::Tensor& tensor) {
  int64_t expected = 1;
  for (int32_t i = tensor.dimensions - 1; i >= 0; --i) {
    if (tensor.shape[i] == 0) return true;
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

inline int64_t elements(const dlpack::Tensor& tensor) {
  int64_t count = 1;
  for (int32_t i = 0; i < tensor.dimensions; ++i) count *= tensor.shape[i];
  return count;
}

// The number of a tensor's type in the C interface.
inline int32_t scalar_type(const dlpack::Tensor& tensor) {
  if (tensor.scalar.code == dlpack::kBfloat) return SCA_BFLOAT16;
  if (tensor.scalar.code != dlpack::kFloat) throw py::type_error("expected floating-point numbers");
  return tensor.scalar.bits == 64 ? SCA_FLOAT64 : tensor.scalar.bits == 32 ? SCA_FLOAT32 : SCA_FLOAT16;
}

// Reads numbers, strings and tensors from a flat tuple in order; None stands for a tensor that is not there. A call has
// some thirty of them, and the usual conversion would cost more than a small kernel. What a kernel wants contiguous or
// broadcast and gets otherwise is copied; the copies live as long as this does.
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
  void read(double& value) {
    value = PyFloat_AsDouble(next());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  template <typename T>
  void read(T*& pointer) {  // a result, which is contiguous
    pointer = static_cast<T*>(describe(next()).data);
  }
  template <typename T>
  dlpack::Tensor read(const T*& pointer) {
    PyObject* object = next();
    dlpack::Tensor found = describe(object);
    if (found.data && !is_contiguous(found)) found = keep(py::handle(object).attr("contiguous")());
    pointer = static_cast<const T*>(found.data);
    return found;
  }
  dlpack::Tensor read(sca_tensor& tensor) {
    return read_strided(next(), tensor.data, tensor.batch_stride, tensor.head_stride, tensor.token_stride,
                        tensor.channel_stride);
  }
  dlpack::Tensor read(sca_feature_map& map) {
    return read_strided(next(), map.data, map.batch_stride, map.channel_stride, map.row_stride, map.column_stride);
  }
  // What goes with x: a map, or what broadcasts to one, or a table; and whether it is of another type than x.
  void read_parameter(sca_feature_map& map, const void*& table, const dlpack::Tensor& x, int32_t& is_wide) {
    PyObject* object = next();
    const dlpack::Tensor found = describe(object);
    is_wide = object != Py_None && found.scalar.bits != x.scalar.bits;
    if (found.dimensions == 4) {
      read_broadcast(object, map.data, map.batch_stride, map.channel_stride, map.row_stride, map.column_stride);
    } else {
      read_table(object, table, x.shape[0], x.shape[1]);
    }
  }
  // Numbers for (rows, columns), or what broadcasts to that.
  template <typename T>
  void read_table(const T*& pointer, int64_t rows, int64_t columns) {
    read_table(next(), pointer, rows, columns);
  }
  // Where the tokens of each label begin, for each image or for all.
  void read_offsets(sca_tokens& tokens, int64_t count) {
    PyObject* object = next();
    const dlpack::Tensor offsets = describe(object);
    if (offsets.dimensions < 1) throw py::type_error("expected offsets of tokens");
    const int64_t places = offsets.shape[offsets.dimensions - 1];
    tokens.count = count;
    tokens.labels = places - 1;
    tokens.offsets = static_cast<const int64_t*>(
        is_contiguous(offsets) ? offsets.data : keep(py::handle(object).attr("contiguous")()).data);
    tokens.offsets_stride = offsets.dimensions == 1 || offsets.shape[0] == 1 ? 0 : places;
  }
  // The order of the tokens whose offsets were read; None for latents.
  void read_order(sca_tokens& tokens) {
    read(tokens.order);
    tokens.order_stride = tokens.order && tokens.offsets_stride ? tokens.count : 0;
  }
  // Values that broadcast to (batch, 1, height, width), a seed, and a table of strengths.
  void read_noise(sca_noise& noise, int64_t batch, int64_t channels) {
    int64_t channel_stride;
    read_broadcast(next(), noise.values, noise.batch_stride, channel_stride, noise.row_stride, noise.column_stride);
    read(noise.seed);
    read_table(noise.strength, batch, channels);
  }
  // The halves of a contiguous tensor.
  template <typename T>
  void read_halves(T*& first, T*& second) {
    const dlpack::Tensor both = describe(next());
    first = static_cast<T*>(both.data);
    second = reinterpret_cast<T*>(static_cast<char*>(both.data) + elements(both) / 2 * (both.scalar.bits / 8));
  }
  // Whether mean and rstd are given. They are read elsewhere.
  void read_whether_statistics_are_given(int32_t& given) {
    given = next() != Py_None;
    next();
  }
  // The rule for tokens without others of their label: "uniform" or "zero".
  void read_rule(int32_t& is_uniform) {
    PyObject* rule = next();
    if (!PyUnicode_Check(rule)) throw py::type_error("expected a string");
    is_uniform = PyUnicode_CompareWithASCIIString(rule, "uniform") == 0;
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

  template <typename T>
  void read_table(PyObject* object, const T*& pointer, int64_t rows, int64_t columns) {
    dlpack::Tensor found = describe(object);
    // What has as many elements as the table has them in its order.
    if (found.data && !(is_contiguous(found) && elements(found) == rows * columns)) {
      found = keep(py::handle(object).attr("expand")(rows, columns).attr("contiguous")());
    }
    pointer = static_cast<const T*>(found.data);
  }

  // A tensor of four dimensions with any strides.
  template <typename T, typename... Strides>
  dlpack::Tensor read_strided(PyObject* object, T*& pointer, Strides&... strides) {
    const dlpack::Tensor found = describe(object);
    constexpr int kDimensions = sizeof...(Strides);
    if (object != Py_None && found.dimensions != kDimensions) {
      throw py::type_error("expected a tensor of four dimensions");
    }
    pointer = static_cast<T*>(found.data);
    int dimension = 0;
    ((strides = found.data ? found.strides[dimension++] : 0), ...);
    return found;
  }

  // A tensor of up to four dimensions; along those that it lacks or has a single place in, nothing moves.
  template <typename T, typename... Strides>
  void read_broadcast(PyObject* object, T*& pointer, Strides&... strides) {
    const dlpack::Tensor found = describe(object);
    constexpr int kDimensions = sizeof...(Strides);
    if (found.dimensions > kDimensions) throw py::type_error("expected at most four dimensions");
    pointer = static_cast<T*>(found.data);
    int dimension = found.dimensions - kDimensions;
    ((strides = dimension >= 0 && found.shape[dimension] != 1 ? found.strides[dimension] : 0, ++dimension), ...);
  }

  dlpack::Tensor keep(py::object copy) {
    copies_.push_back(std::move(copy));
    return describe(copies_.back().ptr());
  }

  const py::tuple& values_;
  Py_ssize_t index_ = 0;
  std::vector<py::object> copies_;
};

// Threads for a call of so many multiply-adds: one if there is little to do.
inline int32_t threads_for(int64_t work, int64_t threads, int64_t work_per_thread) {
  return static_cast<int32_t>(work >= threads * work_per_thread ? threads : 1);
}

// How the pixels of a label are sorted: the settings of some operators end with that.
template <typename Call>
inline void read_tiles(Arguments& settings, Call& call) {
  settings.read_all(call.tile_height, call.tile_width);
}
inline void read_tiles(Arguments&, sca_semantic_cross_attention&) {}
inline void read_tiles(Arguments&, sca_instance_modulate&) {}

// The following read the arguments of an operator as its schema has them, without the backend, and its results; sizes
// are those of the tensors. They return how many multiply-adds the call takes.

inline int64_t read(Arguments& arguments, Arguments& results, sca_semantic_cross_attention& call) {
  const dlpack::Tensor query = arguments.read(call.query), key = arguments.read(call.key);
  const dlpack::Tensor value = arguments.read(call.value);
  if (!query.shape || !key.shape || !value.shape) throw py::type_error("expected query, key and value");
  call.scalar_type = scalar_type(query);
  call.batch = query.shape[0];
  call.heads = query.shape[1];
  call.key_width = query.shape[3];
  call.value_width = value.shape[3];
  arguments.read(call.empty_value);
  arguments.read_offsets(call.query_tokens, query.shape[2]);
  arguments.read_order(call.query_tokens);
  arguments.read_offsets(call.key_tokens, key.shape[2]);
  arguments.read_order(call.key_tokens);
  arguments.read_all(call.query_tokens.max_per_label, call.key_tokens.max_per_label, call.scale);
  arguments.read_rule(call.empty_uniform);
  results.read_all(call.out, call.lse);
  return call.batch * call.heads * std::max(query.shape[2], key.shape[2]) * (call.key_width + call.value_width);
}
inline void read(Arguments& arguments, sca_semantic_cross_attention_gradients& gradients) {
  arguments.read_all(gradients.grad_lse, gradients.grad_empty_value, gradients.grad_out, gradients.grad_query,
                     gradients.grad_key, gradients.grad_value);
}

// The sizes of a feature map and its type.
template <typename Call>
inline dlpack::Tensor read_x(Arguments& arguments, Call& call) {
  const dlpack::Tensor x = arguments.read(call.x);
  if (!x.shape) throw py::type_error("expected a tensor");
  call.scalar_type = scalar_type(x);
  call.batch = x.shape[0];
  call.channels = x.shape[1];
  call.height = x.shape[2];
  call.width = x.shape[3];
  return x;
}

inline int64_t read(Arguments& arguments, Arguments& results, sca_semantic_pool& call) {
  const dlpack::Tensor queries = arguments.read(call.queries);
  if (queries.dimensions != 4) throw py::type_error("expected a tensor of four dimensions");
  read_x(arguments, call);
  const int64_t pixels = call.height * call.width;
  call.heads = queries.shape[1];
  arguments.read_offsets(call.latents, queries.shape[2]);
  arguments.read_offsets(call.pixels, pixels);
  arguments.read_order(call.pixels);
  arguments.read_all(call.row_bias, call.col_bias, call.latents.max_per_label);
  arguments.read_rule(call.empty_uniform);
  results.read_all(call.pooled, call.lse, call.row_mass, call.col_mass, call.mean, call.second_moment);
  return call.batch * pixels * call.channels * call.latents.max_per_label * call.heads;
}
inline void read(Arguments& arguments, sca_semantic_pool_gradients& gradients) {
  arguments.read_all(gradients.grad_pooled, gradients.grad_lse, gradients.grad_row_mass, gradients.grad_col_mass,
                     gradients.grad_mean, gradients.grad_second_moment, gradients.grad_x, gradients.grad_queries,
                     gradients.grad_row_bias, gradients.grad_col_bias);
}

inline int64_t read(Arguments& arguments, Arguments& results, sca_semantic_modulate& call) {
  read_x(arguments, call);
  const int64_t pixels = call.height * call.width;
  const dlpack::Tensor keys = arguments.read(call.keys);
  if (keys.dimensions != 4) throw py::type_error("expected a tensor of four dimensions");
  call.heads = keys.shape[1];
  arguments.read_all(call.scale, call.shift);
  arguments.read_offsets(call.latents, keys.shape[2]);
  arguments.read_offsets(call.pixels, pixels);
  arguments.read_order(call.pixels);
  arguments.read_all(call.key_bias, call.row_bias, call.col_bias);
  for (const void** table : {&call.scale_bias, &call.shift_bias, &call.empty_scale, &call.empty_shift}) {
    arguments.read_table(*table, call.batch, call.channels);
  }
  arguments.read_whether_statistics_are_given(call.stats_given);
  arguments.read_noise(call.noise, call.batch, call.channels);
  arguments.read_all(call.latents.max_per_label, call.eps, call.negative_slope, call.add_one);
  arguments.read_rule(call.empty_uniform);
  results.read(call.out);
  results.read_halves(call.mean, call.rstd);
  return 3 * call.batch * pixels * call.channels * std::max<int64_t>(call.latents.max_per_label * call.heads, 1);
}
inline void read(Arguments& arguments, sca_semantic_modulate_gradients& gradients) {
  arguments.read_all(gradients.grad_out, gradients.grad_x, gradients.grad_keys, gradients.grad_scale,
                     gradients.grad_shift, gradients.grad_key_bias, gradients.grad_row_bias, gradients.grad_col_bias,
                     gradients.grad_scale_bias, gradients.grad_shift_bias, gradients.grad_empty_scale,
                     gradients.grad_empty_shift, gradients.grad_mean, gradients.grad_rstd,
                     gradients.grad_noise_strength);
}

inline int64_t read(Arguments& arguments, Arguments& results, sca_instance_modulate& call) {
  const dlpack::Tensor x = read_x(arguments, call);
  arguments.read_parameter(call.gamma, call.channel_gamma, x, call.gamma_wide);
  arguments.read_parameter(call.beta, call.channel_beta, x, call.beta_wide);
  arguments.read_whether_statistics_are_given(call.stats_given);
  arguments.read_noise(call.noise, call.batch, call.channels);
  arguments.read_all(call.add_one, call.unbiased, call.eps, call.negative_slope);
  results.read(call.out);
  results.read_halves(call.mean, call.rstd);
  return elements(x) * (call.noise.seed ? 32 : 4);
}
inline void read(Arguments& arguments, sca_instance_modulate_gradients& gradients) {
  arguments.read_all(gradients.grad_x, gradients.grad_gamma, gradients.grad_beta, gradients.grad_channel_gamma,
                     gradients.grad_channel_beta, gradients.grad_mean, gradients.grad_rstd,
                     gradients.grad_noise_strength);
}

// Memory of so many bytes from PyTorch, where the tensors of a call are.
inline py::object allocate(int64_t bytes, const py::tuple& values) {
  for (const py::handle value : values) {
    if (PyObject_TypeCheck(value.ptr(), tensor_class)) {
      return value.attr("new_empty")(bytes, py::arg("dtype") = py::module_::import("torch").attr("uint8"));
    }
  }
  throw py::type_error("expected a tensor");
}

// Whether forward leaves mean and rstd for backward. Python passes no memory for them where nothing will go backward.
template <typename Call, typename = void>
constexpr bool kLeavesStatistics = false;
template <typename Call>
constexpr bool kLeavesStatistics<Call, std::void_t<decltype(Call::rstd)>> = true;

// An operator of a library. `Library` says whether it has kernels for a capability, passes the capability or a stream
// on to the functions of the C interface, and finds memory for the workspace.
template <typename Library, typename Call, typename Gradients, auto kWorkspace, auto kBackwardWorkspace, auto kForward,
          auto kBackward>
class Operator {
 public:
  // Python's functions take the settings of the library (capability, threads, multiply-adds that are worth a thread,
  // and what `read_tiles` above reads), then what `read` reads. The caller's frame keeps the tensors alive.
  static void bind(py::module_& module, const std::string& name) {
    module.def((name + "_workspace").c_str(), &workspace_size);
    module.def((name + "_backward_workspace").c_str(), &backward_workspace_size);
    module.def(name.c_str(), &forward, py::arg("settings"), py::arg("arguments"), py::arg("results"),
               py::arg("stream") = 0);
    module.def((name + "_backward").c_str(), &backward, py::arg("settings"), py::arg("arguments"), py::arg("results"),
               py::arg("gradients"), py::arg("stream") = 0);
  }

 private:
  Operator(const py::tuple& settings, const py::tuple& arguments, const py::tuple& results)
      : settings_(settings), arguments_(arguments), results_(results) {
    int64_t threads, work_per_thread;
    settings_.read_all(capability_, threads, work_per_thread);
    if (!Library::has(capability_)) throw py::value_error("no kernels for this instruction set");
    read_tiles(settings_, call_);
    const int64_t work = read(arguments_, results_, call_);
    call_.threads = threads_for(work, threads, work_per_thread);
    for (const Arguments* values : {&settings_, &arguments_, &results_}) values->finish();
  }

  static int64_t workspace_size(const py::tuple& settings, const py::tuple& arguments, const py::tuple& results) {
    return Operator(settings, arguments, results).size(kWorkspace);
  }
  static int64_t backward_workspace_size(const py::tuple& settings, const py::tuple& arguments,
                                         const py::tuple& results) {
    return Operator(settings, arguments, results).size(kBackwardWorkspace);
  }

  template <typename Size>
  int64_t size(Size workspace_size) const {
    return Library::size(workspace_size, &call_, capability_);
  }

  static void forward(const py::tuple& settings, const py::tuple& arguments, const py::tuple& results, Address stream) {
    Operator self(settings, arguments, results);
    Call& call = self.call_;
    const int64_t begin = (self.size(kWorkspace) + kAlignment - 1) / kAlignment * kAlignment;
    const int64_t statistics = self.unwanted_statistics();
    Library::with_memory(begin + 2 * statistics, arguments, [&](char* memory) {
      call.workspace = memory;
      if constexpr (kLeavesStatistics<Call>) {
        if (statistics) {
          call.mean = static_cast<decltype(call.mean)>(static_cast<void*>(memory + begin));
          call.rstd = static_cast<decltype(call.rstd)>(static_cast<void*>(memory + begin + statistics));
        }
      }
      Library::run([&](auto... where) { return kForward(&call, where...); }, self.capability_, stream);
    });
  }

  static void backward(const py::tuple& settings, const py::tuple& arguments, const py::tuple& results,
                       const py::tuple& of_gradients, Address stream) {
    Operator self(settings, arguments, results);
    Arguments targets(of_gradients);
    Gradients gradients;
    read(targets, gradients);
    targets.finish();
    Library::with_memory(self.size(kBackwardWorkspace), arguments, [&](char* memory) {
      self.call_.workspace = memory;
      Library::run([&](auto... where) { return kBackward(&self.call_, &gradients, where...); }, self.capability_,
                   stream);
    });
  }

  // Bytes of mean, and of rstd, that forward writes for nobody, in the widest type; they lie behind the workspace.
  int64_t unwanted_statistics() const {
    if constexpr (kLeavesStatistics<Call>) {
      if (!call_.mean) return call_.batch * call_.channels * static_cast<int64_t>(sizeof(double));
    }
    return 0;
  }

  static constexpr int64_t kAlignment = 64;

  Arguments settings_, arguments_, results_;
  int32_t capability_ = 0;
  Call call_ = {};
};

}  // namespace sca::python
