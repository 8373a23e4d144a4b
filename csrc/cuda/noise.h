// A standard normal number for each element of a feature map, from a counter: Philox4x32-10 and Box-Muller, as
// sca_kernels/reference/noise.py defines them.
#pragma once

#include "features.h"

namespace sca::cuda {

SCA_DEVICE uint32_t high_word(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }

// The two words that the channels 4 q and 4 q + 1, or 4 q + 2 and 4 q + 3, of a pixel are made of.
SCA_DEVICE void random_words(int64_t seed, uint32_t pixel, uint32_t group, uint32_t image, bool second_pair,
                             uint32_t& first, uint32_t& second) {
  uint32_t counter[4] = {pixel, group, image, 0};
  auto low_key = static_cast<uint32_t>(seed), high_key = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t a = counter[0], c = counter[2];
    counter[0] = high_word(c, 0xcd9e8d57u) ^ counter[1] ^ low_key;
    counter[1] = c * 0xcd9e8d57u;
    counter[2] = high_word(a, 0xd2511f53u) ^ counter[3] ^ high_key;
    counter[3] = a * 0xd2511f53u;
    low_key += 0x9e3779b9u;
    high_key += 0xbb67ae85u;
  }
  first = second_pair ? counter[2] : counter[0];
  second = second_pair ? counter[3] : counter[1];
}

// sqrt(-2 ln u) times the cosine (or the sine) of 2 pi v, with u = (first + 1) / 2^24 and v = second / 2^24. Only the
// rest beyond whole quarter turns is rounded, and the series of sine and cosine take no local memory.
SCA_DEVICE float box_muller(uint32_t first, uint32_t second, bool sine) {
  const float radius = sqrtf(-2.0f * logf(static_cast<float>(first + 1) * 0x1p-24f));
  const int turns = static_cast<int>(second), quarter = (turns + (1 << 21)) >> 22;
  const float angle = static_cast<float>(turns - (quarter << 22)) * (1.5707963267948966f * 0x1p-22f);
  const float square = angle * angle;
  const float sine_rest = square * (-1.0f / 5040 + square * (1.0f / 362880));
  const float near_sine = angle + angle * square * (-1.0f / 6 + square * (1.0f / 120 + sine_rest));
  const float cosine_rest = square * (-1.0f / 720 + square * (1.0f / 40320 - square * (1.0f / 3628800)));
  const float near_cosine = 1 - square * (0.5f - square * (1.0f / 24 + cosine_rest));
  const int quadrant = sine ? quarter + 3 : quarter;  // sin x = cos(x - pi / 2)
  const float value = quadrant & 1 ? near_sine : near_cosine;
  return (quadrant + 1) & 2 ? -radius * value : radius * value;
}

SCA_DEVICE float normal(int64_t seed, uint32_t image, uint32_t channel, uint32_t pixel) {
  uint32_t first, second;
  random_words(seed, pixel, channel / 4, image, channel & 2, first, second);
  return box_muller(first >> 8, second >> 8, channel & 1);
}

// The noise of an element.
struct Noise {
  sca_noise noise;
  uint32_t width;

  SCA_DEVICE bool present() const { return noise.values || noise.seed; }
  SCA_DEVICE float strength(int64_t index) const {
    return noise.strength ? static_cast<const float*>(noise.strength)[index] : 0.0f;
  }
  SCA_DEVICE float at(int64_t image, int64_t channel, uint32_t pixel) const {
    if (noise.seed) {
      return normal(*noise.seed, static_cast<uint32_t>(image), static_cast<uint32_t>(channel), pixel);
    }
    return static_cast<const float*>(noise.values)[image * noise.batch_stride + pixel / width * noise.row_stride +
                                                   pixel % width * noise.column_stride];
  }
};

}  // namespace sca::cuda
