"""Matrix products of a few rows with weights: the same as PyTorch's, in whatever order the factors lie."""

from __future__ import annotations

import time

import pytest
import torch
from tokens import error_ratio
from torch import Tensor, nn

from sca_kernels.folding import products
from sca_kernels.folding.products import linear


@pytest.fixture(autouse=True, params=["MKL", "oneDNN"])
def library(request, monkeypatch):
    """Both libraries, whichever is the quicker one on this processor."""
    if request.param == "oneDNN" and not products._has_onednn:
        pytest.skip("PyTorch has no oneDNN here")
    monkeypatch.setattr(products, "_prefers_onednn", request.param == "oneDNN")


@pytest.mark.parametrize("rows", [(3,), (64, 9), (40, 300), (2, 40, 300)])
def test_linear(rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, generator=generator, requires_grad=True)
    weight = torch.randn(200, rows[-1], generator=generator, requires_grad=True)
    bias = torch.randn(200, generator=generator, requires_grad=True)
    for factor in (weight, weight.detach().t().contiguous().t().requires_grad_()):
        inputs = (x, factor, bias)
        results = []
        for function in (linear, nn.functional.linear):
            out = function(*inputs)
            first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(part.square().sum() for part in first), inputs)
            results.append([out, *first, *second])
        for got, wanted in zip(*results, strict=True):
            assert error_ratio(got.detach(), wanted.detach()) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, bias), linear(x, weight, bias).float())
        assert torch.autograd.grad(linear(x, weight, bias).sum(), x)[0].dtype == torch.float32
    assert torch.func.vmap(linear, (0, None))(x.detach().unsqueeze(0), weight.detach()).shape == (1, *rows[:-1], 200)


def test_parts_of_a_matrix():
    """oneDNN would take a thousand times as long for a weight whose rows do not lie side by side."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 310, generator=generator)
    rows = torch.randn(64, 300, generator=generator)
    for weight in (matrix[:, :300], matrix[:, 7:307], matrix.t()[3:], matrix.t()[10:, :300]):
        dense = weight.contiguous()
        assert error_ratio(linear(rows, weight), linear(rows, dense)) < 1e-6
        assert shortest(rows, weight) < 30 * shortest(rows, dense)


def shortest(rows: Tensor, weight: Tensor) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        linear(rows, weight)
        times.append(time.perf_counter() - start)
    return min(times)
