"""Modulation of normalised features by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..labels import tile_size
from ..outputs import empty_modulate_outputs
from . import Library, contiguous, scalar_type


def semantic_modulate(
    library: Library,
    x: Tensor,
    keys: Tensor,
    scale: Tensor,
    shift: Tensor,
    cu_latents: Tensor,
    offsets: Tensor,
    order: Tensor,
    key_bias: Tensor | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    scale_bias: Tensor | None,
    shift_bias: Tensor | None,
    empty_scale: Tensor | None,
    empty_shift: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    noise: Tensor | None,
    noise_seed: Tensor | None,
    noise_strength: Tensor | None,
    max_latents: int,
    eps: float,
    negative_slope: float,
    add_one: bool,
    empty: str,
) -> tuple[Tensor, Tensor]:
    """Returns the output, and the mean and rstd that were used as (2, B, C)."""
    out, stats = empty_modulate_outputs(x)
    library.prepare_result(out)
    if mean is not None and rstd is not None:
        stats[0] = mean
        stats[1] = rstd
    tables = list(
        map(contiguous, (
            keys, scale, shift, key_bias, row_bias, col_bias, scale_bias, shift_bias, empty_scale, empty_shift,
        ))
    )  # fmt: skip
    call = _call(
        library, x, out, tables, stats, cu_latents, offsets, order, noise, noise_seed, contiguous(noise_strength),
        mean is not None, max_latents, eps, negative_slope, add_one, empty,
    )  # fmt: skip
    workspace = torch.empty(call.workspace_size(), dtype=torch.uint8, device=x.device)
    library.run(call.forward, x.device, workspace)
    return out, stats


def semantic_modulate_backward(
    library: Library,
    grad_out: Tensor,
    x: Tensor,
    keys: Tensor,
    scale: Tensor,
    shift: Tensor,
    cu_latents: Tensor,
    offsets: Tensor,
    order: Tensor,
    key_bias: Tensor | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    scale_bias: Tensor | None,
    shift_bias: Tensor | None,
    empty_scale: Tensor | None,
    empty_shift: Tensor | None,
    stats: Tensor,
    noise: Tensor | None,
    noise_seed: Tensor | None,
    noise_strength: Tensor | None,
    stats_given: bool,
    max_latents: int,
    eps: float,
    negative_slope: float,
    add_one: bool,
    empty: str,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x and of the 13 tables; None for one that is not asked for."""
    tables = list(
        map(contiguous, (
            keys, scale, shift, key_bias, row_bias, col_bias, scale_bias, shift_bias, empty_scale, empty_shift,
        ))
    )  # fmt: skip
    strength = contiguous(noise_strength)
    call = _call(
        library, x, None, tables, stats, cu_latents, offsets, order, noise, noise_seed, strength,
        stats_given, max_latents, eps, negative_slope, add_one, empty,
    )  # fmt: skip
    workspace = torch.empty(call.backward_workspace_size(), dtype=torch.uint8, device=x.device)
    wants_x, *mask = output_mask
    grad_x = library.prepare_result(torch.empty_like(x)) if wants_x else None
    of_tables = [
        keys.new_empty(table.shape) if wanted and table is not None else None
        for table, wanted in zip(tables, mask[:10], strict=True)
    ]
    of_channels = [
        keys.new_empty(x.shape[:2]) if wanted and given is not None else None
        for given, wanted in zip((stats, stats, strength), mask[10:], strict=True)
    ]
    library.run(call.backward, x.device, workspace, (grad_out, grad_x, *of_tables, *of_channels))
    return grad_x, *of_tables, *of_channels


def _call(
    library: Library,
    x: Tensor,
    out: Tensor | None,
    tables: list[Tensor | None],
    stats: Tensor,
    cu_latents: Tensor,
    offsets: Tensor,
    order: Tensor,
    noise: Tensor | None,
    noise_seed: Tensor | None,
    noise_strength: Tensor | None,
    stats_given: bool,
    max_latents: int,
    eps: float,
    negative_slope: float,
    add_one: bool,
    empty: str,
) -> Any:
    batch, channels, height, width = x.shape
    keys = tables[0]
    assert keys is not None
    _, heads, latents, _ = keys.shape
    pixels = height * width
    return library.kernels().SemanticModulate(
        (
            *library.settings(x.device, 3 * batch * pixels * channels * max(max_latents * heads, 1)),
            scalar_type(x.dtype),
            empty == "uniform",
            add_one,
            stats_given,
            *(batch, heads, channels, height, width),
            *tile_size(height, width),
            *(latents, cu_latents, None, max_latents),
            *(pixels, offsets, order, 0),
            x,
            out,
            *tables,
            stats,
            *(noise, noise_seed, noise_strength),
        ),
        eps,
        negative_slope,
    )
