"""Instance normalisation with modulation, noise and activation by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..outputs import empty_instance_modulate_outputs
from . import Library, contiguous, scalar_type


def instance_modulate(
    library: Library,
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
    library.prepare_result(out)
    if mean is not None and rstd is not None:
        stats[0] = mean
        stats[1] = rstd
    channel_gamma, channel_beta, strength = map(contiguous, (_by_channel(gamma), _by_channel(beta), noise_strength))
    call = _call(
        library, x, out, gamma, beta, channel_gamma, channel_beta, stats, noise, noise_seed, strength,
        mean is not None, add_one, unbiased, eps, negative_slope,
    )  # fmt: skip
    workspace = torch.empty(call.workspace_size(), dtype=torch.uint8, device=x.device)
    library.run(call.forward, x.device, workspace)
    return out, stats


def instance_modulate_backward(
    library: Library,
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
    channel_gamma, channel_beta, strength = map(contiguous, (_by_channel(gamma), _by_channel(beta), noise_strength))
    call = _call(
        library, x, grad_out, gamma, beta, channel_gamma, channel_beta, stats, noise, noise_seed, strength,
        stats_given, add_one, unbiased, eps, negative_slope,
    )  # fmt: skip
    workspace = torch.empty(call.backward_workspace_size(), dtype=torch.uint8, device=x.device)
    compute_type = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad_x, *of_maps = (
        library.prepare_result(torch.empty_like(parameter)) if wanted and parameter is not None else None
        for parameter, wanted in zip((x, _by_pixel(gamma), _by_pixel(beta)), output_mask[:3], strict=True)
    )
    of_tables = [
        x.new_empty(x.shape[:2], dtype=compute_type) if wanted and parameter is not None else None
        for parameter, wanted in zip(
            (channel_gamma, channel_beta, stats, stats, strength), output_mask[1:], strict=True
        )
    ]
    library.run(call.backward, x.device, workspace, (grad_x, *of_maps, *of_tables))
    given = (of_table if of_map is None else of_map for of_map, of_table in zip(of_maps, of_tables[:2], strict=True))
    return grad_x, *given, *of_tables[2:]


def _call(
    library: Library,
    x: Tensor,
    out: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    channel_gamma: Tensor | None,
    channel_beta: Tensor | None,
    stats: Tensor,
    noise: Tensor | None,
    noise_seed: Tensor | None,
    noise_strength: Tensor | None,
    stats_given: bool,
    add_one: bool,
    unbiased: bool,
    eps: float,
    negative_slope: float,
) -> Any:
    batch, channels, height, width = shape = x.shape
    return library.kernels().InstanceModulate(
        (
            *library.settings(x.device, shape.numel() * (4 if noise_seed is None else 32)),
            scalar_type(x.dtype),
            add_one,
            stats_given,
            unbiased,
            gamma is not None and gamma.dtype != x.dtype,
            beta is not None and beta.dtype != x.dtype,
            *(batch, channels, height, width),
            x,
            out,
            _by_pixel(gamma),
            _by_pixel(beta),
            channel_gamma,
            channel_beta,
            stats,
            *(noise, noise_seed, noise_strength),
        ),
        eps,
        negative_slope,
    )


def _by_pixel(parameter: Tensor | None) -> Tensor | None:
    """A parameter that is given per pixel, as (B, C, height, width)."""
    return parameter if parameter is not None and parameter.dim() == 4 else None


def _by_channel(parameter: Tensor | None) -> Tensor | None:
    """A parameter that is given per channel, as (B, C)."""
    return parameter if parameter is not None and parameter.dim() == 2 else None
