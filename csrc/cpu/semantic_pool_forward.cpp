#include <cmath>

#include "semantic_pool.h"
#include "softmax.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

template <typename Scalar>
class Forward : public SemanticPool<Scalar> {
  using Base = SemanticPool<Scalar>;
  using typename Base::Ahead;
  using typename Base::Scratch;
  using typename Base::T;
  using Base::call_;

 public:
  using Base::Base;

  void run() const {
    Base::template each_chunk<Scratch>(
        *this, [&](int64_t image, int64_t chunk, Scratch& scratch) { pool_chunk(image, chunk, scratch); });
    Base::each_channels([&](int64_t image, Range channels) { merge_moments_of(image, channels); });
    Base::each_label([&](int64_t image, int64_t head, int64_t label) { merge_label(image, head, label); });
  }

 private:
  // The sums of which the moments of a chunk are made.
  struct Moments {
    double *mean, *squares;
    T *shift, *sums, *sums_of_squares;
    int64_t seen = 0, summed = 0;
  };

  void pool_chunk(int64_t image, int64_t chunk, Scratch& scratch) const {
    const FeatureMap<Scalar> x = image_of<Scalar>(call_.x, image, call_.channels);
    T* const* rows = scratch.moments.rows;
    const int64_t first = (image * Base::chunks_ + chunk) * call_.channels;
    Moments moments{Base::mean_ + first, Base::squares_ + first, rows[0], rows[1], rows[2]};
    for (int64_t c = 0; c < call_.channels; ++c) moments.mean[c] = moments.squares[c] = 0;
    Base::find_labels(image, chunk, scratch.labels);
    Base::clear_partials(image, chunk, scratch.labels);
    Base::walk_chunk(
        image, chunk, Base::turned_, x, {}, scratch.labels,
        [&](const Segment& segment, const Ahead& ahead) {
          pool_label(image, chunk, segment, ahead, x, moments, scratch);
        },
        [&](const Rectangle& place, const Segment* segments, int64_t count) {
          scratch.x_tile.load(x, place);
          for (int64_t i = 0; i < count; ++i) {
            pool_label(image, chunk, segments[i], {}, scratch.x_tile.map(place), moments, scratch);
          }
        });
    merge_summed(moments);
    Base::seen_[image * Base::chunks_ + chunk] = static_cast<double>(moments.seen);
  }

  template <typename Stored>
  void pool_label(int64_t image, int64_t chunk, const Segment& segment, const Ahead& ahead, const FeatureMap<Stored>& x,
                  Moments& moments, Scratch& scratch) const {
    const Range latents = Base::labelled_latents(image, segment.label);
    const int64_t count = latents.size() * call_.heads;
    Base::load_rows(call_.queries, image, latents, scratch.queries);
    Base::point_to_partials(image, chunk, latents, scratch.sums);
    const int64_t first_row = Base::rows_of_chunk(chunk).begin;
    Range& reached = Base::reached(image, chunk, segment.label);
    Base::each_block(
        ImageTokens(call_.pixels, image), segment.positions, ahead,
        [&](const Runs& runs, const Upcoming<Scalar>& upcoming) {
          scratch.x.gather(x, runs);
          add_to_moments(scratch.x, runs.pixels, moments);
          if (count == 0) return;
          Base::make_logits(scratch, runs, image, latents);
          for (int64_t head = 0; head < call_.heads; ++head) {
            const int64_t index = Base::partial(image, head, chunk, latents.begin), first = head * latents.size();
            add_to_softmax(
                scratch.weights.rows[first], scratch.weights.pitch, latents.size(), runs.pixels, padded<T>(runs.pixels),
                T(1), Base::max_ + index, Base::sum_ + index,
                [&](int64_t j, T factor) { Base::partials_.scale(scratch.sums[first + j], factor, reached); });
          }
          scratch.x.pool(scratch.weights, count, scratch.sums,
                         [&](int64_t row, int64_t i) { upcoming.template fetch<false>(row, i / kLanes<T>); });
          Base::partials_.add_by_position(runs, scratch.weights, count, scratch.sums, first_row, reached);
        });
  }

  void add_to_moments(const FeatureBlock<T>& block, int64_t pixels, Moments& moments) const {
    if (moments.summed == 0) {
      block.copy_first_pixel(moments.shift);
      for (int64_t c = 0; c < Base::channel_width_; ++c) moments.sums[c] = moments.sums_of_squares[c] = 0;
    }
    block.sum_differences(moments.shift, moments.sums, moments.sums_of_squares);
    moments.summed += pixels;
    if (moments.summed >= kMostSummed) merge_summed(moments);
  }
  void merge_summed(Moments& moments) const {
    if (moments.summed == 0) return;
    for (int64_t c = 0; c < call_.channels; ++c) {
      merge_sums(static_cast<double>(moments.seen), moments.mean[c], moments.squares[c],
                 static_cast<double>(moments.summed), moments.shift[c], moments.sums[c], moments.sums_of_squares[c]);
    }
    moments.seen += moments.summed;
    moments.summed = 0;
  }

  // The moments of an image from those of its chunks, in their order.
  void merge_moments_of(int64_t image, Range channels) const {
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      double mean = 0, squares = 0, seen = 0;
      for (int64_t chunk = 0; chunk < Base::chunks_; ++chunk) {
        const int64_t index = (image * Base::chunks_ + chunk) * call_.channels + c;
        const double count = Base::seen_[image * Base::chunks_ + chunk];
        merge_moments(seen, mean, squares, count, Base::mean_[index], Base::squares_[index]);
        seen += count;
      }
      static_cast<T*>(call_.mean)[image * call_.channels + c] = static_cast<T>(mean);
      static_cast<T*>(call_.second_moment)[image * call_.channels + c] =
          static_cast<T>(squares / static_cast<double>(larger<int64_t>(call_.pixels.count, 1)));
    }
  }

  void merge_label(int64_t image, int64_t head, int64_t label) const {
    const Range latents = Base::latents_of(image, label);
    const Range pixels = ImageTokens(call_.pixels, image).with_label(label);
    for (int64_t latent = latents.begin; latent < latents.end; ++latent) {
      const int64_t row = Base::row(image, head, latent);
      T* pooled = static_cast<T*>(call_.pooled) + row * call_.channels;
      T* row_mass = static_cast<T*>(call_.row_mass) + row * call_.height;
      T* col_mass = static_cast<T*>(call_.col_mass) + row * call_.width;
      T& lse = static_cast<T*>(call_.lse)[row];
      if (pixels.size() == 0) {
        // All pixels have equal shares in what an absent label gets.
        const T* mean = static_cast<const T*>(call_.mean) + image * call_.channels;
        const T one = call_.empty_uniform ? T(1) : T(0);
        for (int64_t c = 0; c < call_.channels; ++c) pooled[c] = call_.empty_uniform ? mean[c] : T(0);
        for (int64_t r = 0; r < call_.height; ++r) row_mass[r] = one / static_cast<T>(call_.height);
        for (int64_t c = 0; c < call_.width; ++c) col_mass[c] = one / static_cast<T>(call_.width);
        lse = -std::numeric_limits<T>::infinity();
        continue;
      }
      T max = -std::numeric_limits<T>::infinity(), sum = 0;
      Base::each_chunk_of_label(image, label, [&](int64_t chunk) {
        max = larger(max, Base::max_[Base::partial(image, head, chunk, latent)]);
      });
      Base::each_chunk_of_label(image, label, [&](int64_t chunk) {
        const int64_t index = Base::partial(image, head, chunk, latent);
        sum += std::exp(Base::max_[index] - max) * Base::sum_[index];
      });
      lse = max == -std::numeric_limits<T>::infinity() ? max : max + std::log(sum);
      for (int64_t c = 0; c < call_.channels; ++c) pooled[c] = 0;
      for (int64_t r = 0; r < call_.height; ++r) row_mass[r] = 0;
      for (int64_t c = 0; c < call_.width; ++c) col_mass[c] = 0;
      Base::each_chunk_of_label(image, label, [&](int64_t chunk) {
        const int64_t index = Base::partial(image, head, chunk, latent);
        const T* __restrict sums = Base::partials_.at(index);
        const T weight = std::exp(Base::max_[index] - max) / sum;
        for (int64_t c = 0; c < call_.channels; ++c) pooled[c] += weight * sums[c];
        Base::partials_.add_rows(sums, weight, Base::rows_of_chunk(chunk), row_mass);
        Base::partials_.add_columns(sums, weight, Base::reached(image, chunk, label), col_mass);
      });
    }
  }
};

}  // namespace

int64_t semantic_pool_workspace(const sca_semantic_pool& call) {
  int64_t size = 0;
  with_scalar_type(call.scalar_type,
                   [&](auto scalar) { size = SemanticPool<decltype(scalar)>(call).workspace_size(); });
  return size;
}

void semantic_pool_forward(const sca_semantic_pool& call) {
  with_scalar_type(call.scalar_type, [&](auto scalar) { Forward<decltype(scalar)>(call).run(); });
}

}  // namespace sca::SCA_CPU_CAPABILITY
