#include "semantic_pool.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// With a = exp(logits - lse), over the pixels p of a latent's label, and dA = <dO, x_p> + dR[row] + dC[column]:
//     dS = a * (dA - delta),  delta = <dO, O> + <dR, R> + <dC, C> - dlse,
//     dx_p = sum_latents (a dO + dS query) + what the moments and the latents without pixels add,
//     dquery = sum_p dS x_p,  and dS summed over the rows and columns of the image gives those of the biases.
template <typename Scalar>
class Backward : public SemanticPool<Scalar> {
  using Base = SemanticPool<Scalar>;
  using typename Base::Ahead;
  using typename Base::Scratch;
  using typename Base::T;
  using Base::call_;

 public:
  Backward(const sca_semantic_pool& call, const sca_semantic_pool_gradients& gradients)
      : Base(call), gradients_(gradients) {}

  void run() const {
    Base::each_label([&](int64_t image, int64_t head, int64_t label) { find_deltas(image, head, label); });
    Base::each_channels([&](int64_t image, Range channels) { find_affine(image, channels); });
    Base::template each_chunk<Scratch>(
        *this, [&](int64_t image, int64_t chunk, Scratch& scratch) { differentiate_chunk(image, chunk, scratch); });
    Base::each_label([&](int64_t image, int64_t head, int64_t label) { merge_label(image, head, label); });
  }

 private:
  // <row of a, row of b>, zero where there is no a
  static T inner(const void* a, const void* b, int64_t row, int64_t size) {
    if (!a) return 0;
    const T *left = static_cast<const T*>(a) + row * size, *right = static_cast<const T*>(b) + row * size;
    Vector<T> sum = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= size; i += kLanes<T>) sum += load(left + i) * load(right + i);
    if (i < size) sum += load_some(left + i, size - i) * load_some(right + i, size - i);
    return sum_lanes<T>(sum);
  }
  static T value(const void* base, int64_t i) { return base ? static_cast<const T*>(base)[i] : T(0); }

  bool absent(int64_t image, int64_t label) const {
    return ImageTokens(call_.pixels, image).with_label(label).size() == 0;
  }

  void find_deltas(int64_t image, int64_t head, int64_t label) const {
    if (absent(image, label)) return;
    const Range latents = Base::latents_of(image, label);
    for (int64_t latent = latents.begin; latent < latents.end; ++latent) {
      const int64_t row = Base::row(image, head, latent);
      Base::delta_[row] = inner(gradients_.grad_pooled, call_.pooled, row, call_.channels) +
                          inner(gradients_.grad_row_mass, call_.row_mass, row, call_.height) +
                          inner(gradients_.grad_col_mass, call_.col_mass, row, call_.width) -
                          value(gradients_.grad_lse, row);
    }
  }

  // What the moments and the latents without pixels add to the gradient of x: offset + factor (x_p - centre).
  void find_affine(int64_t image, Range channels) const {
    const int64_t begin = image * call_.channels, padded_begin = image * Base::channel_width_;
    const T share = T(1) / static_cast<T>(larger<int64_t>(call_.pixels.count, 1));
    T *offset = Base::offset_ + padded_begin, *factor = Base::factor_ + padded_begin;
    T* centre = Base::centre_ + padded_begin;
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      offset[c] = value(gradients_.grad_mean, begin + c);
      factor[c] = 2 * share * value(gradients_.grad_second_moment, begin + c);
      centre[c] = static_cast<const T*>(call_.mean)[begin + c];
    }
    for (int64_t label = 0; label <= call_.latents.labels; ++label) {
      if (!call_.empty_uniform || !gradients_.grad_pooled || !absent(image, label)) continue;
      Base::each_row(Base::latents_of(image, label), [&](int64_t, int64_t head, int64_t latent) {
        const T* gradient =
            static_cast<const T*>(gradients_.grad_pooled) + Base::row(image, head, latent) * call_.channels;
#pragma GCC ivdep
        for (int64_t c = channels.begin; c < channels.end; ++c) offset[c] += gradient[c];
      });
    }
    for (int64_t c = channels.begin; c < channels.end; ++c) offset[c] *= share;
    const int64_t end = channels.end == call_.channels ? Base::channel_width_ : channels.end;
    for (int64_t c = channels.end; c < end; ++c) offset[c] = factor[c] = centre[c] = 0;
  }

  void differentiate_chunk(int64_t image, int64_t chunk, Scratch& scratch) const {
    const FeatureMap<Scalar> x = image_of<Scalar>(call_.x, image, call_.channels);
    const FeatureMap<Scalar> grad_x = image_of<Scalar>(gradients_.grad_x, image, call_.channels);
    const bool wants_x = grad_x.data != nullptr, turned = Base::turned_ && (!wants_x || has_planes(gradients_.grad_x));
    Base::find_labels(image, chunk, scratch.labels);
    Base::clear_partials(image, chunk, scratch.labels);
    Base::walk_chunk(
        image, chunk, turned, x, {}, scratch.labels,
        [&](const Segment& segment, const Ahead& ahead) {
          differentiate_label(image, chunk, segment, ahead, x, grad_x, Base::streamed(), scratch);
        },
        [&](const Rectangle& place, const Segment* segments, int64_t count) {
          scratch.x_tile.load(x, place);
          for (int64_t i = 0; i < count; ++i) {
            differentiate_label(image, chunk, segments[i], {}, scratch.x_tile.map(place),
                                scratch.gradient_tile.map(place), false, scratch);
          }
          if (wants_x) scratch.gradient_tile.store_to(grad_x, place, Base::streamed());
        });
  }

  template <typename Stored>
  void differentiate_label(int64_t image, int64_t chunk, const Segment& segment, const Ahead& ahead,
                           const FeatureMap<Stored>& x, const FeatureMap<Stored>& grad_x, bool streamed,
                           Scratch& scratch) const {
    const T* offset = Base::offset_ + image * Base::channel_width_;
    const T* factor = Base::factor_ + image * Base::channel_width_;
    const T* centre = Base::centre_ + image * Base::channel_width_;
    const Range latents = Base::labelled_latents(image, segment.label);
    const int64_t count = latents.size() * call_.heads;
    Base::load_rows(call_.queries, image, latents, scratch.queries);
    Base::load_rows(gradients_.grad_pooled, image, latents, scratch.gradients);
    Base::point_to_partials(image, chunk, latents, scratch.sums);
    const int64_t first_row = Base::rows_of_chunk(chunk).begin;
    Range& reached = Base::reached(image, chunk, segment.label);
    Base::each_block(
        ImageTokens(call_.pixels, image), segment.positions, ahead,
        [&](const Runs& runs, const Upcoming<Scalar>& upcoming) {
          scratch.x.gather(x, runs);
          Base::make_logits(scratch, runs, image, latents);
          scratch.x.multiply(scratch.gradients, count, scratch.logit_gradients);
          Base::add_by_position(runs, image, latents, gradients_.grad_row_mass, gradients_.grad_col_mass,
                                scratch.logit_gradients);
          Base::each_row(latents, [&](int64_t j, int64_t head, int64_t latent) {
            const int64_t row = Base::row(image, head, latent);
            differentiate_softmax(scratch.weights.rows[j], scratch.logit_gradients.rows[j], runs.pixels,
                                  static_cast<const T*>(call_.lse)[row], Base::delta_[row]);
          });
          scratch.x.pool(scratch.logit_gradients, count, scratch.sums,
                         [&](int64_t row, int64_t i) { upcoming.template fetch<false>(row, i / kLanes<T>); });
          Base::partials_.add_by_position(runs, scratch.logit_gradients, count, scratch.sums, first_row, reached);
          if (!gradients_.grad_x.data) return;
          scratch.gradient.locate(grad_x, runs, scratch.x.pixel_rows());
          scratch.gradient.spread(Write::kReplace, scratch.weights, scratch.gradients, count);
          scratch.gradient.spread(Write::kAccumulate, scratch.logit_gradients, scratch.queries, count);
          scratch.gradient.add_affine(offset, factor, centre, scratch.x);
          scratch.gradient.scatter(grad_x, runs, streamed);
        });
  }

  // logits become weights, gradients of the weights become gradients of the logits; both zero past the last pixel.
  static void differentiate_softmax(T* logits, T* gradients, int64_t count, T lse, T delta) {
    const int64_t width = padded<T>(count);
    for (int64_t p = 0; p < width; p += kLanes<T>) {
      const Vector<T> weights = exp<T>(load(logits + p) - lse);
      store<T>(logits + p, weights);
      store<T>(gradients + p, weights * (load(gradients + p) - delta));
    }
    for (int64_t p = count; p < width; ++p) logits[p] = gradients[p] = 0;
  }

  void merge_label(int64_t image, int64_t head, int64_t label) const {
    const Range latents = Base::latents_of(image, label);
    const Range pixels = ImageTokens(call_.pixels, image).with_label(label);
    // Calls add(partial row, its chunk) for each chunk in which there are pixels of the label, with a cleared target.
    const auto merge = [&](void* gradient, int64_t latent, int64_t size, const auto& add) {
      if (!gradient) return;
      T* target = static_cast<T*>(gradient) + Base::row(image, head, latent) * size;
      for (int64_t i = 0; i < size; ++i) target[i] = 0;
      if (pixels.size() == 0) return;
      Base::each_chunk_of_label(image, label, [&](int64_t chunk) {
        add(Base::partials_.at(Base::partial(image, head, chunk, latent)), chunk, target);
      });
    };
    for (int64_t latent = latents.begin; latent < latents.end; ++latent) {
      merge(gradients_.grad_queries, latent, call_.channels, [&](const T* sums, int64_t, T* target) {
        for (int64_t c = 0; c < call_.channels; ++c) target[c] += sums[c];
      });
      merge(gradients_.grad_row_bias, latent, call_.height, [&](const T* sums, int64_t chunk, T* target) {
        Base::partials_.add_rows(sums, 1, Base::rows_of_chunk(chunk), target);
      });
      merge(gradients_.grad_col_bias, latent, call_.width, [&](const T* sums, int64_t chunk, T* target) {
        Base::partials_.add_columns(sums, 1, Base::reached(image, chunk, label), target);
      });
    }
  }

  const sca_semantic_pool_gradients& gradients_;
};

}  // namespace

void semantic_pool_backward(const sca_semantic_pool& call, const sca_semantic_pool_gradients& gradients) {
  with_scalar_type(call.scalar_type, [&](auto scalar) { Backward<decltype(scalar)>(call, gradients).run(); });
}

}  // namespace sca::SCA_CPU_CAPABILITY
