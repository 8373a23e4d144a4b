"""The ways to compute a semantic attention that are compared, by the names that the tables use.

* ``ours``: this library; the plan of the label map is remembered, as in a model that uses a map more
  than once. ``ours + plan``: a new label map in every call, so its plan is counted.
* ``copy``: of the query into memory that is already there, the least that any implementation reads
  and writes.
* ``dense``: :func:`bench.dense.attention`; ``compiled``: the same under ``torch.compile``; ``SDPA``:
  ``scaled_dot_product_attention`` with a mask. Their masks are made beforehand and not counted.
* ``Flex``: compiled FlexAttention on pixels that are already sorted by label, with the block mask made
  beforehand. ``Flex + sort``: sorting, block mask and bringing the result back in order are counted.
  :mod:`bench.flex` says how it was made fast.
* ``autocast``: ``dense`` under autocast to bfloat16, so its result is less exact than that of the others.
* ``loop``: over the labels, ``scaled_dot_product_attention`` of each label's pixels and latents; quicker than two
  products and a softmax. ``nested``: one call of it on jagged nested tensors, a sequence for each label, which on a CPU
  pads them to the longest. The order of the pixels is found beforehand; bringing them into it and back is counted, with
  ``index_select``, the quickest way that has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sca_kernels import LabelMap, LatentLayout, semantic_cross_attention

from . import flex
from .dense import attention, blocked_pairs
from .problems import Attention, Problem
from .timing import Contender, Figure, has_bfloat16, skipped

FlexFunction = Callable[..., Tensor]
Compiler = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]

MOST_MASKED_BYTES = 4e9
# Rounding to 8 bits puts some units on the other side of an activation's kink, with another gradient.
AUTOCAST_TOLERANCE = 5e-2


def entry(
    name: str,
    problem: Problem,
    attend: Attention,
    backward: bool,
    expected: tuple[Tensor, ...] | None = None,
) -> Contender:
    """An attention as a contender; ``expected`` spares computing it for each of several."""
    expected = expected or problem.expected(backward)
    return Contender(name, problem.task(attend, backward), expected[: 4 if backward else 1], problem.shape)


def lineup(
    problem: Problem,
    expected: tuple[Tensor, ...],
    backward: bool,
    compiler: Compiler | None = None,
) -> tuple[list[Contender], list[Figure]]:
    """Everyone who can take part for pixels that attend to latents, and why the others do not.

    With a ``compiler`` the contenders that it makes take part too.
    """
    present = [
        entry("ours", problem, ours(problem), backward, expected),
        entry("ours + plan", problem, ours_with_plan(problem), backward, expected),
        copy(problem.query),
    ]
    absent = []
    needed = masked_bytes(problem)
    if needed > MOST_MASKED_BYTES:
        reason = f"logits, masked logits, weights and mask would take {needed / 1e9:.1f} GB"
        absent += [skipped(name, problem.shape, reason) for name in ("dense", "compiled", "SDPA")]
    else:
        present.append(entry("dense", problem, dense(problem), backward, expected))
        if compiler is not None:
            attend = dense(problem, compiler(attention))
            present.append(entry("compiled", problem, attend, backward, expected))
        present.append(entry("SDPA", problem, sdpa(problem), backward, expected))
        if problem.dtype == torch.float32:
            if has_bfloat16():
                present.append(autocast(entry("autocast", problem, dense(problem), backward, expected)))
            else:
                absent.append(skipped("autocast", problem.shape, "this processor has no bfloat16"))
    present.append(entry("loop", problem, loop(problem), backward, expected))
    counts = ByLabel.of(problem).queries
    padded_bytes = 2 * len(counts) * max(counts) * problem.query.nbytes // sum(counts)
    if padded_bytes > MOST_MASKED_BYTES:
        reason = f"query and result padded to the largest label would take {padded_bytes / 1e9:.1f} GB"
        absent.append(skipped("nested", problem.shape, reason))
    else:
        present.append(entry("nested", problem, nested(problem), backward, expected))
    if compiler is not None:
        no_backward = flex.why_no_backward() if backward else None
        if no_backward:
            absent += [skipped(name, problem.shape, no_backward) for name in ("Flex", "Flex + sort")]
        else:
            compiled_flex = compiler(flex_attention)
            sort_and_attend = flex_with_sort(problem, compiled_flex)
            present.append(flex_on_sorted(problem, expected, compiled_flex))
            present.append(entry("Flex + sort", problem, sort_and_attend, False, expected))
    return present, absent


def masked_bytes(problem: Problem) -> int:
    """What the tables of all pairs of ``dense`` take: mask, logits, masked logits and weights."""
    pairs = problem.query.shape[2] * problem.key.shape[2] * problem.query.shape[1]
    return pairs * (3 * problem.query.element_size() + 1)


def ours(problem: Problem) -> Attention:
    query_tokens, key_tokens = problem.query_tokens, problem.key_tokens
    return lambda query, key, value: semantic_cross_attention(query, key, value, query_tokens, key_tokens)


def ours_with_plan(problem: Problem) -> Attention:
    def without_plan(tokens: LabelMap | LatentLayout) -> LabelMap | LatentLayout:
        return LabelMap(tokens.labels, tokens.num_labels) if isinstance(tokens, LabelMap) else tokens

    query_tokens, key_tokens = problem.query_tokens, problem.key_tokens
    return lambda query, key, value: semantic_cross_attention(
        query, key, value, without_plan(query_tokens), without_plan(key_tokens)
    )


def copy(source: Tensor) -> Contender:
    target = torch.empty_like(source)
    return Contender("copy", lambda: (target.copy_(source),), (source,), {"elements": source.numel()})


def dense(problem: Problem, dense_attention: Callable[..., Tensor] = attention) -> Attention:
    blocked = blocked_pairs(problem.query_labels, problem.key_labels)
    return lambda query, key, value: dense_attention(query, key, value, blocked)


def sdpa(problem: Problem) -> Attention:
    allowed = ~blocked_pairs(problem.query_labels, problem.key_labels)
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


def sdpa_with_float_mask(problem: Problem) -> Attention:
    blocked = blocked_pairs(problem.query_labels, problem.key_labels)
    bias = torch.zeros(blocked.shape, dtype=problem.dtype).masked_fill_(blocked, -torch.inf)
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def autocast(contender: Contender) -> Contender:
    """The same under autocast to bfloat16."""

    def run() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return contender.run()

    return replace(contender, run=run, joint=True, tolerance=AUTOCAST_TOLERANCE)


@dataclass(frozen=True)
class ByLabel:
    """Which queries and keys belong together, for labels that have queries.

    Attributes:
        order: the queries, label by label.
        places: where each query is in that order.
        queries: how many each label has.
        keys_present: the keys of these labels.
    """

    order: Tensor
    places: Tensor
    queries: list[int]
    keys_present: Tensor

    @classmethod
    def of(cls, problem: Problem) -> ByLabel:
        _, order, places = flex.sort_pixels(problem.query_labels[0])
        counts = problem.query_labels[0].long().bincount(minlength=problem.num_labels)
        keys_present = torch.isin(problem.key_labels[0], counts.nonzero()[:, 0]).nonzero()[:, 0]
        return cls(order, places, counts[counts > 0].tolist(), keys_present)


def loop(problem: Problem) -> Attention:
    grouped = ByLabel.of(problem)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries = query.index_select(2, grouped.order).split(grouped.queries, 2)
        keys, values = (
            tensor.index_select(2, grouped.keys_present).split(problem.latents, 2) for tensor in (key, value)
        )
        results = [F.scaled_dot_product_attention(*of_label) for of_label in zip(queries, keys, values, strict=True)]
        return torch.cat(results, 2).index_select(2, grouped.places)

    return attend


def nested(problem: Problem) -> Attention:
    grouped = ByLabel.of(problem)
    query_offsets = torch.tensor([0, *grouped.queries]).cumsum(0)
    key_offsets = torch.arange(len(grouped.queries) + 1) * problem.latents
    longest, shortest = max(grouped.queries), min(grouped.queries)

    def jagged(tokens: Tensor, order: Tensor, offsets: Tensor, shortest: int, longest: int) -> Tensor:
        values = tokens[0].transpose(0, 1).index_select(0, order)
        sequences: Tensor = torch.nested.nested_tensor_from_jagged(
            values, offsets, min_seqlen=shortest, max_seqlen=longest
        )
        return sequences.transpose(1, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries = jagged(query, grouped.order, query_offsets, shortest, longest)
        keys, values = (
            jagged(tensor, grouped.keys_present, key_offsets, problem.latents, problem.latents)
            for tensor in (key, value)
        )
        results = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).values()
        return results.index_select(0, grouped.places).transpose(0, 1)[None]

    return attend


def flex_on_sorted(
    problem: Problem,
    expected: tuple[Tensor, ...],
    attend: FlexFunction = flex_attention,
    blocks: tuple[int, int] | None = None,
) -> Contender:
    """FlexAttention alone, forward."""
    sorted_labels, order, places = flex.sort_pixels(problem.query_labels[0])
    block_mask = flex.label_block_mask(
        sorted_labels, problem.num_labels, problem.latents, blocks or flex.BLOCKS[problem.dtype]
    )
    query = problem.query.index_select(2, order)
    return Contender(
        "Flex" if blocks is None else f"{blocks[0]} x {blocks[1]}",
        lambda: (attend(query, problem.key, problem.value, block_mask=block_mask),),
        expected[:1],
        problem.shape,
        restore=lambda out: out.index_select(2, places),
    )


def flex_with_sort(problem: Problem, attend: FlexFunction = flex_attention) -> Attention:
    """FlexAttention from and to pixels in their own order, forward."""
    labels = problem.query_labels[0]
    blocks = flex.BLOCKS[problem.dtype]

    def sort_and_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sorted_labels, order, places = flex.sort_pixels(labels)
        block_mask = flex.label_block_mask(sorted_labels, problem.num_labels, problem.latents, blocks)
        out = attend(query.index_select(2, order), key, value, block_mask=block_mask)
        return out.index_select(2, places)

    return sort_and_attend
