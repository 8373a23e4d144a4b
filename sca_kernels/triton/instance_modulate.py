"""Instance normalisation with modulation, noise and activation in Triton.

Forward: the statistics, then one pass that reads and writes each element once. Backward: one pass for the sums over
each channel, where any are wanted, and one that writes the gradients of x and of maps; both compute again what went
into the activation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..outputs import empty_instance_modulate_outputs
from .features import memory_order, pixel_offsets, strides_of, tile_pointers
from .launch import Configuration, configuration, launch
from .moments import channel_statistics, merge_sums
from .noise import noise_tile


def instance_modulate(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    noise: Tensor | None,
    noise_seed: Tensor | None,
    noise_strength: Tensor | None,
    add_one: bool,
    unbiased: bool,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """Returns the output, and the mean and rstd that were used as (2, B, C) in double precision."""
    out, stats = empty_instance_modulate_outputs(x)
    if mean is not None and rstd is not None:
        stats[0] = mean
        stats[1] = rstd
    else:
        channel_statistics(x, stats[0], stats[1], unbiased=unbiased, eps=eps)
    config = configuration("instance_modulate", memory_order(x), x.device, x.dtype)
    flat, strides = strides_of(x, _map(gamma), _map(beta), noise, out)
    launch(
        _forward,
        (_tiles(x, config),),
        *_inputs(x, gamma, beta, stats, noise, noise_seed, noise_strength, strides),
        *(out, *strides[4]),
        *(negative_slope, *_sizes(x, config)),
        **_kinds(gamma, beta, add_one, flat),
        **config.options,
    )
    return out, stats


def instance_modulate_backward(
    grad_out: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    stats: Tensor,
    noise: Tensor | None,
    noise_seed: Tensor | None,
    noise_strength: Tensor | None,
    stats_given: bool,
    add_one: bool,
    unbiased: bool,
    eps: float,
    negative_slope: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, gamma, beta, mean, rstd and noise_strength; None for one that is not asked for."""
    given = (x, gamma, beta, stats, stats, noise_strength)
    wants = [wanted and tensor is not None for wanted, tensor in zip(output_mask, given, strict=True)]
    maps = [
        torch.empty_like(tensor) if wanted and tensor is not None and tensor.dim() == 4 else None
        for wanted, tensor in zip(wants[:3], given[:3], strict=True)
    ]
    flat, strides = strides_of(x, _map(gamma), _map(beta), noise, grad_out, *maps)
    inputs = _inputs(x, gamma, beta, stats, noise, noise_seed, noise_strength, strides)
    kinds = _kinds(gamma, beta, add_one, flat)
    rows = _sum_rows(wants, gamma, beta, stats_given)
    merged = None
    if rows:
        config = configuration("instance_modulate_sums", memory_order(x), x.device, x.dtype)
        chunks = triton.cdiv(x.shape[2] * x.shape[3], config["BLOCK_PIXELS"] * config["TILES"])
        partial = torch.empty((len(rows), chunks, x.shape[0] * x.shape[1]), dtype=torch.float32, device=x.device)
        launch(
            _backward_sums,
            (x.shape[0] * triton.cdiv(x.shape[1], config["BLOCK_CHANNELS"]) * chunks,),
            *inputs,
            *(grad_out, *strides[4], partial, chunks),
            *(negative_slope, *_sizes(x, config)),
            **{f"{name}_SUM": rows.get(name, -1) for name in _SUMS},
            **kinds,
            **config.options,
        )
        merged = merge_sums(partial)
    if any(target is not None for target in maps):
        config = configuration("instance_modulate", memory_order(x), x.device, x.dtype)
        pixels = x.shape[2] * x.shape[3]
        launch(
            _backward_maps,
            (_tiles(x, config),),
            *inputs,
            *(grad_out, *strides[4], None if stats_given else merged),
            *(part for target, steps in zip(maps, strides[5:], strict=True) for part in (target, *steps)),
            *(max(pixels - unbiased, 1), negative_slope, *_sizes(x, config)),
            **kinds,
            **config.options,
        )
    # Copies, since results of an operator must not share memory.
    sums = {name: merged[row].clone().view(x.shape[:2]) for name, row in rows.items()} if merged is not None else {}
    if stats_given and wants[3]:
        sums["MEAN"] = -(sums["NORMALIZED"] * stats[1]).float()
    tables = [sums.get(name) for name in ("GAMMA", "BETA", "MEAN", "CENTRED", "STRENGTH")]
    found = [maps[0], maps[1] if maps[1] is not None else tables[0], maps[2] if maps[2] is not None else tables[1]]
    return tuple(gradient if wanted else None for gradient, wanted in zip((*found, *tables[2:]), wants, strict=True))


# Sums over each channel, by what the gradient of the result before the activation is multiplied with. The first two are
# of the gradient of the normalised x, which is that times the factor.
_SUMS = ("NORMALIZED", "CENTRED", "GAMMA", "BETA", "STRENGTH")


def _sum_rows(wants: list[bool], gamma: Tensor | None, beta: Tensor | None, stats_given: bool) -> dict[str, int]:
    """The sums that are wanted, and the row of each."""
    needed = {
        "NORMALIZED": wants[3] if stats_given else wants[0],
        "CENTRED": wants[4] if stats_given else wants[0],
        "GAMMA": wants[1] and gamma is not None and gamma.dim() == 2,
        "BETA": wants[2] and beta is not None and beta.dim() == 2,
        "STRENGTH": wants[5],
    }
    return {name: row for row, name in enumerate(name for name in _SUMS if needed[name])}


def _map(parameter: Tensor | None) -> Tensor | None:
    """A parameter that is given per pixel."""
    return parameter if parameter is not None and parameter.dim() == 4 else None


def _inputs(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    stats: Tensor,
    noise: Tensor | None,
    noise_seed: Tensor | None,
    noise_strength: Tensor | None,
    strides: list[tuple[int, int, int, int]],
) -> list[Any]:
    """What all kernels take first."""
    parameters: list[Any] = []
    for parameter, steps in ((gamma, strides[1]), (beta, strides[2])):
        by_channel = parameter is not None and parameter.dim() == 2
        parameters += [parameter, *((*parameter.stride(), 0, 0) if parameter is not None and by_channel else steps)]
    noise_steps = (strides[3][0], *strides[3][2:])
    strength_steps = (0, 0) if noise_strength is None else noise_strength.stride()
    return [x, *strides[0], *parameters, stats, noise, *noise_steps, noise_seed, noise_strength, *strength_steps]


def _kinds(gamma: Tensor | None, beta: Tensor | None, add_one: bool, flat: bool) -> dict[str, bool]:
    return {
        "GAMMA_BY_PIXEL": _map(gamma) is not None,
        "BETA_BY_PIXEL": _map(beta) is not None,
        "ADD_ONE": add_one,
        "FLAT": flat,
    }


def _sizes(x: Tensor, config: Configuration) -> tuple[int, ...]:
    """Images, channels, width, pixels, blocks of channels."""
    batch, channels, height, width = x.shape
    return batch, channels, width, height * width, triton.cdiv(channels, config["BLOCK_CHANNELS"])


def _tiles(x: Tensor, config: Configuration) -> int:
    batch, channels, height, width = x.shape
    blocks = triton.cdiv(channels, config["BLOCK_CHANNELS"])
    return batch * blocks * triton.cdiv(height * width, config["BLOCK_PIXELS"])


@triton.jit
def _load_parameter(
    parameter, image_stride, channel_stride, row_stride, column_stride,
    image, channels, here, pixels, mask, width, BY_PIXEL: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Gamma or beta, as a tile or as a column of it."""
    if BY_PIXEL:
        pointers = tile_pointers(
            parameter, image, channels, pixels, width, image_stride, channel_stride, row_stride, column_stride, FLAT
        )
        values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        pointers = parameter + image.to(tl.int64) * image_stride + channels.to(tl.int64) * channel_stride
        values = tl.load(pointers, mask=here, other=0.0).to(tl.float32)[:, None]
    return values


@triton.jit
def _modulate(
    x, x_image, x_channel, x_row, x_column,
    gamma, gamma_image, gamma_channel, gamma_row, gamma_column,
    beta, beta_image, beta_channel, beta_row, beta_column,
    stats, noise, noise_image, noise_row, noise_column, noise_seed, strength, strength_image, strength_channel,
    image, block, begin, batch, channel_count, width, pixel_count,
    GAMMA_BY_PIXEL: tl.constexpr, BETA_BY_PIXEL: tl.constexpr, ADD_ONE: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """A tile: what goes into the activation, x - mean, rstd of the channels, the factor 1 + gamma, and the noise."""
    channels = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    here = channels < channel_count
    pixels = begin + tl.arange(0, BLOCK_PIXELS)
    mask = here[:, None] & (pixels < pixel_count)[None, :]
    table = image.to(tl.int64) * channel_count + channels
    mean = tl.load(stats + table, mask=here, other=0.0)
    rstd = tl.load(stats + tl.cast(batch, tl.int64) * channel_count + table, mask=here, other=0.0).to(tl.float32)
    pointers = tile_pointers(x, image, channels, pixels, width, x_image, x_channel, x_row, x_column, FLAT)
    values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    # In two parts, since a mean that is large beside the deviations would lose them.
    rough_mean = mean.to(tl.float32)
    rest = (mean - rough_mean.to(tl.float64)).to(tl.float32)
    centred = (values - rough_mean[:, None]) - rest[:, None]

    before = centred * rstd[:, None]
    factor = tl.full((BLOCK_CHANNELS, 1), 1.0, tl.float32)
    if gamma is not None:
        factor = _load_parameter(
            gamma, gamma_image, gamma_channel, gamma_row, gamma_column,
            image, channels, here, pixels, mask, width, GAMMA_BY_PIXEL, FLAT,
        )  # fmt: skip
        if ADD_ONE:
            factor += 1.0
        before *= factor
    if beta is not None:
        before += _load_parameter(
            beta, beta_image, beta_channel, beta_row, beta_column,
            image, channels, here, pixels, mask, width, BETA_BY_PIXEL, FLAT,
        )  # fmt: skip
    drawn = tl.zeros((1, BLOCK_PIXELS), tl.float32)
    if noise is not None:
        pointers = noise + image.to(tl.int64) * noise_image
        pointers += pixel_offsets(pixels, width, noise_row, noise_column, FLAT)
        drawn = tl.load(pointers, mask=pixels < pixel_count, other=0.0)[None, :]
    elif noise_seed is not None:
        drawn = noise_tile(tl.load(noise_seed), image, block, pixels, BLOCK_CHANNELS)
    if strength is not None:
        pointers = strength + image.to(tl.int64) * strength_image + channels.to(tl.int64) * strength_channel
        before += tl.load(pointers, mask=here, other=0.0)[:, None] * drawn
    return before, centred, rstd, factor, drawn


@triton.jit
def _forward(
    x, x_image, x_channel, x_row, x_column,
    gamma, gamma_image, gamma_channel, gamma_row, gamma_column,
    beta, beta_image, beta_channel, beta_row, beta_column,
    stats, noise, noise_image, noise_row, noise_column, noise_seed, strength, strength_image, strength_channel,
    out, out_image, out_channel, out_row, out_column,
    negative_slope, batch, channel_count, width, pixel_count, channel_blocks,
    GAMMA_BY_PIXEL: tl.constexpr, BETA_BY_PIXEL: tl.constexpr, ADD_ONE: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    pixel_blocks = tl.cdiv(pixel_count, BLOCK_PIXELS)
    block = tl.program_id(0) // pixel_blocks % channel_blocks
    image = tl.program_id(0) // pixel_blocks // channel_blocks
    begin = (tl.program_id(0) % pixel_blocks).to(tl.int64) * BLOCK_PIXELS
    before, _, _, _, _ = _modulate(
        x, x_image, x_channel, x_row, x_column,
        gamma, gamma_image, gamma_channel, gamma_row, gamma_column,
        beta, beta_image, beta_channel, beta_row, beta_column,
        stats, noise, noise_image, noise_row, noise_column, noise_seed, strength, strength_image, strength_channel,
        image, block, begin, batch, channel_count, width, pixel_count,
        GAMMA_BY_PIXEL, BETA_BY_PIXEL, ADD_ONE, FLAT, BLOCK_CHANNELS, BLOCK_PIXELS,
    )  # fmt: skip
    channels = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    pixels = begin + tl.arange(0, BLOCK_PIXELS)
    mask = (channels < channel_count)[:, None] & (pixels < pixel_count)[None, :]
    pointers = tile_pointers(out, image, channels, pixels, width, out_image, out_channel, out_row, out_column, FLAT)
    tl.store(pointers, tl.where(before > 0, before, before * negative_slope).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_sums(
    x, x_image, x_channel, x_row, x_column,
    gamma, gamma_image, gamma_channel, gamma_row, gamma_column,
    beta, beta_image, beta_channel, beta_row, beta_column,
    stats, noise, noise_image, noise_row, noise_column, noise_seed, strength, strength_image, strength_channel,
    grad_out, grad_image, grad_channel, grad_row, grad_column, partial, chunk_count,
    negative_slope, batch, channel_count, width, pixel_count, channel_blocks,
    NORMALIZED_SUM: tl.constexpr, CENTRED_SUM: tl.constexpr, GAMMA_SUM: tl.constexpr, BETA_SUM: tl.constexpr,
    STRENGTH_SUM: tl.constexpr,
    GAMMA_BY_PIXEL: tl.constexpr, BETA_BY_PIXEL: tl.constexpr, ADD_ONE: tl.constexpr, FLAT: tl.constexpr,
    TILES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """Partial sums over a chunk of pixels; each goes to the row of its constant, or nowhere if that is negative."""
    chunk = tl.program_id(0) % chunk_count
    block = tl.program_id(0) // chunk_count % channel_blocks
    image = tl.program_id(0) // chunk_count // channel_blocks
    channels = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    here = channels < channel_count
    normalized_sum = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    centred_sum = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    gamma_sum = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    beta_sum = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    strength_sum = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for tile in range(TILES):
        begin = (tl.cast(chunk, tl.int64) * TILES + tile) * BLOCK_PIXELS
        if begin < pixel_count:
            before, centred, rstd, factor, drawn = _modulate(
                x, x_image, x_channel, x_row, x_column,
                gamma, gamma_image, gamma_channel, gamma_row, gamma_column,
                beta, beta_image, beta_channel, beta_row, beta_column,
                stats, noise, noise_image, noise_row, noise_column, noise_seed,
                strength, strength_image, strength_channel,
                image, block, begin, batch, channel_count, width, pixel_count,
                GAMMA_BY_PIXEL, BETA_BY_PIXEL, ADD_ONE, FLAT, BLOCK_CHANNELS, BLOCK_PIXELS,
            )  # fmt: skip
            pixels = begin + tl.arange(0, BLOCK_PIXELS)
            mask = here[:, None] & (pixels < pixel_count)[None, :]
            pointers = tile_pointers(
                grad_out, image, channels, pixels, width, grad_image, grad_channel, grad_row, grad_column, FLAT
            )
            # Where there is no element this is zero, and no sum gains anything.
            grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            grad = tl.where(before > 0, grad, grad * negative_slope)
            if NORMALIZED_SUM >= 0:
                normalized_sum += tl.sum(grad * factor, 1)
            if CENTRED_SUM >= 0:
                centred_sum += tl.sum(tl.where(mask, grad * factor * centred, 0.0), 1)
            if GAMMA_SUM >= 0:
                gamma_sum += tl.sum(tl.where(mask, grad * centred, 0.0), 1) * rstd
            if BETA_SUM >= 0:
                beta_sum += tl.sum(grad, 1)
            if STRENGTH_SUM >= 0:
                strength_sum += tl.sum(tl.where(mask, grad * drawn, 0.0), 1)
    rows = tl.cast(batch, tl.int64) * channel_count
    target = partial + chunk * rows + image.to(tl.int64) * channel_count + channels
    if NORMALIZED_SUM >= 0:
        tl.store(target + NORMALIZED_SUM * chunk_count * rows, normalized_sum, mask=here)
    if CENTRED_SUM >= 0:
        tl.store(target + CENTRED_SUM * chunk_count * rows, centred_sum, mask=here)
    if GAMMA_SUM >= 0:
        tl.store(target + GAMMA_SUM * chunk_count * rows, gamma_sum, mask=here)
    if BETA_SUM >= 0:
        tl.store(target + BETA_SUM * chunk_count * rows, beta_sum, mask=here)
    if STRENGTH_SUM >= 0:
        tl.store(target + STRENGTH_SUM * chunk_count * rows, strength_sum, mask=here)


@triton.jit
def _backward_maps(
    x, x_image, x_channel, x_row, x_column,
    gamma, gamma_image, gamma_channel, gamma_row, gamma_column,
    beta, beta_image, beta_channel, beta_row, beta_column,
    stats, noise, noise_image, noise_row, noise_column, noise_seed, strength, strength_image, strength_channel,
    grad_out, grad_image, grad_channel, grad_row, grad_column, sums,
    grad_x, grad_x_image, grad_x_channel, grad_x_row, grad_x_column,
    grad_gamma, grad_gamma_image, grad_gamma_channel, grad_gamma_row, grad_gamma_column,
    grad_beta, grad_beta_image, grad_beta_channel, grad_beta_row, grad_beta_column,
    freedom, negative_slope, batch, channel_count, width, pixel_count, channel_blocks,
    GAMMA_BY_PIXEL: tl.constexpr, BETA_BY_PIXEL: tl.constexpr, ADD_ONE: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """Gradients that are maps. With ``sums``, that of x flows through its mean and its deviation too."""
    pixel_blocks = tl.cdiv(pixel_count, BLOCK_PIXELS)
    block = tl.program_id(0) // pixel_blocks % channel_blocks
    image = tl.program_id(0) // pixel_blocks // channel_blocks
    begin = (tl.program_id(0) % pixel_blocks).to(tl.int64) * BLOCK_PIXELS
    before, centred, rstd, factor, _ = _modulate(
        x, x_image, x_channel, x_row, x_column,
        gamma, gamma_image, gamma_channel, gamma_row, gamma_column,
        beta, beta_image, beta_channel, beta_row, beta_column,
        stats, noise, noise_image, noise_row, noise_column, noise_seed, strength, strength_image, strength_channel,
        image, block, begin, batch, channel_count, width, pixel_count,
        GAMMA_BY_PIXEL, BETA_BY_PIXEL, ADD_ONE, FLAT, BLOCK_CHANNELS, BLOCK_PIXELS,
    )  # fmt: skip
    channels = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    here = channels < channel_count
    pixels = begin + tl.arange(0, BLOCK_PIXELS)
    mask = here[:, None] & (pixels < pixel_count)[None, :]
    pointers = tile_pointers(
        grad_out, image, channels, pixels, width, grad_image, grad_channel, grad_row, grad_column, FLAT
    )
    grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    grad = tl.where(before > 0, grad, grad * negative_slope)
    if grad_beta is not None:
        pointers = tile_pointers(
            grad_beta, image, channels, pixels, width,
            grad_beta_image, grad_beta_channel, grad_beta_row, grad_beta_column, FLAT,
        )  # fmt: skip
        tl.store(pointers, grad.to(grad_beta.dtype.element_ty), mask=mask)
    if grad_gamma is not None:
        pointers = tile_pointers(
            grad_gamma, image, channels, pixels, width,
            grad_gamma_image, grad_gamma_channel, grad_gamma_row, grad_gamma_column, FLAT,
        )  # fmt: skip
        tl.store(pointers, (grad * (centred * rstd[:, None])).to(grad_gamma.dtype.element_ty), mask=mask)
    if grad_x is not None:
        grad *= factor
        if sums is not None:
            table = image.to(tl.int64) * channel_count + channels
            average = tl.load(sums + table, mask=here, other=0.0) / pixel_count
            slope = tl.load(sums + tl.cast(batch, tl.int64) * channel_count + table, mask=here, other=0.0)
            slope = slope * rstd * rstd / freedom
            grad = grad - average[:, None] - centred * slope[:, None]
        pointers = tile_pointers(
            grad_x, image, channels, pixels, width, grad_x_image, grad_x_channel, grad_x_row, grad_x_column, FLAT
        )
        tl.store(pointers, (grad * rstd[:, None]).to(grad_x.dtype.element_ty), mask=mask)
