"""Memory for results, laid out as their inputs are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_attention_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the output (B, H, Nq, Dv) and the log-sum-exp (B, H, Nq) of an attention.

    The output has the memory order of ``query``, so that undoing the permutation by which the query was made, of a
    feature map or of split heads, copies nothing.
    """
    batch, heads, tokens, _ = query.shape
    width = value.shape[3]
    _, head_stride, token_stride, channel_stride = query.stride()
    if channel_stride != 1 and token_stride == 1:
        out = query.new_empty((batch, heads, width, tokens)).transpose(2, 3)
    elif heads > 1 and head_stride < token_stride:
        out = query.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    else:
        out = query.new_empty(batch, heads, tokens, width)
    lse_type = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty(batch, heads, tokens, dtype=lse_type)


def empty_pool_outputs(queries: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Memory for the results of ``semantic_pool``: pooled, lse, row_mass, col_mass, mean, second_moment."""
    batch, channels, height, width = x.shape
    _, heads, latents, _ = queries.shape
    # With sizes as arguments of their own PyTorch takes two thirds of the time that a tuple takes.
    empty = queries.new_empty
    return (
        empty(batch, heads, latents, channels),
        empty(batch, heads, latents),
        empty(batch, heads, latents, height),
        empty(batch, heads, latents, width),
        empty(batch, channels),
        empty(batch, channels),
    )


def empty_modulate_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for a modulated feature map, in the memory order of ``x``, and its mean and rstd as (2, B, C)."""
    batch, channels, _, _ = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x), x.new_empty((2, batch, channels), dtype=dtype)


def empty_modulate_gradients(
    x: Tensor,
    of_latents: Sequence[Tensor | None],
    of_channels: Sequence[Tensor | None],
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of ``semantic_modulate``; None for one that is not there, or not wanted.

    Args:
        x: the feature map.
        of_latents: tables with rows for latents; their gradients have their shapes.
        of_channels: tables with numbers for images and channels; their gradients are (B, C), whatever their shapes.
        output_mask: which are wanted: that of x, then those of the tables.
    """
    wants_x, *wanted = output_mask
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    tables = [*of_latents, *of_channels]
    shapes = [None if table is None else table.shape for table in of_latents] + [x.shape[:2]] * len(of_channels)
    gradients = (
        x.new_empty(shape, dtype=dtype) if is_wanted and table is not None and shape is not None else None
        for table, shape, is_wanted in zip(tables, shapes, wanted, strict=True)
    )
    return torch.empty_like(x) if wants_x else None, *gradients


def empty_instance_modulate_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for a modulated feature map, in the memory order of ``x``, and its mean and rstd as (2, B, C).

    These are of double precision whatever ``x`` is: a float32 mean that is large beside the deviations from it would
    spoil those in the backward pass.
    """
    batch, channels, _, _ = x.shape
    return torch.empty_like(x), x.new_empty((2, batch, channels), dtype=torch.float64)
