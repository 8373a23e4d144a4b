#include "semantic_modulate.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// With n = (x - mean) rstd, y = gamma n + beta + noise, out = leaky_relu(y), and dy = dout * (1 or the slope):
//     dgamma_p = dy_p n_p, dbeta_p = dy_p,
//     dscale_j = sum_p P_pj dgamma_p,  dshift_j = sum_p P_pj dbeta_p,  dP_pj = <scale_j, dgamma_p> + <shift_j,
//     dbeta_p>, dS = P * (dP - rowsum(P * dP)),  dkey_j = sum_p dS_pj x_p, dx_p = rstd gamma dy_p + sum_j dS_pj key_j +
//     what the statistics add, which is an affine function of x in each channel. The two sums it takes follow from the
//     gradients above: sum_p gamma dy = sum_j scale_j dshift_j + ..., sum_p gamma dy n = sum_j scale_j dscale_j + ...
template <typename Scalar>
class Backward : public SemanticModulate<Scalar> {
  using Base = SemanticModulate<Scalar>;
  using typename Base::Ahead;
  using typename Base::T;
  using Base::arena_;
  using Base::call_;

 public:
  Backward(const sca_semantic_modulate& call, const sca_semantic_modulate_gradients& gradients)
      : Base(call, 4, Base::most_chunks_of_partials(call)),
        gradients_(gradients),
        scale_begin_(Base::channel_width_),
        shift_begin_(scale_begin_ + Base::channel_width_),
        partials_(Base::make_partials(shift_begin_ + Base::channel_width_)) {
    chunk_sums_ = arena_.template take<T>(call.batch * Base::chunks_ * kChunkSums * Base::channel_width_);
    sums_ = arena_.template take<T>(call.batch * kSums * Base::channel_width_);
    const int64_t values = call.batch * call.heads * call.latents.count * call.channels;
    T* scale = arena_.template take<T>(gradients.grad_scale ? 0 : values);
    T* shift = arena_.template take<T>(gradients.grad_shift ? 0 : values);
    grad_scale_ = gradients.grad_scale ? static_cast<T*>(gradients.grad_scale) : scale;
    grad_shift_ = gradients.grad_shift ? static_cast<T*>(gradients.grad_shift) : shift;
  }

  int64_t workspace_size() const { return arena_.used() + call_.threads * Base::template scratch_size<Scratch>(*this); }

  void run() const {
    Base::make_uniform_rows();
    Base::template each_chunk<Scratch>(
        *this, [&](int64_t image, int64_t chunk, Scratch& scratch) { differentiate_chunk(image, chunk, scratch); });
    Base::each_label([&](int64_t image, int64_t head, int64_t label) { merge_label(image, head, label); });
    Base::each_channels([&](int64_t image, Range channels) { finish_channels(image, channels); });
    if (!call_.stats_given && gradients_.grad_x.data) differentiate_statistics();
  }

 private:
  // Sums over pixels, for each channel: those that a chunk keeps beside the partial rows, of pixels without latents and
  // with the noise; then, for the image, those of dgamma and dbeta, the two with gamma as a factor, and what the
  // statistics add to the gradient of x.
  enum Sum {
    kEmptyScale,
    kEmptyShift,
    kNoise,
    kChunkSums,
    kScale = kChunkSums,
    kShift,
    kScaled,
    kShifted,
    kOffset,
    kFactor,
    kSums
  };

  struct Scratch : Base::Scratch {
    TurnedTile<Scalar> grad_out_tile;
    FeatureBlock<T> gamma_gradient, beta_gradient;
    RowTable<T> logit_gradients, more_gradients;
    T **scale_sums, **shift_sums, **key_sums;  // the partial rows

    Scratch(Arena& arena, const Backward& kernel)
        : Base::Scratch(arena, kernel),
          grad_out_tile(kernel.make_tile(arena)),
          gamma_gradient(arena, kernel.call_.channels, kernel.block_),
          beta_gradient(arena, kernel.call_.channels, kernel.block_),
          logit_gradients(arena, kernel.most_rows(), kernel.block_),
          more_gradients(arena, kernel.most_rows(), kernel.block_),
          scale_sums(arena.take<T*>(larger<int64_t>(kernel.most_rows(), 1))),
          shift_sums(arena.take<T*>(larger<int64_t>(kernel.most_rows(), 1) + 1)),
          key_sums(arena.take<T*>(kernel.most_rows())) {}
  };

  T* chunk_sum(int64_t image, int64_t chunk, int64_t which) const {
    return chunk_sums_ + ((image * Base::chunks_ + chunk) * kChunkSums + which) * Base::channel_width_;
  }
  T* sum(int64_t image, int64_t which) const { return sums_ + (image * kSums + which) * Base::channel_width_; }

  void differentiate_chunk(int64_t image, int64_t chunk, Scratch& scratch) const {
    const FeatureMap<Scalar> x = image_of<Scalar>(call_.x, image, call_.channels);
    const FeatureMap<Scalar> grad_out = image_of<Scalar>(gradients_.grad_out, image, call_.channels);
    const FeatureMap<Scalar> grad_x = image_of<Scalar>(gradients_.grad_x, image, call_.channels);
    const bool wants_x = grad_x.data != nullptr;
    const bool turned = Base::turned_ && has_planes(gradients_.grad_out) && (!wants_x || has_planes(gradients_.grad_x));
    Base::load_channels(image, scratch);
    for (int64_t i = 0; i < kChunkSums * Base::channel_width_; ++i) chunk_sum(image, chunk, 0)[i] = 0;
    Base::find_labels(image, chunk, scratch.labels);
    clear_partials(image, chunk, scratch.labels);
    Base::walk_chunk(
        image, chunk, turned, x, x.same_strides(grad_out) ? grad_out : FeatureMap<Scalar>{}, scratch.labels,
        [&](const Segment& segment, const Ahead& ahead) {
          differentiate_label(image, chunk, segment, ahead, x, grad_out, grad_x, Base::streamed(), scratch);
        },
        [&](const Rectangle& place, const Segment* segments, int64_t count) {
          scratch.x_tile.load(x, place);
          scratch.grad_out_tile.load(grad_out, place);
          // Pixels of grad_out, which are copied before anything else, turn into those of grad_x where they lie.
          const FeatureMap<T> gradient = scratch.grad_out_tile.map(place);
          for (int64_t i = 0; i < count; ++i) {
            differentiate_label(image, chunk, segments[i], {}, scratch.x_tile.map(place), gradient, gradient, false,
                                scratch);
          }
          if (wants_x) scratch.grad_out_tile.store_to(grad_x, place, Base::streamed());
        });
  }

  template <typename Stored>
  void differentiate_label(int64_t image, int64_t chunk, const Segment& segment, const Ahead& ahead,
                           const FeatureMap<Stored>& x, const FeatureMap<Stored>& grad_out,
                           const FeatureMap<Stored>& grad_x, bool streamed, Scratch& scratch) const {
    const Range latents = ImageTokens(call_.latents, image).with_label(segment.label);
    const bool wants_x = gradients_.grad_x.data != nullptr;
    Base::load_label(image, latents, scratch);
    point_to_partials(image, chunk, latents, scratch);
    const int64_t first_row = Base::rows_of_chunk(chunk).begin;
    Range& reached = Base::reached(image, chunk, segment.label);
    Base::each_block(ImageTokens(call_.pixels, image), segment.positions, ahead,
                     [&](const Runs& runs, const Upcoming<Scalar>& upcoming) {
                       scratch.x.gather(x, runs);
                       const bool pixel_rows = scratch.x.pixel_rows();
                       scratch.beta_gradient.gather_copy(grad_out, runs, pixel_rows);
                       scratch.gamma_gradient.make_room_like(scratch.x);
                       scratch.result.make_room_like(scratch.x);
                       if (wants_x) scratch.result.locate(grad_x, runs, pixel_rows);
                       Base::fill_table(image, latents, runs, scratch);
                       if (pixel_rows) {
                         differentiate_modulation<true>(image, chunk, latents, runs, upcoming, scratch);
                       } else {
                         differentiate_modulation<false>(image, chunk, latents, runs, upcoming, scratch);
                       }
                       differentiate_attention(latents, runs, first_row, reached, scratch);
                       if (wants_x) scratch.result.scatter(grad_x, runs, streamed);
                     });
  }

  // Clears the partial rows of the labels in a chunk.
  void clear_partials(int64_t image, int64_t chunk, const ChunkLabels& labels) const {
    for (int64_t i = 0; i < labels.count; ++i) {
      const Range latents = ImageTokens(call_.latents, image).with_label(labels.list[i].label);
      Base::each_row(latents, [&](int64_t, int64_t head, int64_t latent) {
        partials_.clear(partials_.at(Base::partial(image, head, chunk, latent)));
      });
    }
  }

  // Points the sums of the table's rows at the partial rows of a label's latents.
  void point_to_partials(int64_t image, int64_t chunk, Range latents, Scratch& scratch) const {
    Base::each_row(latents, [&](int64_t j, int64_t head, int64_t latent) {
      T* partial = partials_.at(Base::partial(image, head, chunk, latent));
      scratch.key_sums[j] = partial;
      scratch.scale_sums[j] = partial + scale_begin_;
      scratch.shift_sums[j] = partial + shift_begin_;
    });
    if (latents.size() == 0) {
      scratch.scale_sums[0] = chunk_sum(image, chunk, kEmptyScale);
      scratch.shift_sums[0] = chunk_sum(image, chunk, kEmptyShift);
    }
    scratch.shift_sums[Base::attention_rows(latents)] = chunk_sum(image, chunk, kNoise);
  }

  // The gradients of gamma and beta, and the part of that of x that does not go through the attention.
  template <bool kPixelRows>
  void differentiate_modulation(int64_t image, int64_t chunk, Range latents, const Runs& runs,
                                const Upcoming<Scalar>& upcoming, Scratch& scratch) const {
    const T slope = static_cast<T>(call_.negative_slope);
    T* const* x = scratch.x.rows();
    T* const* grad_beta = scratch.beta_gradient.rows();
    T* const* grad_gamma = scratch.gamma_gradient.rows();
    T* const* grad_x = scratch.result.rows();
    const T *means = scratch.mean, *rstds = scratch.rstd;
    const auto differentiate = [x, grad_beta, grad_gamma, grad_x, means, rstds, slope](
                                   int64_t row, int64_t i, Vector<T> gamma, Vector<T> beta) {
      const Vector<T> rstd = beside_row<kPixelRows>(rstds, row, i);
      const Vector<T> centred = load(x[row] + i) - beside_row<kPixelRows>(means, row, i);
      const Vector<T> normalised = centred * rstd, y = gamma * normalised + beta;
      const Vector<T> grad_out = load(grad_beta[row] + i);
      const Vector<T> grad_y = y > T(0) ? grad_out : grad_out * slope;
      store<T>(grad_beta[row] + i, grad_y);
      store<T>(grad_gamma[row] + i, grad_y * normalised);
      store<T>(grad_x[row] + i, grad_y * gamma * rstd);
    };
    Base::template each_vector<kPixelRows>(image, latents, runs, upcoming, scratch, differentiate);
    if (Base::per_element_noise() && gradients_.grad_noise_strength) {
      T* sums = chunk_sum(image, chunk, kNoise);
      for (int64_t r = 0; r < scratch.x.row_count(); ++r) {
        const T* numbers = scratch.noise.rows()[r];
        if constexpr (kPixelRows) {
          for (int64_t c = 0; c < call_.channels; ++c) sums[c] += numbers[c] * grad_beta[r][c];
        } else {
          Vector<T> total = {};
          for (int64_t i = 0; i < scratch.x.width(); i += kLanes<T>)
            total += load(numbers + i) * load(grad_beta[r] + i);
          sums[r] += sum_lanes<T>(total);
        }
      }
    }
  }

  void differentiate_attention(Range latents, const Runs& runs, int64_t first_row, Range& reached,
                               Scratch& scratch) const {
    const int64_t count = latents.size() * call_.heads, width = padded<T>(runs.pixels);
    const int64_t rows = Base::attention_rows(latents);
    for (int64_t j = 0; j <= rows; ++j) {
      for (int64_t p = runs.pixels; p < width; ++p) scratch.table.rows[j][p] = 0;
    }
    scratch.gamma_gradient.pool(scratch.table, rows, scratch.scale_sums, FetchNothing{});
    scratch.beta_gradient.pool(scratch.table, rows + (Base::noise_per_pixel() ? 1 : 0), scratch.shift_sums,
                               FetchNothing{});
    if (count == 0) return;
    scratch.gamma_gradient.multiply(scratch.scale, count, scratch.logit_gradients);
    scratch.beta_gradient.multiply(scratch.shift, count, scratch.more_gradients);
    for (int64_t head = 0; head < call_.heads; ++head) {
      const int64_t first = head * latents.size();
      differentiate_softmax(scratch.table.rows + first, scratch.logit_gradients.rows + first,
                            scratch.more_gradients.rows + first, latents.size(), width);
    }
    scratch.x.pool(scratch.logit_gradients, count, scratch.key_sums, FetchNothing{});
    partials_.add_by_position(runs, scratch.logit_gradients, count, scratch.key_sums, first_row, reached);
    scratch.result.spread(Write::kAccumulate, scratch.logit_gradients, scratch.keys, count);
  }

  // From the two parts of the weights' gradients to those of the logits.
  static void differentiate_softmax(T* const* weights, T* const* gradients, T* const* more, int64_t count,
                                    int64_t width) {
    for (int64_t p = 0; p < width; p += kLanes<T>) {
      Vector<T> sum = {};
      for (int64_t j = 0; j < count; ++j) {
        const Vector<T> gradient = load(gradients[j] + p) + load(more[j] + p);
        store<T>(gradients[j] + p, gradient);
        sum += gradient * load(weights[j] + p);
      }
      for (int64_t j = 0; j < count; ++j) {
        store<T>(gradients[j] + p, load(weights[j] + p) * (load(gradients[j] + p) - sum));
      }
    }
  }

  // The gradients of the rows of a label's latents from the partial rows of the chunks, in their order.
  void merge_label(int64_t image, int64_t head, int64_t label) const {
    const Range latents = Base::latents_of(image, label);
    const bool absent = ImageTokens(call_.pixels, image).with_label(label).size() == 0;
    // Clears a gradient and calls add(partial row, its chunk, target) for each chunk with pixels of the label.
    const auto merge = [&](void* gradient, int64_t latent, int64_t size, const auto& add) {
      if (!gradient) return;
      T* target = static_cast<T*>(gradient) + Base::row(image, head, latent) * size;
      for (int64_t i = 0; i < size; ++i) target[i] = 0;
      if (absent) return;
      Base::each_chunk_of_label(image, label, [&](int64_t chunk) {
        add(partials_.at(Base::partial(image, head, chunk, latent)), chunk, target);
      });
    };
    const auto channels_from = [&](int64_t begin) {
      return [this, begin](const T* sums, int64_t, T* target) {
        for (int64_t c = 0; c < call_.channels; ++c) target[c] += sums[begin + c];
      };
    };
    for (int64_t latent = latents.begin; latent < latents.end; ++latent) {
      merge(gradients_.grad_keys, latent, call_.channels, channels_from(0));
      merge(grad_scale_, latent, call_.channels, channels_from(scale_begin_));
      merge(grad_shift_, latent, call_.channels, channels_from(shift_begin_));
      merge(gradients_.grad_row_bias, latent, call_.height, [&](const T* sums, int64_t chunk, T* target) {
        partials_.add_rows(sums, 1, Base::rows_of_chunk(chunk), target);
      });
      merge(gradients_.grad_col_bias, latent, call_.width, [&](const T* sums, int64_t chunk, T* target) {
        partials_.add_columns(sums, 1, Base::reached(image, chunk, label), target);
      });
      merge(gradients_.grad_key_bias, latent, 1, [&](const T* sums, int64_t chunk, T* target) {
        partials_.add_to_total(sums, Base::rows_of_chunk(chunk), *target);
      });
    }
  }

  // What is summed over all pixels of an image, and what follows from it.
  void finish_channels(int64_t image, Range channels) const {
    for (int64_t which = 0; which < kChunkSums; ++which) {
      T* total = sum(image, which);
      for (int64_t c = channels.begin; c < channels.end; ++c) total[c] = 0;
      for (int64_t chunk = 0; chunk < Base::chunks_; ++chunk) {
        const T* more = chunk_sum(image, chunk, which);
        for (int64_t c = channels.begin; c < channels.end; ++c) total[c] += more[c];
      }
    }
    add_matched(image, channels);
    const auto give = [&](void* gradient, const T* values) {
      if (!gradient) return;
      T* target = static_cast<T*>(gradient) + image * call_.channels;
      for (int64_t c = channels.begin; c < channels.end; ++c) target[c] = values[c];
    };
    give(gradients_.grad_empty_scale, sum(image, kEmptyScale));
    give(gradients_.grad_empty_shift, sum(image, kEmptyShift));
    give(gradients_.grad_noise_strength, sum(image, kNoise));
    give(gradients_.grad_scale_bias, sum(image, kScale));
    give(gradients_.grad_shift_bias, sum(image, kShift));
    finish_statistics(image, channels);
    if (call_.empty_uniform && Base::any_empty(image)) {
      if (!call_.empty_scale) share_out(image, channels, sum(image, kEmptyScale), grad_scale_);
      if (!call_.empty_shift) share_out(image, channels, sum(image, kEmptyShift), grad_shift_);
    }
  }

  // Sums over all pixels from those over the pixels of each label: the weights of a pixel sum to one in each head, so
  // one head's gradients of scale and shift sum to those of gamma and beta.
  void add_matched(int64_t image, Range channels) const {
    T *scale = sum(image, kScale), *shift = sum(image, kShift);
    T *scaled = sum(image, kScaled), *shifted = sum(image, kShifted);
    const T* given_empty_scale = Base::empty_rows(call_.empty_scale, Base::uniform_scale_) + image * call_.channels;
    const T *empty_scale = sum(image, kEmptyScale), *empty_shift = sum(image, kEmptyShift);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      scale[c] = empty_scale[c];
      shift[c] = empty_shift[c];
      scaled[c] = given_empty_scale[c] * empty_scale[c];
      shifted[c] = given_empty_scale[c] * empty_shift[c];
    }
    const ImageTokens pixels(call_.pixels, image);
    for (int64_t label = 0; label < call_.latents.labels; ++label) {
      if (pixels.with_label(label).size() == 0) continue;
      Base::each_row(Base::latents_of(image, label), [&](int64_t, int64_t head, int64_t latent) {
        const int64_t begin = Base::row(image, head, latent) * call_.channels;
        const T* factor = static_cast<const T*>(call_.scale) + begin;
        const T *grad_scale = grad_scale_ + begin, *grad_shift = grad_shift_ + begin;
        const T first_head = head == 0 ? T(1) : T(0);
#pragma GCC ivdep
        for (int64_t c = channels.begin; c < channels.end; ++c) {
          scale[c] += first_head * grad_scale[c];
          shift[c] += first_head * grad_shift[c];
          scaled[c] += factor[c] * grad_scale[c];
          shifted[c] += factor[c] * grad_shift[c];
        }
      });
    }
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const T bias = (call_.add_one ? T(1) : T(0)) + Base::value(call_.scale_bias, image * call_.channels + c);
      scaled[c] += bias * scale[c];
      shifted[c] += bias * shift[c];
    }
  }

  // With the sums of gamma dy and of gamma dy n: the gradients of the statistics, or what they add to that of x,
  // offset + factor (x - mean).
  void finish_statistics(int64_t image, Range channels) const {
    const T *scaled = sum(image, kScaled), *shifted = sum(image, kShifted);
    T *offset = sum(image, kOffset), *factor = sum(image, kFactor);
    const T share = T(1) / static_cast<T>(larger<int64_t>(call_.pixels.count, 1));
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const int64_t i = image * call_.channels + c;
      const T rstd = static_cast<const T*>(call_.rstd)[i];
      offset[c] = -share * rstd * shifted[c];
      factor[c] = -share * rstd * rstd * scaled[c];
      if (gradients_.grad_mean) static_cast<T*>(gradients_.grad_mean)[i] = -rstd * shifted[c];
      if (gradients_.grad_rstd) static_cast<T*>(gradients_.grad_rstd)[i] = scaled[c] / rstd;
    }
  }

  // The share of each latent in the gradient of the mean over them.
  void share_out(int64_t image, Range channels, const T* gradient, T* rows) const {
    const T share = T(1) / static_cast<T>(larger<int64_t>(call_.latents.count, 1));
    T* target = rows + Base::row(image, 0, 0) * call_.channels;
    for (int64_t i = 0; i < call_.heads * call_.latents.count; ++i) {
      for (int64_t c = channels.begin; c < channels.end; ++c) target[i * call_.channels + c] += share * gradient[c];
    }
  }

  // grad_x += offset + factor (x - mean), line by line as the maps lie in memory.
  void differentiate_statistics() const {
    const bool by_pixel = image_of<Scalar>(call_.x, 0, call_.channels).adjacent_channels();
    const int64_t lines = by_pixel ? call_.height : call_.channels;
    parallel_for(call_.batch * lines, call_.threads, [&](int64_t item, int) {
      const int64_t image = item / lines, line = item % lines;
      const FeatureMap<Scalar> x = image_of<Scalar>(call_.x, image, call_.channels);
      const FeatureMap<Scalar> grad_x = image_of<Scalar>(gradients_.grad_x, image, call_.channels);
      const T *offset = sum(image, kOffset), *factor = sum(image, kFactor);
      const T* mean = static_cast<const T*>(call_.mean) + image * call_.channels;
      const auto add = [&](Scalar* target, const Scalar* source, int64_t c) {
        *target = narrow<Scalar>(widen(*target) + (offset[c] + factor[c] * (widen(*source) - mean[c])));
      };
      if (by_pixel) {
        for (int64_t column = 0; column < call_.width; ++column) {
          const Scalar* source = x.at(line, column);
          Scalar* target = grad_x.at(line, column);
          each_element(call_.channels, grad_x.channel_stride, x.channel_stride,
                       [&](int64_t c, int64_t to, int64_t from) { add(target + to, source + from, c); });
        }
      } else {
        for (int64_t row = 0; row < call_.height; ++row) {
          const Scalar* source = x.at(row, 0) + line * x.channel_stride;
          Scalar* target = grad_x.at(row, 0) + line * grad_x.channel_stride;
          each_element(call_.width, grad_x.column_stride, x.column_stride,
                       [&](int64_t, int64_t to, int64_t from) { add(target + to, source + from, line); });
        }
      }
    });
  }

  // Calls visit(i, offset of i in one tensor, in another), in a loop that can be vectorised where both strides are 1.
  template <typename Visit>
  static void each_element(int64_t count, int64_t stride, int64_t other_stride, const Visit& visit) {
    if (stride == 1 && other_stride == 1) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) visit(i, i, i);
    } else {
      for (int64_t i = 0; i < count; ++i) visit(i, i * stride, i * other_stride);
    }
  }

  const sca_semantic_modulate_gradients& gradients_;
  const int64_t scale_begin_, shift_begin_;
  const PartialRows<T> partials_;
  T *chunk_sums_, *sums_;
  T *grad_scale_, *grad_shift_;  // (batch, heads, latents, channels)
};

}  // namespace

int64_t semantic_modulate_backward_workspace(const sca_semantic_modulate& call) {
  int64_t size = 0;
  with_scalar_type(call.scalar_type,
                   [&](auto scalar) { size = Backward<decltype(scalar)>(call, {}).workspace_size(); });
  return size;
}

void semantic_modulate_backward(const sca_semantic_modulate& call, const sca_semantic_modulate_gradients& gradients) {
  with_scalar_type(call.scalar_type, [&](auto scalar) { Backward<decltype(scalar)>(call, gradients).run(); });
}

}  // namespace sca::SCA_CPU_CAPABILITY
