// How the body of a kernel is executed: by the threads of a block on a GPU, or on the host by one thread after another.
//
// A kernel is a structure of its arguments with an operator (block, item, shared), where an item is a piece of work for
// one block. It does everything in phases, block.each_thread([&](int thread) { ... }), and behind each is a barrier.
// What a thread remembers from one phase to the next is a PerThread, what threads tell each other is in Shared. Control
// flow around phases is the same for all threads of a block.
//
// nvcc makes a kernel for a GPU of it. The host's compiler makes a function that runs each phase for all threads in
// turn, for any number of them, forwards or backwards: what needs a barrier that is not there, an order among threads,
// or a certain number of them gives different results. Tests do that, there is no other use of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define SCA_DEVICE __device__ __forceinline__
#define SCA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SCA_DEVICE inline
#define SCA_HOST_DEVICE inline
#endif

namespace sca::cuda {

// Threads of every block; tests of the host's version take other numbers.
constexpr int kThreads = 256;

#ifdef __CUDACC__

template <typename T>
class PerThread {
 public:
  SCA_DEVICE T& operator[](int) { return value_; }

 private:
  T value_;
};

struct Block {
  static SCA_DEVICE int threads() { return kThreads; }
  template <typename Phase>
  SCA_DEVICE void each_thread(const Phase& phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
};

inline int block_threads() { return kThreads; }

// One block per multiprocessor is enough to ask for: with more, ptxas rather spills registers.
template <typename Kernel>
__global__ void __launch_bounds__(kThreads, 1) run(const __grid_constant__ Kernel kernel, const int64_t items) {
  __shared__ typename Kernel::Shared shared;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) kernel(Block(), item, shared);
}

// Runs a kernel on a stream of the current device: as many blocks as fit on its multiprocessors at once walk the items.
// Returns what went wrong, or null.
template <typename Kernel>
const char* launch(const Kernel& kernel, int64_t items, int32_t multiprocessors, void* stream) {
  if (items <= 0) return nullptr;
  int blocks = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, run<Kernel>, kThreads, 0);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t room = int64_t{multiprocessors} * blocks;
  run<Kernel><<<static_cast<unsigned>(items < room ? items : room), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      kernel, items);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

#else

constexpr int kMostThreads = 1024;

// How kernels are run from now on, by this process.
struct Emulation {
  int threads = kThreads;
  bool backwards = false;
};
inline Emulation& emulation() {
  static Emulation settings;
  return settings;
}

// What has not been written is not a number.
inline void poison(void* memory, size_t bytes) { std::memset(memory, 0xff, bytes); }

template <typename T>
class PerThread {
 public:
  PerThread() { poison(values_, sizeof(values_)); }
  T& operator[](int thread) { return values_[thread]; }

 private:
  T values_[kMostThreads];
};

struct Block {
  static int threads() { return emulation().threads; }
  template <typename Phase>
  void each_thread(const Phase& phase) const {
    for (int i = 0; i < threads(); ++i) phase(emulation().backwards ? threads() - 1 - i : i);
  }
};

inline int block_threads() { return emulation().threads; }

template <typename Kernel>
const char* launch(const Kernel& kernel, int64_t items, int32_t, void*) {
  auto* shared = new typename Kernel::Shared;
  for (int64_t i = 0; i < items; ++i) {
    poison(shared, sizeof(*shared));
    kernel(Block(), emulation().backwards ? items - 1 - i : i, *shared);
  }
  delete shared;
  return nullptr;
}

#endif

template <typename T>
constexpr SCA_HOST_DEVICE T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr SCA_HOST_DEVICE T larger(T a, T b) {
  return a < b ? b : a;
}
SCA_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Adds up rows of shared[0 .. count), each of `lanes` entries that lie `step` apart, by halves, so that the order is
// always the same: afterwards entry r is the sum of r, r + step, ..., for r < step. `add(a, b)` adds entry b to entry
// a.
template <typename Add>
SCA_DEVICE void reduce(const Block& block, int lanes, int step, const Add& add) {
  while (lanes > 1) {
    const int half = (lanes + 1) / 2, pairs = (lanes - half) * step;
    block.each_thread([&](int thread) {
      if (thread < pairs) add(thread, thread + half * step);
    });
    lanes = half;
  }
}

// Hands out parts of a workspace, each at a multiple of 256 bytes. With a null workspace it only measures.
class Arena {
 public:
  explicit Arena(void* workspace) : memory_(static_cast<char*>(workspace)) {}
  template <typename T>
  T* take(int64_t count) {
    T* const part = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (count * int64_t{sizeof(T)} + 255) / 256 * 256;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace sca::cuda
