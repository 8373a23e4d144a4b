"""Matrix products of a few rows, the latents, with weights: by the fastest routine that PyTorch has for them.

On x86 PyTorch multiplies float32 matrices with MKL, and oneDNN, which it carries as well, takes half the time or less
where the processor has AVX-512 and MKL does not use it (2 cores of an EPYC: 110 against 260 billion multiply-adds in a
second). It is used there for plain calls; whatever is compiled, transformed or not float32 goes through
``torch.nn.functional.linear``. With AVX2 alone MKL is the quicker one, by up to a half. On processors of Intel, whose
AVX-512 MKL does use, PyTorch's own function takes 0.8 to 1 of the time, and with gradients 0.5 to 0.8.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..tracing import is_plain_call

# Below it both are equally fast, and MKL wakes no other thread.
_FEWEST_MULTIPLY_ADDS = 1 << 20


def _is_of_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel" in platform.processor()


_has_onednn = (
    torch.backends.mkldnn.is_available()
    and platform.machine() in ("x86_64", "AMD64")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_prefers_onednn = _has_onednn and torch.backends.cpu.get_cpu_capability() == "AVX512" and not _is_of_intel()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias``, like ``torch.nn.functional.linear``, but never cast by autocast.

    Args:
        rows: (..., a), any strides.
        weight: (b, a), any strides.
        bias: (b).

    Returns:
        (..., b), contiguous.

    Gradients: of all three, any number of times.

    Example:
        >>> linear(torch.ones(2, 3), torch.full((1, 3), 2.0)).tolist()
        [[6.0], [6.0]]
    """
    if not _is_fast(rows, weight, bias):
        if torch.is_autocast_enabled(rows.device.type):
            with torch.autocast(rows.device.type, enabled=False):
                return F.linear(rows, weight, bias)
        return F.linear(rows, weight, bias)
    flat = rows.flatten(0, -2)
    if torch.is_grad_enabled() and (
        rows.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        result: Tensor = _Linear.apply(flat, weight, bias)
    else:
        result = _multiply(flat, weight, bias)
    return result.view(*rows.shape[:-1], weight.shape[0])


def _is_fast(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        _prefers_onednn
        and not torch.compiler.is_compiling()
        and rows.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and rows.device.type == weight.device.type == "cpu"
        and rows.dim() > 1
        and rows.shape[-1] == weight.shape[-1]
        and rows.numel() * weight.shape[0] >= _FEWEST_MULTIPLY_ADDS
        and torch._C._get_mkldnn_enabled()
        and forward_ad._current_level < 0
        and is_plain_call((rows, weight, bias))
    )


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(_dense(rows), _dense(weight), bias, "none", [], "")
    return result


def _dense(matrix: Tensor) -> Tensor:
    """Without gaps between rows or columns: with them oneDNN falls back to code a thousand times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _multiply(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if wants_rows else None,
            linear(grad.t(), rows.t()) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )
