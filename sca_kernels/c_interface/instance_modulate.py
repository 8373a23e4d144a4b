"""Instance normalisation with modulation, noise and activation by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Library


def instance_modulate(library: Library, *arguments: Any, for_backward: bool = True) -> tuple[Tensor, Tensor | None]:
    """Returns the output, and the mean and rstd that were used as (2, B, C) in double precision: for the backward pass,
    if there is one."""
    x, _, _, mean, rstd = arguments[:5]
    out = library.prepare_result(torch.empty_like(x))
    stats = None
    if for_backward or mean is not None:
        batch, channels, _, _ = x.shape
        stats = x.new_empty(2, batch, channels, dtype=torch.float64)
        if mean is not None:
            stats[0] = mean
            stats[1] = rstd
    library.run("instance_modulate", x, library.settings(x), arguments, (out, stats))
    return out, stats


def instance_modulate_backward(library: Library, grad_out: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, gamma, beta, mean, rstd and noise_strength; None for one that is not asked for."""
    x, gamma, beta, stats, noise, noise_seed, noise_strength = arguments[:7]
    stats_given, *settings, output_mask = arguments[7:]
    compute_type = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad_x, *of_maps = (
        library.prepare_result(torch.empty_like(parameter.expand(x.shape)))
        if wanted and parameter is not None and parameter.dim() == 4
        else None
        for parameter, wanted in zip((x, gamma, beta), output_mask[:3], strict=True)
    )
    of_tables = [
        x.new_empty(x.shape[:2], dtype=compute_type)
        if wanted and parameter is not None and parameter.dim() != 4
        else None
        for parameter, wanted in zip((gamma, beta, stats, stats, noise_strength), output_mask[1:], strict=True)
    ]
    given = stats if stats_given else None
    library.run(
        "instance_modulate_backward",
        x,
        library.settings(x),
        (x, gamma, beta, given, given, noise, noise_seed, noise_strength, *settings),
        (grad_out, stats),
        (grad_x, *of_maps, *of_tables),
    )
    of_parameters = (
        of_table if of_map is None else of_map for of_map, of_table in zip(of_maps, of_tables[:2], strict=True)
    )
    return grad_x, *of_parameters, *of_tables[2:]
