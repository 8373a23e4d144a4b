#include <cmath>

#include "semantic_modulate.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

template <typename Scalar>
class Forward : public SemanticModulate<Scalar> {
  using Base = SemanticModulate<Scalar>;
  using typename Base::Ahead;
  using typename Base::Scratch;
  using typename Base::T;
  using Base::call_;

 public:
  explicit Forward(const sca_semantic_modulate& call) : Base(call, 2, Base::kMostChunks) {}

  int64_t workspace_size() const {
    return Base::arena_.used() + call_.threads * Base::template scratch_size<Scratch>(*this);
  }

  void run() const {
    if (!call_.stats_given) make_statistics();
    Base::make_uniform_rows();
    Base::template each_chunk<Scratch>(
        *this, [&](int64_t image, int64_t chunk, Scratch& scratch) { modulate_chunk(image, chunk, scratch); });
  }

 private:
  void make_statistics() const {
    const double pixels = static_cast<double>(call_.pixels.count);
    Base::statistics_.run(call_.threads, [&](int64_t image, int64_t channel, double mean, double squares) {
      const double variance = pixels > 0 ? squares / pixels : 0;
      static_cast<T*>(call_.mean)[image * call_.channels + channel] = static_cast<T>(mean);
      static_cast<T*>(call_.rstd)[image * call_.channels + channel] =
          static_cast<T>(1 / std::sqrt(variance + call_.eps));
    });
  }

  void modulate_chunk(int64_t image, int64_t chunk, Scratch& scratch) const {
    const FeatureMap<Scalar> x = image_of<Scalar>(call_.x, image, call_.channels);
    const FeatureMap<Scalar> out = image_of<Scalar>(call_.out, image, call_.channels);
    Base::load_channels(image, scratch);
    Base::find_labels(image, chunk, scratch.labels);
    Base::walk_chunk(
        image, chunk, Base::turned_ && has_planes(call_.out), x, {}, scratch.labels,
        [&](const Segment& segment, const Ahead& ahead) {
          modulate_label(image, segment, ahead, x, out, Base::streamed(), scratch);
        },
        [&](const Rectangle& place, const Segment* segments, int64_t count) {
          scratch.x_tile.load(x, place);
          // The pixels turn into the result where they lie.
          const FeatureMap<T> tile = scratch.x_tile.map(place);
          for (int64_t i = 0; i < count; ++i) modulate_label(image, segments[i], {}, tile, tile, false, scratch);
          scratch.x_tile.store_to(out, place, Base::streamed());
        });
  }

  template <typename Stored>
  void modulate_label(int64_t image, const Segment& segment, const Ahead& ahead, const FeatureMap<Stored>& x,
                      const FeatureMap<Stored>& out, bool streamed, Scratch& scratch) const {
    const Range latents = ImageTokens(call_.latents, image).with_label(segment.label);
    Base::load_label(image, latents, scratch);
    Base::each_block(ImageTokens(call_.pixels, image), segment.positions, ahead,
                     [&](const Runs& runs, const Upcoming<Scalar>& upcoming) {
                       scratch.x.gather(x, runs);
                       // A copy of the pixels turns into the result where it lies.
                       FeatureBlock<T>& result = scratch.x.is_copy() ? scratch.x : scratch.result;
                       if (!scratch.x.is_copy()) result.locate(out, runs, scratch.x.pixel_rows());
                       const Lines<Stored> lines(out, runs, streamed);
                       Base::fill_table(image, latents, runs, scratch);
                       if (scratch.x.pixel_rows()) {
                         modulate<true>(image, latents, runs, upcoming, streamed && result.streamable(out), lines,
                                        result, scratch);
                         result.scatter(out, runs);
                       } else {
                         modulate<false>(image, latents, runs, upcoming, false, lines, result, scratch);
                         result.scatter_rest(out, runs, lines);
                       }
                     });
  }

  template <bool kPixelRows, typename Stored>
  void modulate(int64_t image, Range latents, const Runs& runs, const Upcoming<Scalar>& upcoming, bool streamed,
                const Lines<Stored>& lines, const FeatureBlock<T>& result, Scratch& scratch) const {
    const T slope = static_cast<T>(call_.negative_slope);
    T* const* x = scratch.x.rows();
    T* const* out = result.rows();
    const T *means = scratch.mean, *rstds = scratch.rstd;
    Base::template each_vector<kPixelRows>(
        image, latents, runs, upcoming, scratch,
        [x, out, means, rstds, slope, streamed, &lines](int64_t row, int64_t i, Vector<T> gamma, Vector<T> beta) {
          const Vector<T> centred = load(x[row] + i) - beside_row<kPixelRows>(means, row, i);
          const Vector<T> y = gamma * (centred * beside_row<kPixelRows>(rstds, row, i)) + beta;
          const Vector<T> result = y > T(0) ? y : y * slope;
          if (!kPixelRows && i < lines.count() * kLanes<T>) {
            lines.store(row, i / kLanes<T>, result);
          } else if (streamed) {
            stream<T>(out[row] + i, result);
          } else {
            store<T>(out[row] + i, result);
          }
        });
  }
};

}  // namespace

int64_t semantic_modulate_workspace(const sca_semantic_modulate& call) {
  int64_t size = 0;
  with_scalar_type(call.scalar_type, [&](auto scalar) { size = Forward<decltype(scalar)>(call).workspace_size(); });
  return size;
}

void semantic_modulate_forward(const sca_semantic_modulate& call) {
  with_scalar_type(call.scalar_type, [&](auto scalar) { Forward<decltype(scalar)>(call).run(); });
}

}  // namespace sca::SCA_CPU_CAPABILITY
