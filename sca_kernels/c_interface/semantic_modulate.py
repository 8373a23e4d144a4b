"""Modulation of normalised features by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..labels import tile_size
from ..outputs import empty_modulate_gradients
from . import Library


def semantic_modulate(library: Library, *arguments: Any, for_backward: bool = True) -> tuple[Tensor, Tensor | None]:
    """Returns the output, and the mean and rstd that were used as (2, B, C): for the backward pass, if there is one."""
    x, keys, mean, rstd = arguments[0], arguments[1], arguments[14], arguments[15]
    out = library.prepare_result(torch.empty_like(x))
    stats = None
    if for_backward or mean is not None:
        batch, channels, _, _ = x.shape
        stats = keys.new_empty(2, batch, channels)
        if mean is not None:
            stats[0] = mean
            stats[1] = rstd
    library.run("semantic_modulate", x, _settings(library, x), arguments, (out, stats))
    return out, stats


def semantic_modulate_backward(library: Library, grad_out: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x and of the 13 tables; None for one that is not asked for."""
    *tensors, stats, noise, noise_seed, noise_strength = arguments[:18]
    stats_given, *settings, output_mask = arguments[18:]
    x = tensors[0]
    of_latents, of_channels = (*tensors[1:4], *tensors[7:10]), (*tensors[10:], stats, stats, noise_strength)
    gradients = grad_x, *_ = empty_modulate_gradients(x, of_latents, of_channels, output_mask)
    if grad_x is not None:
        library.prepare_result(grad_x)
    given = stats if stats_given else None
    library.run(
        "semantic_modulate_backward",
        x,
        _settings(library, x),
        (*tensors, given, given, noise, noise_seed, noise_strength, *settings),
        (None, stats),
        (grad_out, *gradients),
    )
    return gradients


def _settings(library: Library, x: Tensor) -> tuple[int, ...]:
    _, _, height, width = x.shape
    return *library.settings(x), *tile_size(height, width)
