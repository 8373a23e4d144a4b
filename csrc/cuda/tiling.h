// How the elements of a feature map are shared out among blocks and threads.
#pragma once

#include "features.h"

namespace sca::cuda {

// The elements of a thread in one item: those of the channels from `channel` on, at the pixels from `pixel` to `end` in
// steps; packs lie along the channels or along the pixels.
struct Lane {
  bool active;
  // Of threads with the same channels they differ by Tiling::channel_lanes; those that are left over have none, which
  // is Tiling::entries().
  int entry;
  int64_t image, channel, chunk;
  int64_t pixel, end, step;
};

// An item is a chunk of pixels of a block of channels of an image. Threads lie along the direction in which the map is
// adjacent in memory, with as many in the other one as there are left. It depends on sizes alone, not on the device.
struct Tiling {
  int64_t channels, pixels;
  int64_t chunk, chunks, channel_blocks, items;
  int channel_lanes, pixel_lanes, pack;
  bool along_channels;

  static constexpr int64_t kSteps = 16;  // of a thread in a chunk

  Tiling(int64_t batch, int64_t channels, int64_t pixels, bool along_channels, int pack, int64_t steps = kSteps)
      : channels(channels), pixels(pixels), pack(pack), along_channels(along_channels) {
    const int threads = block_threads();
    if (along_channels) {
      channel_lanes = static_cast<int>(smaller<int64_t>(smaller(threads, 32), larger<int64_t>(channels / pack, 1)));
      pixel_lanes = threads / channel_lanes;
    } else {
      pixel_lanes = static_cast<int>(smaller<int64_t>(threads, larger<int64_t>(pixels / pack, 1)));
      channel_lanes = threads / pixel_lanes;
    }
    chunk = pixel_step() * steps;
    chunks = divide_up(pixels, chunk);
    channel_blocks = divide_up(channels, channel_lanes * channel_step());
    items = batch * channel_blocks * chunks;
  }

  SCA_HOST_DEVICE int entries() const { return channel_lanes * pixel_lanes; }
  SCA_HOST_DEVICE int64_t channel_step() const { return along_channels ? pack : 1; }
  SCA_HOST_DEVICE int64_t pixel_step() const { return int64_t{pixel_lanes} * (along_channels ? 1 : pack); }

  SCA_DEVICE Lane lane(int64_t item, int thread) const {
    const int channel_lane = along_channels ? thread % channel_lanes : thread / pixel_lanes;
    const int pixel_lane = along_channels ? thread / channel_lanes : thread % pixel_lanes;
    Lane lane;
    lane.chunk = item % chunks;
    lane.image = item / chunks / channel_blocks;
    lane.channel = (item / chunks % channel_blocks * channel_lanes + channel_lane) * channel_step();
    const bool inside = channel_lane < channel_lanes && pixel_lane < pixel_lanes;
    lane.active = inside && lane.channel < channels;
    lane.entry = inside ? pixel_lane * channel_lanes + channel_lane : entries();
    lane.step = pixel_step();
    lane.pixel = lane.chunk * chunk + (along_channels ? pixel_lane : pixel_lane * pack);
    lane.end = smaller((lane.chunk + 1) * chunk, pixels);
    return lane;
  }
};

}  // namespace sca::cuda
