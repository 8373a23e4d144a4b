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


def arguments(x: Any, out: Any = None, stats: Any = STATS) -> tuple[Any, ...]:
    """Of an InstanceModulate on (1, 2, 3, 4) without modulation, with given statistics."""
    flags = (True, True, False, False, False)  # add_one, stats_given and those that do not matter here
    return (cpu.capability(), 1, 0, *flags, 1, 2, 3, 4, x, out, None, None, None, None, stats, None, None, None)


def call_of(values: tuple[Any, ...]) -> Any:
    return cpu.native.InstanceModulate(values, 1e-5, 1.0)


def workspace_of(call: Any) -> Tensor:
    return torch.empty(call.workspace_size(), dtype=torch.uint8)


def test_reads_strides_and_halves():
    x = torch.randn(3, 1, 4, 2).permute(1, 3, 0, 2)
    out = torch.empty(1, 2, 4, 3).transpose(2, 3)
    call = call_of(arguments(x, out))
    call.forward(workspace_of(call))
    mean, rstd = (half.float()[:, :, None, None] for half in STATS)
    torch.testing.assert_close(out, (x - mean) * rstd)


def test_a_call_keeps_its_tensors():
    x = torch.randn(1, 2, 3, 4)
    seen = weakref.ref(x)
    call = call_of(arguments(x, torch.empty(1, 2, 3, 4)))
    del x
    gc.collect()
    assert seen() is not None
    del call
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (arguments([[1.0]]), TypeError, "expected a tensor or None"),
        (arguments(0), TypeError, "expected a tensor or None"),
        (arguments(torch.randn(2, 3, 4)), TypeError, "four dimensions"),
        (arguments(torch.randn(1, 2, 3, 4), stats=1), TypeError, "expected a tensor or None"),
        (arguments(torch.randn(1, 2, 3, 4))[:-1], IndexError, "too few arguments"),
        ((*arguments(torch.randn(1, 2, 3, 4)), 0), IndexError, "too many arguments"),
        (("avx2", *arguments(torch.randn(1, 2, 3, 4))[1:]), TypeError, "int"),
        ((99, *arguments(torch.randn(1, 2, 3, 4))[1:]), ValueError, "instruction set"),
    ],
    ids=["list", "number", "three dimensions", "table", "too few", "too many", "no integer", "no such kernels"],
)
def test_refuses(values, error, message):
    with pytest.raises(error, match=message):
        call_of(values)


def test_refuses_a_workspace_that_is_no_tensor():
    call = call_of(arguments(torch.randn(1, 2, 3, 4), torch.empty(1, 2, 3, 4)))
    with pytest.raises(TypeError, match="expected a tensor or None"):
        call.forward(1)
