"""Semantic cross-attention as its formula reads."""

from __future__ import annotations

import torch
from torch import Tensor


def semantic_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    empty_value: Tensor | None,
    query_labels: Tensor,
    key_labels: Tensor,
    num_labels: int,
    *,
    scale: float,
    empty: str,
) -> tuple[Tensor, Tensor]:
    """Dense masked attention; returns the output and the log-sum-exp.

    Args:
        query, key, value: (B, H, Nq, D), (B, H, Nk, D), (B, H, Nk, Dv).
        empty_value: (B, H, Dv), or None for what ``empty`` says.
        query_labels, key_labels: (B or 1, Nq), (B or 1, Nk); values outside [0, num_labels) are no label.
    """
    compute_type = torch.promote_types(query.dtype, torch.float32)
    out_type = query.dtype
    query, key, value = query.to(compute_type), key.to(compute_type), value.to(compute_type)

    labelled = (query_labels >= 0) & (query_labels < num_labels)
    allowed = (query_labels[:, :, None] == key_labels[:, None, :]) & labelled[:, :, None]
    allowed = allowed.unsqueeze(1)
    matched = allowed.any(-1, keepdim=True)

    logits = (query @ key.transpose(-2, -1)) * scale
    # A row without keys gets equal logits, so that nothing undefined enters the gradients; its results are replaced.
    logits = torch.where(matched, torch.where(allowed, logits, -torch.inf), 0)
    out = torch.where(allowed, logits.softmax(-1), 0) @ value
    instead = value.new_zeros(())
    if empty_value is not None:
        instead = empty_value.to(compute_type).unsqueeze(2)
    elif empty == "uniform" and value.shape[2] > 0:
        instead = value.mean(2, keepdim=True)
    lse = torch.where(matched.squeeze(-1), logits.logsumexp(-1), -torch.inf)
    return torch.where(matched, out, instead).to(out_type), lse
