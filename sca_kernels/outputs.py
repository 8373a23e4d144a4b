"""Memory for results, laid out as their inputs are."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_attention_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the output (B, H, Nq, Dv) and the log-sum-exp (B, H, Nq) of an attention.

    The output has the memory order of ``query``, so that undoing the permutation by which the query was made, of a
    feature map or of split heads, copies nothing.
    """
    batch, heads, tokens, _ = query.shape
    width = value.shape[3]
    _, head_stride, token_stride, channel_stride = query.stride()
    if channel_stride != 1 and token_stride == 1:
        out = query.new_empty((batch, heads, width, tokens)).transpose(2, 3)
    elif heads > 1 and head_stride < token_stride:
        out = query.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    else:
        out = query.new_empty((batch, heads, tokens, width))
    lse_type = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty((batch, heads, tokens), dtype=lse_type)
