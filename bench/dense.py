"""Semantic attention as it was published: a dense mask over all pairs of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def blocked_pairs(query_labels: Tensor, key_labels: Tensor) -> Tensor:
    """True where query i and key j have different labels: (B, Nq) and (B, Nk) to (B, 1, Nq, Nk)."""
    return query_labels[:, None, :, None] != key_labels[:, None, None, :]


def attention_weights(query: Tensor, key: Tensor, blocked: Tensor | None = None) -> Tensor:
    """The weights (B, H, Nq, Nk) of attention in which blocked pairs get a large negative logit.

    That the number is finite matters: a query of which all pairs are blocked gets the mean of all
    values, as the published models do.
    """
    logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return (logits if blocked is None else logits.masked_fill(blocked, -1e4)).softmax(-1)


def attention(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor) -> Tensor:
    """Attention over (B, H, N, D), with the weights of :func:`attention_weights`."""
    return attention_weights(query, key, blocked) @ value


def attention_by_label(query: Tensor, key: Tensor, value: Tensor, query_labels: Tensor, key_labels: Tensor) -> Tensor:
    """The result of :func:`attention`, one label at a time, for B = 1.

    Outside a query's label all weights are exactly zero, so every label is a dense attention of its
    own. That makes a float64 reference affordable where a mask of all pairs is not.
    """
    query_order, queries_of = _by_label(query_labels)
    key_order, keys_of = _by_label(key_labels)
    queries = torch.split(query.index_select(2, query_order), list(queries_of.values()), 2)
    keys = torch.split(key.index_select(2, key_order), list(keys_of.values()), 2)
    values = torch.split(value.index_select(2, key_order), list(keys_of.values()), 2)
    sources = dict(zip(keys_of, zip(keys, values, strict=True), strict=True))
    results = []
    for label, own_query in zip(queries_of, queries, strict=True):
        if label in sources:
            own_key, own_value = sources[label]
            logits = own_query @ own_key.mT * query.shape[-1] ** -0.5
            results.append(logits.softmax(-1) @ own_value)
        else:
            mean = value.mean(2, keepdim=True)
            results.append(mean.expand(-1, -1, own_query.shape[2], -1))
    return torch.cat(results, 2).index_select(2, query_order.argsort())


def _by_label(labels: Tensor) -> tuple[Tensor, dict[int, int]]:
    """Tokens in the order of their labels, (N), and how many there are of each label."""
    sorted_labels, order = labels[0].sort(stable=True)
    present, counts = torch.unique_consecutive(sorted_labels, return_counts=True)
    return order, dict(zip(present.tolist(), counts.tolist(), strict=True))
