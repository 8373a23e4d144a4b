// What is needed of DLPack's C exchange interface (https://dmlc.github.io/dlpack/latest) to see where a tensor of
// Python lies. Its layout is fixed for a major version, so this library depends on no version of PyTorch.
#pragma once

#include <cstdint>

namespace sca::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr char kAttribute[] = "__dlpack_c_exchange_api__";  // of the class of tensors: a capsule with this name:
constexpr char kCapsule[] = "dlpack_exchange_api";

constexpr uint8_t kFloat = 2, kBfloat = 4;  // codes of scalar types

struct Tensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t dimensions;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } scalar;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;    // from `data`
};

struct ExchangeInterface {
  uint32_t major_version, minor_version;
  const ExchangeInterface* older;  // null: this is the oldest
  void (*allocate)();
  void (*export_owning)();
  void (*import_owning)();
  // Describes a tensor for as long as it is neither freed nor resized; not 0: there is a Python error.
  int (*describe)(void* object, Tensor* tensor);
  int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};

}  // namespace sca::dlpack
