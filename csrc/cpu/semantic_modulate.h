// What the forward and the backward of semantic_modulate share.
//
// For the pixels of a label, `table` has one row of attention for each of the label's latents in each head, and beside
// it stand the latents' rows of scale and shift; the products of the two sides are gamma and beta. Pixels without
// latents have one row of ones, and beside it what such pixels get.
#pragma once

#include "folded_attention.h"
#include "moments.h"
#include "noise.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

template <typename Scalar>
class SemanticModulate : public FoldedAttention<Scalar, sca_semantic_modulate> {
  using Base = FoldedAttention<Scalar, sca_semantic_modulate>;

 public:
  using typename Base::T;

  SemanticModulate(const sca_semantic_modulate& call, int64_t blocks, int64_t most_chunks)
      : Base(call, blocks, most_chunks),
        statistics_(arena_, call.x, call.batch, call.channels, call.height, call.width) {
    uniform_scale_ = arena_.template take<T>(call.batch * call.channels);
    uniform_shift_ = arena_.template take<T>(call.batch * call.channels);
  }

 protected:
  using Base::arena_;
  using Base::call_;

  // What one thread works in.
  struct Scratch {
    ChunkLabels labels;
    TurnedTile<Scalar> x_tile;
    FeatureBlock<T> x, result, noise;
    RowTable<T> keys, scale, shift;  // (rows, channels)
    RowTable<T> table;               // (rows and, if there is one value per pixel, the noise; pixels of a block)
    T *mean, *rstd, *strength, *scale_bias, *shift_bias, *empty_scale, *empty_shift;  // of the channels of the image

    Scratch(Arena& arena, const SemanticModulate& kernel)
        : labels(kernel.make_labels(arena)),
          x_tile(kernel.make_tile(arena)),
          x(arena, kernel.call_.channels, kernel.block_),
          result(arena, kernel.call_.channels, kernel.block_),
          noise(arena, kernel.per_element_noise() ? kernel.call_.channels : 0, kernel.block_),
          keys(arena, kernel.most_rows(), kernel.channel_width_),
          scale(arena, larger<int64_t>(kernel.most_rows(), 1), kernel.channel_width_),
          shift(arena, larger<int64_t>(kernel.most_rows(), 1), kernel.channel_width_),
          table(arena, larger<int64_t>(kernel.most_rows(), 1) + 1, kernel.block_),
          mean(arena.take<T>(kernel.channel_width_)),
          rstd(arena.take<T>(kernel.channel_width_)),
          strength(arena.take<T>(kernel.channel_width_)),
          scale_bias(arena.take<T>(kernel.channel_width_)),
          shift_bias(arena.take<T>(kernel.channel_width_)),
          empty_scale(arena.take<T>(kernel.channel_width_)),
          empty_shift(arena.take<T>(kernel.channel_width_)) {}
  };

  bool noise_per_pixel() const { return call_.noise.values != nullptr; }
  bool per_element_noise() const { return call_.noise.seed != nullptr; }

  static T value(const void* values, int64_t i) { return values ? static_cast<const T*>(values)[i] : T(0); }

  // What pixels without latents add to gamma or beta: the rows given, or the mean over the latents.
  static const T* empty_rows(const void* given, const T* uniform) {
    return given ? static_cast<const T*>(given) : uniform;
  }

  bool any_empty(int64_t image) const {
    return ImageTokens(call_.pixels, image).any_unmatched(ImageTokens(call_.latents, image));
  }

  void make_uniform_rows() const {
    for (int64_t image = 0; image < call_.batch; ++image) {
      const bool needed = call_.empty_uniform && any_empty(image);
      mean_of_rows(call_.scale, image, needed && !call_.empty_scale, uniform_scale_);
      mean_of_rows(call_.shift, image, needed && !call_.empty_shift, uniform_shift_);
    }
  }
  // The mean over the latents, summed over the heads; zero if not needed.
  void mean_of_rows(const void* rows, int64_t image, bool needed, T* result) const {
    const T* source = static_cast<const T*>(rows) + Base::row(image, 0, 0) * call_.channels;
    T* target = result + image * call_.channels;
    for (int64_t c = 0; c < call_.channels; ++c) target[c] = 0;
    if (!needed) return;
    for (int64_t i = 0; i < call_.heads * call_.latents.count; ++i) {
      for (int64_t c = 0; c < call_.channels; ++c) target[c] += source[i * call_.channels + c];
    }
    const T share = T(1) / static_cast<T>(call_.latents.count);
    for (int64_t c = 0; c < call_.channels; ++c) target[c] = call_.latents.count > 0 ? target[c] * share : T(0);
  }

  void load_channels(int64_t image, Scratch& scratch) const {
    const auto load_values = [&](const void* values, T offset, T* target) {
      for (int64_t c = 0; c < Base::channel_width_; ++c) {
        target[c] = c < call_.channels ? offset + value(values, image * call_.channels + c) : T(0);
      }
    };
    load_values(call_.mean, 0, scratch.mean);
    load_values(call_.rstd, 0, scratch.rstd);
    load_values(call_.noise.strength, 0, scratch.strength);
    load_values(call_.scale_bias, call_.add_one ? T(1) : T(0), scratch.scale_bias);
    load_values(call_.shift_bias, 0, scratch.shift_bias);
    load_values(empty_rows(call_.empty_scale, uniform_scale_), 0, scratch.empty_scale);
    load_values(empty_rows(call_.empty_shift, uniform_shift_), 0, scratch.empty_shift);
  }

  // Loads the rows of a label's latents, or the one of pixels without latents.
  void load_label(int64_t image, Range latents, Scratch& scratch) const {
    if (latents.size() == 0) {
      scratch.scale.point_to(scratch.empty_scale, 1);
      scratch.shift.point_to(scratch.empty_shift, 1);
      return;
    }
    Base::load_rows(call_.keys, image, latents, scratch.keys);
    Base::load_rows(call_.scale, image, latents, scratch.scale);
    Base::load_rows(call_.shift, image, latents, scratch.shift);
  }
  // Rows of attention in the table; those of the noise, if any, follow.
  int64_t attention_rows(Range latents) const { return larger<int64_t>(latents.size() * call_.heads, 1); }

  // Fills the table for a block of pixels: softmax of the logits, noise; finite past the last pixel.
  void fill_table(int64_t image, Range latents, const Runs& runs, Scratch& scratch) const {
    const int64_t count = latents.size() * call_.heads, width = padded<T>(runs.pixels);
    if (count > 0) {
      scratch.x.multiply(scratch.keys, count, scratch.table);
      Base::each_row(latents, [&](int64_t j, int64_t head, int64_t latent) {
        const T bias = value(call_.key_bias, Base::row(image, head, latent));
        T* logits = scratch.table.rows[j];
        if (call_.key_bias) {
          for (int64_t p = 0; p < runs.pixels; ++p) logits[p] += bias;
        }
        for (int64_t p = runs.pixels; p < width; ++p) logits[p] = 0;
      });
      Base::add_by_position(runs, image, latents, call_.row_bias, call_.col_bias, scratch.table);
      for (int64_t head = 0; head < call_.heads; ++head) {
        softmax_over_rows(scratch.table.rows + head * latents.size(), latents.size(), width);
      }
    } else {
      for (int64_t p = 0; p < width; ++p) scratch.table.rows[0][p] = 1;
    }
    if (noise_per_pixel()) gather_noise(image, runs, width, scratch.table.rows[attention_rows(latents)]);
  }

  void gather_noise(int64_t image, const Runs& runs, int64_t width, T* target) const {
    const sca_noise& noise = call_.noise;
    const T* values = static_cast<const T*>(noise.values) + image * noise.batch_stride;
    for (const Run& run : runs) {
      const T* source = values + run.row * noise.row_stride + run.column * noise.column_stride;
      for (int64_t i = 0; i < run.size; ++i) target[run.begin + i] = source[i * noise.column_stride];
    }
    for (int64_t p = runs.pixels; p < width; ++p) target[p] = 0;
  }

  static void softmax_over_rows(T* const* rows, int64_t count, int64_t width) {
    for (int64_t p = 0; p < width; p += kLanes<T>) {
      Vector<T> largest = load(rows[0] + p);
      for (int64_t j = 1; j < count; ++j) largest = maximum<T>(load(rows[j] + p), largest);
      Vector<T> sum = {};
      for (int64_t j = 0; j < count; ++j) {
        const Vector<T> weight = exp<T>(load(rows[j] + p) - largest);
        store<T>(rows[j] + p, weight);
        sum += weight;
      }
      const Vector<T> factor = T(1) / sum;
      for (int64_t j = 0; j < count; ++j) store<T>(rows[j] + p, load(rows[j] + p) * factor);
    }
  }

  // What gamma and beta are made of, as values: what is found by references is read again after each store.
  struct Factors {
    const T *attention, *scale, *shift;
    int64_t terms, attention_pitch, row_pitch;
    const T *scale_bias, *shift_bias, *strength, *pixel_noise;
    T* const* element_noise;
  };

  // Calls visit(row, i, gamma, beta) for each vector of a block: row of the block, first lane. kPixelRows is how x is
  // kept. Meanwhile the block that follows is fetched. Let `visit` hold values, too.
  template <bool kPixelRows, typename Visit>
  void each_vector(int64_t image, Range latents, const Runs& runs, const Upcoming<Scalar>& upcoming, Scratch& scratch,
                   Visit visit) const {
    if (per_element_noise()) fill_noise<kPixelRows>(image, runs, scratch);
    const int64_t rows = scratch.x.row_count(), width = scratch.x.width(), terms = attention_rows(latents);
    const Factors factors{scratch.table.memory,
                          scratch.scale.memory,
                          scratch.shift.memory,
                          terms,
                          scratch.table.pitch,
                          scratch.scale.pitch,
                          scratch.scale_bias,
                          scratch.shift_bias,
                          scratch.strength,
                          noise_per_pixel() ? scratch.table.rows[terms] : nullptr,
                          per_element_noise() ? scratch.noise.rows() : nullptr};
    // With what they are made of, gamma and beta of a block fill the registers. Of pixels it has more rows, which share
    // what is known of the channels, and of channels more vectors.
    constexpr int64_t kRows = kPixelRows ? 6 : 3, kVectors = kPixelRows ? kBlockColumns / 2 : kBlockColumns;
    const auto visit_rows = [&](auto row_count, int64_t row) {
      int64_t i = 0;
      for (; i + kVectors * kLanes<T> <= width; i += kVectors * kLanes<T>) {
        visit_block<kPixelRows, row_count.value, kVectors>(factors, upcoming, row, i, visit);
      }
      if constexpr (kVectors == 1) return;
      for (; i < width; i += kLanes<T>) visit_block<kPixelRows, row_count.value, 1>(factors, upcoming, row, i, visit);
    };
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) visit_rows(std::integral_constant<int64_t, kRows>{}, row);
    for (; row + 2 <= rows; row += 2) visit_rows(std::integral_constant<int64_t, 2>{}, row);
    if (row < rows) visit_rows(std::integral_constant<int64_t, 1>{}, row);
  }

  template <bool kPixelRows, int64_t kRows, int64_t kVectors, typename Visit>
  static inline void visit_block(const Factors& factors, const Upcoming<Scalar>& upcoming, int64_t row, int64_t i,
                                 const Visit& visit) {
    Vector<T> gamma[kRows][kVectors], beta[kRows][kVectors];
#pragma GCC unroll 6
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
      for (int64_t v = 0; v < kVectors; ++v) {
        gamma[r][v] = beside_row<kPixelRows>(factors.scale_bias, row + r, i + v * kLanes<T>);
        beta[r][v] = beside_row<kPixelRows>(factors.shift_bias, row + r, i + v * kLanes<T>);
      }
    }
    const T *attention = factors.attention, *scale = factors.scale, *shift = factors.shift;
    for (int64_t j = 0; j < factors.terms; ++j) {
      if (j < kRows * kVectors) {
        upcoming.template fetch<kPixelRows>(row + j / kVectors, i / kLanes<T> + j % kVectors);
      }
#pragma GCC unroll 6
      for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
        for (int64_t v = 0; v < kVectors; ++v) {
          const Vector<T> weight = beside_pixels<kPixelRows>(attention, row + r, i + v * kLanes<T>);
          gamma[r][v] += weight * beside_row<kPixelRows>(scale, row + r, i + v * kLanes<T>);
          beta[r][v] += weight * beside_row<kPixelRows>(shift, row + r, i + v * kLanes<T>);
        }
      }
      attention += factors.attention_pitch;
      scale += factors.row_pitch;
      shift += factors.row_pitch;
    }
#pragma GCC unroll 6
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t lane = i + v * kLanes<T>;
        if (factors.pixel_noise) {
          beta[r][v] += beside_row<kPixelRows>(factors.strength, row + r, lane) *
                        beside_pixels<kPixelRows>(factors.pixel_noise, row + r, lane);
        } else if (factors.element_noise) {
          beta[r][v] +=
              beside_row<kPixelRows>(factors.strength, row + r, lane) * load(factors.element_noise[row + r] + lane);
        }
        visit(row + r, lane, gamma[r][v], beta[r][v]);
      }
    }
  }

  // The numbers of every element of the block.
  template <bool kPixelRows>
  void fill_noise(int64_t image, const Runs& runs, Scratch& scratch) const {
    constexpr int64_t kGroup = 4;  // channels that share a counter
    scratch.noise.make_room_like(scratch.x);
    T* const* rows = scratch.noise.rows();
    const int64_t width = scratch.noise.width(), seed = *call_.noise.seed;
    const auto index = static_cast<uint32_t>(image);
    typename FloatTraits<T>::Bits pixels[kMostPixels] = {};
    for (const Run& run : runs) {
      for (int64_t i = 0; i < run.size; ++i) {
        pixels[run.begin + i] = static_cast<uint32_t>(run.row * call_.width + run.column + i);
      }
    }
    if constexpr (kPixelRows) {
      for (int64_t p = 0; p < runs.pixels; ++p) {
        for (int64_t c = 0; c < width; c += kGroup * kLanes<T>) {
          const Words<T> groups = ascending<T>(static_cast<uint32_t>(c / kGroup));
          const Normals<T> numbers = by_lane<T>(normals<T>(seed, Words<T>{} + pixels[p], groups, index));
          for (int64_t v = 0; v < kGroup && c + v * kLanes<T> < width; ++v) {
            store<T>(rows[p] + c + v * kLanes<T>, numbers.values[v]);
          }
        }
      }
    } else {
      for (int64_t c = 0; c < call_.channels; c += kGroup) {
        const Words<T> group = Words<T>{} + static_cast<uint32_t>(c / kGroup);
        for (int64_t p = 0; p < width; p += kLanes<T>) {
          const Normals<T> numbers = normals<T>(seed, load(pixels + p), group, index);
          for (int64_t v = 0; v < kGroup && c + v < call_.channels; ++v) store<T>(rows[c + v] + p, numbers.values[v]);
        }
      }
    }
  }

  MapMoments<Scalar> statistics_;
  T *uniform_scale_, *uniform_shift_;  // (batch, channels)
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
