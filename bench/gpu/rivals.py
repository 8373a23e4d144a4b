"""Who else computes what a call does, with PyTorch alone; each is timed beside the call.

* ``dense``: the published formulation, with a mask of all pairs where there are labels; the mask is made beforehand.
  ``dense, compiled``: the same under ``torch.compile``.
* ``SDPA``: ``scaled_dot_product_attention`` with that mask. ``Flex``: compiled FlexAttention, forward, for pixels that
  attend to latents, on pixels that are already sorted by label, with the block mask made beforehand.
* ``instance_norm``: of the same feature map, the yardstick. ``copy``: of the largest tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sca_kernels import LabelMap, LatentLayout

from .. import feature_maps, flex
from ..dense import attention, blocked_pairs
from .calls import Call, Results

Rivals = dict[str, Callable[[], Results]]

YARDSTICKS = ("copy", "instance_norm")
_FLEX_BLOCKS = (128, 128)  # the smallest that FlexAttention takes on every GPU


def expectation(name: str, run: Any, result: Tensor) -> Tensor | None:
    """What a rival's first result must be, if the call's is ``result``; None for what computes something else."""
    if name in YARDSTICKS:
        return None
    if name == "Flex":
        return result.index_select(2, flex.sort_pixels(run.args[3].labels.flatten())[1])
    return result


def rivals(call: Call, run: Any) -> Rivals:
    """By name; ``run`` is the prepared call, a ``functools.partial``, and what is returned are others."""
    return {
        "semantic_cross_attention": _of_attention,
        "instance_modulate": _of_instance_modulate,
        "semantic_pool": _of_folded,
        "semantic_modulate": _of_folded,
    }[call.operator](call, run)


def _of_attention(call: Call, run: Any) -> Rivals:
    query, key, value, query_tokens, key_tokens = run.args
    query_labels, key_labels = (_labels(tokens, query.device) for tokens in (query_tokens, key_tokens))
    blocked = blocked_pairs(query_labels, key_labels)
    found: Rivals = {
        "dense": functools.partial(attention, query, key, value, blocked),
        "dense, compiled": functools.partial(torch.compile(attention, dynamic=False), query, key, value, blocked),
        "SDPA": functools.partial(F.scaled_dot_product_attention, query, key, value, attn_mask=~blocked),
        "copy": _copy(query),
    }
    if isinstance(query_tokens, LabelMap) and isinstance(key_tokens, LatentLayout):
        labels, order, _ = flex.sort_pixels(query_labels[0])
        latents = key_tokens.max_per_label
        block_mask = flex.label_block_mask(labels, key_tokens.num_labels, latents, _FLEX_BLOCKS)
        sorted_query, key, value = query.detach().index_select(2, order), key.detach(), value.detach()
        compiled = torch.compile(flex_attention, dynamic=False)
        found["Flex"] = functools.partial(compiled, sorted_query, key, value, block_mask=block_mask)
    return found


def _labels(tokens: LabelMap | LatentLayout, device: torch.device) -> Tensor:
    return tokens.labels.flatten(1) if isinstance(tokens, LabelMap) else tokens.labels(device)[None]


def _of_instance_modulate(call: Call, run: Any) -> Rivals:
    x, gamma, beta = run.args
    noise, strength = run.keywords["noise"], run.keywords["noise_strength"]

    def published(x: Tensor, gamma: Tensor, beta: Tensor, noise: Tensor, strength: Tensor) -> Tensor:
        added = strength[:, None, None] * noise
        return F.leaky_relu((1 + gamma) * F.instance_norm(x) + beta + added, 0.2).to(x.dtype)

    return {**_compiled_too(published, x, gamma, beta, noise, strength), **_yardsticks(x)}


def _of_folded(call: Call, run: Any) -> Rivals:
    named = dict(run.keywords)
    x, labels, layout = named.pop("x"), named.pop("labels"), named.pop("layout")
    noise = named.pop("noise", None)
    names = list(named)
    problem = feature_maps.Problem(call.operator, x, named, noise, (), labels, layout)
    compute = feature_maps.dense(problem)

    def dense(x: Tensor, *rows: Tensor) -> Results:
        results = compute(x.float(), dict(zip(names, rows, strict=True)))
        return results[0].to(x.dtype) if len(results) == 1 else results

    return {**_compiled_too(dense, x, *named.values()), **_yardsticks(x)}


def _compiled_too(formula: Callable[..., Results], *arguments: Tensor) -> Rivals:
    return {
        "dense": functools.partial(formula, *arguments),
        "dense, compiled": functools.partial(torch.compile(formula, dynamic=False), *arguments),
    }


def _yardsticks(x: Tensor) -> Rivals:
    return {"instance_norm": functools.partial(F.instance_norm, x), "copy": _copy(x)}


def _copy(source: Tensor) -> Callable[[], Tensor]:
    source = source.detach()
    return functools.partial(torch.empty_like(source).copy_, source)
