"""Semantic pooling: the latents of a label attend to the raw features of its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..autocast import without_autocast
from ..labels import LabelMap, LatentLayout, LatentSelection
from ..outputs import empty_pool_outputs
from ..reference import semantic_pool as reference
from .arguments import check_empty, check_feature_map, check_regions, check_table, grouping
from .known_calls import Given, can_be_known, look_at
from .library import Saved, register

_OPERATOR = "semantic_pool"


class Pooled(NamedTuple):
    """What :func:`semantic_pool` returns; float32, or float64 where x is.

    Attributes:
        pooled: (B, H, m, C), the attention's mean of the features.
        lse: (B, H, m), log-sum-exp of the logits; -inf for a latent without pixels.
        row_mass: (B, H, m, height), the attention summed over each row of the image.
        col_mass: (B, H, m, width), the attention summed over each column of the image.
        mean: (B, C), the mean of each channel over all pixels.
        second_moment: (B, C), the mean of the squared deviations from it (the biased variance).

    Example:
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [0, 1]]), num_labels=2)
        >>> x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> result = semantic_pool(torch.zeros(1, 1, 2, 1), x, LatentLayout((1, 1)), labels)
        >>> result.mean.item(), result.second_moment.item()
        (2.5, 1.25)
    """

    pooled: Tensor
    lse: Tensor
    row_mass: Tensor
    col_mass: Tensor
    mean: Tensor
    second_moment: Tensor


def semantic_pool(
    queries: Tensor,
    x: Tensor,
    layout: LatentLayout | LatentSelection,
    labels: LabelMap,
    *,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    empty: Literal["uniform", "zero"] = "uniform",
) -> Pooled:
    """The latents of a label pool the raw features of its pixels, and the features' moments come along in one read.

    For a latent j of label l, over the pixels p of that label, in each image and head:

        a_jp = softmax_p(<queries_j, x_p> + row_bias_j[row of p] + col_bias_j[column of p]),
        pooled_j = sum_p a_jp x_p,  row_mass_j[h] = sum_(p in row h) a_jp,  col_mass_j[w] = sum_(p in column w) a_jp

    This is cross-attention of latents to pixels with the projections of the pixels folded onto the latents: a key
    projection goes into ``queries`` (whose scale is included there), a value projection follows on ``pooled``, and a
    positional encoding that is separable into rows and columns goes into the biases and follows from the masses.

    Args:
        queries: (B, H, m, C), float32 (float64 where x is).
        x: (B, C, height, width); any strides, read in place.
        layout: the m latents, or a selection of them, whose padding is like latents without pixels.
        labels: the label of each pixel at x's resolution, for B images or one for all.
        row_bias: (B, H, m, height), like queries in type. Default: none.
        col_bias: (B, H, m, width), like queries in type. Default: none.
        empty: what a latent gets that has no pixel of its label: "uniform", the mean over all pixels and equal masses,
            or "zero", zeros.

    Returns:
        a :class:`Pooled`.

    Types: x float32, float64, bfloat16 or float16, never cast; under autocast nothing changes.

    Gradients: of queries, x, row_bias and col_bias through all six results. Deterministic, independent of the number
    of threads. Gradients of gradients are refused, except by ``backend("reference")``.

    Raises:
        TypeError: if a type is not as above.
        ValueError: if shapes, devices or numbers of labels do not agree.

    Backends: ``cpu`` (the default on the CPU), ``triton`` (on GPUs where it is chosen, all but float64, with at most
    256 latents of a label in all heads; it has never run on one), ``reference``.

    Source: Dufour et al., SCAM!, ECCV 2022, the cross-attention of SAT, with folded projections.

    Example:
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [0, 1]]), num_labels=2)
        >>> x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> semantic_pool(torch.zeros(1, 1, 2, 1), x, LatentLayout((1, 1)), labels).pooled.flatten().tolist()
        [2.0, 4.0]
    """
    # A call like an earlier one skips the checks and preparations that follow.
    given: Given | None = None
    if can_be_known(_OPERATOR, x, layout, labels):
        (cu_latents, _, max_latents), of_latents = look_at(layout)
        (offsets, order, _), of_pixels = look_at(labels)
        tensors = (queries, x, cu_latents, offsets, order, row_bias, col_bias)
        given = (tensors, (max_latents, empty, *of_latents, *of_pixels))
        results = _operator.run_known(*given)
        if results is not None:
            return Pooled(*results)
    _check(queries, x, layout, labels, row_bias, col_bias, empty)
    device = x.device
    backend = backends.resolve(_OPERATOR, device, x.dtype)
    if backend == "reference":
        with without_autocast(device):
            results = reference.semantic_pool(
                queries,
                x,
                labels.labels.flatten(1),
                torch.atleast_2d(layout.labels(device)),
                layout.num_labels,
                row_bias,
                col_bias,
                empty=empty,
            )
        return Pooled(*results)
    offsets, order, _ = grouping(labels, device)
    results = _operator.run(
        (queries, x, layout.offsets(device), offsets, order, row_bias, col_bias),
        (layout.max_per_label, empty, backend),
        given,
    )
    return Pooled(*results)


def merge_pools(
    parts: Sequence[Pooled],
    origins: Sequence[tuple[int, int]],
    size: tuple[int, int],
    *,
    empty: Literal["uniform", "zero"] = "uniform",
) -> Pooled:
    """Puts together what :func:`semantic_pool` gives for the tiles of an image, as if it had seen the image at once.

    With lse = log sum_i exp(lse_i), the pooled rows and the masses of part i count exp(lse_i - lse) times; mean and
    second moment are merged by Chan's formula.

    Args:
        parts: results for tiles that cover the image without overlap. Each is that of a tile of x with the same tile
            of the label map and of the biases, and the same queries, taken with ``empty="zero"``.
        origins: (top, left) of each tile.
        size: (height, width) of the image.
        empty: the rule for a latent that has no pixel in the whole image; see :func:`semantic_pool`.

    Returns:
        a :class:`Pooled` for the image.

    Gradients: of everything in ``parts``, twice differentiable.

    Raises:
        ValueError: if the tiles do not cover the image exactly once, or shapes do not agree.

    Backends: plain PyTorch, on any device.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979;
        Dao et al., FlashAttention, NeurIPS 2022, for partial softmax.

    Example:
        >>> x, labels = torch.randn(1, 4, 2, 6), torch.tensor([[0, 0, 0, 1, 1, 0], [1, 1, 0, 0, 0, 1]])
        >>> queries, layout = torch.randn(1, 1, 3, 4), LatentLayout((2, 1))
        >>> left, right = (
        ...     semantic_pool(queries, x[..., part], layout, LabelMap.from_labels(labels[:, part], 2), empty="zero")
        ...     for part in (slice(0, 4), slice(4, 6))
        ... )
        >>> merged = merge_pools([left, right], [(0, 0), (0, 4)], (2, 6))
        >>> whole = semantic_pool(queries, x, layout, LabelMap.from_labels(labels, 2))
        >>> all(torch.allclose(*pair, atol=1e-5) for pair in zip(merged, whole))
        True
    """
    check_empty(empty)
    _check_parts(parts, origins, size)
    height, width = size
    lse = torch.stack([part.lse for part in parts])
    present = lse != -torch.inf
    matched = present.any(0)
    # A latent without pixels gets equal weights, so that nothing undefined enters the gradients; it is replaced below.
    lse = torch.where(matched, lse, 0)
    total = lse.logsumexp(0)
    weights = (lse - total).exp()

    pooled, mean = torch.zeros_like(parts[0].pooled), torch.zeros_like(parts[0].mean)
    squares = mean
    row_mass, col_mass = mean.new_zeros((*total.shape, height)), mean.new_zeros((*total.shape, width))
    seen = 0
    for part, (top, left), weight, counts in zip(
        parts, origins, weights.unsqueeze(-1), present.unsqueeze(-1), strict=True
    ):
        rows, columns = part.row_mass.shape[-1], part.col_mass.shape[-1]
        pixels = rows * columns
        if pixels == 0:
            continue
        pooled = pooled + torch.where(counts, weight * part.pooled, 0)
        row_mass = row_mass + F.pad(torch.where(counts, weight * part.row_mass, 0), (top, height - top - rows))
        col_mass = col_mass + F.pad(torch.where(counts, weight * part.col_mass, 0), (left, width - left - columns))
        step = part.mean - mean
        mean = mean + step * (pixels / (seen + pixels))
        squares = squares + part.second_moment * pixels + step.square() * (pixels * seen / (seen + pixels))
        seen += pixels

    uniform = empty == "uniform"
    has_pixels = matched.unsqueeze(-1)
    return Pooled(
        torch.where(has_pixels, pooled, mean[:, None, None] if uniform else 0),
        torch.where(matched, total, -torch.inf),
        torch.where(has_pixels, row_mass, 1 / max(height, 1) if uniform else 0),
        torch.where(has_pixels, col_mass, 1 / max(width, 1) if uniform else 0),
        mean,
        squares / max(seen, 1),
    )


def _check(
    queries: Tensor,
    x: Tensor,
    layout: LatentLayout | LatentSelection,
    labels: LabelMap,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    empty: str,
) -> None:
    dtype, device = check_feature_map(x), x.device
    check_regions(x, layout, labels)
    batch, channels, height, width = x.shape
    if not isinstance(queries, Tensor):
        raise TypeError(f"queries: expected a tensor, got {type(queries).__name__}")
    if queries.dim() != 4:
        raise ValueError(f"queries: expected shape (B, H, m, C), got {tuple(queries.shape)}")
    heads, latents = queries.shape[1], layout.count
    check_table("queries", queries, (batch, heads, latents, channels), dtype, device)
    if row_bias is not None:
        check_table("row_bias", row_bias, (batch, heads, latents, height), dtype, device)
    if col_bias is not None:
        check_table("col_bias", col_bias, (batch, heads, latents, width), dtype, device)
    check_empty(empty)


def _check_parts(parts: Sequence[Pooled], origins: Sequence[tuple[int, int]], size: tuple[int, int]) -> None:
    if not parts:
        raise ValueError("parts: expected at least one, got none")
    if len(origins) != len(parts):
        raise ValueError(f"origins: expected {len(parts)}, one for each of parts, got {len(origins)}")
    height, width = size
    tiles: list[tuple[int, int, int, int]] = []
    for number, (part, (top, left)) in enumerate(zip(parts, origins, strict=True)):
        for name, tensor, expected in zip(Pooled._fields, part, parts[0], strict=True):
            mass = name.endswith("_mass")
            if tensor.shape[: 3 if mass else None] != expected.shape[: 3 if mass else None]:
                raise ValueError(
                    f"parts[{number}].{name}: expected shape {tuple(expected.shape)} as in parts[0]"
                    f"{' up to the last size' if mass else ''}, got {tuple(tensor.shape)}"
                )
        bottom, right = top + part.row_mass.shape[-1], left + part.col_mass.shape[-1]
        if top < 0 or left < 0 or bottom > height or right > width:
            raise ValueError(
                f"origins[{number}]: expected a tile inside of {height} x {width} pixels, "
                f"got rows {top} to {bottom} and columns {left} to {right}"
            )
        if bottom == top or right == left:
            continue
        for other_top, other_left, other_bottom, other_right in tiles:
            if top < other_bottom and other_top < bottom and left < other_right and other_left < right:
                raise ValueError(f"origins[{number}]: expected tiles that do not overlap, got {tuple(origins)}")
        tiles.append((top, left, bottom, right))
    covered = sum((bottom - top) * (right - left) for top, left, bottom, right in tiles)
    if covered != height * width:
        raise ValueError(f"parts: expected tiles that cover all {height * width} pixels of size, got {covered}")


def _save(arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> Saved:
    queries, x, cu_latents, offsets, order, row_bias, col_bias, *settings = arguments
    return (queries, x, *results, cu_latents, offsets, order, row_bias, col_bias), tuple(settings)


def _fake(queries: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return empty_pool_outputs(queries, x)


def _backward_fake(*arguments: Any) -> tuple[Tensor | None, ...]:
    queries, x = arguments[6:8]
    row_mass, col_mass = arguments[10:12]
    wants_queries, wants_x, wants_row_bias, wants_col_bias = arguments[-1]
    return (
        queries.new_empty(queries.shape) if wants_queries else None,
        torch.empty_like(x) if wants_x else None,
        queries.new_empty(row_mass.shape) if wants_row_bias else None,
        queries.new_empty(col_mass.shape) if wants_col_bias else None,
    )


_GROUPING_SCHEMA = "Tensor cu_latents, Tensor offsets, Tensor order, Tensor? row_bias, Tensor? col_bias"
_SETTINGS_SCHEMA = "int max_latents, str empty, str backend"
_RESULTS_SCHEMA = "Tensor pooled, Tensor lse, Tensor row_mass, Tensor col_mass, Tensor mean, Tensor second_moment"
_operator = register(
    _OPERATOR,
    f"(Tensor queries, Tensor x, {_GROUPING_SCHEMA}, {_SETTINGS_SCHEMA}) -> ({_RESULTS_SCHEMA})",
    "(Tensor? grad_pooled, Tensor? grad_lse, Tensor? grad_row_mass, Tensor? grad_col_mass, Tensor? grad_mean,"
    f" Tensor? grad_second_moment, Tensor queries, Tensor x, {_RESULTS_SCHEMA}, {_GROUPING_SCHEMA},"
    f" {_SETTINGS_SCHEMA}, bool[4] output_mask)"
    " -> (Tensor grad_queries, Tensor grad_x, Tensor grad_row_bias, Tensor grad_col_bias)",
    differentiable=("queries", "x", "row_bias", "col_bias"),
    save=_save,
    fake=_fake,
    backward_fake=_backward_fake,
)
