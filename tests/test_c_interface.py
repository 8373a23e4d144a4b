"""How compiled calls read their arguments: whatever Python passes, no kernel gets an address that means nothing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from sca_kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

STATS = torch.tensor([[[1.0, 2.0]], [[0.5, 0.25]]], dtype=torch.float64)  # mean and rstd of two channels
SETTINGS = (cpu.capability(), 1, 0)
X = torch.randn(1, 2, 3, 4)


def arguments(
    x: Any = X, *, gamma: Any = None, beta: Any = None, noise: Any = None, strength: Any = None
) -> tuple[Any, ...]:
    """Of instance_modulate on (1, 2, 3, 4), with given statistics and without activation."""
    return (x, gamma, beta, STATS, STATS, noise, None, strength, False, False, 1e-5, 1.0)


def modulated(**parameters: Any) -> Tensor:
    out = torch.empty(X.shape)
    cpu.native.instance_modulate(SETTINGS, arguments(**parameters), (out, STATS))
    return out


def normalised(x: Tensor = X) -> Tensor:
    mean, rstd = (half.float()[:, :, None, None] for half in STATS)
    return (x - mean) * rstd


def test_reads_strides_and_halves():
    x = torch.randn(3, 1, 4, 2).permute(1, 3, 0, 2)
    out = torch.empty(1, 2, 4, 3).transpose(2, 3)
    cpu.native.instance_modulate(SETTINGS, arguments(x), (out, STATS))
    torch.testing.assert_close(out, normalised(x))


@pytest.mark.parametrize(
    "parameter",
    [
        torch.randn(1, 2, 3, 4),
        torch.randn(1, 2, 4, 3).transpose(2, 3),
        torch.randn(1, 2),
        torch.randn(2),
        torch.randn(4)[::2],
        torch.randn(1, 1),
        torch.randn(()),
    ],
    ids=["map", "transposed", "table", "channels", "gaps", "one number", "scalar"],
)
def test_broadcasts_parameters(parameter):
    """As the operator's checks would have, which a call like an earlier one leaves out."""
    wide = parameter if parameter.dim() == 4 else parameter.expand(1, 2)[..., None, None]
    torch.testing.assert_close(modulated(gamma=parameter, beta=parameter), wide * normalised() + wide)


@pytest.mark.parametrize("shape", [(1, 1, 3, 4), (3, 4), (4,), (3, 1), (1, 1, 1, 1), ()], ids=str)
def test_broadcasts_noise(shape):
    noise = torch.randn(shape)
    torch.testing.assert_close(modulated(noise=noise, strength=torch.ones(2)), normalised() + noise)


@pytest.mark.parametrize("on_stack", [True, False])
def test_workspace_and_unwanted_statistics_have_memory(on_stack):
    cpu.native.use_stack(on_stack)
    out = torch.empty(X.shape)
    values = (X, *[None] * 7, False, False, 1e-5, 1.0)
    cpu.native.instance_modulate(SETTINGS, values, (out, None))
    torch.testing.assert_close(out, torch.nn.functional.instance_norm(X))


def test_a_call_keeps_no_tensors():
    x = X.clone()
    seen = weakref.ref(x)
    cpu.native.instance_modulate(SETTINGS, arguments(x), (torch.empty(x.shape), STATS))
    del x
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(
    ("settings", "values", "results", "error", "message"),
    [
        (SETTINGS, arguments([[1.0]]), (X, STATS), TypeError, "expected a tensor or None"),
        (SETTINGS, arguments(0), (X, STATS), TypeError, "expected a tensor or None"),
        (SETTINGS, arguments(None), (X, STATS), TypeError, "expected a tensor"),
        (SETTINGS, arguments(torch.randn(2, 3, 4)), (X, STATS), TypeError, "four dimensions"),
        (SETTINGS, arguments(X.int()), (X, STATS), TypeError, "floating-point"),
        (SETTINGS, arguments(), (X, 1), TypeError, "expected a tensor or None"),
        (SETTINGS, arguments()[:-1], (X, STATS), IndexError, "too few arguments"),
        (SETTINGS, (*arguments(), 0), (X, STATS), IndexError, "too many arguments"),
        (SETTINGS, arguments(), (X,), IndexError, "too few arguments"),
        (SETTINGS, arguments(), (X, STATS, STATS), IndexError, "too many arguments"),
        (SETTINGS, (*arguments()[:-1], "steep"), (X, STATS), TypeError, "real number"),
        (("avx2", *SETTINGS[1:]), arguments(), (X, STATS), TypeError, "int"),
        ((99, *SETTINGS[1:]), arguments(), (X, STATS), ValueError, "instruction set"),
    ],
    ids=[
        "list", "number", "none", "three dimensions", "integers", "table", "too few", "too many",
        "too few results", "too many results", "no number", "no integer", "no such kernels",
    ],
)  # fmt: skip
def test_refuses(settings, values, results, error, message):
    with pytest.raises(error, match=message):
        cpu.native.instance_modulate(settings, values, results)
