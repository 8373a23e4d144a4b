"""Pooling of raw features by the latents of each label, as its formula reads."""

from __future__ import annotations

import torch
from torch import Tensor


def semantic_pool(
    queries: Tensor,
    x: Tensor,
    pixel_labels: Tensor,
    latent_labels: Tensor,
    num_labels: int,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    *,
    empty: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dense masked attention of the latents to the pixels; see ``sca_kernels.ops.semantic_pool``.

    Args:
        queries: (B, H, m, C).
        x: (B, C, height, width).
        pixel_labels, latent_labels: (B or 1, n), (B or 1, m); values outside [0, num_labels) are no label.
        row_bias, col_bias: (B, H, m, height), (B, H, m, width).
    """
    height, width = x.shape[2:]
    pixels = height * width
    features = x.to(queries.dtype).flatten(2)
    logits = (queries @ features.unsqueeze(1)).unflatten(-1, (height, width))
    if row_bias is not None:
        logits = logits + row_bias.unsqueeze(-1)
    if col_bias is not None:
        logits = logits + col_bias.unsqueeze(-2)
    logits = logits.flatten(-2)
    labelled = (latent_labels >= 0) & (latent_labels < num_labels)
    allowed = (latent_labels.unsqueeze(-1) == pixel_labels.unsqueeze(-2)) & labelled.unsqueeze(-1)
    allowed = allowed.unsqueeze(1)
    matched = allowed.any(-1, keepdim=True)

    # A row without pixels gets equal logits, so that nothing undefined enters the gradients; its results are replaced.
    logits = torch.where(matched, torch.where(allowed, logits, -torch.inf), 0)
    weights = torch.where(allowed, logits.softmax(-1), 0)
    lse = torch.where(matched.squeeze(-1), logits.logsumexp(-1), -torch.inf)
    by_position = weights.unflatten(-1, (height, width))

    mean = features.sum(-1) / max(pixels, 1)
    second_moment = (features - mean.unsqueeze(-1)).square().sum(-1) / max(pixels, 1)
    uniform = empty == "uniform"
    return (
        torch.where(matched, weights @ features.transpose(1, 2).unsqueeze(1), mean[:, None, None] if uniform else 0),
        lse,
        torch.where(matched, by_position.sum(-1), 1 / max(height, 1) if uniform else 0),
        torch.where(matched, by_position.sum(-2), 1 / max(width, 1) if uniform else 0),
        mean,
        second_moment,
    )
