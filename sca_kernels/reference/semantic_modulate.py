"""Modulation of normalised features by the latents of each pixel's label, as its formula reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def semantic_modulate(
    x: Tensor,
    keys: Tensor,
    scale: Tensor,
    shift: Tensor,
    pixel_labels: Tensor,
    latent_labels: Tensor,
    num_labels: int,
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
    *,
    eps: float,
    negative_slope: float,
    add_one: bool,
    empty: str,
) -> Tensor:
    """Dense masked attention of the pixels to the latents; see ``sca_kernels.ops.semantic_modulate``.

    Args:
        x: (B, C, height, width).
        keys, scale, shift: (B, H, m, C), of the type that is computed in, like all tables.
        pixel_labels, latent_labels: (B or 1, n), (B or 1, m); values outside [0, num_labels) are no label.
        key_bias, row_bias, col_bias: (B, H, m), (B, H, m, height), (B, H, m, width).
        scale_bias, shift_bias, empty_scale, empty_shift, mean, rstd, noise_strength: (B, C).
        noise: (B, 1, height, width).
        noise_seed: one integer, for a normal number per element.
    """
    batch, channels, height, width = x.shape
    pixels = height * width
    features = x.to(keys.dtype).flatten(2).transpose(1, 2)

    logits = (keys @ features.transpose(1, 2).unsqueeze(1)).unflatten(-1, (height, width))
    if key_bias is not None:
        logits = logits + key_bias[..., None, None]
    if row_bias is not None:
        logits = logits + row_bias.unsqueeze(-1)
    if col_bias is not None:
        logits = logits + col_bias.unsqueeze(-2)
    logits = logits.flatten(-2).transpose(-2, -1)
    labelled = (pixel_labels >= 0) & (pixel_labels < num_labels)
    allowed = (pixel_labels.unsqueeze(-1) == latent_labels.unsqueeze(-2)) & labelled.unsqueeze(-1)
    allowed = allowed.unsqueeze(1)
    matched = allowed.any(-1, keepdim=True)
    # A row without latents gets equal logits, so that nothing undefined enters the gradients; it is replaced below.
    logits = torch.where(matched, torch.where(allowed, logits, -torch.inf), 0)
    weights = torch.where(allowed, logits.softmax(-1), 0)

    def attend(rows: Tensor, of_empty: Tensor | None) -> Tensor:
        instead: Tensor | float = 0.0
        if of_empty is not None:
            instead = of_empty.unsqueeze(1)
        elif empty == "uniform" and rows.shape[2] > 0:
            instead = rows.mean(2).sum(1).unsqueeze(1)
        return torch.where(matched.squeeze(1), (weights @ rows).sum(1), instead)

    gamma, beta = attend(scale, empty_scale), attend(shift, empty_shift)
    if scale_bias is not None:
        gamma = gamma + scale_bias.unsqueeze(1)
    if add_one:
        gamma = gamma + 1
    if shift_bias is not None:
        beta = beta + shift_bias.unsqueeze(1)

    if mean is None or rstd is None:
        mean = features.sum(1) / max(pixels, 1)
        variance = (features - mean.unsqueeze(1)).square().sum(1) / max(pixels, 1)
        rstd = (variance + eps).rsqrt()
    out = gamma * ((features - mean.unsqueeze(1)) * rstd.unsqueeze(1)) + beta
    out = out.transpose(1, 2).unflatten(-1, (height, width))

    if noise_seed is not None:
        from .noise import per_element_noise

        noise = per_element_noise(noise_seed, batch, channels, height, width, keys.dtype)
    if noise is not None:
        out = out + (noise if noise_strength is None else noise_strength[..., None, None] * noise)
    return torch.empty_like(x).copy_(F.leaky_relu(out, negative_slope))  # in the memory order of x
