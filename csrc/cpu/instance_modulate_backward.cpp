#include "instance_modulate.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// With c = x - mean, y = factor rstd c + offset, out = leaky_relu(y) and dy = dout * (1 or the slope):
//     dgamma = dy rstd c,  dbeta = dy,  dstrength = sum dy noise,  dc = dy factor rstd,
//     where mean and rstd are given:  dx = dc,  dmean = -sum dc,  drstd = sum dy factor c;
//     where they are those of x:      dx = dc - sum dc / n - c rstd^2 sum(dc c) / divisor of the variance.
// The last takes the sums before it can begin, so x and dout are read again; where y was positive is kept until then,
// in one bit for each element, for it may take two more maps or a random number to find out.

// Over the pixels of a channel: of dy, of dy times the factor per pixel, of that times c, and of dy times the noise.
enum Sum { kPlain, kFactored, kCentred, kNoise, kSums };

enum class Activation { kNone, kPlain, kWithOffsetRows };

// One bit for each lane of a vector.
template <typename T>
using LaneBits = std::conditional_t<(kLanes<T> > 8), uint16_t, uint8_t>;

inline LaneBits<float> positive_lanes(Vector<float> value) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<LaneBits<float>>(_mm256_movemask_ps(_mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_GT_OQ)));
#elif defined(__SSE2__)
  return static_cast<LaneBits<float>>(_mm_movemask_ps(_mm_cmpgt_ps(value, _mm_setzero_ps())));
#else
  LaneBits<float> bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= static_cast<LaneBits<float>>((value[i] > 0) << i);
  return bits;
#endif
}
inline LaneBits<double> positive_lanes(Vector<double> value) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(value, _mm512_setzero_pd(), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<LaneBits<double>>(_mm256_movemask_pd(_mm256_cmp_pd(value, _mm256_setzero_pd(), _CMP_GT_OQ)));
#elif defined(__SSE2__)
  return static_cast<LaneBits<double>>(_mm_movemask_pd(_mm_cmpgt_pd(value, _mm_setzero_pd())));
#else
  LaneBits<double> bits = 0;
  for (int i = 0; i < kLanes<double>; ++i) bits |= static_cast<LaneBits<double>>((value[i] > 0) << i);
  return bits;
#endif
}

template <typename T>
inline Vector<T> choose_lanes(LaneBits<T> bits, Vector<T> where_set, Vector<T> elsewhere) {
  using Bits = typename FloatTraits<T>::Bits;
  const Words<T> bit_of_lane = (Words<T>{} + Bits{1}) << ascending<T>(0);
  return ((Words<T>{} + Bits{bits}) & bit_of_lane) != Bits{0} ? where_set : elsewhere;
}

// Rows of a tile beside its inputs; null: not wanted.
template <typename Scalar>
struct GradientRows {
  using T = ComputeType<Scalar>;
  TileRows<Scalar> out, x;
  TileRows<T> gamma, beta;
  TileRows<LaneBits<T>> positive;  // a number for each vector
  bool x_streams, gamma_streams, beta_streams;
  T slope;
};

// Adds a vector of elements to the sums, and writes the gradients that have a number for each element.
template <typename Scalar, bool kPixelRows, bool kGamma, Activation kActivation>
inline void reduce_vector(
    const RowFormula<Scalar, kPixelRows, kGamma, kActivation == Activation::kWithOffsetRows>& formula,
    const TileInputs<Scalar>& in, const GradientRows<Scalar>& gradients, int64_t row, int64_t i,
    Vector<ComputeType<Scalar>>* sums) {
  using T = ComputeType<Scalar>;
  const Vector<T> centred = formula.centred(i);
  Vector<T> gradient = load_widened(gradients.out.row(row) + i);
  if (kActivation != Activation::kNone) {
    const LaneBits<T> positive = positive_lanes(formula.before_activation(i, centred));
    gradients.positive.row(row)[i / kLanes<T>] = positive;
    gradient = choose_lanes<T>(positive, gradient, gradient * gradients.slope);
  }
  const Vector<T> factored = formula.times_factor(i, gradient);
  if (kGamma) sums[kPlain] += gradient;
  sums[kFactored] += factored;
  sums[kCentred] += factored * centred;
  if (in.noise.rows.data) sums[kNoise] += gradient * in.noise.template at<kPixelRows>(row, i);
  if (gradients.gamma.data) {
    put(gradients.gamma.row(row) + i, gradient * (centred * formula.scale(i)), gradients.gamma_streams);
  }
  if (gradients.beta.data) put(gradients.beta.row(row) + i, gradient, gradients.beta_streams);
}

template <typename Scalar, bool kPixelRows, bool kGamma, Activation kActivation>
void reduce_rows(const TileInputs<Scalar>& in, const GradientRows<Scalar>& gradients, double* sums, int64_t pitch) {
  using T = ComputeType<Scalar>;
  using Formula = RowFormula<Scalar, kPixelRows, kGamma, kActivation == Activation::kWithOffsetRows>;
  const auto used = [&](int64_t sum) { return sum == kPlain ? kGamma : sum != kNoise || in.noise.rows.data; };
  if (kPixelRows) {
    for (int64_t i = 0; i < in.length; i += kLanes<T>) {
      Vector<T> totals[kSums] = {};
      for (int64_t row = 0; row < in.rows; ++row) {
        reduce_vector<Scalar, kPixelRows, kGamma, kActivation>(Formula(in, row), in, gradients, row, i, totals);
      }
      for (int64_t sum = 0; sum < kSums; ++sum) {
        if (!used(sum)) continue;
        T lanes[kLanes<T>];
        store(lanes, totals[sum]);
        for (int64_t k = 0; k < kLanes<T>; ++k) sums[sum * pitch + i + k] += static_cast<double>(lanes[k]);
      }
    }
    return;
  }
  for (int64_t row = 0; row < in.rows; ++row) {
    const Formula formula(in, row);
    Vector<T> totals[kSums] = {};
    for (int64_t i = 0; i < in.length; i += kLanes<T>) {
      reduce_vector<Scalar, kPixelRows, kGamma, kActivation>(formula, in, gradients, row, i, totals);
    }
    for (int64_t sum = 0; sum < kSums; ++sum) {
      if (used(sum)) sums[sum * pitch + row] += static_cast<double>(sum_lanes<T>(totals[sum]));
    }
  }
}

// The gradient of x, once the sums are known.
template <typename Scalar, bool kPixelRows, bool kGamma, bool kActive>
void differentiate_rows(const TileInputs<Scalar>& in, const GradientRows<Scalar>& gradients) {
  using T = ComputeType<Scalar>;
  for (int64_t row = 0; row < in.rows; ++row) {
    const RowFormula<Scalar, kPixelRows, kGamma, false> formula(in, row);
    const PerChannel<T, kPixelRows> common(in.channels.common, row), proportional(in.channels.proportional, row);
    const Scalar* grad_out = gradients.out.row(row);
    const LaneBits<T>* positive = gradients.positive.row(row);
    Scalar* grad_x = gradients.x.row(row);
    for (int64_t i = 0; i < in.length; i += kLanes<T>) {
      Vector<T> gradient = load_widened(grad_out + i);
      if (kActive) gradient = choose_lanes<T>(positive[i / kLanes<T>], gradient, gradient * gradients.slope);
      const Vector<T> through_value = (formula.times_factor(i, gradient) + common.at(i)) * formula.scale(i);
      put(grad_x + i, through_value + formula.centred(i) * proportional.at(i), gradients.x_streams);
    }
  }
}

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// Calls visit with a constant for each of two booleans.
template <typename Visit>
inline void with_constants(bool first, bool second, const Visit& visit) {
  if (first) {
    second ? visit(Constant<true>{}, Constant<true>{}) : visit(Constant<true>{}, Constant<false>{});
  } else {
    second ? visit(Constant<false>{}, Constant<true>{}) : visit(Constant<false>{}, Constant<false>{});
  }
}

template <typename Scalar>
class Backward : public InstanceModulate<Scalar> {
  using Base = InstanceModulate<Scalar>;
  using typename Base::Scratch;
  using typename Base::T;
  using Base::call_;
  using Base::pixel_rows_;
  static_assert(Sum::kSums <= Base::kSums);

 public:
  Backward(const sca_instance_modulate& call, const sca_instance_modulate_gradients& gradients)
      : Base(call),
        gradients_(gradients),
        activation_(call.negative_slope == 1                                 ? Activation::kNone
                    : call.beta.data || call.noise.values || call.noise.seed ? Activation::kWithOffsetRows
                                                                             : Activation::kPlain) {
    const int64_t rows = call.batch * (pixel_rows_ ? Base::pixels_ : call.channels);
    row_vectors_ = padded<T>(pixel_rows_ ? call.channels : Base::pixels_) / kLanes<T>;
    positive_ = Base::arena_.template take<LaneBits<T>>(activation_ == Activation::kNone ? 0 : rows * row_vectors_);
  }

  void run() const { Base::run(*this, {true, true, !call_.stats_given && gradients_.grad_x.data}); }

 private:
  friend Base;

  void start(int64_t group) const { Base::prepare(group); }
  void before(int64_t group, int64_t chunk, int thread) const { reduce(group, chunk, thread); }
  void middle(int64_t group) const { finish(group); }
  void after(int64_t group, int64_t chunk, int thread) const { differentiate(group, chunk, thread); }

  void reduce(int64_t group, int64_t chunk, int thread) const {
    const Scratch scratch = Base::scratch(thread);
    double* sums = Base::sums_of(group, chunk);
    for (int64_t i = 0; i < Base::kSums * Base::pitch_; ++i) sums[i] = 0;
    Base::each_tile(group, chunk, [&](const Tile& tile) {
      const bool active = activation_ != Activation::kNone;
      const TileInputs<Scalar> in = Base::read(tile, scratch, active, gradients_.grad_noise_strength);
      GradientRows<Scalar> rows = read_gradient(tile, scratch);
      rows.gamma = Base::locate_parameter(gradients_.grad_gamma, call_.gamma_wide, tile, scratch.grad_gamma);
      rows.beta = Base::locate_parameter(gradients_.grad_beta, call_.beta_wide, tile, scratch.grad_beta);
      rows.gamma_streams = Base::streams(rows.gamma);
      rows.beta_streams = Base::streams(rows.beta);
      with_constants(pixel_rows_, in.gamma.data, [&](auto pixel_rows, auto gamma) {
        constexpr bool kPixelRows = pixel_rows.value, kGamma = gamma.value;
        switch (activation_) {
          case Activation::kNone:
            return reduce_rows<Scalar, kPixelRows, kGamma, Activation::kNone>(in, rows, sums, Base::pitch_);
          case Activation::kPlain:
            return reduce_rows<Scalar, kPixelRows, kGamma, Activation::kPlain>(in, rows, sums, Base::pitch_);
          case Activation::kWithOffsetRows:
            return reduce_rows<Scalar, kPixelRows, kGamma, Activation::kWithOffsetRows>(in, rows, sums, Base::pitch_);
        }
      });
      Base::write_parameter(gradients_.grad_gamma, call_.gamma_wide, tile, rows.gamma, scratch.grad_gamma);
      Base::write_parameter(gradients_.grad_beta, call_.beta_wide, tile, rows.beta, scratch.grad_beta);
      if (call_.stats_given && gradients_.grad_x.data) differentiate_tile(tile, in, rows, scratch);
    });
    stream_fence();
  }

  void differentiate(int64_t group, int64_t chunk, int thread) const {
    const Scratch scratch = Base::scratch(thread);
    Base::each_tile(group, chunk, [&](const Tile& tile) {
      differentiate_tile(tile, Base::read(tile, scratch, false, false), read_gradient(tile, scratch), scratch);
    });
    stream_fence();
  }

  void differentiate_tile(const Tile& tile, const TileInputs<Scalar>& in, GradientRows<Scalar> rows,
                          const Scratch& scratch) const {
    const auto grad_x = Base::template map<Scalar, Scalar>(gradients_.grad_x);
    rows.x = grad_x.locate(tile, scratch.result);
    rows.x_streams = Base::streams(rows.x);
    with_constants(pixel_rows_, in.gamma.data, [&](auto pixel_rows, auto gamma) {
      if (activation_ == Activation::kNone) {
        differentiate_rows<Scalar, pixel_rows.value, gamma.value, false>(in, rows);
      } else {
        differentiate_rows<Scalar, pixel_rows.value, gamma.value, true>(in, rows);
      }
    });
    grad_x.write(tile, rows.x, scratch.result);
  }

  GradientRows<Scalar> read_gradient(const Tile& tile, const Scratch& scratch) const {
    GradientRows<Scalar> rows = {};
    rows.out = Base::template map<Scalar, Scalar>(call_.out).read(tile, scratch.grad_out);
    rows.slope = static_cast<T>(call_.negative_slope);
    const int64_t row =
        pixel_rows_ ? tile.image * Base::pixels_ + tile.pixel : tile.image * call_.channels + tile.channel;
    rows.positive = {positive_ + row * row_vectors_ + (pixel_rows_ ? tile.channel : tile.pixel) / kLanes<T>,
                     row_vectors_};
    return rows;
  }

  // Gradients of what is given per channel, and what the statistics add to that of x.
  void finish(int64_t group) const {
    const Tile all = Base::all_of(group);
    const Channels<T> channels = Base::channels_of(all);
    const double count = static_cast<double>(all.pixels);
    const double divisor = larger(call_.unbiased ? count - 1 : count, 1.0);
    for (int64_t c = 0; c < all.channels; ++c) {
      const int64_t i = all.image * call_.channels + all.channel + c;
      double total[kSums] = {};
      for (int64_t chunk = 0; chunk < Base::chunks_; ++chunk) {
        for (int64_t sum = 0; sum < kSums; ++sum) total[sum] += Base::sums_of(group, chunk)[sum * Base::pitch_ + c];
      }
      const double rstd = call_.rstd[i], factor = static_cast<double>(Base::factor(i));
      const double factored = factor * total[kFactored], centred = factor * total[kCentred];
      put_number(gradients_.grad_channel_gamma, i, rstd * total[kCentred]);
      put_number(gradients_.grad_channel_beta, i, call_.gamma.data ? total[kPlain] : total[kFactored]);
      put_number(gradients_.grad_noise_strength, i, total[kNoise]);
      put_number(gradients_.grad_mean, i, -rstd * factored);
      put_number(gradients_.grad_rstd, i, centred);
      if (!call_.stats_given) {
        channels.common[c] = static_cast<T>(-total[kFactored] / larger(count, 1.0));
        channels.proportional[c] = static_cast<T>(-rstd * rstd * rstd * centred / divisor);
      }
    }
  }
  static void put_number(void* target, int64_t i, double number) {
    if (target) static_cast<T*>(target)[i] = static_cast<T>(number);
  }

  const sca_instance_modulate_gradients& gradients_;
  const Activation activation_;
  int64_t row_vectors_;    // vectors in a row of all channels, or of all pixels
  LaneBits<T>* positive_;  // (rows, row_vectors_)
};

}  // namespace

int64_t instance_modulate_backward_workspace(const sca_instance_modulate& call) {
  const sca_instance_modulate_gradients none = {};
  int64_t size = 0;
  with_scalar_type(call.scalar_type,
                   [&](auto scalar) { size = Backward<decltype(scalar)>(call, none).workspace_size(); });
  return size;
}

void instance_modulate_backward(const sca_instance_modulate& call, const sca_instance_modulate_gradients& gradients) {
  with_scalar_type(call.scalar_type, [&](auto scalar) { Backward<decltype(scalar)>(call, gradients).run(); });
}

}  // namespace sca::SCA_CPU_CAPABILITY
