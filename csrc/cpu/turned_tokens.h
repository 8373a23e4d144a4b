// Tensors of tokens whose channels are planes, as those of feature maps are, turned: kept with adjacent channels.
//
// The tokens of a label come a few at a time from all over such a tensor, and each number of a token lies in a page of
// its own. To gather them so takes several times as long as to turn all tokens where they are neighbours.
#pragma once

#include "turned_tile.h"

namespace sca::SCA_CPU_CAPABILITY {
namespace {

template <typename Scalar>
class TurnedTokens {
 public:
  using T = ComputeType<Scalar>;

  // Tensors of so many images and heads. Without memory it only counts.
  TurnedTokens(void* memory, int64_t batch, int64_t heads, int32_t threads)
      : arena_(memory), counts_(memory == nullptr), items_(batch * heads), heads_(heads), threads_(threads) {}

  // Whether a tensor of tokens that are so wide is turned.
  static bool turns(const sca_tensor& tensor, int64_t tokens, int64_t width) {
    return tensor.data && tensor.token_stride == 1 && tensor.channel_stride != 1 && tokens >= kLanes<T> &&
           width % kLanes<T> == 0;
  }

  // What is read in the place of a tensor: itself, or a turned copy.
  sca_tensor operand(const sca_tensor& tensor, int64_t tokens, int64_t width) {
    const sca_tensor turned = result(tensor, tokens, width);
    if (!counts_ && turned.data != tensor.data) {
      each_piece(tensor, turned, tokens, width,
                 [](const Tile& tile, const FeatureMap<Scalar>& map, Rectangle place) { tile.load(map, place); });
    }
    return turned;
  }
  // What is written in the place of a tensor: itself, or memory that write() turns back.
  sca_tensor result(const sca_tensor& tensor, int64_t tokens, int64_t width) {
    if (!turns(tensor, tokens, width)) return tensor;
    Scalar* memory = arena_.template take<Scalar>(items_ * tokens * width);
    // One that is only counted keeps an address, which stands for being there.
    return {counts_ ? tensor.data : memory, heads_ * tokens * width, tokens * width, width, 1};
  }
  // From what result() gave to the tensor itself.
  void write(const sca_tensor& turned, const sca_tensor& tensor, int64_t tokens, int64_t width) const {
    if (turned.data == tensor.data) return;
    const bool streamed = items_ * tokens * width * int64_t{sizeof(Scalar)} >= kStreamedBytes;
    each_piece(tensor, turned, tokens, width, [&](const Tile& tile, const FeatureMap<Scalar>& map, Rectangle place) {
      tile.store_to(map, place, streamed);
      if (streamed) stream_fence();
    });
  }

  int64_t used() const { return arena_.used(); }

 private:
  using Tile = TurnedTile<Scalar, Scalar>;
  static constexpr int64_t kPiece = 64;  // tokens that are turned at once

  // Calls visit(turned tile, map, place in it) for pieces of all images and heads.
  template <typename Visit>
  void each_piece(const sca_tensor& tensor, const sca_tensor& turned, int64_t tokens, int64_t width,
                  const Visit& visit) const {
    const int64_t pieces = (tokens + kPiece - 1) / kPiece;
    parallel_for(items_ * pieces, threads_, [&](int64_t item, int) {
      const int64_t image = item / pieces / heads_, head = item / pieces % heads_, first = item % pieces * kPiece;
      Arena rows(static_cast<Scalar*>(turned.data) + (item / pieces * tokens + first) * width);
      Scalar* planes =
          static_cast<Scalar*>(tensor.data) + image * tensor.batch_stride + head * tensor.head_stride + first;
      const int64_t count = smaller(kPiece, tokens - first);
      visit(Tile(rows, width, count), {planes, width, tensor.channel_stride, kLanes<T>, 1}, {0, 0, 1, count});
    });
  }

  Arena arena_;
  const bool counts_;
  const int64_t items_, heads_;
  const int32_t threads_;
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
