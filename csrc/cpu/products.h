// The two small matrix products that attention is made of, on rows given by pointers.
//
// Both keep a block of the result in registers. A block that reaches past the last row computes that row again, so
// there is one code path and every element is computed the same way wherever it stands in a block.
#pragma once

#include "simd.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// Vector registers are 32 with AVX-512 and 16 before it.
constexpr int64_t kBlockRows = 4;
constexpr int64_t kBlockColumns = kVectorBytes == 64 ? 4 : 2;

struct FetchNothing {
  void operator()(int64_t, int64_t) const {}
};

// The products of kBlockRows rows with kBlockColumns columns, summed over `width`: block[c * kBlockRows + r]. Calls
// fetch(r, i) on the way, for each vector of each row.
template <typename T, typename Fetch>
inline void dots_block(const T* const* row, const T* const* column, int64_t width, const Fetch& fetch, T* block) {
  constexpr int64_t kGroups = kBlockRows * kBlockColumns / kLanes<T>;
  static_assert(kGroups * kLanes<T> == kBlockRows * kBlockColumns);
  Vector<T> sums[kBlockColumns * kBlockRows];
#pragma GCC unroll 16
  for (int64_t s = 0; s < kBlockColumns * kBlockRows; ++s) sums[s] = Vector<T>{};
  for (int64_t i = 0; i < width; i += kLanes<T>) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < kBlockRows; ++r) fetch(r, i);
    Vector<T> row_values[kBlockRows];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kBlockRows; ++r) row_values[r] = load(row[r] + i);
#pragma GCC unroll 4
    for (int64_t c = 0; c < kBlockColumns; ++c) {
      const Vector<T> column_value = load(column[c] + i);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kBlockRows; ++r) sums[c * kBlockRows + r] += row_values[r] * column_value;
    }
  }
  for (int64_t g = 0; g < kGroups; ++g) store(block + g * kLanes<T>, sum_each<T>(sums + g * kLanes<T>));
}

// Calls visit(row, column, block) for each block of rows and columns, and fetch(row, i) once for each vector of each
// row: rows that come one by one from all over a tensor elude the hardware, so others are fetched meanwhile.
template <typename T, typename Fetch, typename Visit>
inline void each_dots_block(T* const* rows, int64_t row_count, T* const* columns, int64_t column_count, int64_t width,
                            const Fetch& fetch, const Visit& visit) {
  for (int64_t r0 = 0; r0 < row_count; r0 += kBlockRows) {
    const T* row[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r) row[r] = rows[smaller(r0 + r, row_count - 1)];
    for (int64_t c0 = 0; c0 < column_count; c0 += kBlockColumns) {
      const T* column[kBlockColumns];
      for (int64_t c = 0; c < kBlockColumns; ++c) column[c] = columns[smaller(c0 + c, column_count - 1)];
      alignas(kVectorBytes) T block[kBlockColumns * kBlockRows];
      if (c0 == 0) {
        dots_block(row, column, width, [&](int64_t r, int64_t i) { fetch(r0 + r, i); }, block);
      } else {
        dots_block(row, column, width, FetchNothing{}, block);
      }
      visit(r0, c0, block);
    }
  }
}

// table[c * table_stride + r] = sum_i rows[r][i] * columns[c][i]. `width` is a whole number of vectors;
// table_stride is a multiple of kBlockRows and the rows up to the next one are written too.
template <typename T, typename Fetch>
void dots(T* const* rows, int64_t row_count, T* const* columns, int64_t column_count, int64_t width, T* table,
          int64_t table_stride, const Fetch& fetch) {
  each_dots_block(rows, row_count, columns, column_count, width, fetch, [&](int64_t r0, int64_t c0, const T* block) {
    for (int64_t c = 0; c < kBlockColumns && c0 + c < column_count; ++c) {
      __builtin_memcpy(table + (c0 + c) * table_stride + r0, block + c * kBlockRows, kBlockRows * sizeof(T));
    }
  });
}

// sums[c][r] += sum_i rows[r][i] * columns[c][i]. What stands behind the last row, up to a multiple of kBlockRows,
// changes too.
template <typename T, typename Fetch>
void add_dots(T* const* rows, int64_t row_count, T* const* columns, int64_t column_count, int64_t width, T* const* sums,
              const Fetch& fetch) {
  each_dots_block(rows, row_count, columns, column_count, width, fetch, [&](int64_t r0, int64_t c0, const T* block) {
    for (int64_t c = 0; c < kBlockColumns && c0 + c < column_count; ++c) {
      T* __restrict target = sums[c0 + c] + r0;
#pragma GCC unroll 4
      for (int64_t r = 0; r < kBlockRows; ++r) target[r] += block[c * kBlockRows + r];
    }
  });
}

enum class Write { kReplace, kStream, kAccumulate };

// Factors of a weighted sum: of target r and term c, values[r * target_stride + c * term_stride].
template <typename T>
struct Weights {
  const T* values;
  int64_t target_stride, term_stride;
};

template <Write kWrite, int64_t kRows, int64_t kVectors, typename T>
inline void weighted_sum_block(const Weights<T>& weights, const int64_t* row, T* const* terms, int64_t term_count,
                               T* const* target, int64_t i) {
  Vector<T> sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      sums[r][v] = kWrite == Write::kAccumulate ? load(target[r] + i + v * kLanes<T>) : Vector<T>{};
    }
  }
  const T* weight[kRows];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) weight[r] = weights.values + row[r] * weights.target_stride;
  for (int64_t c = 0; c < term_count; ++c) {
    const T* term = terms[c] + i;
    const int64_t offset = c * weights.term_stride;
    Vector<T> values[kVectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) values[v] = load(term + v * kLanes<T>);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const Vector<T> factor = broadcast<T>(weight[r][offset]);
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] += factor * values[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      if constexpr (kWrite == Write::kStream) {
        stream<T>(target[r] + i + v * kLanes<T>, sums[r][v]);
      } else {
        store<T>(target[r] + i + v * kLanes<T>, sums[r][v]);
      }
    }
  }
}

// A few vectors of all targets. Fewer vectors at once leave registers for more targets, so that there are always
// enough sums to hide the latency of an addition.
template <Write kWrite, int64_t kVectors, typename T>
inline void weighted_sum_columns(const Weights<T>& weights, T* const* terms, int64_t term_count, T* const* targets,
                                 int64_t target_count, int64_t i) {
  constexpr int64_t kRows = kVectors == kBlockColumns ? kBlockRows : 2 * kBlockRows;
  for (int64_t r0 = 0; r0 < target_count; r0 += kRows) {
    int64_t row[kRows];
    T* target[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      row[r] = smaller(r0 + r, target_count - 1);
      target[r] = targets[row[r]];
    }
    weighted_sum_block<kWrite, kRows, kVectors>(weights, row, terms, term_count, target, i);
  }
}

template <Write kWrite, typename T>
inline void weighted_sum_as(const Weights<T>& weights, T* const* terms, int64_t term_count, T* const* targets,
                            int64_t target_count, int64_t width) {
  constexpr int64_t kMost = kBlockColumns, kFewer = kBlockColumns / 2;
  int64_t i = 0;
  for (; i + kMost * kLanes<T> <= width; i += kMost * kLanes<T>) {
    weighted_sum_columns<kWrite, kMost>(weights, terms, term_count, targets, target_count, i);
  }
  for (; i + kFewer * kLanes<T> <= width; i += kFewer * kLanes<T>) {
    weighted_sum_columns<kWrite, kFewer>(weights, terms, term_count, targets, target_count, i);
  }
  for (; i < width; i += kLanes<T>) {
    weighted_sum_columns<kWrite, 1>(weights, terms, term_count, targets, target_count, i);
  }
}

// targets[r] (=, or += with kAccumulate) sum_c weight(r, c) * terms[c]. `width` is a whole number of vectors.
template <typename T>
void weighted_sum(Write write, const Weights<T>& weights, T* const* terms, int64_t term_count, T* const* targets,
                  int64_t target_count, int64_t width) {
  switch (write) {
    case Write::kReplace:
      return weighted_sum_as<Write::kReplace>(weights, terms, term_count, targets, target_count, width);
    case Write::kStream:
      return weighted_sum_as<Write::kStream>(weights, terms, term_count, targets, target_count, width);
    case Write::kAccumulate:
      return weighted_sum_as<Write::kAccumulate>(weights, terms, term_count, targets, target_count, width);
  }
}

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
