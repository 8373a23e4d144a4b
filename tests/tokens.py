"""Tokens, the tensors that go with them, and how results are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from devices import device_of, on_device
from torch import Tensor

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, LatentSelection, semantic_cross_attention

Tokens = LabelMap | LatentLayout | LatentSelection

# Largest error, as a ratio of norms against the reference in float64.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def label_map(labels: Sequence[Any] | Tensor, num_labels: int) -> LabelMap:
    """A map of the labels of one image, as rows of pixels, or of several."""
    return LabelMap.from_labels(torch.as_tensor(labels), num_labels)


def random_map(
    batch: int, height: int, width: int, num_labels: int, *, without: Sequence[int] = (), seed: int = 0
) -> LabelMap:
    """A map in which each pixel has a random label, or none (-1), except for the labels ``without``."""
    choices = torch.tensor([label for label in range(-1, num_labels) if label not in without])
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(choices), (batch, height, width), generator=generator)
    return LabelMap.from_labels(choices[index], num_labels)


def mostly(label: int, pixels: LabelMap) -> LabelMap:
    """Three quarters of the pixels get one label, enough for several of the chunks that the kernels work in."""
    labels = pixels.labels.flatten(1).clone()
    labels[:, torch.arange(labels.shape[1]) % 4 != 0] = label
    assert (labels == label).sum(1).min() > 600
    return LabelMap(labels.view_as(pixels.labels), pixels.num_labels)


def combinations() -> dict[str, tuple[Tokens, Tokens]]:
    """Query and key tokens of every kind, for two images.

    Five labels, with pixels that have none, labels without pixels, and labels without latents, on either side.
    """
    pixels = random_map(2, 7, 9, 5, without=[3], seed=1)
    more_pixels = random_map(2, 5, 11, 5, without=[1], seed=2)
    latents, more_latents = LatentLayout((3, 1, 0, 2, 5)), LatentLayout((2, 4, 3, 0, 1))
    return {
        "pixel-latent": (pixels, latents),
        "latent-pixel": (latents, pixels),
        "latent-latent": (latents, more_latents),
        "pixel-pixel": (pixels, more_pixels),
    }


COMBINATIONS = combinations()


def count(tokens: Tokens) -> int:
    """The number of tokens in an image."""
    return tokens.height * tokens.width if isinstance(tokens, LabelMap) else tokens.count


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call, and the gradients that flow into its two results; None for one that takes no gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_tokens: Tokens
    key_tokens: Tokens
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def changed(self, **changes: Any) -> Problem:
        return dataclasses.replace(self, **changes)

    def on(self, device: torch.device) -> Problem:
        names = ("query", "key", "value", "query_tokens", "key_tokens", "grad_out", "grad_lse")
        return self.changed(**on_device({name: getattr(self, name) for name in names}, device))

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers, rounded to ``dtype``; the gradient of lse is never less than float32."""
        query, key, value = (tensor.to(dtype) for tensor in self.inputs)
        grad_out = None if self.grad_out is None else self.grad_out.to(dtype)
        grad_lse = None if self.grad_lse is None else self.grad_lse.to(torch.promote_types(dtype, torch.float32))
        return self.changed(query=query, key=key, value=value, grad_out=grad_out, grad_lse=grad_lse)


class Results(NamedTuple):
    """Outputs and gradients; the gradients that were not asked for are None."""

    out: Tensor
    lse: Tensor
    grad_query: Tensor | None
    grad_key: Tensor | None
    grad_value: Tensor | None


def make_problem(
    query_tokens: Tokens,
    key_tokens: Tokens,
    *,
    batch: int = 2,
    heads: int = 2,
    key_width: int = 5,
    value_width: int = 7,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """A call with random tensors and random gradients."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = count(query_tokens), count(key_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, heads, *shape, generator=generator, dtype=torch.float64)

    return Problem(
        query=normal(queries, key_width),
        key=normal(keys, key_width),
        value=normal(keys, value_width),
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        grad_out=normal(queries, value_width),
        grad_lse=normal(queries),
    ).to(dtype)


def solve(
    problem: Problem,
    backend: str,
    *,
    empty: str = "uniform",
    scale: float | None = None,
    wanted: Sequence[bool] = (True, True, True),
) -> Results:
    """The results of a backend, which is forced: a test never compares the reference with itself."""
    device = device_of(backend)
    problem = problem.on(device)
    inputs = [tensor.detach().requires_grad_(asked) for tensor, asked in zip(problem.inputs, wanted, strict=True)]
    with sca_kernels.backend(backend):
        out, lse = semantic_cross_attention(
            *inputs, problem.query_tokens, problem.key_tokens, scale=scale, empty=empty, return_lse=True
        )
    flows = [
        (result, gradient)
        for result, gradient in ((out, problem.grad_out), (lse, problem.grad_lse))
        if gradient is not None and result.requires_grad
    ]
    asked_for = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = {id(tensor): torch.zeros_like(tensor) for tensor in asked_for}
    if flows and asked_for:
        results, result_gradients = zip(*flows, strict=True)
        found = torch.autograd.grad(results, asked_for, result_gradients, allow_unused=True, materialize_grads=True)
        gradients = {id(tensor): gradient for tensor, gradient in zip(asked_for, found, strict=True)}
    found_results = Results(out.detach(), lse.detach(), *(gradients.get(id(tensor)) for tensor in inputs))
    return Results(*on_device(tuple(found_results), torch.device("cpu")))


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Norm of the error over norm of what is expected; infinite where shapes, infinities or NaNs differ."""
    actual, expected = actual.double(), expected.double()
    if actual.shape != expected.shape:
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(nan=0.5), expected[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    error, size = (actual - expected)[finite].norm().item(), expected[finite].norm().item()
    return error / size if size > 0 else error


def assert_close(actual: Results, expected: Results, tolerance: float) -> None:
    """Each result agrees within ``tolerance``, as a ratio of norms, and is there or not as expected."""
    for name, got, wanted in zip(Results._fields, actual, expected, strict=True):
        assert (got is None) == (wanted is None), name
        if got is not None:
            ratio = error_ratio(got, wanted)
            assert ratio <= tolerance, f"{name}: error {ratio:.2e}, expected at most {tolerance:.0e}"


def assert_same_bits(actual: Results, expected: Results) -> None:
    """Each result is the same, the sign of zero and the bits of NaN included."""
    for name, got, wanted in zip(Results._fields, actual, expected, strict=True):
        assert (got is None) == (wanted is None), name
        if got is not None:
            assert got.shape == wanted.shape, name
            integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
            different = (got.contiguous().view(integers) != wanted.contiguous().view(integers)).sum().item()
            assert different == 0, f"{name}: {different} of {got.numel()} elements differ"


def assert_matches_reference(
    problem: Problem, *, backend: str = "cpu", tolerance: float | None = None, **settings: Any
) -> Results:
    """The kernels agree with the reference in float64 on outputs and gradients; returns their results."""
    actual = solve(problem, backend, **settings)
    expected = solve(problem.to(torch.float64), "reference", **settings)
    assert_close(actual, expected, TOLERANCE[problem.query.dtype] if tolerance is None else tolerance)
    return actual


def assert_at_least_as_accurate(
    problem: Problem, expected: Results, *, backend: str = "cpu", empty: str = "uniform"
) -> None:
    """At most 1.5 times the error that the reference makes in the same type, or what float32 rounds away."""
    actual = solve(problem, backend, empty=empty)
    rounded = solve(problem, "reference", empty=empty)
    assert actual.out.dtype == problem.query.dtype and actual.lse.dtype == torch.float32
    for name, got, also, wanted in zip(Results._fields, actual, rounded, expected, strict=True):
        assert got is not None and also is not None and wanted is not None
        assert got.dtype == also.dtype, name
        limit = 1.5 * error_ratio(also, wanted) + 1e-6
        assert error_ratio(got, wanted) <= limit, f"{name}: {error_ratio(got, wanted):.2e} > {limit:.2e}"


def combine(
    combination: str, pixels: LabelMap, more_pixels: LabelMap, latents: LatentLayout, more_latents: LatentLayout
) -> tuple[Tokens, Tokens]:
    """The tokens of query and key, of those given, for a combination of kinds."""
    return {
        "pixel-latent": (pixels, latents),
        "latent-pixel": (latents, pixels),
        "latent-latent": (latents, more_latents),
        "pixel-pixel": (pixels, more_pixels),
    }[combination]
