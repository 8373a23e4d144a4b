// Instance normalisation with modulation, noise and activation: the moments, then one pass that reads and writes each
// element once; where the shared memory of a cluster has room for a channel, it is read only once.
#include "cluster.h"
#include "instance_modulate.h"

namespace sca::cuda {
namespace {

template <typename Scalar, int kWidth>
struct Forward {
  Formula<Scalar, kWidth> formula;
  struct Shared {};

  SCA_DEVICE void operator()(const Block& block, int64_t item, Shared&) const {
    block.each_thread([&](int thread) {
      const Lane lane = formula.tiling.lane(item, thread);
      if (!lane.active) return;
      const auto channels = formula.channels(lane);
      for (int64_t pixel = lane.pixel; pixel < lane.end; pixel += lane.step) {
        auto elements = formula.at(lane, channels, pixel);
        formula.activate(lane, elements, pixel);
      }
    });
  }
};

// Moments and result at once where the blocks of a cluster have all pixels of their channels: they are read once and
// kept in shared memory, each pack by the thread that has read it. Block r has chunk r.
template <typename Scalar, int kWidth>
struct ForwardAtOnce {
  using MomentsKernel = ChannelMoments<Scalar, kWidth>;
  using Shared = typename MomentsKernel::Shared;
  static constexpr int64_t kBytes = sizeof(Scalar) * kWidth;
  static constexpr int64_t kMostExtra = 64 << 10;  // bytes, beside which others fit on a multiprocessor

  Formula<Scalar, kWidth> formula;
  MomentsKernel moments;
  FinishStatistics<double> finish;

  // How a call is cut if there is room for it, else without a chunk. Few channels that are adjacent in memory leave
  // room for more pixels.
  static Formula<Scalar, kWidth> cut(const sca_instance_modulate& call) {
    const ClusterLimits limits = cluster_limits();
    const int64_t most_steps = smaller(limits.extra, kMostExtra) / (block_threads() * kBytes);
    for (int lanes = Tiling::kMostLanes; lanes >= 4; lanes /= 2) {
      Formula<Scalar, kWidth> formula(call, lanes);
      Tiling& tiling = formula.tiling;
      const int64_t steps = divide_up(tiling.pixels, tiling.pixel_step());
      for (int blocks = 1; blocks <= limits.blocks; blocks *= 2) {
        tiling.cut(divide_up(steps, blocks), blocks, call.batch);
        if (divide_up(steps, blocks) <= most_steps) return formula;
      }
      if (!tiling.along_channels) break;
    }
    Formula<Scalar, kWidth> none(call);
    none.tiling.cut(0, 0, 0);
    return none;
  }

  const char* run(void* stream) const {
    const Tiling& tiling = formula.tiling;
    const int64_t steps = tiling.chunk / tiling.pixel_step();
    return launch_clusters(*this, tiling.items / tiling.chunks, static_cast<int>(tiling.chunks),
                           steps * block_threads() * kBytes, formula.call.threads, stream);
  }

  SCA_DEVICE void operator()(const Cluster<Shared>& cluster, int64_t of_cluster) const {
    const Tiling& tiling = formula.tiling;
    cluster.each_block([&](int rank, const Block& block, Shared& shared) {
      char* const kept = cluster.extra();
      moments.compute(block, of_cluster * tiling.chunks + rank, shared,
                      [&](int thread, int64_t step, const float (&values)[kWidth]) {
                        store<Scalar>(kept, (step * block.threads() + thread) * kWidth, values);
                      });
    });
    cluster.each_block([&](int rank, const Block& block, Shared&) {
      if (rank != 0) return;
      block.each_thread([&](int thread) {
        const Lane lane = tiling.lane(of_cluster * tiling.chunks, thread);
        if (!lane.active || lane.entry >= tiling.channel_lanes) return;
        for (int i = 0; i < moments.rows(); ++i) {
          Moments merged = {};
          for (int other = 0; other < cluster.blocks(); ++other) {
            merged.merge(cluster.shared(other).moments[i][lane.entry]);
          }
          finish(formula.row(lane, i), merged);
        }
      });
    });
    cluster.each_block([&](int rank, const Block& block, Shared&) {
      const char* const kept = cluster.extra();
      block.each_thread([&](int thread) {
        const Lane lane = tiling.lane(of_cluster * tiling.chunks + rank, thread);
        if (!lane.active) return;
        const auto channels = formula.channels(lane);
        int64_t step = 0;
        for (int64_t pixel = lane.pixel; pixel < lane.end; pixel += lane.step, ++step) {
          float x[kWidth];
          load<Scalar>(kept, (step * block.threads() + thread) * kWidth, x);
          auto elements = formula.at(lane, channels, pixel, x);
          formula.activate(lane, elements, pixel);
        }
      });
    });
  }
};

template <typename Scalar, int kWidth>
const char* forward(const sca_instance_modulate& call, void* stream) {
  Arena arena(call.workspace);
  const Formula<Scalar, kWidth> formula(call);
  const FinishStatistics<double> finish = {call.mean, call.rstd, call.eps, call.unbiased != 0};
  if (!call.stats_given) {
    using AtOnce = ForwardAtOnce<Scalar, smaller(kWidth, 4)>;
    const auto whole = AtOnce::cut(call);
    if (whole.tiling.chunks > 0) {
      return AtOnce{whole, {call.x, whole.pixels, whole.tiling, nullptr}, finish}.run(stream);
    }
    auto* partial = arena.take<Moments>(call.batch * call.channels * most_chunks(call));
    const char* error = channel_moments<Scalar, smaller(kWidth, 4)>(call.x, call.batch, call.channels, call.height,
                                                                    call.width, partial, finish, call.threads, stream);
    if (error) return error;
  }
  return launch(Forward<Scalar, kWidth>{formula}, formula.tiling.items, call.threads, stream);
}

}  // namespace
}  // namespace sca::cuda

using namespace sca::cuda;

int64_t sca_cuda_instance_modulate_workspace(const sca_instance_modulate* call) {
  Arena arena(nullptr);
  arena.take<Moments>(call->batch * call->channels * most_chunks(*call));
  return arena.used();
}

const char* sca_cuda_instance_modulate_forward(const sca_instance_modulate* call, void* stream) {
  if (call->height * call->width > kMostPixels) return kTooManyPixels;
  return with_scalar_type(call->scalar_type, [&](auto scalar) {
    using Scalar = decltype(scalar);
    constexpr int kWidth = kPackWidth<Scalar>;
    return packs_fit(*call, kWidth) ? forward<Scalar, kWidth>(*call, stream) : forward<Scalar, 1>(*call, stream);
  });
}
