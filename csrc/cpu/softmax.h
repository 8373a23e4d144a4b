#pragma once

#include <cmath>

#include "simd.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// Adds `count` logits to a softmax with a running maximum and sum: turns scale * logits into weights relative to the
// new maximum, zero from `count` up to the whole number of vectors `width`. Returns the factor that corrects what was
// accumulated with earlier weights.
template <typename T>
T add_to_softmax(T* logits, int64_t count, int64_t width, T scale, T& max, T& sum) {
  for (int64_t i = 0; i < width; i += kLanes<T>) store<T>(logits + i, load(logits + i) * scale);
  for (int64_t i = count; i < width; ++i) logits[i] = -std::numeric_limits<T>::infinity();
  Vector<T> largest = broadcast<T>(max);
  for (int64_t i = 0; i < width; i += kLanes<T>) largest = maximum<T>(load(logits + i), largest);
  const T new_max = max_lanes<T>(largest);
  // Where all logits are -inf so far, their weights are zero, not exp(-inf + inf).
  const T shift = new_max == -std::numeric_limits<T>::infinity() ? T(0) : new_max;
  Vector<T> total = {};
  for (int64_t i = 0; i < width; i += kLanes<T>) {
    const Vector<T> weights = exp<T>(load(logits + i) - shift);
    store<T>(logits + i, weights);
    total += weights;
  }
  const T correction = max == new_max ? T(1) : std::exp(max - new_max);
  sum = sum * correction + sum_lanes<T>(total);
  max = new_max;
  return correction;
}

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
