"""Instance normalisation with modulation, noise and activation by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..outputs import empty_instance_modulate_outputs
from . import Library, scalar_type
from .arguments import ABSENT, address, contiguous, strided


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
    library.run(call.forward, x.device, workspace.data_ptr())
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
) -> tuple[Tensor, ...]:
    """Returns the gradients of x, gamma, beta, mean, rstd and noise_strength.

    One that ``output_mask`` does not ask for is an empty tensor.
    """
    channel_gamma, channel_beta, strength = map(contiguous, (_by_channel(gamma), _by_channel(beta), noise_strength))
    call = _call(
        library, x, grad_out, gamma, beta, channel_gamma, channel_beta, stats, noise, noise_seed, strength,
        stats_given, add_one, unbiased, eps, negative_slope,
    )  # fmt: skip
    workspace = torch.empty(call.backward_workspace_size(), dtype=torch.uint8, device=x.device)
    compute_type = torch.float64 if x.dtype == torch.float64 else torch.float32
    gradients = [x.new_empty(0) for _ in output_mask]
    targets = [0] * 20  # as the C interface takes them: three maps, then five tables
    for index, parameter in enumerate((x, gamma, beta)):
        if output_mask[index] and parameter is not None and parameter.dim() == 4:
            gradients[index] = library.prepare_result(torch.empty_like(parameter))
            targets[5 * index : 5 * index + 5] = strided(gradients[index])
    for index, parameter in enumerate((channel_gamma, channel_beta, stats, stats, strength), 1):
        if output_mask[index] and parameter is not None:
            gradients[index] = x.new_empty(x.shape[:2], dtype=compute_type)
            targets[14 + index] = gradients[index].data_ptr()
    library.run(call.backward, x.device, workspace.data_ptr(), tuple(targets))
    return tuple(gradients)


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
    noise_by_pixel = (0, 0, 0, 0)
    if noise is not None:
        batch_stride, _, row_stride, column_stride = noise.stride()
        noise_by_pixel = (noise.data_ptr(), batch_stride, row_stride, column_stride)
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
            *strided(x),
            *strided(out),
            *(strided(gamma) if gamma is not None and channel_gamma is None else ABSENT),
            *(strided(beta) if beta is not None and channel_beta is None else ABSENT),
            address(channel_gamma),
            address(channel_beta),
            stats.data_ptr(),
            stats.data_ptr() + stats.nbytes // 2,
            *noise_by_pixel,
            address(noise_seed),
            address(noise_strength),
        ),
        eps,
        negative_slope,
    )


def _by_channel(parameter: Tensor | None) -> Tensor | None:
    """A parameter that is given per channel, as (B, C)."""
    return parameter if parameter is not None and parameter.dim() == 2 else None
