"""Integers by which the C interface is told of tensors that several operators take."""

from __future__ import annotations

from torch import Tensor

ABSENT = (0, 0, 0, 0, 0)  # a tensor or a feature map that is not there


def address(tensor: Tensor | None) -> int:
    """Where a contiguous tensor lies."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def strided(tensor: Tensor) -> tuple[int, ...]:
    """A tensor with any strides."""
    return (tensor.data_ptr(), *tensor.stride())


def latent_tokens(count: int, cu_latents: Tensor, max_latents: int) -> tuple[int, ...]:
    """``count`` latents, grouped alike in all images (s + 1) or image by image (B, s + 1)."""
    shape = cu_latents.shape
    places = shape[-1]
    stride = 0 if len(shape) == 1 or shape[0] == 1 else places
    return count, places - 1, cu_latents.data_ptr(), stride, 0, 0, max_latents


def pixel_tokens(count: int, offsets: Tensor, order: Tensor) -> tuple[int, ...]:
    """``count`` pixels, grouped by a plan for each image or for all."""
    images, places = offsets.shape
    if images == 1:
        return count, places - 1, offsets.data_ptr(), 0, order.data_ptr(), 0, 0
    return count, places - 1, offsets.data_ptr(), places, order.data_ptr(), count, 0
