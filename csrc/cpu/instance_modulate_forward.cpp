#include "instance_modulate.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

template <typename Scalar>
class Forward : public InstanceModulate<Scalar> {
  using Base = InstanceModulate<Scalar>;
  using typename Base::Scratch;
  using typename Base::T;
  using Base::call_;
  using Base::pixel_rows_;

 public:
  explicit Forward(const sca_instance_modulate& call) : Base(call) {}

  void run() const { Base::run(*this, {false, !call_.stats_given, true}); }

 private:
  friend Base;
  enum Moment { kMean, kSquares };

  double* moments(int64_t group, int64_t chunk, Moment moment) const {
    return Base::sums_of(group, chunk) + moment * Base::pitch_;
  }

  void start(int64_t) const {}
  void before(int64_t group, int64_t chunk, int thread) const { measure(group, chunk, thread); }
  void middle(int64_t group) const {
    if (!call_.stats_given) merge(group);
    Base::prepare(group);
  }
  void after(int64_t group, int64_t chunk, int thread) const { modulate(group, chunk, thread); }

  // The moments of a chunk.
  void measure(int64_t group, int64_t chunk, int thread) const {
    const Scratch scratch = Base::scratch(thread);
    double *mean = moments(group, chunk, kMean), *squares = moments(group, chunk, kSquares);
    for (int64_t c = 0; c < Base::pitch_; ++c) mean[c] = squares[c] = 0;
    double seen = 0;
    Base::each_tile(group, chunk, [&](const Tile& tile) {
      const TileRows<T> x = Base::read_wide_x(tile, scratch);
      const double count = static_cast<double>(tile.pixels);
      if (pixel_rows_) {
        for (int64_t c = 0; c < Base::pitch_; c += kLanes<T>) {
          measure_column(x, c, tile.pixels, seen, mean + c, squares + c);
        }
      } else {
        for (int64_t c = 0; c < tile.channels; ++c) {
          T sum, sum_of_squares;
          const T shift = typical_of_row(x.row(c), tile.pixels);
          sum_differences(x.row(c), 1, tile.pixels, shift, sum, sum_of_squares);
          merge_sums(seen, mean[c], squares[c], count, shift, sum, sum_of_squares);
        }
      }
      seen += count;
    });
  }

  // Numbers near the mean, if that is to be had cheaply: one pixel alone may be far off, and what is lost in
  // subtracting squares grows with the square of the distance. Of equal numbers it is that number, exactly.
  static T typical_of_row(const T* row, int64_t count) {
    constexpr T kShare = T(1) / static_cast<T>(kLanes<T>);
    return count < kLanes<T> ? row[0] : sum_lanes<T>(load(row) * kShare);
  }
  static Vector<T> typical_of_column(const TileRows<T>& x, int64_t c, int64_t pixels) {
    constexpr int64_t kSome = 8;
    if (pixels < kSome) return load(x.data + c);
    Vector<T> some[kSome];
    for (int64_t i = 0; i < kSome; ++i) some[i] = load(x.row(pixels / kSome * i) + c) * (T(1) / T(kSome));
    for (int64_t half = kSome / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) some[i] += some[i + half];
    }
    return some[0];
  }

  // A vector of channels in rows of pixels.
  static void measure_column(const TileRows<T>& x, int64_t c, int64_t pixels, double seen, double* mean,
                             double* squares) {
    const Vector<T> shift = typical_of_column(x, c, pixels);
    Vector<T> sum = {}, sum_of_squares = {};
    for (int64_t p = 0; p < pixels; ++p) {
      const Vector<T> difference = load(x.row(p) + c) - shift;
      sum += difference;
      sum_of_squares += difference * difference;
    }
    T shifts[kLanes<T>], sums[kLanes<T>], sums_of_squares[kLanes<T>];
    store(shifts, shift);
    store(sums, sum);
    store(sums_of_squares, sum_of_squares);
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      merge_sums(seen, mean[i], squares[i], static_cast<double>(pixels), shifts[i], sums[i], sums_of_squares[i]);
    }
  }

  // The statistics of a group's channels from the moments of the chunks.
  void merge(int64_t group) const {
    const Tile all = Base::all_of(group);
    const double count = static_cast<double>(all.pixels);
    const double divisor = larger(call_.unbiased ? count - 1 : count, 1.0);
    for (int64_t c = 0; c < all.channels; ++c) {
      double mean = 0, squares = 0, seen = 0;
      for (int64_t chunk = 0; chunk < Base::chunks_; ++chunk) {
        const double size = static_cast<double>(Base::chunk_pixels(chunk));
        merge_moments(seen, mean, squares, size, moments(group, chunk, kMean)[c], moments(group, chunk, kSquares)[c]);
        seen += size;
      }
      const int64_t i = all.image * call_.channels + all.channel + c;
      call_.mean[i] = mean;
      call_.rstd[i] = 1 / __builtin_sqrt(squares / divisor + call_.eps);
    }
  }

  void modulate(int64_t group, int64_t chunk, int thread) const {
    const Scratch scratch = Base::scratch(thread);
    const auto out = Base::template map<Scalar, Scalar>(call_.out);
    Base::each_tile(group, chunk, [&](const Tile& tile) {
      const TileInputs<Scalar> in = Base::read(tile, scratch, true, true);
      const TileRows<Scalar> result = out.locate(tile, scratch.result);
      pixel_rows_ ? modulate_rows<true>(in, result) : modulate_rows<false>(in, result);
      out.write(tile, result, scratch.result);
    });
    stream_fence();
  }

  template <bool kPixelRows>
  void modulate_rows(const TileInputs<Scalar>& in, const TileRows<Scalar>& result) const {
    if (in.gamma.data) {
      in.offset.data ? modulate_rows<kPixelRows, true, true>(in, result)
                     : modulate_rows<kPixelRows, true, false>(in, result);
    } else {
      in.offset.data ? modulate_rows<kPixelRows, false, true>(in, result)
                     : modulate_rows<kPixelRows, false, false>(in, result);
    }
  }

  template <bool kPixelRows, bool kGamma, bool kOffset>
  void modulate_rows(const TileInputs<Scalar>& in, const TileRows<Scalar>& result) const {
    const T slope = static_cast<T>(call_.negative_slope);
    const bool streams = Base::streams(result);
    for (int64_t row = 0; row < in.rows; ++row) {
      const RowFormula<Scalar, kPixelRows, kGamma, kOffset> formula(in, row);
      Scalar* target = result.row(row);
      for (int64_t i = 0; i < in.length; i += kLanes<T>) {
        const Vector<T> before = formula.before_activation(i, formula.centred(i));
        put(target + i, before > T(0) ? before : before * slope, streams);
      }
    }
  }
};

}  // namespace

int64_t instance_modulate_workspace(const sca_instance_modulate& call) {
  int64_t size = 0;
  with_scalar_type(call.scalar_type,
                   [&](auto scalar) { size = InstanceModulate<decltype(scalar)>(call).workspace_size(); });
  return size;
}

void instance_modulate_forward(const sca_instance_modulate& call) {
  with_scalar_type(call.scalar_type, [&](auto scalar) { Forward<decltype(scalar)>(call).run(); });
}

}  // namespace sca::SCA_CPU_CAPABILITY
