"""Modulation of normalised features on a GPU.

Forward is one pass over blocks of pixels of a label, after that for the statistics. Backward: with n = (x - mean) rstd,
y = gamma n + beta + noise, out = leaky_relu(y), and dy = dout * (1 or the slope):

    dgamma_p = dy_p n_p, dbeta_p = dy_p,
    dscale_j = sum_p P_pj dgamma_p,  dshift_j = sum_p P_pj dbeta_p,  dP_pj = <scale_j, dgamma_p> + <shift_j, dbeta_p>,
    dS = P * (dP - rowsum(P * dP)),  dkey_j = sum_p dS_pj x_p,  dx_p = rstd gamma dy_p + sum_j dS_pj key_j

and, of the statistics, dx_p -= rstd (mean of gamma dy + n_p * mean of gamma dy n) over the pixels of the channel. So
one pass makes P, dS and the sums over channels, and a second one dx and the sums over the pixels of a label.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..outputs import empty_modulate_outputs
from .features import strides_of
from .label_blocks import LabelBlocks, add_partial_rows, contiguous, image_stride
from .launch import configuration, launch
from .modulate_backward import SUMS, add_block_sums, modulate_backward_features, modulate_backward_sums
from .modulate_forward import modulate_blocks, modulate_weights
from .moments import channel_statistics
from .position_sums import add_up_positions
from .position_values import position_values
from .products import float32_precision

# With more latents of a label in all heads the weights are made by a program of their own.
_MOST_ROWS_FORWARD, _MOST_ROWS_BACKWARD = 32, 16


def semantic_modulate(
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
    used_mean, used_rstd = stats
    if mean is not None and rstd is not None:
        used_mean.copy_(mean)
        used_rstd.copy_(rstd)
    else:
        channel_statistics(x, used_mean, used_rstd, unbiased=False, eps=eps)
    batch, channels, height, width = x.shape
    heads, latents = keys.shape[1:3]
    blocks = LabelBlocks("modulate_blocks", x, heads, latents, max_latents, offsets.shape[1] - 1)
    tables = (
        keys, scale, shift, key_bias, row_bias, col_bias, scale_bias, shift_bias,
        _instead(empty_scale, scale, empty), _instead(empty_shift, shift, empty), used_mean, used_rstd, noise_strength,
    )  # fmt: skip
    grouping = (cu_latents, offsets, order)
    weights = None
    if blocks.padded > _MOST_ROWS_FORWARD:
        weights = _weights(x, keys, key_bias, row_bias, col_bias, *grouping, max_latents)
    flat, [x_strides, out_strides] = strides_of(x, out)
    launch(
        modulate_blocks,
        (blocks.programs, batch),
        x, out, *map(contiguous, tables), noise, noise_seed, *grouping, weights,
        *x_strides, *out_strides, *_noise_strides(noise), *map(image_stride, grouping),
        heads, latents, max_latents, blocks.num_labels, height, width, negative_slope,
        channels=channels, ADD_ONE=add_one, FLAT=flat, PRECISION=float32_precision(x.dtype),
        **{**blocks.all_rows, **blocks.rows}, **blocks.cut.options,
    )  # fmt: skip
    return out, stats


def semantic_modulate_backward(
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
    mean, rstd = stats
    wants_x, *wants_rows, wants_key_bias, wants_row_bias, wants_col_bias = output_mask[:7]
    batch, channels, height, width = x.shape
    heads, latents = keys.shape[1:3]
    sizes = (x, heads, latents, max_latents, offsets.shape[1] - 1)
    blocks = LabelBlocks("modulate_backward_sums", *sizes)
    of_rows = tuple(map(contiguous, (keys, scale, shift)))
    biases = tuple(map(contiguous, (key_bias, row_bias, col_bias)))
    of_channels = tuple(
        map(contiguous, (
            scale_bias, shift_bias, _instead(empty_scale, scale, empty), _instead(empty_shift, shift, empty),
            mean, rstd, noise_strength,
        ))
    )  # fmt: skip
    grouping = (cu_latents, offsets, order)
    precision = float32_precision(x.dtype)
    gradients, labels = position_values(x, blocks)
    stored = blocks.padded > _MOST_ROWS_BACKWARD
    if stored:
        weights = _weights(x, keys, key_bias, row_bias, col_bias, *grouping, max_latents)
    else:
        weights = torch.empty_like(gradients)
    partial_bias = keys.new_empty((batch, heads, blocks.partial_rows, 1)) if wants_key_bias else None
    kinds = offsets.new_empty((batch, blocks.programs), dtype=torch.int32)
    block_sums = keys.new_empty((batch, blocks.programs, SUMS.value, channels))
    flat, [x_strides, out_strides] = strides_of(x, grad_out)
    launch(
        modulate_backward_sums,
        (blocks.programs, batch),
        x, grad_out, *of_rows, *biases, *of_channels, noise, noise_seed, *grouping,
        partial_bias, kinds, block_sums, weights, gradients, labels,
        *x_strides, *out_strides, *_noise_strides(noise), *map(image_stride, grouping),
        heads, latents, max_latents, blocks.num_labels, blocks.partial_rows, height, width, negative_slope,
        channels=channels, STORED=stored, ADD_ONE=add_one, FLAT=flat, PRECISION=precision,
        **{**blocks.all_rows, **blocks.rows}, **blocks.cut.options,
    )  # fmt: skip
    # The sums over all pixels, and over those without latents.
    sums = keys.new_empty((2, SUMS.value, batch, channels))
    cut = configuration("add_block_sums", "any", x.device, x.dtype)
    launch(
        add_block_sums,
        (triton.cdiv(channels, cut["CHANNELS"]), batch, SUMS.value),
        kinds, block_sums, sums, blocks.programs, channels,
        **cut.options,
    )  # fmt: skip
    of_all, of_empty = sums

    grad_x = torch.empty_like(x) if wants_x else None
    of_tables: list[Tensor | None] = [None, None, None]
    if wants_x or any(wants_rows):
        second = LabelBlocks("modulate_backward_features", *sizes)
        partial = [
            keys.new_empty((batch, heads, second.partial_rows, channels)) if wanted else None for wanted in wants_rows
        ]
        flat, [x_strides, out_strides, grad_strides] = strides_of(x, grad_out, grad_x)
        launch(
            modulate_backward_features,
            (second.programs * triton.cdiv(channels, second.cut["CHANNELS"]), batch),
            x, grad_out, *of_rows, *of_channels, noise, noise_seed, *grouping,
            weights, gradients, None if stats_given else of_all, grad_x, *partial,
            *x_strides, *out_strides, *grad_strides, *_noise_strides(noise), *map(image_stride, grouping),
            heads, latents, max_latents, second.num_labels, second.partial_rows, height, width, negative_slope,
            channels=channels, ADD_ONE=add_one, FLAT=flat, PRECISION=precision, **second.rows, **second.cut.options,
        )  # fmt: skip
        of_tables = [None if rows is None else add_partial_rows(second, rows, cu_latents, offsets) for rows in partial]
    # What pixels without latents get is, where it is not given, a mean of rows.
    for index, given in enumerate((empty_scale, empty_shift)):
        of_table = of_tables[1 + index]
        if of_table is not None and empty == "uniform" and given is None:
            of_table += of_empty[index, :, None, None] / max(latents, 1)

    by_row = by_column = by_latent = None
    if partial_bias is not None:
        by_latent = add_partial_rows(blocks, partial_bias, cu_latents, offsets).squeeze(-1)
    if wants_row_bias and row_bias is not None:
        by_row = add_up_positions(gradients, labels, blocks, cu_latents, "rows", keys.new_zeros(row_bias.shape))
    if wants_col_bias and col_bias is not None:
        by_column = add_up_positions(gradients, labels, blocks, cu_latents, "columns", keys.new_zeros(col_bias.shape))
    by_channel = (
        of_all[0], of_all[1], of_empty[0], of_empty[1], -rstd * of_all[3], of_all[2] / rstd, of_all[4]
    )  # fmt: skip
    return (
        *(grad_x, *of_tables, by_latent, by_row, by_column),
        # Copies: no two results of an operator may share memory.
        *(found.clone() if wanted else None for found, wanted in zip(by_channel, output_mask[7:], strict=True)),
    )


def _weights(
    x: Tensor,
    keys: Tensor,
    key_bias: Tensor | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    cu_latents: Tensor,
    offsets: Tensor,
    order: Tensor,
    max_latents: int,
) -> Tensor:
    """The weights, as ``position_values`` describes them."""
    batch, channels, height, width = x.shape
    heads, latents = keys.shape[1:3]
    blocks = LabelBlocks("modulate_weights", x, heads, latents, max_latents, offsets.shape[1] - 1)
    weights, _ = position_values(x, blocks)
    grouping = (cu_latents, offsets, order)
    flat, [strides] = strides_of(x)
    launch(
        modulate_weights,
        (blocks.programs, batch),
        x, *map(contiguous, (keys, key_bias, row_bias, col_bias)), *grouping, weights,
        *strides, *map(image_stride, grouping),
        heads, latents, max_latents, blocks.num_labels, height, width,
        channels=channels, FLAT=flat, PRECISION=float32_precision(x.dtype), **blocks.all_rows, **blocks.cut.options,
    )  # fmt: skip
    return weights


def _instead(given: Tensor | None, rows: Tensor, empty: str) -> Tensor | None:
    """What pixels without latents get (B, C) in place of a sum over rows; None for zero."""
    if given is not None:
        return given
    return rows.mean(2).sum(1) if empty == "uniform" and rows.shape[2] > 0 else None


def _noise_strides(noise: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if noise is None else (noise.stride(0), noise.stride(2), noise.stride(3))
