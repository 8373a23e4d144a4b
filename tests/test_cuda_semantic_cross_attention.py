"""semantic_cross_attention in CUDA C++ against the reference: results and every gradient, by the host or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tokens import (
    COMBINATIONS,
    Problem,
    assert_at_least_as_accurate,
    assert_close,
    assert_matches_reference,
    assert_same_bits,
    combine,
    label_map,
    make_problem,
    random_map,
    solve,
)
from torch import Tensor

import sca_kernels
from sca_kernels import LatentLayout, semantic_cross_attention

pytestmark = pytest.mark.cuda

combination = pytest.mark.parametrize("combination", [name for name in COMBINATIONS if name != "pixel-pixel"])


def tiny(combination: str, **options: object) -> Problem:
    """Four labels: one without pixels, one without latents, and pixels without a label."""
    pixels, more_pixels = label_map([[0, 0, 1], [2, -1, 0]], 4), label_map([[1, 0], [0, 3]], 4)
    tokens = combine(combination, pixels, more_pixels, LatentLayout((2, 0, 1, 1)), LatentLayout((1, 2, 0, 1)))
    return make_problem(*tokens, **{"batch": 1, "heads": 1, "key_width": 3, "value_width": 5, **options})


@combination
@pytest.mark.parametrize("empty", ["uniform", "zero"])
@pytest.mark.parametrize("widths", [(1, 3), (5, 20), (40, 33)], ids=str)
def test_matches_reference(cuda_order, combination, empty, widths):
    problem = make_problem(*COMBINATIONS[combination], heads=2, key_width=widths[0], value_width=widths[1])
    results = assert_matches_reference(problem, backend="cuda", empty=empty)
    assert results.out.dtype == results.lse.dtype == torch.float32


@combination
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_as_accurate_as_the_reference_in_16_bits(cuda_kernels, combination, dtype):
    problem = make_problem(*COMBINATIONS[combination], heads=2, key_width=16, value_width=40, dtype=dtype)
    assert_at_least_as_accurate(problem, solve(problem.to(torch.float64), "reference"), backend="cuda")


@combination
def test_gradients_where_differences_are_small_in_16_bits(cuda_kernels, combination):
    """Values with a large mean: the gradient of a logit is a small difference of large numbers."""
    problem = tiny(combination, key_width=16, value_width=16)
    problem = problem.changed(value=problem.value + 8, grad_out=problem.grad_out + 1, grad_lse=None)
    problem = problem.to(torch.bfloat16)
    assert_at_least_as_accurate(problem, solve(problem.to(torch.float64), "reference"), backend="cuda")


@combination
def test_several_tiles_and_blocks(cuda_kernels, combination):
    pixels, more_pixels = random_map(1, 150, 160, 3, without=[1], seed=1), random_map(1, 120, 150, 3, seed=2)
    tokens = combine(combination, pixels, more_pixels, LatentLayout((37, 1, 3)), LatentLayout((2, 0, 38)))
    assert_matches_reference(make_problem(*tokens, batch=1, heads=1, key_width=3, value_width=5), backend="cuda")


@combination
def test_more_latents_than_shared_memory_has(cuda_order, combination):
    pixels, more_pixels = random_map(2, 7, 9, 3, seed=1), random_map(2, 5, 7, 3, seed=2)
    tokens = combine(combination, pixels, more_pixels, LatentLayout((70, 1, 3)), LatentLayout((2, 0, 90)))
    assert_matches_reference(make_problem(*tokens, heads=2, key_width=6, value_width=7), backend="cuda")


@combination
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(cuda_kernels, combination, wanted):
    problem = tiny(combination)
    together, alone = solve(problem, "cuda"), solve(problem, "cuda", wanted=wanted)
    kept = [got if asked else None for got, asked in zip(together[2:], wanted, strict=True)]
    assert_same_bits(alone, together._replace(grad_query=kept[0], grad_key=kept[1], grad_value=kept[2]))


@combination
def test_gradients_through_lse_alone(cuda_kernels, combination):
    assert_matches_reference(tiny(combination).changed(grad_out=None), backend="cuda")


@combination
def test_scale(cuda_kernels, combination):
    assert_matches_reference(tiny(combination), backend="cuda", scale=-2.5)


def channels_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def every_other_channel(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor.new_full((), torch.nan).expand_as(tensor)), -1).flatten(3)[..., ::2]


@combination
@pytest.mark.parametrize("arrangement", [channels_first, every_other_channel])
def test_any_strides(cuda_kernels, combination, arrangement):
    problem = tiny(combination, batch=2, heads=2)
    tensors = {name: arrangement(getattr(problem, name)) for name in ("query", "key", "value", "grad_out")}
    assert_matches_reference(problem.changed(**tensors), backend="cuda")


@combination
def test_what_queries_without_keys_get(cuda_kernels, combination):
    problem = tiny(combination, batch=2, heads=2)
    empty_value = torch.randn(2, 2, 5)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (*problem.inputs, empty_value)]
        *inputs, instead = leaves
        with sca_kernels.backend(backend):
            tokens = problem.query_tokens, problem.key_tokens
            out = semantic_cross_attention(*inputs, *tokens, empty_value=instead)
        return [out, *torch.autograd.grad(out, leaves, problem.grad_out.to(dtype))]

    for got, wanted in zip(run("cuda", torch.float32), run("reference", torch.float64), strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-5)


@combination
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"value_width": 0}, {"key_width": 0}], ids=str)
def test_nothing_of_a_kind(cuda_kernels, combination, sizes):
    pixels, more_pixels = random_map(1, 3, 4, 3), random_map(1, 2, 5, 3)
    tokens = combine(combination, pixels, more_pixels, LatentLayout((2, 1, 3)), LatentLayout((2, 0, 1)))
    problem = make_problem(*tokens, **{"batch": 2, "heads": 2, "key_width": 3, "value_width": 4, **sizes})
    expected = solve(problem.to(torch.float64), "reference", scale=1.0)
    assert_close(solve(problem, "cuda", scale=1.0), expected, 1e-5)


def test_pixels_that_attend_to_pixels_are_refused(cuda_kernels):
    problem = make_problem(*COMBINATIONS["pixel-pixel"], key_width=3, value_width=3)
    with pytest.raises(RuntimeError, match="pixels that attend to pixels"):
        solve(problem, "cuda")
