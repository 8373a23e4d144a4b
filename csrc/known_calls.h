// Remembers calls of Python functions by all that checks of their arguments can see, to tell whether the next call is
// like one that was checked before.
#pragma once

#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <utility>
#include <vector>

#include "calls.h"

namespace sca::python {

// What is known of calls, by their signatures: types, shapes, strides, devices and requires_grad of tensors, the values
// of numbers and strings, and which classes and None there are. Neither the addresses of tensors nor what is in them
// belong to a signature, and no tensor is kept. The GIL guards it.
class KnownCalls {
 public:
  // `tensor_classes`: the classes of tensors about which a signature says everything; calls with others stay unknown.
  KnownCalls(py::tuple tensor_classes, size_t most)
      : tensor_classes_(std::move(tensor_classes)),
        requires_grad_(tensor_class_attribute("requires_grad")),
        is_neg_(tensor_class_attribute("is_neg")),
        most_(most) {}

  // What was added for a call like this one, or None.
  py::object find(const py::tuple& tensors, const py::tuple& others) const {
    Signature signature;
    if (!sign(tensors, others, signature)) return py::none();
    const auto found = known_.find(signature);
    return found == known_.end() ? py::none() : found->second;
  }

  void add(const py::tuple& tensors, const py::tuple& others, const py::object& record) {
    Signature signature;
    if (!sign(tensors, others, signature)) return;
    if (known_.size() >= most_) known_.clear();
    known_[std::move(signature)] = record;
  }

  size_t size() const { return known_.size(); }

 private:
  using Signature = std::vector<int64_t>;

  struct Hash {
    size_t operator()(const Signature& signature) const {
      uint64_t hash = signature.size();
      for (const int64_t word : signature) {
        hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
      }
      return hash;
    }
  };

  enum Kind : int64_t { kNone, kTensor, kInteger, kFloat, kString, kClass };

  static py::object tensor_class_attribute(const char* name) {
    return py::handle(reinterpret_cast<PyObject*>(tensor_class)).attr(name);
  }

  bool is_tensor(PyObject* value) const {
    for (const py::handle known : tensor_classes_) {
      if (known.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(value))) return true;
    }
    return false;
  }

  // False: there is more to know of these values than a signature says.
  bool sign(const py::tuple& tensors, const py::tuple& others, Signature& signature) const {
    signature.reserve(9 * tensors.size() + 4 * others.size() + 16);
    for (const py::tuple* values : {&tensors, &others}) {
      for (const py::handle value : *values) {
        if (!sign(value.ptr(), signature)) return false;
      }
    }
    return true;
  }

  static void push(Signature& signature, Kind kind, int64_t value) {
    signature.push_back(kind);
    signature.push_back(value);
  }

  bool sign(PyObject* value, Signature& signature) const {
    if (value == Py_None) {
      signature.push_back(kNone);
    } else if (is_tensor(value)) {
      return sign_tensor(value, signature);
    } else if (PyLong_Check(value)) {
      const int64_t number = PyLong_AsLongLong(value);
      if (number == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
      push(signature, kInteger, number);
    } else if (PyFloat_CheckExact(value)) {
      const double number = PyFloat_AS_DOUBLE(value);
      int64_t bits;
      std::memcpy(&bits, &number, sizeof bits);
      push(signature, kFloat, bits);
    } else if (PyUnicode_CheckExact(value)) {
      Py_ssize_t length;
      const char* text = PyUnicode_AsUTF8AndSize(value, &length);
      if (!text) return PyErr_Clear(), false;
      push(signature, kString, length);
      for (Py_ssize_t i = 0; i < length; ++i) signature.push_back(text[i]);
    } else if (PyType_Check(value)) {
      push(signature, kClass, reinterpret_cast<int64_t>(value));
    } else {
      return false;
    }
    return true;
  }

  bool sign_tensor(PyObject* value, Signature& signature) const {
    dlpack::Tensor tensor;
    if (exchange->describe(value, &tensor) != 0) return PyErr_Clear(), false;  // it has no memory to look at
    if (!tensor.data && elements(tensor) != 0) return false;                   // zeros without memory
    if (may_be_negated(tensor) && is_neg_(py::handle(value)).cast<bool>()) return false;
    const int64_t type = int64_t{tensor.scalar.code} << 8 | tensor.scalar.bits;
    const int64_t device = int64_t{tensor.device.type} << 16 | (tensor.device.index & 0xFFFF);
    const bool is_floating = tensor.scalar.code == dlpack::kFloat || tensor.scalar.code == dlpack::kBfloat;
    const int64_t differentiable = is_floating && requires_grad(value);  // integers never are
    signature.push_back(kTensor | differentiable << 8 | int64_t{tensor.dimensions} << 16 | type << 24 | device << 40);
    for (int32_t i = 0; i < tensor.dimensions; ++i) {
      signature.push_back(tensor.shape[i]);
      signature.push_back(tensor.strides[i]);
    }
    return true;
  }

  // Negatives of tensors are views of imaginary parts of complex numbers, and between those lie the real ones. To ask
  // each tensor would take as long as all the rest.
  static bool may_be_negated(const dlpack::Tensor& tensor) {
    for (int32_t i = 0; i < tensor.dimensions; ++i) {
      if (tensor.strides[i] == 1 && tensor.shape[i] > 1) return false;
    }
    return true;
  }

  // By the descriptor of the class: looking the attribute up by name would take longer than all that it does.
  bool requires_grad(PyObject* value) const {
    PyTypeObject* type = Py_TYPE(requires_grad_.ptr());
    PyObject* found = type->tp_descr_get(requires_grad_.ptr(), value, reinterpret_cast<PyObject*>(Py_TYPE(value)));
    if (!found) throw py::error_already_set();
    Py_DECREF(found);  // True and False live on
    return found == Py_True;
  }

  const py::tuple tensor_classes_;
  const py::object requires_grad_, is_neg_;
  const size_t most_;
  std::unordered_map<Signature, py::object, Hash> known_;
};

}  // namespace sca::python
