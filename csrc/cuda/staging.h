// Some pixels of x, with all channels, copied to shared memory as they are.
#pragma once

#include "folded_attention.h"
#include "reductions.h"

namespace sca::cuda {

// What counts the bytes that have been copied; part of a kernel's shared memory.
struct alignas(8) CopyBarrier {
  uint64_t state;
};

// Copies rows of `bytes` bytes each, a multiple of 16, where row(i) has the target in shared memory and the source in
// global memory, both at multiples of 16. GPUs since sm_90 have an engine for that; elsewhere threads copy packs.
struct RowCopy {
  void* target;
  const void* source;
};
template <typename Row>
SCA_DEVICE void copy_rows(const Block& block, CopyBarrier& barrier, int rows, uint32_t bytes, const Row& row) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  const auto counter = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  block.each_thread([&](int thread) {
    if (thread > 0) return;
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.proxy.async.shared::cta;" ::"r"(counter) : "memory");
  });
  block.each_thread([&](int thread) {
    if (thread == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(counter), "r"(rows * bytes)
                   : "memory");
    }
    for (int i = thread; i < rows; i += block.threads()) {
      const RowCopy copy = row(i);
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       static_cast<uint32_t>(__cvta_generic_to_shared(copy.target))),
                   "l"(__cvta_generic_to_global(copy.source)), "r"(bytes), "r"(counter)
                   : "memory");
    }
    uint32_t done = 0;
    while (!done) {
      asm volatile(
          "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], 0;\n"
          "selp.u32 %0, 1, 0, done;\n}"
          : "=r"(done)
          : "r"(counter)
          : "memory");
    }
  });
  block.each_thread([&](int thread) {
    if (thread == 0) asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(counter) : "memory");
  });
#else
  using Bytes = Pack<uint32_t, 4>;
  const int packs = static_cast<int>(bytes / sizeof(Bytes));
  block.each_thread([&](int thread) {
    for (int index = thread; index < rows * packs; index += block.threads()) {
      const RowCopy copy = row(index / packs);
      static_cast<Bytes*>(copy.target)[index % packs] = static_cast<const Bytes*>(copy.source)[index % packs];
    }
  });
  static_cast<void>(barrier);
#endif
}

// Where the copies of up to `pixels` pixels are: rows of channels or rows of pixels, as in memory, with gaps between
// the rows so that the lanes of a warp find few of a product's numbers in the same bank.
template <typename Scalar>
struct Staging {
  int64_t channels, step;  // between rows
  int pixels;
  bool along_channels, whole_rows;

  static constexpr int64_t kPack = kPackWidth<Scalar>;

  Staging(const Logits<Scalar>& logits, int64_t pixels)
      : channels(logits.channels), pixels(static_cast<int>(pixels)), along_channels(logits.lanes.along_channels) {
    const sca_feature_map& x = logits.x;
    whole_rows = along_channels &&
                 allows_packs(x, true, channels, logits.height, logits.width, sizeof(Scalar), static_cast<int>(kPack));
    constexpr int64_t kLine = 32 / sizeof(Scalar), kGap = 16 / sizeof(Scalar);
    step = along_channels ? (divide_up(channels, kLine) * kLine) + kGap : divide_up(pixels, kLine) * kLine + kGap;
  }
  SCA_HOST_DEVICE int64_t bytes() const { return divide_up((along_channels ? pixels : channels) * step, kPack) * 16; }

  SCA_DEVICE int64_t index(int p, int64_t channel) const {
    return along_channels ? p * step + channel : channel * step + p;
  }
  SCA_DEVICE Features<Scalar> features(const char* memory, int p) const {
    return {reinterpret_cast<const Scalar*>(memory) + index(p, 0), along_channels ? 1 : step};
  }
  // The same numbers, by channel.
  SCA_DEVICE Features<Scalar> pixels_of(const char* memory, int64_t channel) const {
    return {reinterpret_cast<const Scalar*>(memory) + index(0, channel), along_channels ? step : 1};
  }

  // The moments of a channel at the pixels first, first + stride, ... of the `count` that have been copied, from
  // differences to the first of them: a mean that is large beside the deviations costs nothing.
  SCA_DEVICE Moments moments(const char* memory, int64_t channel, int first, int stride, int count) const {
    if (first >= count) return {};
    const Features<Scalar> x = pixels_of(memory, channel);
    const float shift = x[first], number = static_cast<float>((count - first - 1) / stride + 1);
    float mean = 0, squares = 0;
    for (int p = first; p < count; p += stride) mean += x[p] - shift;
    mean /= number;
    for (int p = first; p < count; p += stride) {
      const float deviation = x[p] - shift - mean;
      squares += deviation * deviation;
    }
    return {number, double{shift} + double{mean}, squares};
  }

  // Copies the pixels at `count` positions of an image's plan from `begin` on.
  SCA_DEVICE void fill(const Block& block, const Logits<Scalar>& logits, int64_t image, int64_t begin, int count,
                       CopyBarrier& barrier, char* memory) const {
    auto* const target = reinterpret_cast<Scalar*>(memory);
    if (whole_rows) {
      copy_rows(block, barrier, count, static_cast<uint32_t>(channels * sizeof(Scalar)), [&](int p) -> RowCopy {
        return {target + index(p, 0), logits.features(logits.x, image, begin + p).first};
      });
      return;
    }
    const TileLanes& lanes = logits.lanes;
    block.each_thread([&](int thread) {
      if (!lanes.inside(thread)) return;
      for (int p = lanes.pixel(thread); p < count; p += lanes.pixels) {
        const Features<Scalar> x = logits.features(logits.x, image, begin + p);
#pragma unroll 8
        for (int64_t c = lanes.channel(thread); c < channels; c += lanes.channels)
          target[index(p, c)] = x.first[c * x.step];
      }
    });
  }
};

}  // namespace sca::cuda
