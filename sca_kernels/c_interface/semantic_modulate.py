"""Modulation of normalised features by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..labels import tile_size
from ..outputs import empty_modulate_outputs
from . import Library, scalar_type
from .arguments import ABSENT, address, contiguous, latent_tokens, pixel_tokens, strided


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output, and the mean and rstd that were used."""
    out, used_mean, used_rstd = empty_modulate_outputs(x)
    library.prepare_result(out)
    if mean is not None and rstd is not None:
        used_mean.copy_(mean)
        used_rstd.copy_(rstd)
    tables = [
        None if table is None else table.contiguous()
        for table in (
            keys, scale, shift, key_bias, row_bias, col_bias, scale_bias, shift_bias, empty_scale, empty_shift,
            used_mean, used_rstd,
        )
    ]  # fmt: skip
    strength = contiguous(noise_strength)
    call = _call(
        library, x, out, tables, cu_latents, offsets, order, noise, noise_seed, strength,
        mean is not None, max_latents, eps, negative_slope, add_one, empty,
    )  # fmt: skip
    workspace = torch.empty(call.workspace_size(), dtype=torch.uint8, device=x.device)
    library.run(call.forward, x.device, workspace.data_ptr())
    return out, used_mean, used_rstd


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
    mean: Tensor,
    rstd: Tensor,
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
) -> tuple[Tensor, ...]:
    """Returns the gradients of x and of the 13 tables; one that ``output_mask`` does not ask for is an empty tensor."""
    tables = [
        None if table is None else table.contiguous()
        for table in (
            keys, scale, shift, key_bias, row_bias, col_bias, scale_bias, shift_bias, empty_scale, empty_shift,
            mean, rstd,
        )
    ]  # fmt: skip
    strength = contiguous(noise_strength)
    call = _call(
        library, x, None, tables, cu_latents, offsets, order, noise, noise_seed, strength,
        stats_given, max_latents, eps, negative_slope, add_one, empty,
    )  # fmt: skip
    workspace = torch.empty(call.backward_workspace_size(), dtype=torch.uint8, device=x.device)
    grad_x = library.prepare_result(torch.empty_like(x)) if output_mask[0] else x.new_empty(0)
    gradients = [
        keys.new_empty(table.shape if wanted and table is not None else 0)
        for table, wanted in zip((*tables, strength), output_mask[1:], strict=True)
    ]
    targets = [
        gradient.data_ptr() if wanted else 0 for gradient, wanted in zip(gradients, output_mask[1:], strict=True)
    ]
    library.run(
        call.backward,
        x.device,
        workspace.data_ptr(),
        (*strided(grad_out), *(strided(grad_x) if output_mask[0] else ABSENT), *targets),
    )
    return (grad_x, *gradients)


def _call(
    library: Library,
    x: Tensor,
    out: Tensor | None,
    tables: list[Tensor | None],
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
    by_pixel = (0, 0, 0, 0)
    if noise is not None:
        batch_stride, _, row_stride, column_stride = noise.stride()
        by_pixel = (noise.data_ptr(), batch_stride, row_stride, column_stride)
    return library.kernels().SemanticModulate(
        (
            *library.settings(x.device, 3 * batch * pixels * channels * max(max_latents * heads, 1)),
            scalar_type(x.dtype),
            empty == "uniform",
            add_one,
            stats_given,
            *(batch, heads, channels, height, width),
            *tile_size(height, width),
            *latent_tokens(latents, cu_latents, max_latents),
            *pixel_tokens(pixels, offsets, order),
            *strided(x),
            *(ABSENT if out is None else strided(out)),
            *(0 if table is None else table.data_ptr() for table in tables),
            *by_pixel,
            address(noise_seed),
            address(noise_strength),
        ),
        eps,
        negative_slope,
    )
