"""Feature maps as kernels address them: tiles of some channels and some pixels of an image."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def flat_strides(tensor: Tensor) -> tuple[int, int, int, int] | None:
    """Strides of image, channel, row (0) and pixel of a map whose rows follow one another; of others None."""
    _, _, height, width = tensor.shape
    image, channel, row, column = tensor.stride()
    if width == 1:
        return image, channel, 0, row
    return (image, channel, 0, column) if height == 1 or row == width * column else None


def strides_of(*maps: Tensor | None) -> tuple[bool, list[tuple[int, int, int, int]]]:
    """Whether in all maps a pixel's number alone says where it lies, and the strides of each as kernels want them.

    Those of a map that is not there are zero.
    """
    flat = [None if each is None else flat_strides(each) for each in maps]
    if all(strides is not None for each, strides in zip(maps, flat, strict=True) if each is not None):
        return True, [strides or (0, 0, 0, 0) for strides in flat]
    return False, [(0, 0, 0, 0) if each is None else each.stride() for each in maps]  # type: ignore[misc]


def memory_order(x: Tensor) -> str:
    """The class of sizes that decides the shape of tiles: whether channels or pixels are neighbours in memory."""
    return "channels last" if x.stride(1) == 1 and x.shape[1] > 1 else "channels first"


@triton.jit
def pixel_offsets(pixels, width, row_stride, column_stride, FLAT: tl.constexpr):
    """Where pixels lie in a channel; with FLAT, ``column_stride`` is that of pixels."""
    if FLAT:
        offsets = pixels.to(tl.int64) * column_stride
    else:
        rows = pixels // width
        offsets = rows.to(tl.int64) * row_stride + (pixels - rows * width).to(tl.int64) * column_stride
    return offsets


@triton.jit
def tile_pointers(
    base, image, channels, pixels, width, image_stride, channel_stride, row_stride, column_stride, FLAT: tl.constexpr
):
    """Pointers to a tile (channels, pixels) of an image."""
    offsets = pixel_offsets(pixels, width, row_stride, column_stride, FLAT)
    return (
        base + image.to(tl.int64) * image_stride + (channels.to(tl.int64) * channel_stride)[:, None] + offsets[None, :]
    )


@triton.jit
def pixel_pointers(base, image, pixels, width, image_stride, row_stride, column_stride, FLAT: tl.constexpr):
    """Pointers to the first channel of pixels of an image, for a program that takes their channels part by part."""
    return base + image.to(tl.int64) * image_stride + pixel_offsets(pixels, width, row_stride, column_stride, FLAT)


@triton.jit
def load_channels(first, channel_stride, channels, mask):
    """A tile (pixels, channels) in float32, zero where it is masked, from pointers to the pixels' first channel.

    Of pixels that are listed somewhere the compiler does not know that they are mostly neighbours. Where it knows of no
    neighbours it gives those of a tile's first dimension to the threads of a warp, so that must be the pixels.
    """
    pointers = first[:, None] + (channels.to(tl.int64) * channel_stride)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_channels(first, channel_stride, channels, tile, mask):
    pointers = first[:, None] + (channels.to(tl.int64) * channel_stride)[None, :]
    tl.store(pointers, tile.to(first.dtype.element_ty), mask=mask)
