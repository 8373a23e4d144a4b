// Gradients of semantic_modulate. The tiles of the forward pass are walked once more, for the gradients of the tables
// and that of x but for the part that flows through its moments; then come merges in order, and an affine pass that
// adds the missing part.
#include "semantic_modulate.h"

namespace sca::cuda {
namespace {

// Sums over a channel of the gradient g of what goes into the activation: times the normalised x, alone, times the
// noise, times the factor, times both factor and normalised x; and the first two over pixels without latents alone.
enum Kind { kScale, kShift, kStrength, kFactor, kNormalized, kEmptyScale, kEmptyShift, kKinds };

// Leaves for each label block partial sums over its pixels: of the gradients of its latents' rows, which are those of
// keys, scale and shift and that of the key's bias, and of the channels.
template <typename Scalar>
struct Backward {
  Modulation<Scalar> modulation;
  sca_semantic_modulate_gradients gradients;
  float* partial_rows;        // ((image * heads + head) * blocks.rows + row) * row_size()
  Sum<float>* partial_kinds;  // ((kind * batch + image) * channels + channel) * blocks.per_image + block
  PixelValues position;       // gradients of the logits, for the sums over rows and columns; values null: not wanted

  static constexpr int kChannels = 32;  // that are worked on at once
  struct Shared {
    float sums[kRowGroup][kThreads];
    float weights[2][kSharedRows * kTilePixels];  // and the gradients of the logits
    float grad[kChannels][kTilePixels + 1], x[kChannels][kTilePixels + 1], normalized[kChannels][kTilePixels + 1];
    float factor[kChannels][kTilePixels + 1], noise[kChannels][kTilePixels + 1];
  };

  SCA_HOST_DEVICE int64_t row_size() const { return 3 * modulation.call.channels + 1; }

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared& shared) const {
    const LabelBlock block = modulation.logits.blocks.at(item);
    float* const weights = modulation.weights(item, shared, 0, 2);
    float* const grad_logits = modulation.weights(item, shared, 1, 2);
    run.each_thread([&](int thread) { clear(run, item, block, thread); });
    for (int64_t begin = block.begin; begin < block.end; begin += modulation.logits.lanes.pixels) {
      const Tile tile = modulation.logits.tile(block, begin);
      modulation.attend(run, tile, shared, weights);
      differentiate_logits(run, tile, shared, weights, grad_logits);
      if (position.values) {
        run.each_thread([&](int thread) {
          if (thread < tile.pixels)
            position.store_tile(tile, thread, modulation.logits.pixel(tile, thread), grad_logits);
        });
      }
      for (int64_t first = 0; first < modulation.call.channels; first += kChannels) {
        run.each_thread([&](int thread) { fill(tile, thread, first, shared, weights, grad_logits); });
        run.each_thread([&](int thread) { add_rows(run, tile, thread, first, shared, weights, grad_logits); });
        run.each_thread([&](int thread) { add_kinds(run, item, tile, thread, first, shared); });
      }
      run.each_thread([&](int thread) { add_key_bias(run, tile, thread, grad_logits); });
    }
  }

  SCA_DEVICE float* partial_row(const LabelBlock& block, int64_t row) const {
    const int64_t head = row / block.latents, latent = row % block.latents;
    const int64_t of_head = (block.image * modulation.call.heads + head) * modulation.logits.blocks.rows;
    return partial_rows + (of_head + block.partial_row + latent) * row_size();
  }
  SCA_DEVICE float& partial_kind(int64_t item, int kind, int64_t channel) const {
    const sca_semantic_modulate& call = modulation.call;
    const int64_t per_image = modulation.logits.blocks.per_image;
    const int64_t row = (kind * call.batch + item / per_image) * call.channels + channel;
    return partial_kinds[row * per_image + item % per_image].value;
  }

  SCA_DEVICE void clear(const Block& run, int64_t item, const LabelBlock& block, int thread) const {
    for (int64_t row = 0; row < modulation.call.heads * block.latents; ++row) {
      float* const target = partial_row(block, row);
      for (int64_t i = thread; i < row_size(); i += run.threads()) target[i] = 0;
    }
    for (int kind = 0; kind < kKinds; ++kind) {
      for (int64_t c = thread; c < modulation.call.channels; c += run.threads()) partial_kind(item, kind, c) = 0;
    }
  }

  // The gradient of what goes into the activation, at the channels of `elements`.
  SCA_DEVICE void gradient(const Tile& tile, int p, int64_t first,
                           const typename Modulation<Scalar>::Elements& elements, float (&grad)[kChannelGroup]) const {
    const auto& logits = modulation.logits;
    const int64_t base = logits.offset(gradients.grad_out, tile, p);
    const auto slope = static_cast<float>(modulation.call.negative_slope);
#pragma unroll
    for (int k = 0; k < kChannelGroup; ++k) {
      const int64_t channel = first + k * logits.lanes.channels;
      grad[k] = channel < modulation.call.channels ? logits.feature(gradients.grad_out, base, channel) : 0.0f;
      if (!(elements.before[k] > 0)) grad[k] *= slope;
    }
  }

  // Weights w of gradients dw have logits of gradients w (dw - sum of w dw over the latents of the head).
  SCA_DEVICE void differentiate_logits(const Block& run, const Tile& tile, Shared& shared, float* weights,
                                       float* grad_logits) const {
    const auto& logits = modulation.logits;
    const sca_semantic_modulate& call = modulation.call;
    for (int group = 0; group < tile.rows; group += kRowGroup) {
      const auto products = [&](int p, int lane, float (&sums)[kRowGroup]) {
        int64_t begin[kRowGroup];
#pragma unroll
        for (int i = 0; i < kRowGroup; ++i)
          begin[i] = logits.rows.index(tile, smaller(group + i, tile.rows - 1)) * call.channels;
        for (int64_t first = lane; first < call.channels; first += kChannelGroup * logits.lanes.channels) {
          const auto elements = modulation.at(tile, p, first, weights);
          float grad[kChannelGroup];
          gradient(tile, p, first, elements, grad);
#pragma unroll
          for (int k = 0; k < kChannelGroup; ++k) {
            const int64_t channel = smaller(first + k * logits.lanes.channels, call.channels - 1);
#pragma unroll
            for (int i = 0; i < kRowGroup; ++i) {
              sums[i] += grad[k] * (elements.normalized[k] * static_cast<const float*>(call.scale)[begin[i] + channel] +
                                    static_cast<const float*>(call.shift)[begin[i] + channel]);
            }
          }
        }
      };
      logits.lanes.sum_group(run, tile.pixels, tile.rows, group, shared, products,
                             [&](int row, int p, float sum) { grad_logits[row * kTilePixels + p] = sum; });
    }
    modulation.each_head(
        run, tile,
        [&](float* first, int latents) {
          const float* const weight = weights + (first - grad_logits);
          float inner = 0;
          for (int j = 0; j < latents; ++j) inner += weight[j * kTilePixels] * first[j * kTilePixels];
          for (int j = 0; j < latents; ++j) {
            first[j * kTilePixels] = weight[j * kTilePixels] * (first[j * kTilePixels] - inner);
          }
        },
        grad_logits);
  }

  // What the sums of some channels are made of, and the gradient of x but for its moments.
  SCA_DEVICE void fill(const Tile& tile, int thread, int64_t begin, Shared& shared, const float* weights,
                       const float* grad_logits) const {
    const auto& logits = modulation.logits;
    const TileLanes& lanes = logits.lanes;
    const sca_semantic_modulate& call = modulation.call;
    const int p = lanes.pixel(thread);
    if (!lanes.inside(thread) || p >= tile.pixels) return;
    const int64_t end = smaller(begin + kChannels, call.channels);
    for (int64_t first = begin + lanes.channel(thread); first < end; first += kChannelGroup * lanes.channels) {
      const auto elements = modulation.at(tile, p, first, weights);
      float grad[kChannelGroup];
      gradient(tile, p, first, elements, grad);
#pragma unroll
      for (int k = 0; k < kChannelGroup; ++k) {
        const int64_t channel = first + k * lanes.channels, c = channel - begin;
        if (channel >= end) break;
        shared.grad[c][p] = grad[k];
        shared.x[c][p] = elements.x[k];
        shared.normalized[c][p] = elements.normalized[k];
        shared.factor[c][p] = elements.factor[k];
        shared.noise[c][p] = elements.noise[k];
        if (!gradients.grad_x.data) continue;
        const int64_t index = tile.block.image * call.channels + channel;
        float sum = grad[k] * elements.factor[k] * static_cast<const float*>(call.rstd)[index];
        for (int row = 0; row < tile.rows; ++row) {
          const float key = logits.keys[logits.rows.index(tile, row) * call.channels + channel];
          sum += grad_logits[row * kTilePixels + p] * key;
        }
        const int64_t offset = logits.offset(gradients.grad_x, tile, p) + channel * gradients.grad_x.channel_stride;
        narrow(sum, static_cast<Scalar*>(gradients.grad_x.data)[offset]);
      }
    }
  }

  SCA_DEVICE void add_rows(const Block& run, const Tile& tile, int thread, int64_t begin, Shared& shared,
                           const float* weights, const float* grad_logits) const {
    const int64_t channels = modulation.call.channels;
    for (int index = thread; index < tile.rows * kChannels; index += run.threads()) {
      const int row = index / kChannels, c = index % kChannels;
      if (begin + c >= channels) continue;
      float key = 0, scale = 0, shift = 0;
      for (int p = 0; p < tile.pixels; ++p) {
        const float weight = weights[row * kTilePixels + p] * shared.grad[c][p];
        key += grad_logits[row * kTilePixels + p] * shared.x[c][p];
        scale += weight * shared.normalized[c][p];
        shift += weight;
      }
      float* const target = partial_row(tile.block, row) + begin + c;
      target[0] += key;
      target[channels] += scale;
      target[2 * channels] += shift;
    }
  }

  SCA_DEVICE void add_kinds(const Block& run, int64_t item, const Tile& tile, int thread, int64_t begin,
                            const Shared& shared) const {
    for (int c = thread; c < kChannels; c += run.threads()) {
      if (begin + c >= modulation.call.channels) break;
      float sums[kKinds] = {};
      for (int p = 0; p < tile.pixels; ++p) {
        const float grad = shared.grad[c][p], normalized = shared.normalized[c][p];
        sums[kScale] += grad * normalized;
        sums[kShift] += grad;
        sums[kStrength] += grad * shared.noise[c][p];
        sums[kFactor] += grad * shared.factor[c][p];
        sums[kNormalized] += grad * shared.factor[c][p] * normalized;
      }
      sums[kEmptyScale] = tile.rows == 0 ? sums[kScale] : 0.0f;
      sums[kEmptyShift] = tile.rows == 0 ? sums[kShift] : 0.0f;
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) partial_kind(item, kind, begin + c) += sums[kind];
    }
  }

  SCA_DEVICE void add_key_bias(const Block& run, const Tile& tile, int thread, const float* grad_logits) const {
    for (int row = thread; row < tile.rows; row += run.threads()) {
      float sum = 0;
      for (int p = 0; p < tile.pixels; ++p) sum += grad_logits[row * kTilePixels + p];
      partial_row(tile.block, row)[3 * modulation.call.channels] += sum;
    }
  }
};

// Keeps the sums over channels, and writes the gradients that they are.
struct FinishKinds {
  sca_semantic_modulate_gradients gradients;
  const float* rstd;
  float* sums;
  int64_t rows;

  SCA_DEVICE void operator()(int64_t index, const Sum<float>& sum) const {
    sums[index] = sum.value;
    const int64_t row = index % rows;
    switch (index / rows) {
      case kScale: return write(gradients.grad_scale_bias, row, sum.value);
      case kShift: return write(gradients.grad_shift_bias, row, sum.value);
      case kStrength: return write(gradients.grad_noise_strength, row, sum.value);
      case kFactor: return write(gradients.grad_mean, row, -sum.value * rstd[row]);
      case kNormalized: return write(gradients.grad_rstd, row, sum.value / rstd[row]);
      case kEmptyScale: return write(gradients.grad_empty_scale, row, sum.value);
      default: return write(gradients.grad_empty_shift, row, sum.value);
    }
  }
  SCA_DEVICE static void write(void* table, int64_t row, float value) {
    if (table) static_cast<float*>(table)[row] = value;
  }
};

// Writes the gradients of the latents' rows. `share`, where the pixels without latents get the mean of all rows, is
// what each row has of their gradients.
struct FinishRows {
  sca_semantic_modulate_gradients gradients;
  const float* sums;
  int64_t latent_rows, channels, rows;  // latent rows: of an image
  float share;

  SCA_DEVICE void operator()(int64_t latent_row, int64_t place, float sum) const {
    if (place == 3 * channels) return FinishKinds::write(gradients.grad_key_bias, latent_row, sum);
    const int64_t channel = place % channels, table = place / channels;
    const int64_t index = latent_row / latent_rows * channels + channel;
    if (table == 1) sum += share * sums[kEmptyScale * rows + index];
    if (table == 2) sum += share * sums[kEmptyShift * rows + index];
    void* const target = table == 0 ? gradients.grad_keys : table == 1 ? gradients.grad_scale : gradients.grad_shift;
    FinishKinds::write(target, latent_row * channels + channel, sum);
  }
};

// Adds to the gradient of x what flows through its mean and deviation.
template <typename Scalar, int kWidth>
struct AddThroughMoments {
  sca_feature_map x, grad_x;
  Tiling tiling;
  Pixels pixels;
  const float *mean, *rstd, *sums;
  int64_t rows;
  struct Shared {};

  SCA_DEVICE void operator()(const Block& run, int64_t item, Shared&) const {
    run.each_thread([&](int thread) {
      const Lane lane = tiling.lane(item, thread);
      if (!lane.active) return;
      float common[kWidth], slope[kWidth], centre[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const int64_t row = lane.image * tiling.channels + lane.channel + (tiling.along_channels ? i : 0);
        const float part = rstd[row] / static_cast<float>(tiling.pixels);
        common[i] = part * sums[kFactor * rows + row];
        slope[i] = part * rstd[row] * sums[kNormalized * rows + row];
        centre[i] = mean[row];
      }
      for (int64_t pixel = lane.pixel; pixel < lane.end; pixel += lane.step) {
        float values[kWidth], grad[kWidth];
        const int64_t offset =
            offset_of(grad_x, lane.image, lane.channel) + pixels.offset(grad_x, static_cast<uint32_t>(pixel));
        load<Scalar>(x.data, offset_of(x, lane.image, lane.channel) + pixels.offset(x, static_cast<uint32_t>(pixel)),
                     values);
        load<Scalar>(grad_x.data, offset, grad);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) grad[i] -= common[i] + (values[i] - centre[i]) * slope[i];
        store<Scalar>(grad_x.data, offset, grad);
      }
    });
  }
};

template <typename Scalar, int kWidth>
const char* add_through_moments(const sca_semantic_modulate& call, const sca_feature_map& grad_x, const float* sums,
                                void* stream) {
  const Tiling tiling(call.batch, call.channels, call.height * call.width, adjacent_channels(call.x), kWidth);
  const AddThroughMoments<Scalar, kWidth> kernel = {call.x,
                                                    grad_x,
                                                    tiling,
                                                    {static_cast<uint32_t>(call.width)},
                                                    static_cast<const float*>(call.mean),
                                                    static_cast<const float*>(call.rstd),
                                                    sums,
                                                    call.batch * call.channels};
  return launch(kernel, tiling.items, call.threads, stream);
}

// The parts of the workspace of the backward pass.
template <typename Scalar>
struct BackwardWorkspace {
  Prepared<Scalar> prepared;
  float *sums, *partial_rows;
  Sum<float>* partial_kinds;
  PixelValues position;

  BackwardWorkspace(const sca_semantic_modulate& call, Arena& arena)
      : prepared(call, block_of_tiles(call.x, call.pixels.count), 2, arena) {
    const LabelBlocks& blocks = prepared.modulation.logits.blocks;
    const int64_t table = call.batch * call.channels;
    sums = arena.take<float>(kKinds * table);
    partial_kinds = arena.take<Sum<float>>(kKinds * table * blocks.per_image);
    partial_rows = arena.take<float>(call.batch * call.heads * blocks.rows * (3 * call.channels + 1));
    const bool biased = call.row_bias || call.col_bias;
    position =
        PixelValues::take(arena, biased ? call.batch : 0, call.heads, call.latents.max_per_label, call.pixels.count);
  }
};

template <typename Scalar>
const char* backward(const sca_semantic_modulate& call, const sca_semantic_modulate_gradients& gradients,
                     void* stream) {
  Arena arena(call.workspace);
  BackwardWorkspace<Scalar> workspace(call, arena);
  Prepared<Scalar>& prepared = workspace.prepared;
  if (const char* error = prepared.launch_means(call, stream)) return error;
  PixelValues position = workspace.position;
  if (!gradients.grad_row_bias && !gradients.grad_col_bias) position.values = nullptr;
  const Modulation<Scalar>& modulation = prepared.modulation;
  const LabelBlocks& blocks = modulation.logits.blocks;
  const Backward<Scalar> kernel = {modulation, gradients, workspace.partial_rows, workspace.partial_kinds, position};
  if (const char* error = launch(kernel, modulation.items(), call.threads, stream)) return error;

  const int64_t rows = call.batch * call.channels;
  const FinishKinds finish = {gradients, static_cast<const float*>(call.rstd), workspace.sums, rows};
  const MergeRows<Sum<float>, FinishKinds> kinds(workspace.partial_kinds, kKinds * rows, blocks.per_image, finish);
  if (const char* error = launch(kinds, kinds.items(), call.threads, stream)) return error;
  const float share = means_needed(call) ? 1 / static_cast<float>(call.latents.count) : 0.0f;
  const FinishRows finish_rows = {gradients,     workspace.sums, call.heads * call.latents.count,
                                  call.channels, rows,           share};
  const MergeLatents<FinishRows> latents = {blocks, workspace.partial_rows, call.heads, kernel.row_size(), finish_rows};
  if (const char* error = launch(latents, latents.items(call.batch), call.threads, stream)) return error;

  for (const bool over_rows : {true, false}) {
    auto* const target = static_cast<float*>(over_rows ? gradients.grad_row_bias : gradients.grad_col_bias);
    if (!target) continue;
    const LineSums sums(position, call.latents.count, call.height, call.width, over_rows, target);
    if (const char* error = launch(sums, sums.items(call.batch), call.threads, stream)) return error;
  }
  if (call.stats_given || !gradients.grad_x.data) return nullptr;
  const bool packs = packs_fit(call, call.x, 4) && packs_fit(call, gradients.grad_x, 4);
  return packs ? add_through_moments<Scalar, 4>(call, gradients.grad_x, workspace.sums, stream)
               : add_through_moments<Scalar, 1>(call, gradients.grad_x, workspace.sums, stream);
}

}  // namespace
}  // namespace sca::cuda

using namespace sca::cuda;

int64_t sca_cuda_semantic_modulate_backward_workspace(const sca_semantic_modulate* call) {
  Arena arena(nullptr);
  BackwardWorkspace<float>(*call, arena);
  return arena.used();
}

const char* sca_cuda_semantic_modulate_backward(const sca_semantic_modulate* call,
                                                const sca_semantic_modulate_gradients* gradients, void* stream) {
  return with_scalar_type(call->scalar_type,
                          [&](auto scalar) { return backward<decltype(scalar)>(*call, *gradients, stream); });
}
