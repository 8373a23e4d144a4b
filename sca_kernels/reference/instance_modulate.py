"""Instance normalisation with modulation, noise and activation, as its formula reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import per_element_noise


def instance_modulate(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    noise: Tensor | None,
    noise_seed: Tensor | None,
    noise_strength: Tensor | None,
    *,
    add_one: bool,
    unbiased: bool,
    eps: float,
    negative_slope: float,
) -> Tensor:
    """See ``sca_kernels.ops.instance_modulate``.

    Args:
        x: (B, C, height, width).
        gamma, beta: (B, C, height, width) or (B, C).
        mean, rstd, noise_strength: (B, C), of the type that is computed in; mean and rstd are given together.
        noise: (B, 1, height, width).
        noise_seed: one integer, for a normal number per element.
    """
    compute_type = torch.promote_types(x.dtype, torch.float32)
    features = x.to(compute_type)
    batch, channels, height, width = x.shape

    if mean is None or rstd is None:
        pixels = height * width
        mean = features.sum((2, 3)) / max(pixels, 1)
        squares = (features - _per_pixel(mean)).square().sum((2, 3))
        rstd = (squares / max(pixels - unbiased, 1) + eps).rsqrt()
    out = (features - _per_pixel(mean)) * _per_pixel(rstd)
    if gamma is not None:
        factor = _per_pixel(gamma).to(compute_type)
        out = (factor + 1 if add_one else factor) * out
    if beta is not None:
        out = out + _per_pixel(beta).to(compute_type)
    if noise_seed is not None:
        noise = per_element_noise(noise_seed, batch, channels, height, width, compute_type)
    if noise is not None:
        out = out + (noise if noise_strength is None else _per_pixel(noise_strength) * noise)
    return torch.empty_like(x).copy_(F.leaky_relu(out, negative_slope))  # in the memory order of x


def _per_pixel(values: Tensor) -> Tensor:
    return values if values.dim() == 4 else values[..., None, None]
