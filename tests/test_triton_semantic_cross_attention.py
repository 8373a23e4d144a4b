"""semantic_cross_attention in Triton against the reference: every combination of tokens, results and every gradient, in
the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from devices import device_of, on_device
from tiles import use_small_tiles
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
from sca_kernels import LabelMap, LatentLayout, semantic_cross_attention

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("triton_kernels")]

combination = pytest.mark.parametrize("combination", COMBINATIONS)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


def tiny(combination: str, **options: object) -> Problem:
    """Four labels: one without pixels, one without latents, and pixels without a label."""
    pixels, more_pixels = label_map([[0, 0, 1], [2, -1, 0]], 4), label_map([[1, 0], [0, 3]], 4)
    tokens = combine(combination, pixels, more_pixels, LatentLayout((2, 0, 1, 1)), LatentLayout((1, 2, 0, 1)))
    return make_problem(*tokens, **{"batch": 1, "heads": 1, "key_width": 3, "value_width": 5, **options})


@combination
@pytest.mark.parametrize("empty", ["uniform", "zero"])
def test_matches_reference(combination, empty):
    problem = make_problem(*COMBINATIONS[combination], heads=2, key_width=5, value_width=20)
    results = assert_matches_reference(problem, backend="triton", empty=empty)
    assert results.out.dtype == results.lse.dtype == torch.float32


@combination
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_as_accurate_as_the_reference_in_16_bits(combination, dtype):
    problem = make_problem(*COMBINATIONS[combination], heads=1, key_width=6, value_width=7, dtype=dtype)
    assert_at_least_as_accurate(problem, solve(problem.to(torch.float64), "reference"), backend="triton")


@combination
def test_gradients_where_differences_are_small_in_16_bits(combination):
    """Values with a large mean: the gradient of a logit is a small difference of large numbers."""
    problem = tiny(combination, key_width=16, value_width=16)
    problem = problem.changed(value=problem.value + 8, grad_out=problem.grad_out + 1, grad_lse=None)
    problem = problem.to(torch.bfloat16)
    assert_at_least_as_accurate(problem, solve(problem.to(torch.float64), "reference"), backend="triton")


def test_small_weights_under_a_large_gradient_in_float16():
    """As scaling a loss makes them: no weight may vanish in the small range of float16."""
    tokens = label_map([[0, 0, 1], [1, 1, 0]], 2), LatentLayout((2, 2))
    problem = make_problem(*tokens, batch=1, heads=1, key_width=4)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    problem = problem.changed(
        query=torch.ones_like(problem.query),
        key=torch.full_like(problem.key, 3.5) * sign,
        grad_out=1000 * problem.grad_out,
        grad_lse=None,
    ).to(torch.float16)
    expected = solve(problem.to(torch.float64), "reference").grad_value[..., 1::2, :]
    assert expected.abs().max() < 1e-2
    error = solve(problem, "triton").grad_value[..., 1::2, :] - expected
    assert error.norm() < 1e-3 * expected.norm()


@pytest.mark.usefixtures("small_tiles")
@combination
def test_several_blocks_of_everything(combination):
    """Rows, columns, chunks and widths of several blocks, with ends that are not full."""
    pixels, more_pixels = random_map(2, 4, 9, 3, without=[1], seed=1), random_map(2, 5, 7, 3, seed=2)
    tokens = combine(combination, pixels, more_pixels, LatentLayout((17, 1, 3)), LatentLayout((2, 0, 18)))
    problem = make_problem(*tokens, heads=1, key_width=17, value_width=35)
    assert_matches_reference(problem, backend="triton")


@pytest.mark.parametrize(
    ("combination", "wanted"),
    [
        ("pixel-latent", (True, False, False)),
        ("latent-pixel", (False, True, False)),
        ("latent-latent", (False, False, True)),
        ("pixel-pixel", (True, False, False)),
        ("pixel-pixel", (False, False, True)),
    ],
    ids=str,
)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(combination, wanted):
    problem = tiny(combination)
    together, alone = solve(problem, "triton"), solve(problem, "triton", wanted=wanted)
    kept = [got if asked else None for got, asked in zip(together[2:], wanted, strict=True)]
    assert_same_bits(alone, together._replace(grad_query=kept[0], grad_key=kept[1], grad_value=kept[2]))


@combination
def test_gradients_through_lse_alone(combination):
    assert_matches_reference(tiny(combination).changed(grad_out=None), backend="triton")


@combination
def test_scale(combination):
    assert_matches_reference(tiny(combination), backend="triton", scale=-2.5)


def channels_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def every_other_channel(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor.new_full((), torch.nan).expand_as(tensor)), -1).flatten(3)[..., ::2]


@combination
@pytest.mark.parametrize("arrangement", [channels_first, every_other_channel])
def test_any_strides(combination, arrangement):
    problem = tiny(combination, batch=2, heads=2)
    tensors = {name: arrangement(getattr(problem, name)) for name in ("query", "key", "value", "grad_out")}
    assert_matches_reference(problem.changed(**tensors), backend="triton")


@pytest.mark.parametrize("combination", ["pixel-latent", "latent-pixel", "pixel-pixel"])
def test_every_pixel_its_own_label(combination):
    pixels = label_map(torch.randperm(35, generator=torch.Generator().manual_seed(0)).view(1, 5, 7), 36)
    latents = LatentLayout(tuple(index % 3 for index in range(36)))
    tokens = combine(combination, pixels, pixels, latents, latents)
    assert_matches_reference(make_problem(*tokens, batch=1, heads=1), backend="triton")


@combination
def test_one_map_for_all_images(combination):
    pixels, more_pixels = random_map(1, 4, 5, 3, seed=1), random_map(1, 3, 5, 3, seed=2)
    tokens = combine(combination, pixels, more_pixels, LatentLayout((1, 0, 2)), LatentLayout((2, 1, 1)))
    assert_matches_reference(make_problem(*tokens, heads=1), backend="triton")


@combination
def test_numbers_that_are_none_stay_with_their_label(combination):
    """A key, a value or a gradient that is no number reaches the tokens of its own label alone."""
    problem = tiny(combination).changed(grad_lse=None)
    clean = solve(problem, "triton", empty="zero")
    query_labels, key_labels = (labels_of(tokens) for tokens in (problem.query_tokens, problem.key_tokens))
    label = int(key_labels[0])
    for name in ("key", "value"):
        spoilt = getattr(problem, name).clone()
        spoilt[:, :, 0] = torch.nan
        results = solve(problem.changed(**{name: spoilt}), "triton", empty="zero")
        others = {"out": query_labels != label, "grad_query": query_labels != label}
        others |= {"grad_key": key_labels != label, "grad_value": key_labels != label}
        for result, kept in others.items():
            assert torch.equal(getattr(results, result)[:, :, kept], getattr(clean, result)[:, :, kept]), result
        assert results.out[:, :, query_labels == label].isnan().all()


def labels_of(tokens: LabelMap | LatentLayout) -> Tensor:
    return tokens.labels[0].flatten() if isinstance(tokens, LabelMap) else tokens.labels(torch.device("cpu"))


@pytest.mark.parametrize("combination", ["pixel-latent", "latent-pixel", "latent-latent"])
def test_selection_and_value_for_queries_without_keys(combination):
    pixels = label_map([[[0, 0, 2], [-1, 2, 2]], [[1, 1, 1], [1, 3, -1]]], 5)
    selection = LatentLayout((3, 1, 2, 0, 4)).present_in(pixels)
    tokens = combine(combination, pixels, pixels, selection, selection)
    problem = make_problem(*tokens, heads=2)
    given = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(5))

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        moved = problem.to(dtype).on(device_of(backend))
        empty_value = on_device(given.to(dtype), device_of(backend)).requires_grad_()
        inputs = [tensor.requires_grad_() for tensor in moved.inputs]
        with sca_kernels.backend(backend):
            out, lse = semantic_cross_attention(
                *inputs, moved.query_tokens, moved.key_tokens, empty_value=empty_value, return_lse=True
            )
        found = torch.autograd.grad((out, lse), (*inputs, empty_value), (moved.grad_out, moved.grad_lse))
        return [result.detach().cpu() for result in (out, lse, *found)]

    for actual, expected in zip(run("triton", torch.float32), run("reference", torch.float64), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combination", ["pixel-latent", "latent-pixel"])
@pytest.mark.parametrize("sizes", [(0, 1, 3, 5), (1, 0, 3, 5), (1, 1, 0, 5), (1, 1, 3, 0)], ids=str)
def test_nothing_of_something(combination, sizes):
    batch, heads, key_width, value_width = sizes
    tokens = combine(
        combination, label_map(torch.zeros(batch, 2, 3, dtype=torch.int32), 2), random_map(batch, 2, 2, 2),
        LatentLayout((2, 1)), LatentLayout((1, 2)),
    )  # fmt: skip
    problem = make_problem(*tokens, batch=batch, heads=heads, key_width=key_width, value_width=value_width)
    expected = solve(problem.to(torch.float64), "reference", scale=1.0)
    assert_close(solve(problem, "triton", scale=1.0), expected, 1e-5)


@combination
@pytest.mark.parametrize("side", ["query", "key"])
def test_no_tokens_on_one_side(combination, side):
    nothing = {"pixel": label_map(torch.zeros(1, 0, 3, dtype=torch.int32), 2), "latent": LatentLayout((0, 0))}
    something = {"pixel": label_map([[0, 1, 1]], 2), "latent": LatentLayout((2, 1))}
    of_query, of_key = combination.split("-")
    tokens = (nothing if side == "query" else something)[of_query], (nothing if side == "key" else something)[of_key]
    problem = make_problem(*tokens, batch=1, heads=1)
    assert_close(solve(problem, "triton"), solve(problem.to(torch.float64), "reference"), 1e-5)
