"""semantic_modulate in Triton against the reference: the result and every gradient, in the interpreter or on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from folded import (
    ALL_OPTIONS,
    ARRANGEMENTS,
    EDGES,
    EXPANSIONS,
    MEMORY,
    MODULATE_RULES,
    MODULATE_VARIANTS,
    Problem,
    arranged,
    assert_accurate,
    assert_close,
    assert_matches_reference,
    assert_same_bits,
    away_from_kink,
    expanded,
    expect,
    few_pixels_eps,
    image,
    modulate_problem,
    solve,
)
from tiles import use_small_tiles
from tokens import TOLERANCE, random_map

from sca_kernels import LabelMap, LatentLayout

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("triton_kernels")]

SMALL_EDGES = [name for name, (labels, _, _) in EDGES.items() if labels.height * labels.width <= 45]
# Few labels, latents and pixels: the interpreter takes milliseconds for each program.
PIXELS, LATENTS = random_map(2, 3, 5, 3, without=[2], seed=1), LatentLayout((2, 0, 1))

any_memory = pytest.mark.parametrize("memory", MEMORY)
check = functools.partial(assert_matches_reference, backend="triton")


def small_problem(labels: LabelMap = PIXELS, layout: Any = LATENTS, **arguments: Any) -> Problem:
    return away_from_kink(modulate_problem(labels, layout, **{"heads": 1, "channels": 5, **arguments}))


@pytest.mark.parametrize(
    ("dtype", "memory", "heads", "channels", "variant"),
    [
        (torch.float32, "channels first", 2, 5, "everything but statistics"),
        (torch.bfloat16, "channels last", 1, 70, "noise per pixel"),
        (torch.float16, "channels first", 3, 16, "everything and noise per element"),
    ],
    ids=str,
)
def test_matches_reference(dtype, memory, heads, channels, variant):
    problem = modulate_problem(heads=heads, channels=channels, dtype=dtype, **MODULATE_VARIANTS[variant])
    check(arranged(away_from_kink(problem), memory, gradient_memory="channels last"))


@any_memory
def test_several_blocks_of_a_label(monkeypatch, memory):
    """And several parts of the channels, and chunks of partial rows and of lines, with ends that are not full."""
    use_small_tiles(monkeypatch)
    labels, layout = random_map(1, 7, 17, 2), LatentLayout((3, 1))
    check(arranged(small_problem(labels, layout, batch=1, channels=37), memory, memory))


def test_many_latents():
    """The configurations for them."""
    labels = random_map(1, 3, 5, 2)
    for heads, layout in ((2, LatentLayout((33, 1))), (1, LatentLayout((130, 0)))):
        check(small_problem(labels, layout, batch=1, heads=heads))


@pytest.mark.parametrize("variant", MODULATE_VARIANTS)
def test_variants(variant):
    rule = list(MODULATE_RULES)[list(MODULATE_VARIANTS).index(variant) % len(MODULATE_RULES)]
    check(small_problem(**MODULATE_VARIANTS[variant], **MODULATE_RULES[rule]))


@pytest.mark.parametrize("edge", SMALL_EDGES)
def test_edge_cases(edge):
    labels, layout, batch = EDGES[edge]
    rule = ("uniform", "zero, not activated")[SMALL_EDGES.index(edge) % 2]
    settings = {**MODULATE_RULES[rule], "eps": few_pixels_eps(labels.height, labels.width)}
    problem = small_problem(labels, layout, batch=batch, channels=3, options=("key_bias", "col_bias"), **settings)
    assert_close(solve(problem, "triton"), expect(problem), TOLERANCE[torch.float32])


def test_every_pixel_its_own_label():
    labels = LabelMap.from_labels(torch.arange(12).view(1, 3, 4), 12)
    check(small_problem(labels, LatentLayout((1, 2, 0, 1) * 3), batch=1, channels=3))


def test_labels_out_of_range_are_ignored():
    labels = torch.tensor([[[0, 7, 1], [-5, 2, 0]]], dtype=torch.int32)
    problem = small_problem(LabelMap(torch.where((labels < 0) | (labels > 2), -1, labels), 3), batch=1)
    assert_same_bits(solve(problem.changed(labels=LabelMap(labels, 3)), "triton"), check(problem))


@pytest.mark.parametrize("wanted", ["x", "keys", "scale", "shift", *ALL_OPTIONS])
def test_gradient_of_one_input(wanted):
    problem = small_problem(random_map(1, 2, 3, 3), batch=1, **MODULATE_VARIANTS["everything and noise per pixel"])
    alone, expected = solve(problem, "triton", wanted={wanted}), expect(problem)
    kept = {"out", f"grad_{wanted}"}
    assert_close(alone, {name: value if name in kept else None for name, value in expected.items()}, 1e-5)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_any_strides(arrangement):
    problem = small_problem(options=())
    x, gradient = (arrangement(tensor) for tensor in (problem.tensors["x"], problem.gradients["out"]))
    check(problem.with_tensors(x=x))
    check(problem.with_gradients(out=gradient))


@any_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_lie_in_memory_as_x_does_and_repeat_bit_by_bit(memory, dtype):
    problem = small_problem(dtype=dtype, **MODULATE_VARIANTS["everything and noise per element"])
    problem = arranged(problem, memory, gradient_memory="channels last")
    results = solve(problem, "triton")
    assert results["out"].stride() == results["grad_x"].stride() == problem.tensors["x"].stride()
    assert_same_bits(solve(problem, "triton"), results)


def test_strides_of_tables():
    problem = small_problem(options=ALL_OPTIONS, noise="per_pixel", negative_slope=1.0)
    for change in (
        lambda table: table.transpose(0, -1).contiguous().transpose(0, -1),
        lambda table: table[:1].expand_as(table),
    ):
        check(problem.with_tensors(**{name: change(table) for name, table in problem.tensors.items() if name != "x"}))


@pytest.mark.parametrize("shape", [(), (5,), (3, 1), (2, 1, 1, 5)], ids=str)
def test_shapes_of_noise(shape):
    """Whatever is broadcast is read where it lies."""
    problem = small_problem(options=("noise_strength",), noise="per_pixel")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    check(away_from_kink(problem.with_settings(noise=noise)))


@pytest.mark.parametrize("dimensions", EXPANSIONS.values(), ids=EXPANSIONS)
def test_expanded(dimensions):
    """Without an activation, whose kink an expanded gradient could not keep away from."""
    problem = small_problem(options=("mean", "rstd"), negative_slope=1.0)
    x, gradient = (expanded(tensor, dimensions) for tensor in (problem.tensors["x"], problem.gradients["out"]))
    check(problem.with_tensors(x=x).with_gradients(out=gradient))


def test_selection():
    """Rows of tables then differ from image to image, and some are padding."""
    labels, layout = random_map(2, 3, 5, 3, without=[1]), LatentLayout((2, 1, 1))
    labels.labels[0].clamp_(max=0)
    check(small_problem(labels, layout.present_in(labels), options=("empty_scale", "empty_shift")))


def test_large_logits():
    """e to their power is far out of range; -inf is a weight of zero."""
    problem = small_problem(layout=LatentLayout((3, 1, 2)), options=("key_bias",))
    key_bias = torch.tensor([4096.0, 4095.0, -torch.inf, -4096.0, 0.0, 2048.0]).expand(2, 1, 6)
    problem = away_from_kink(problem.with_tensors(key_bias=key_bias))
    actual, expected = solve(problem, "triton"), expect(problem)
    assert_accurate(problem, actual, expected, ill_conditioned=True)
    assert not actual["grad_key_bias"][..., 2].any()


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)], ids=["no images", "no channels"])
def test_nothing_of_a_kind(sizes):
    batch, channels = sizes
    everything = MODULATE_VARIANTS["everything and noise per pixel"]
    check(small_problem(random_map(1, 3, 4, 3), batch=batch, channels=channels, **everything))


def test_nan_stays_in_its_image():
    problem = small_problem()
    spoiled = problem.tensors["x"].clone()
    spoiled[0, 0, 0, 0] = torch.nan
    actual, expected = solve(problem.with_tensors(x=spoiled), "triton"), solve(problem, "triton")
    assert_same_bits(image(actual, 1), image(expected, 1))
    assert image(actual, 0)["out"].isnan().any()
