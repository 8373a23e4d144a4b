#pragma once

#include "simd.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// Adds `count` logits to each of some softmaxes with running maxima and sums, one for each row: turns scale * logits
// into weights relative to the new maximum, zero from `count` up to the whole number of vectors `width`. Calls
// rescale(row, factor) where what was accumulated with earlier weights is to be corrected.
template <typename T, typename Rescale>
void add_to_softmax(T* logits, int64_t pitch, int64_t rows, int64_t count, int64_t width, T scale, T* max, T* sum,
                    const Rescale& rescale) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  // Rows take turns, and what is known of each becomes a lane: a row by itself waits for itself again and again.
  for (int64_t begin = 0; begin < rows; begin += kLanes<T>) {
    const int64_t size = smaller(kLanes<T>, rows - begin);
    Vector<T> of_rows[kLanes<T>] = {};
    for (int64_t j = 0; j < size; ++j) {
      T* row = logits + (begin + j) * pitch;
      Vector<T> largest = broadcast<T>(kLowest);
      for (int64_t i = 0; i < width; i += kLanes<T>) {
        const Vector<T> value = first_or(load(row + i) * scale, count - i, kLowest);
        store<T>(row + i, value);
        largest = maximum<T>(value, largest);
      }
      of_rows[j] = largest;
    }
    const Vector<T> old_max = load_some(max + begin, size);
    const Vector<T> new_max = maximum<T>(max_each<T>(of_rows), old_max);
    // Where all logits are -inf so far, their weights are zero, not exp(-inf + inf).
    T shifts[kLanes<T>], corrections[kLanes<T>];
    store<T>(shifts, new_max == kLowest ? Vector<T>{} : new_max);
    for (int64_t j = 0; j < size; ++j) {
      T* row = logits + (begin + j) * pitch;
      Vector<T> total = {};
      for (int64_t i = 0; i < width; i += kLanes<T>) {
        const Vector<T> weights = exp<T>(load(row + i) - shifts[j]);
        store<T>(row + i, weights);
        total += weights;
      }
      of_rows[j] = total;
    }
    // What has met no finite logit yet has accumulated nothing.
    const Vector<T> correction =
        (old_max == new_max) | (old_max == kLowest) ? broadcast<T>(1) : exp<T>(old_max - new_max);
    store_some<T>(max + begin, new_max, size);
    store_some<T>(sum + begin, load_some(sum + begin, size) * correction + sum_each<T>(of_rows), size);
    store<T>(corrections, correction);
    for (int64_t j = 0; j < size; ++j) {
      if (corrections[j] != 1) rescale(begin + j, corrections[j]);
    }
  }
}

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
