// Kernels whose items are shared out among the blocks of a cluster, which reach each other's shared memory, and kernels
// that take more shared memory than their structure Shared.
//
// Such a kernel has an operator (cluster, item) that does everything in
// cluster.each_block([&](int rank, const Block& block, Shared& shared) { ... }), inside of which there are phases as
// always, and behind which is a barrier of the cluster. Between such barriers a block can read what another one has
// left in its `shared`, or in its extra memory. Control flow around them is the same for all blocks of a cluster.
//
// GPUs older than sm_90 have clusters of one block, and so does what is launched with one.
#pragma once

#include "execution.h"

namespace sca::cuda {

// What a kernel may ask for: blocks of a cluster, and bytes of extra shared memory of a block.
struct ClusterLimits {
  int blocks;
  int64_t extra;
};

constexpr int kMostClusterBlocks = 8;           // that every GPU with clusters has
constexpr int64_t kMostShared = 24 << 10;       // of a kernel's own structure
constexpr int64_t kMostExtraMemory = 88 << 10;  // with which two blocks fit on a multiprocessor of sm_90

#ifdef __CUDACC__

template <typename Shared>
class Cluster {
 public:
  SCA_DEVICE Cluster(Shared& shared, char* extra) : shared_(shared), extra_(extra) {}

  SCA_DEVICE int blocks() const {
#if __CUDA_ARCH__ >= 900
    uint32_t blocks;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
    return static_cast<int>(blocks);
#else
    return 1;
#endif
  }
  template <typename Work>
  SCA_DEVICE void each_block(const Work& work) const {
    work(rank(), Block(), shared_);
#if __CUDA_ARCH__ >= 900
    if (blocks() > 1) {
      asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
    }
#endif
  }
  SCA_DEVICE Shared& shared(int rank) const { return *of_block(&shared_, rank); }
  SCA_DEVICE char* extra(int rank) const { return of_block(extra_, rank); }
  SCA_DEVICE char* extra() const { return extra_; }

 private:
  Shared& shared_;
  char* extra_;

  SCA_DEVICE static int rank() {
#if __CUDA_ARCH__ >= 900
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
#else
    return 0;
#endif
  }
  // Where a block of the cluster has what this one has at an address.
  template <typename T>
  SCA_DEVICE static T* of_block(T* own, int rank) {
#if __CUDA_ARCH__ >= 900
    uint64_t address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
    return reinterpret_cast<T*>(address);
#else
    return own;
#endif
  }
};

namespace clustered {
template <typename Kernel>
__global__ void __launch_bounds__(kThreads, 1) run(const __grid_constant__ Kernel kernel, const int64_t items) {
  __shared__ typename Kernel::Shared shared;
  extern __shared__ uint4 extra[];
  const Cluster<typename Kernel::Shared> cluster(shared, reinterpret_cast<char*>(extra));
  const int blocks = cluster.blocks();
  for (int64_t item = blockIdx.x / blocks; item < items; item += gridDim.x / blocks) kernel(cluster, item);
}
}  // namespace clustered

// Of the current device.
inline ClusterLimits cluster_limits() {
  int device = 0, clusters = 0, shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {clusters ? kMostClusterBlocks : 1, smaller(shared - kMostShared, kMostExtraMemory)};
}

// Runs a kernel on a stream of the current device, with clusters of `blocks` blocks that have `extra` bytes of extra
// memory each: as many as there can be at once walk the items. Returns what went wrong, or null.
template <typename Kernel>
const char* launch_clusters(const Kernel& kernel, int64_t items, int blocks, int64_t extra, int32_t multiprocessors,
                            void* stream) {
  static_assert(sizeof(typename Kernel::Shared) <= kMostShared);
  if (items <= 0) return nullptr;
  // The same for all calls, which may come from several threads.
  cudaError_t error = cudaFuncSetAttribute(clustered::run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(cluster_limits().extra));
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(static_cast<unsigned>(blocks));
  configuration.blockDim = dim3(kThreads);
  configuration.dynamicSmemBytes = static_cast<size_t>(extra);
  configuration.stream = static_cast<cudaStream_t>(stream);
  configuration.attrs = &size;
  configuration.numAttrs = blocks > 1 ? 1 : 0;
  int room = 0;
  if (error == cudaSuccess && blocks > 1) {
    error = cudaOccupancyMaxActiveClusters(&room, clustered::run<Kernel>, &configuration);
  } else if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&room, clustered::run<Kernel>, kThreads, extra);
    room *= multiprocessors;
  }
  if (error == cudaSuccess) {
    configuration.gridDim.x = static_cast<unsigned>(smaller<int64_t>(items, larger(room, 1)) * blocks);
    error = cudaLaunchKernelEx(&configuration, clustered::run<Kernel>, kernel, items);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else

template <typename Shared>
class Cluster {
 public:
  Cluster(int blocks, int64_t extra) : blocks_(blocks), extra_size_(extra) {
    for (int rank = 0; rank < blocks; ++rank) {
      shared_[rank] = new Shared;
      extra_[rank] = new char[extra];
    }
  }
  ~Cluster() {
    for (int rank = 0; rank < blocks_; ++rank) {
      delete shared_[rank];
      delete[] extra_[rank];
    }
  }
  Cluster(const Cluster&) = delete;
  Cluster& operator=(const Cluster&) = delete;

  void forget() const {
    for (int rank = 0; rank < blocks_; ++rank) {
      poison(shared_[rank], sizeof(Shared));
      poison(extra_[rank], extra_size_);
    }
  }
  int blocks() const { return blocks_; }
  template <typename Work>
  void each_block(const Work& work) const {
    for (int i = 0; i < blocks_; ++i) {
      running_ = emulation().backwards ? blocks_ - 1 - i : i;
      work(running_, Block(), *shared_[running_]);
    }
  }
  Shared& shared(int rank) const { return *shared_[rank]; }
  char* extra(int rank) const { return extra_[rank]; }
  char* extra() const { return extra_[running_]; }

 private:
  int blocks_;
  mutable int running_ = 0;
  int64_t extra_size_;
  Shared* shared_[kMostClusterBlocks];
  char* extra_[kMostClusterBlocks];
};

inline ClusterLimits cluster_limits() { return {emulation().cluster_blocks, emulation().extra_memory}; }

template <typename Kernel>
const char* launch_clusters(const Kernel& kernel, int64_t items, int blocks, int64_t extra, int32_t, void*) {
  static_assert(sizeof(typename Kernel::Shared) <= kMostShared);
  if (blocks > cluster_limits().blocks || extra > cluster_limits().extra) return "expected what the limits allow";
  const Cluster<typename Kernel::Shared> cluster(blocks, extra);
  for (int64_t i = 0; i < items; ++i) {
    cluster.forget();
    kernel(cluster, emulation().backwards ? items - 1 - i : i);
  }
  return nullptr;
}

#endif

}  // namespace sca::cuda
