// Products of small matrices, on the tensor cores of a GPU.
#pragma once

#include "features.h"

namespace sca::cuda {

// Numbers that lie `step` apart, in memory or in shared memory.
template <typename Scalar>
struct Features {
  const Scalar* first;
  int64_t step;

  SCA_DEVICE float operator[](int64_t index) const { return widen(first[index * step]); }
};

constexpr int kWarp = 32;

// A product of 16 x k and k x 8 numbers by the lanes of a warp, each of which gets four numbers of the result. Numbers
// are in TF32, which has 10 bits behind the leading one: numbers of 16 bits are exact, float is split in two, and all
// products but that of the two rests are added up. So the rows that were folded in float32 stay as exact as they are;
// in 16 bits, or in TF32 alone, they would not.
template <typename ScalarA, typename ScalarB>
struct WarpProduct {
  static constexpr int kRows = 16, kColumns = 8, kDepth = 8;

  float sums[4] = {};

  // The place of sums[i] in the result.
  SCA_DEVICE static int row(int lane, int i) { return lane / 4 + i / 2 * 8; }
  SCA_DEVICE static int column(int lane, int i) { return lane % 4 * 2 + i % 2; }

#ifdef __CUDACC__
  // Sums of a_of(row)[k] b_of(column)[k] for k in [begin, begin + 8), [begin + step, ...), ... below `depth`. All lanes
  // of a warp call it together.
  template <typename A, typename B>
  SCA_DEVICE void add(int lane, int64_t begin, int64_t step, int64_t depth, const A& a_of, const B& b_of) {
    const int group = lane / 4, place = lane % 4;
    const Features<ScalarA> a[2] = {a_of(group), a_of(group + 8)};
    const Features<ScalarB> b = b_of(group);
    float rests[4] = {};
    __syncwarp();  // whatever the lanes have done before
    for (int64_t k = begin; k < depth; k += step) {
      uint32_t a_large[4], a_rest[4], b_large[2], b_rest[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t index = k + place + i / 2 * 4;
        split<ScalarA>(index < depth ? a[i % 2][index] : 0.0f, a_large[i], a_rest[i]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t index = k + place + i * 4;
        split<ScalarB>(index < depth ? b[index] : 0.0f, b_large[i], b_rest[i]);
      }
      if constexpr (!kExact<ScalarA>) multiply(rests, a_rest, b_large);
      if constexpr (!kExact<ScalarB>) multiply(rests, a_large, b_rest);
      multiply(sums, a_large, b_large);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += rests[i];
  }

 private:
  template <typename Scalar>
  static constexpr bool kExact = sizeof(Scalar) == 2;

  template <typename Scalar>
  SCA_DEVICE static void split(float value, uint32_t& large, uint32_t& rest) {
    large = rest = __float_as_uint(value);
    if constexpr (!kExact<Scalar>) {
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(large) : "f"(value));
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rest) : "f"(value - __uint_as_float(large)));
    }
  }
  SCA_DEVICE static void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  template <typename A, typename B>
  void add(int lane, int64_t begin, int64_t step, int64_t depth, const A& a_of, const B& b_of) {
    for (int i = 0; i < 4; ++i) {
      const Features<ScalarA> a = a_of(row(lane, i));
      const Features<ScalarB> b = b_of(column(lane, i));
      for (int64_t k = begin; k < depth; ++k) {
        if ((k - begin) % step < kDepth) sums[i] += a[k] * b[k];
      }
    }
  }
#endif
};

// Calls finish(part, row, column, sum of a_of(row)[k] b_of(column)[k]) for all rows and columns; each of `parts` has
// its share of k. The warps of a block share out the parts and pieces of the result, and `thread` is one of theirs.
template <typename ScalarA, typename ScalarB, typename A, typename B, typename Finish>
SCA_DEVICE void multiply(const Block& run, int thread, int64_t rows, int64_t columns, int64_t depth, int parts,
                         const A& a_of, const B& b_of, const Finish& finish) {
  using Product = WarpProduct<ScalarA, ScalarB>;
  const auto of_rows = static_cast<uint32_t>(divide_up(rows, Product::kRows));
  const uint32_t pieces = of_rows * static_cast<uint32_t>(divide_up(columns, Product::kColumns));
  for (uint32_t index = thread; index < pieces * parts * kWarp; index += run.threads()) {
    const int lane = static_cast<int>(index % kWarp), part = static_cast<int>(index / kWarp % parts);
    const uint32_t piece = index / kWarp / parts;
    const int64_t row = int64_t{piece % of_rows} * Product::kRows,
                  column = int64_t{piece / of_rows} * Product::kColumns;
    Product product;
    product.add(
        lane, part * Product::kDepth, parts * Product::kDepth, depth,
        [&](int i) { return a_of(smaller(row + i, rows - 1)); },
        [&](int i) { return b_of(smaller(column + i, columns - 1)); });
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t r = row + Product::row(lane, i), c = column + Product::column(lane, i);
      if (r < rows && c < columns) finish(part, r, c, product.sums[i]);
    }
  }
}

}  // namespace sca::cuda
