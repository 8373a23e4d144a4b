"""Pools of the tiles of an image, merged, against the pool of the whole image."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from folded import (
    LABELS,
    LAYOUT,
    POOL_RESULTS,
    Problem,
    apply,
    assert_close,
    channels_last,
    cropped,
    expect,
    pool_problem,
)
from tokens import TOLERANCE, error_ratio, label_map, random_map
from torch import Tensor

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, Pooled, merge_pools, semantic_pool

pytestmark = pytest.mark.usefixtures("native")

Tile = tuple[int, int, int, int]  # top, left, bottom, right


def grid(rows: Sequence[int], columns: Sequence[int]) -> list[Tile]:
    """The tiles between some rows and some columns."""
    return [
        (top, left, bottom, right)
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]


# Of 7 x 9 pixels.
TILINGS = {
    "one": grid([0, 7], [0, 9]),
    "uneven": grid([0, 1, 5, 7], [0, 2, 9]),
    "unordered": grid([0, 1, 5, 7], [0, 2, 9])[::-1],
    "rows": grid(range(8), [0, 9]),
    "columns": grid([0, 7], range(10)),
    "pixels": grid(range(8), range(10)),
    "no grid": [(0, 0, 3, 4), (0, 4, 7, 6), (3, 0, 7, 4), (0, 6, 2, 9), (2, 6, 7, 9)],
    "with one that is empty": [(0, 0, 0, 9), (0, 0, 7, 5), (0, 5, 7, 9)],
}
MAPS = {
    "random": LABELS,
    "regions": label_map([[[0] * 4 + [1] * 5] * 3 + [[2] * 2 + [3] * 7] * 4] * 2, 5),  # most tiles miss most labels
    "absent from all": label_map(torch.full((2, 7, 9), 1), 5),
    "all ignored": label_map(torch.full((2, 7, 9), -1), 5),
    "one for all": random_map(1, 7, 9, 5),
}


def merged(problem: Problem, tiles: Sequence[Tile], tensors: dict[str, Tensor], empty: str = "uniform") -> Pooled:
    """Each tile's own pool, from crops of everything, and the merge of all."""
    parts = []
    for top, left, bottom, right in tiles:
        labels = problem.labels.labels[:, top:bottom, left:right]
        crops = {
            **tensors,
            "x": tensors["x"][:, :, top:bottom, left:right],
            "row_bias": tensors["row_bias"][..., top:bottom],
            "col_bias": tensors["col_bias"][..., left:right],
        }
        part = problem.changed(
            labels=LabelMap(labels.contiguous(), problem.labels.num_labels), settings={"empty": "zero"}
        )
        parts.append(Pooled(**apply(part, crops)))
    origins = [(top, left) for top, left, _, _ in tiles]
    return merge_pools(parts, origins, (problem.labels.height, problem.labels.width), empty=empty)


def solve_merged(problem: Problem, tiles: Sequence[Tile], backend: str = "cpu") -> dict[str, Tensor]:
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in problem.tensors.items()}
    with sca_kernels.backend(backend):
        results = merged(problem, tiles, tensors, **problem.settings)
    flows = [
        (result, gradient)
        for result, gradient in zip(results, problem.gradients.values(), strict=True)
        if gradient is not None
    ]
    outputs, incoming = zip(*flows, strict=True)
    gradients = torch.autograd.grad(outputs, list(tensors.values()), incoming)
    return {
        **{name: result.detach() for name, result in results._asdict().items()},
        **{f"grad_{name}": gradient for name, gradient in zip(tensors, gradients, strict=True)},
    }


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("labels", MAPS)
@pytest.mark.parametrize("empty", ["uniform", "zero"])
def test_merged_tiles_equal_the_whole(tiling, labels, empty):
    """All six results, and all gradients through all of them."""
    problem = pool_problem(MAPS[labels], channels=5, dtype=torch.float64, empty=empty)
    assert_close(solve_merged(problem, TILINGS[tiling]), expect(problem), TOLERANCE[torch.float64])


@pytest.mark.parametrize("flow", POOL_RESULTS)
@pytest.mark.parametrize("empty", ["uniform", "zero"])
def test_gradients_through_one_result(flow, empty):
    problem = pool_problem(channels=5, dtype=torch.float64, empty=empty)
    problem = problem.changed(
        gradients={
            name: problem.gradients[name] if name == flow else torch.zeros_like(problem.gradients[name])
            for name in POOL_RESULTS
        }
    )
    assert_close(solve_merged(problem, TILINGS["uneven"]), expect(problem), TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arrangement", [torch.clone, channels_last, cropped])
def test_types_and_strides(dtype, arrangement):
    problem = pool_problem(random_map(2, 40, 33, 5), channels=16, dtype=dtype)
    problem = problem.with_tensors(x=arrangement(problem.tensors["x"]))
    actual = solve_merged(problem, grid([0, 17, 40], [0, 30, 33]))
    expected = expect(problem)
    assert all(actual[name].dtype == torch.float32 for name in POOL_RESULTS)
    # The gradient of x, which has its type, is put together from tiles that do not overlap.
    of_x = max(torch.finfo(dtype).eps, TOLERANCE[torch.float32])
    for name, wanted in expected.items():
        assert error_ratio(actual[name], wanted) <= (of_x if name == "grad_x" else TOLERANCE[torch.float32]), name


def test_merged_again():
    """The merge of merges."""
    problem = pool_problem(channels=5, dtype=torch.float64)
    top = problem.changed(labels=LabelMap(problem.labels.labels[:, :3].contiguous(), 5))
    bottom = problem.changed(labels=LabelMap(problem.labels.labels[:, 3:].contiguous(), 5))
    halves = []
    for half, rows in ((top, slice(0, 3)), (bottom, slice(3, 7))):
        tensors = {
            **problem.tensors,
            "x": problem.tensors["x"][:, :, rows],
            "row_bias": problem.tensors["row_bias"][..., rows],
        }
        halves.append(merged(half, grid([0, 1, half.labels.height], [0, 4, 9]), tensors, empty="zero"))
    whole = expect(problem)
    results = merge_pools(halves, [(0, 0), (3, 0)], (7, 9))._asdict()
    assert_close(results, {name: whole[name] for name in POOL_RESULTS}, TOLERANCE[torch.float64])


def test_parts_of_very_different_weight():
    """Log-sum-exps 20,000 apart: neither overflows, and what is negligible takes no part."""
    problem = pool_problem(channels=5, dtype=torch.float64)
    row_bias = problem.tensors["row_bias"].clone()
    row_bias[..., :3] -= 1e4
    row_bias[..., 3:] += 1e4
    problem = problem.with_tensors(row_bias=row_bias)
    # The weights come from differences of numbers of that size.
    assert_close(solve_merged(problem, grid([0, 3, 7], [0, 9])), expect(problem), 1e4 * torch.finfo(torch.float64).eps)


def test_a_tile_without_pixels_overlaps_none():
    """Wherever it lies."""
    problem = pool_problem(channels=5, dtype=torch.float64)
    tiles = [(2, 5, 2, 9), (0, 0, 7, 9), (3, 2, 7, 2)]
    assert_close(solve_merged(problem, tiles), expect(problem), TOLERANCE[torch.float64])


def test_nan_in_a_tile_without_pixels_of_a_label():
    """It does not reach that label's latents, nor another image."""
    problem = pool_problem(MAPS["regions"], channels=5, dtype=torch.float64)
    x = problem.tensors["x"].clone()
    clean = merged(problem, TILINGS["uneven"], {**problem.tensors, "x": x})
    x[0, :, 6, 8] = torch.nan  # a pixel of label 3
    spoiled = merged(problem, TILINGS["uneven"], {**problem.tensors, "x": x})
    reached = LAYOUT.labels(torch.device("cpu")) == 3
    matched = clean.lse[0, 0] > -torch.inf
    for name in ("pooled", "lse", "row_mass", "col_mass"):
        before, after = getattr(clean, name), getattr(spoiled, name)
        assert torch.equal(before[1], after[1]), name
        assert torch.equal(before[0, :, ~reached & matched], after[0, :, ~reached & matched]), name
    assert spoiled.pooled[0, :, reached].isnan().all()


@pytest.mark.parametrize(("labels", "empty"), [("random", "zero"), ("regions", "uniform"), ("all ignored", "uniform")])
def test_twice_differentiable(labels, empty):
    """On the reference, since the compiled kernels are not."""
    small = LabelMap(MAPS[labels].labels[:1, 2:4, 3:6].contiguous(), 5)
    layout = LatentLayout((1, 1, 0, 1, 1))
    problem = pool_problem(small, layout, batch=1, heads=1, channels=1, dtype=torch.float64, empty=empty)
    names = tuple(problem.tensors)

    def pool(*inputs: Tensor) -> tuple[Tensor, ...]:
        with sca_kernels.backend("reference"):
            results = merged(problem, grid([0, 1, 2], [0, 2, 3]), dict(zip(names, inputs, strict=True)), empty)
        return tuple(result.masked_fill(result == -torch.inf, 0) for result in results)

    inputs = [tensor.requires_grad_() for tensor in problem.tensors.values()]
    assert torch.autograd.gradcheck(pool, inputs)
    assert torch.autograd.gradgradcheck(pool, inputs)


def parts_of(*sizes: tuple[int, int], batch: int = 1, heads: int = 1, channels: int = 2) -> list[Pooled]:
    layout = LatentLayout((1, 2))
    return [
        semantic_pool(
            torch.zeros(batch, heads, 3, channels),
            torch.zeros(batch, channels, height, width),
            layout,
            label_map(torch.zeros(1, height, width, dtype=torch.int32), 2),
        )
        for height, width in sizes
    ]


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"parts": [], "origins": []}, "parts: expected at least one, got none"),
    "too few origins": ({"origins": [(0, 0)]}, "origins: expected 2, one for each of parts, got 1"),
    "too many origins": ({"origins": [(0, 0)] * 3}, "origins: expected 2, one for each of parts, got 3"),
    "outside": (
        {"origins": [(0, 0), (0, 4)]},
        "origins[1]: expected a tile inside of 2 x 5 pixels, got rows 0 to 2 and columns 4 to 6",
    ),
    "above": (
        {"origins": [(-1, 0), (0, 3)]},
        "origins[0]: expected a tile inside of 2 x 5 pixels, got rows -1 to 1 and columns 0 to 3",
    ),
    "overlap": (
        {"origins": [(0, 0), (0, 2)]},
        "origins[1]: expected tiles that do not overlap, got ((0, 0), (0, 2))",
    ),
    "gap": (
        {"size": (3, 5)},
        "parts: expected tiles that cover all 15 pixels of size, got 10",
    ),
    "channels": (
        {"parts": [*parts_of((2, 3)), *parts_of((2, 2), channels=3)]},
        "parts[1].pooled: expected shape (1, 1, 3, 2) as in parts[0], got (1, 1, 3, 3)",
    ),
    "heads": (
        {"parts": [*parts_of((2, 3)), *parts_of((2, 2), heads=2)]},
        "parts[1].pooled: expected shape (1, 1, 3, 2) as in parts[0], got (1, 2, 3, 2)",
    ),
    "mass": (
        {"parts": [*parts_of((2, 3)), parts_of((2, 2))[0]._replace(row_mass=torch.zeros(1, 1, 2, 2))]},
        "parts[1].row_mass: expected shape (1, 1, 3, 2) as in parts[0] up to the last size, got (1, 1, 2, 2)",
    ),
    "empty": ({"empty": "mean"}, "empty: expected 'uniform' or 'zero', got 'mean'"),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_bad_input_is_named(error):
    changes, message = ERRORS[error]
    good = {"parts": parts_of((2, 3), (2, 2)), "origins": [(0, 0), (0, 3)], "size": (2, 5)}
    merge_pools(**good)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge_pools(**{**good, **changes})
