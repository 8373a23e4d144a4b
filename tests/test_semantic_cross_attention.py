"""Semantic cross-attention on the compiled kernels against the reference: outputs and every gradient."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokens import (
    COMBINATIONS,
    TOLERANCE,
    Problem,
    Results,
    Tokens,
    assert_at_least_as_accurate,
    assert_close,
    assert_matches_reference,
    assert_same_bits,
    count,
    error_ratio,
    label_map,
    make_problem,
    mostly,
    random_map,
    solve,
)
from torch import Tensor

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, cpu, semantic_cross_attention
from sca_kernels.outputs import empty_attention_outputs

EMPTY = ("uniform", "zero")
# heads, key width, value width: single channels, odd ones, parts of a vector and whole vectors of every instruction set
SIZES = ((1, 1, 3), (3, 3, 40), (1, 40, 64), (3, 64, 96), (1, 96, 1), (3, 64, 64))

combination = pytest.mark.parametrize("combination", COMBINATIONS)
either_empty = pytest.mark.parametrize("empty", EMPTY)


def test_uninitialised_memory_is_poisoned():
    """What every other test relies on: if this fails, elements that are never written can go unnoticed."""
    assert torch.empty(7).isnan().all()
    assert torch.empty(64, dtype=torch.uint8).view(torch.float32).isnan().all()
    assert torch.empty_like(torch.zeros(3, 5).t()).isnan().all()
    assert (torch.empty(5, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        tokens = torch.zeros(2, 3, 5, 4, dtype=dtype)
        for query in (tokens, tokens.transpose(1, 2), tokens.transpose(2, 3)):
            assert all(result.isnan().all() for result in empty_attention_outputs(query, query))


@functools.cache
def problem_and_expected(
    combination: str, sizes: tuple[int, int, int], dtype: torch.dtype, empty: str
) -> tuple[Problem, Results]:
    heads, key_width, value_width = sizes
    problem = make_problem(
        *COMBINATIONS[combination], heads=heads, key_width=key_width, value_width=value_width, dtype=dtype
    )
    return problem, solve(problem.to(torch.float64), "reference", empty=empty)


@combination
@either_empty
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_matches_reference(capability, combination, empty, sizes, dtype, tolerance):
    problem, expected = problem_and_expected(combination, sizes, dtype, empty)
    actual = solve(problem, "cpu", empty=empty)
    assert actual.out.dtype == dtype and actual.lse.dtype == dtype
    assert_close(actual, expected, tolerance)


@combination
@either_empty
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_as_accurate_as_the_reference_in_16_bits(capability, combination, empty, sizes, dtype):
    problem, expected = problem_and_expected(combination, sizes, dtype, empty)
    assert_at_least_as_accurate(problem, expected, empty=empty)


@combination
def test_is_as_accurate_as_the_reference_in_16_bits_where_differences_are_small(capability, combination):
    """Values with a large mean: the gradient of a logit is a small difference of large numbers."""
    problem = make_problem(*COMBINATIONS[combination], key_width=16, value_width=16)
    assert problem.grad_out is not None
    problem = problem.changed(value=problem.value + 8, grad_out=problem.grad_out + 1, grad_lse=None)
    problem = problem.to(torch.bfloat16)
    assert_at_least_as_accurate(problem, solve(problem.to(torch.float64), "reference"))


@combination
@pytest.mark.parametrize("flow", ["out", "lse", "both"])
@pytest.mark.parametrize("wanted", [wanted for wanted in itertools.product((True, False), repeat=3) if any(wanted)])
def test_gradients_of_some_inputs_through_some_outputs(native, combination, flow, wanted):
    problem = make_problem(*COMBINATIONS[combination], key_width=3, value_width=6)
    if flow != "both":
        problem = problem.changed(grad_lse=None) if flow == "out" else problem.changed(grad_out=None)
    for empty in EMPTY:
        results = assert_matches_reference(problem, wanted=wanted, empty=empty)
        assert tuple(gradient is not None for gradient in results[2:]) == wanted


@combination
@either_empty
def test_gradcheck(capability, combination, empty):
    """The gradients against differences of the outputs of the same kernels."""
    query_tokens, key_tokens = small_combinations()[combination]
    problem = make_problem(query_tokens, key_tokens, batch=1, heads=2, key_width=2, value_width=3, dtype=torch.float64)

    def attend(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with sca_kernels.backend("cpu"):
            out, lse = semantic_cross_attention(*inputs, query_tokens, key_tokens, empty=empty, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0)  # differences of infinities are not numbers

    assert torch.autograd.gradcheck(attend, [tensor.requires_grad_() for tensor in problem.inputs])


def small_combinations() -> dict[str, tuple[Tokens, Tokens]]:
    pixels, more_pixels = label_map([[0, 0, 1], [2, -1, 0]], 4), label_map([[1, 0], [0, 3]], 4)
    latents, more_latents = LatentLayout((2, 0, 1, 1)), LatentLayout((1, 2, 0, 1))
    return {
        "pixel-latent": (pixels, latents),
        "latent-pixel": (latents, pixels),
        "latent-latent": (latents, more_latents),
        "pixel-pixel": (pixels, more_pixels),
    }


@combination
def test_scale(capability, combination):
    problem = make_problem(*COMBINATIONS[combination])
    for scale in (0.0, 1.0, -2.5, 1e-3):
        assert_matches_reference(problem, scale=scale)
    default = solve(problem, "cpu")
    assert_same_bits(default, solve(problem, "cpu", scale=problem.query.shape[3] ** -0.5))


def test_meaning_on_paper(capability):
    """Numbers small enough to be worked out by hand, for both backends."""
    pixels, latents = label_map([[0, 1, -1]], 3), LatentLayout((2, 0, 1))
    query = torch.tensor([[1.0], [1.0], [1.0]]).view(1, 1, 3, 1)
    key = torch.tensor([2.0, 4.0, 0.0]).log().view(1, 1, 3, 1)
    value = torch.tensor([3.0, 6.0, 30.0]).view(1, 1, 3, 1)
    for backend in ("cpu", "reference"):
        for empty, of_empty in (("uniform", 13.0), ("zero", 0.0)):
            results = solve(Problem(query, key, value, pixels, latents), backend, empty=empty, scale=1)
            torch.testing.assert_close(results.out.flatten(), torch.tensor([5.0, of_empty, of_empty]))
            torch.testing.assert_close(results.lse.flatten(), torch.tensor([6.0, 0.0, 0.0]).log())


def heads_interleaved(tensor: Tensor) -> Tensor:
    """As a linear layer's output (B, N, H * D), split into heads, lies in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def channels_first(tensor: Tensor) -> Tensor:
    """As a feature map (B, H * D, height, width), split into heads, lies in memory."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def every_other_channel(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor.new_full((), torch.nan).expand_as(tensor)), -1).flatten(3)[..., ::2]


def with_gaps(tensor: Tensor) -> Tensor:
    """Rows with something else between them."""
    return torch.nn.functional.pad(tensor, (2, 3, 1, 1), value=torch.nan)[:, :, 1:-1, 2:-3]


def unaligned(tensor: Tensor) -> Tensor:
    """One element past the beginning of an allocation."""
    storage = tensor.new_empty(tensor.numel() + 1)
    return storage[1:].view(tensor.shape).copy_(tensor)


def batch_last(tensor: Tensor) -> Tensor:
    return tensor.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def one_batch_expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def one_head_expanded(tensor: Tensor) -> Tensor:
    return tensor[:, :1].expand_as(tensor)


def one_token_expanded(tensor: Tensor) -> Tensor:
    return tensor[:, :, :1].expand_as(tensor)


def one_channel_expanded(tensor: Tensor) -> Tensor:
    return tensor[..., :1].expand_as(tensor)


def one_number_expanded(tensor: Tensor) -> Tensor:
    return tensor[:1, :1, :1, :1].expand_as(tensor)


ARRANGED = ("query", "key", "value", "grad_out")
ARRANGEMENTS = [
    heads_interleaved, channels_first, every_other_channel, with_gaps, unaligned, batch_last, one_batch_expanded,
    one_head_expanded, one_token_expanded, one_channel_expanded, one_number_expanded,
]  # fmt: skip


@combination
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_any_strides(capability, combination, arrangement):
    for widths in ({"key_width": 16, "value_width": 32}, {"key_width": 3, "value_width": 17}):
        problem = make_problem(*COMBINATIONS[combination], **widths)
        arranged = {name: arrangement(getattr(problem, name)) for name in ARRANGED}
        assert_matches_reference(problem.changed(**arranged))


@combination
@pytest.mark.parametrize("name", ARRANGED)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_strides_that_differ(native, combination, arrangement, name):
    problem = make_problem(*COMBINATIONS[combination], key_width=16, value_width=32)
    assert_matches_reference(problem.changed(**{name: arrangement(getattr(problem, name))}))


@combination
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_strides_in_16_bits(native, combination, arrangement, dtype):
    for value_width in (17, 32):
        problem = make_problem(*COMBINATIONS[combination], key_width=16, value_width=value_width, dtype=dtype)
        problem = problem.changed(**{name: arrangement(getattr(problem, name)) for name in ARRANGED})
        assert_at_least_as_accurate(problem, solve(problem.to(torch.float64), "reference"))


@combination
def test_expanded_gradients(capability, combination):
    """What ``out.sum().backward()`` sends: one number, expanded."""
    problem = make_problem(*COMBINATIONS[combination], key_width=16, value_width=16)
    assert problem.grad_out is not None and problem.grad_lse is not None
    ones = torch.ones(())
    problem = problem.changed(grad_out=ones.expand_as(problem.grad_out), grad_lse=ones.expand_as(problem.grad_lse))
    assert_matches_reference(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@combination
def test_results_lie_in_memory_as_the_query_does(native, combination, dtype):
    """Undoing the permutation that made the query copies nothing; gradients lie as their inputs do."""
    problem = make_problem(*COMBINATIONS[combination], heads=3, key_width=8, value_width=6, dtype=dtype)
    for arrangement, undo in (
        (torch.clone, lambda result: result),
        (heads_interleaved, lambda result: result.transpose(1, 2)),
        (channels_first, lambda result: result.transpose(2, 3)),
    ):
        query, key, value = (arrangement(tensor) for tensor in problem.inputs)
        results = solve(problem.changed(query=query, key=key, value=value), "cpu")
        assert undo(results.out).is_contiguous()
        assert results.lse.is_contiguous()
        assert results.grad_query is not None and results.grad_query.stride() == query.stride()
        assert results.grad_key is not None and results.grad_key.stride() == key.stride()
        assert results.grad_value is not None and results.grad_value.stride() == value.stride()


def test_lazily_negated_tensors(native):
    """The imaginary part of a conjugate holds the numbers before the change of sign."""
    problem = make_problem(*COMBINATIONS["pixel-latent"])
    tensors = {name: getattr(problem, name) for name in ARRANGED}
    negated = {name: torch.complex(-tensor, -tensor).conj().imag for name, tensor in tensors.items()}
    assert all(tensor.is_neg() for tensor in negated.values())
    assert_same_bits(solve(problem.changed(**negated), "cpu"), solve(problem, "cpu"))


EDGES: dict[str, Callable[[], tuple[Tokens, Tokens]]] = {
    "absent label": lambda: (label_map([[0, 2], [2, 0]], 3), LatentLayout((2, 3, 1))),
    "ignored pixels": lambda: (label_map([[0, -1], [-1, 1]], 2), LatentLayout((2, 3))),
    "queries without keys in the last image only": lambda: (
        label_map([[[0, 1], [1, 0]], [[0, 2], [-1, 0]]], 3), LatentLayout((2, 1, 0)),
    ),
    "all pixels ignored": lambda: (label_map([[-1, -1], [-1, -1]], 2), LatentLayout((2, 3))),
    "single pixel": lambda: (label_map([[1]], 2), LatentLayout((2, 3))),
    "single ignored pixel": lambda: (label_map([[-1]], 2), LatentLayout((2, 3))),
    "single label": lambda: (random_map(1, 4, 5, 1), LatentLayout((4,))),
    "no pixels": lambda: (label_map(torch.zeros(1, 0, 0, dtype=torch.int32), 2), LatentLayout((2, 3))),
    "no rows": lambda: (label_map(torch.zeros(1, 0, 5, dtype=torch.int32), 2), LatentLayout((2, 3))),
    "no columns": lambda: (label_map(torch.zeros(2, 5, 0, dtype=torch.int32), 2), LatentLayout((2, 3))),
    "no latents for a label": lambda: (random_map(2, 3, 5, 3), LatentLayout((2, 0, 3))),
    "no latents": lambda: (random_map(2, 3, 5, 3), LatentLayout((0, 0, 0))),
    "neither pixels nor latents": lambda: (
        label_map(torch.zeros(1, 0, 0, dtype=torch.int32), 2), LatentLayout((0, 0)),
    ),
    "all pixels of one label": lambda: (label_map(torch.full((2, 9, 9), 1), 3), LatentLayout((2, 3, 1))),
    "every pixel its own label": lambda: (label_map(torch.arange(99).view(1, 9, 11), 99), LatentLayout((1, 2, 0) * 33)),
    "one map for all images": lambda: (random_map(1, 5, 7, 3), LatentLayout((2, 3, 1))),
    "one latent per label": lambda: (random_map(2, 9, 9, 4), LatentLayout((1, 1, 1, 1))),
    "more latents than a block": lambda: (random_map(2, 9, 9, 3), LatentLayout((70, 0, 65))),
    "many more latents": lambda: (random_map(2, 9, 9, 2), LatentLayout((300, 3))),
    "a label of many pixels": lambda: (mostly(1, random_map(1, 28, 31, 3)), LatentLayout((2, 5, 1))),
    "a label of many pixels and many latents": lambda: (
        mostly(0, random_map(1, 28, 31, 2)), LatentLayout((70, 1)),
    ),
    "many labels": lambda: (random_map(1, 20, 20, 150), LatentLayout((2, 0, 1) * 50)),
    "a row of pixels": lambda: (random_map(2, 1, 700, 3), LatentLayout((2, 3, 1))),
    "a column of pixels": lambda: (random_map(2, 700, 1, 3), LatentLayout((2, 3, 1))),
}  # fmt: skip


@functools.cache
def edge_and_expected(edge: str, sides: str, empty: str) -> tuple[Problem, Results]:
    pixels, latents = EDGES[edge]()
    tokens = {"pixel": pixels, "latent": latents}
    query_side, key_side = sides.split("-")
    problem = make_problem(tokens[query_side], tokens[key_side])
    return problem, solve(problem.to(torch.float64), "reference", empty=empty)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("sides", ["pixel-latent", "latent-pixel", "pixel-pixel", "latent-latent"])
@either_empty
def test_edge_cases(capability, edge, sides, empty):
    problem, expected = edge_and_expected(edge, sides, empty)
    assert_close(solve(problem, "cpu", empty=empty), expected, TOLERANCE[torch.float32])


@functools.cache
def large_problem_and_expected(sides: str) -> tuple[Problem, Results]:
    tokens = {"pixel": random_map(1, 256, 256, 4, without=[2]), "latent": LatentLayout((2, 3, 1, 0))}
    query_side, key_side = sides.split("-")
    problem = make_problem(tokens[query_side], tokens[key_side], batch=1, heads=2, key_width=32, value_width=32)
    return problem, solve(problem.to(torch.float64), "reference")


@pytest.mark.parametrize("arrangement", [torch.clone, heads_interleaved, channels_first])
@pytest.mark.parametrize("sides", ["pixel-latent", "latent-pixel"])
def test_large_feature_map(capability, use_threads, sides, arrangement):
    """A result of 16 MiB, which may be written in another way than a small one, by two threads."""
    problem, expected = large_problem_and_expected(sides)
    query, key, value = (arrangement(tensor) for tensor in problem.inputs)
    use_threads(2)
    actual = solve(problem.changed(query=query, key=key, value=value), "cpu")
    assert_close(actual, expected, TOLERANCE[torch.float32])


def test_queries_without_keys(capability):
    """The mean of all values or zero, an lse of -inf, and a gradient that reaches the values alone."""
    pixels, latents = label_map([[0, 1, 2, -1]], 3), LatentLayout((2, 0, 3))
    problem = make_problem(pixels, latents, batch=1, heads=1, key_width=4, value_width=3)
    assert problem.grad_out is not None
    without = [1, 3]
    for empty, value_of_empty in (("uniform", problem.value.mean(2)), ("zero", torch.zeros(1, 1, 3))):
        results = solve(problem, "cpu", empty=empty)
        for query in without:
            torch.testing.assert_close(results.out[:, :, query], value_of_empty)
        assert (results.lse.isneginf().flatten().nonzero().flatten()).tolist() == without
        assert results.grad_query is not None and not results.grad_query[:, :, without].any()
    masked = problem.grad_out.clone()
    masked[:, :, without] = 0
    uniform, zero = (solve(problem, "cpu", empty=empty) for empty in EMPTY)
    others = solve(problem.changed(grad_out=masked), "cpu", empty="uniform")
    assert uniform.grad_value is not None and zero.grad_value is not None and others.grad_value is not None
    assert_close(zero, others._replace(out=zero.out), 1e-6)
    share = problem.grad_out[:, :, without].sum(2, keepdim=True) / latents.count
    torch.testing.assert_close(uniform.grad_value - zero.grad_value, share.expand_as(problem.value))


def test_no_images(native):
    no_maps = label_map(torch.zeros(0, 3, 4, dtype=torch.int32), 2)
    one_map = random_map(1, 3, 4, 2)
    latents = LatentLayout((2, 1))
    for pixels in (no_maps, one_map):
        for query_tokens, key_tokens in ((pixels, latents), (latents, pixels), (pixels, pixels), (latents, latents)):
            results = assert_matches_reference(make_problem(query_tokens, key_tokens, batch=0))
            assert results.out.shape[0] == 0


@combination
@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 4, 0)], ids=["no heads", "no value channels"])
def test_no_heads_or_channels(native, combination, sizes):
    heads, key_width, value_width = sizes
    tokens = COMBINATIONS[combination]
    assert_matches_reference(make_problem(*tokens, heads=heads, key_width=key_width, value_width=value_width))


@combination
def test_no_key_channels(native, combination):
    """Without channels all logits are zero, so that a query takes the mean of its keys."""
    problem = make_problem(*COMBINATIONS[combination], key_width=0)
    for scale in (None, 1.0):
        assert_matches_reference(problem, scale=scale)


@combination
def test_one_map_for_all_images_is_that_map_for_each(native, combination):
    def first_map(tokens: Tokens, images: int) -> Tokens:
        if isinstance(tokens, LatentLayout):
            return tokens
        return LabelMap(tokens.labels[:1].expand(images, -1, -1).contiguous(), tokens.num_labels)

    shared, repeated = (
        make_problem(*(first_map(tokens, images) for tokens in COMBINATIONS[combination])) for images in (1, 2)
    )
    assert_same_bits(solve(shared, "cpu"), solve(repeated, "cpu"))


@combination
def test_nan_stays_in_its_image(capability, combination):
    """NaN in every number of one image, gradients included, changes no bit of the other."""
    problem = make_problem(*COMBINATIONS[combination], key_width=16, value_width=8)
    clean = solve(problem, "cpu")
    names = ("query", "key", "value", "grad_out", "grad_lse")
    for spoiled in (*((name,) for name in names), names):
        changes = {}
        for name in spoiled:
            changes[name] = getattr(problem, name).clone()
            changes[name][1] = torch.nan
        results = solve(problem.changed(**changes), "cpu")
        first_image = (Results(*(tensor[:1] for tensor in these)) for these in (results, clean))
        assert_same_bits(*first_image)
        assert results.out[1].isnan().any() or "grad" in spoiled[0]


@combination
# Not the values of the reference: its dense product multiplies those of other labels by zero.
@pytest.mark.parametrize(
    ("backend", "side"),
    [("cpu", "query"), ("cpu", "key"), ("cpu", "value"), ("reference", "query"), ("reference", "key")],
)
def test_nan_stays_in_its_label(native, combination, side, backend):
    """NaN in one token reaches no query of another label: masking selects, it does not multiply by zero."""
    query_tokens, key_tokens = COMBINATIONS[combination]
    problem = make_problem(query_tokens, key_tokens, key_width=16, value_width=8)
    label = 0  # which has tokens on either side
    reached = labels_of(query_tokens) == label
    token = int((labels_of(query_tokens if side == "query" else key_tokens) == label).nonzero()[0])
    if side == "query":
        reached = torch.arange(len(reached)) == token
    spoiled = getattr(problem, side).clone()
    spoiled[0, 0, token, 2] = torch.nan
    clean, results = (solve(p, backend, empty="zero") for p in (problem, problem.changed(**{side: spoiled})))
    assert torch.equal(results.out[0, 0, ~reached], clean.out[0, 0, ~reached])
    assert torch.equal(results.lse[0, 0, ~reached], clean.lse[0, 0, ~reached])
    assert results.out[0, 0, reached].isnan().any(-1).all()
    assert torch.equal(results.out[0, 1], clean.out[0, 1])


def labels_of(tokens: Tokens) -> Tensor:
    """The labels of the tokens of the first image."""
    if isinstance(tokens, LabelMap):
        return tokens.labels[0].flatten()
    return tokens.labels(torch.device("cpu"))


@combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_logits(capability, combination, dtype):
    """Logits of up to 10,000, whole numbers so that they are exact: e to their power is far out of range."""
    problem = make_problem(*COMBINATIONS[combination], key_width=4, value_width=8, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    random = [
        torch.randint(-50, 51, tensor.shape, generator=generator).to(dtype) for tensor in (problem.query, problem.key)
    ]
    largest, smallest = (
        [torch.full_like(problem.query, 50 * sign), torch.full_like(problem.key, 50)] for sign in (1, -1)
    )
    for query, key in (random, largest, smallest):
        these = problem.changed(query=query, key=key)
        actual, expected = solve(these, "cpu", scale=1), solve(these.to(torch.float64), "reference", scale=1)
        size = expected.lse[expected.lse.isfinite()].abs().max().item()
        assert size > 3000
        assert_close(Results(*actual[:2], *(None,) * 3), Results(*expected[:2], *(None,) * 3), TOLERANCE[dtype])
        # Backward takes the weights from the difference of a logit and an lse that has been rounded to the type.
        assert_close(actual, expected, size * torch.finfo(dtype).eps)


@combination
def test_minus_infinity_forbids_a_key(capability, combination):
    """A logit of -inf beside finite ones is a weight of zero."""
    problem = make_problem(*COMBINATIONS[combination])
    query, key = problem.query.clone(), problem.key.clone()
    query[..., 0] = 1
    key[:, :, ::2, 0] = -torch.inf
    problem = problem.changed(query=query, key=key, grad_out=None, grad_lse=None)
    expected = solve(problem.to(torch.float64), "reference")
    actual = solve(problem, "cpu")
    some_key = expected.lse.isfinite() & expected.out.isfinite().all(-1)
    assert some_key.any()
    assert error_ratio(actual.out[some_key], expected.out[some_key]) <= 1e-5
    assert error_ratio(actual.lse[some_key], expected.lse[some_key]) <= 1e-5


def test_negative_zero(native):
    """A mean or a sum of negative zeros is zero, and a query whose logits are zeros of either sign weighs evenly."""
    problem = make_problem(*COMBINATIONS["pixel-latent"])
    problem = problem.changed(query=-torch.zeros_like(problem.query), value=-torch.zeros_like(problem.value))
    results = assert_matches_reference(problem)
    assert not results.out.any()


@combination
def test_tiny_numbers(native, combination):
    """Subnormal values and gradients come through as they do in the reference."""
    problem = make_problem(*COMBINATIONS[combination]).to(torch.float16)
    assert problem.grad_out is not None
    problem = problem.changed(value=problem.value * 2.0**-20, grad_out=problem.grad_out * 2.0**-18, grad_lse=None)
    assert_at_least_as_accurate(problem, solve(problem.to(torch.float64), "reference"))


@pytest.mark.slow_under_sanitizer
def test_more_than_2_to_the_31_elements_expanded(native):
    """A query of that many elements, all in the same few places: only its sizes are large."""
    width, heads, height, columns = 4096, 8, 256, 257
    tokens, latents = height * columns, LatentLayout((2,))
    few = make_problem(label_map([[0]], 1), latents, batch=1, heads=1, key_width=width, value_width=1)
    expected = solve(few.to(torch.float64), "reference")
    pixels = label_map(torch.zeros(1, height, columns, dtype=torch.int32), 1)
    query, grad_out, grad_lse = (
        tensor.expand(1, heads, tokens, *tensor.shape[3:]) for tensor in (few.query, few.grad_out, few.grad_lse)
    )
    assert query.numel() > 2**31
    many = Problem(query, *(t.expand(1, heads, -1, -1) for t in few.inputs[1:]), pixels, latents, grad_out, grad_lse)
    results = solve(many, "cpu", wanted=(False, True, True))
    for actual, one in ((results.out, expected.out), (results.lse, expected.lse)):
        assert error_ratio(actual, one.expand_as(actual)) <= 1e-5
    for actual, one in ((results.grad_key, expected.grad_key), (results.grad_value, expected.grad_value)):
        assert error_ratio(actual, tokens * one.expand_as(actual)) <= 1e-5


# Tensors whose elements lie up to 2^31 elements apart, in one allocation. That is only a range of addresses until it is
# written to, so a few pages of memory are enough; the poison of the tests would write all of it, hence the process.
FAR_APART = """
import sys
import torch
from tokens import LatentLayout, assert_at_least_as_accurate, assert_matches_reference, make_problem, random_map, solve

dtype = getattr(torch, sys.argv[1])
names = ("query", "key", "value", "grad_out")
problem = make_problem(random_map(2, 3, 3, 2), LatentLayout((2, 1)), key_width=3, value_width=16, dtype=dtype)
try:
    memory = torch.empty(2**31 + 2**20, dtype=dtype)
except RuntimeError as error:
    sys.exit(f"no memory: {error}")
for dimension in range(4):
    far_apart = {}
    for place, name in enumerate(names):
        tensor = getattr(problem, name)
        strides = list(tensor.stride())
        strides[dimension] = (2**31 + 2**16) // (tensor.shape[dimension] - 1)
        far_apart[name] = memory.as_strided(tensor.shape, strides, place * 2**14).copy_(tensor)
    far = problem.changed(**far_apart)
    if dtype == torch.float32:
        assert_matches_reference(far)
    else:
        assert_at_least_as_accurate(far, solve(far.to(torch.float64), "reference"))
"""


@pytest.mark.subprocess
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_than_2_to_the_31_elements_apart(native, dtype):
    result = subprocess.run(
        [sys.executable, "-c", FAR_APART, dtype], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if result.stderr.startswith("no memory"):
        pytest.skip(result.stderr)
    assert result.returncode == 0, result.stderr


def workspace_size(heads: int, query_tokens: Tokens, key_tokens: Tokens, width: int = 64) -> int:
    """Bytes of workspace of a call, from its sizes alone: each tensor is one number, expanded."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros((), dtype=dtype).expand(shape)

    queries, keys = count(query_tokens), count(key_tokens)
    query, key = tensor(1, heads, queries, width), tensor(1, heads, keys, width)
    groupings: list[Tensor | None] = []
    for tokens in (query_tokens, key_tokens):
        places = tokens.num_labels + 1
        if isinstance(tokens, LabelMap):
            groupings += [tensor(1, places, dtype=torch.int64), tensor(1, count(tokens), dtype=torch.int32)]
        else:
            groupings += [tensor(places, dtype=torch.int64), None]
    most = [0 if isinstance(tokens, LabelMap) else tokens.max_per_label for tokens in (query_tokens, key_tokens)]
    lse = tensor(1, heads, queries)
    arguments = (query, key, key, None, *groupings, *most, 1.0, "uniform")
    size: int = cpu.native.semantic_cross_attention_workspace(cpu.settings(query), arguments, (query, lse))
    return size


@combination
def test_workspace_past_2_to_the_31_bytes(native, combination):
    """The size of the workspace goes on growing evenly."""
    step = 2**23
    sizes = [workspace_size(heads, *COMBINATIONS[combination]) for heads in (step, 2 * step, 3 * step)]
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert first > 2**31
    assert abs(first - second) <= 4096  # what alignment may add


@pytest.mark.parametrize("sides", ["pixel-latent", "latent-pixel", "pixel-pixel"])
def test_workspace_is_linear_in_pixels_whatever_the_labels(native, sides):
    """A fraction of the inputs: nothing has a number for each latent, or for each pixel, of every pixel."""

    def size(pixels: int, labels: int) -> int:
        one_pixel = torch.zeros(1, 1, 1, dtype=torch.int32)
        tokens = {
            "pixel": LabelMap(one_pixel.expand(1, pixels, 1), labels),
            "latent": LatentLayout.uniform(labels, 8),
        }
        query_side, key_side = sides.split("-")
        return workspace_size(1, tokens[query_side], tokens[key_side])

    row = 64 * 4
    for labels in (3, 151):
        assert size(2**21, labels) - size(2**20, labels) <= 2**20 * row / 4
    assert size(2**20, 151) - size(2**20, 3) <= 16 * 148 * 8 * row
