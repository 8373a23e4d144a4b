"""Matrix products on the matrix units, as the kernels want them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def product_precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed for feature maps or tokens of this type.

    In TF32 if they are float32 and PyTorch's own products may be, otherwise as exactly as float32: on NVIDIA's matrix
    units three products in TF32 are, and AMD's have float32. Products of 16 bit numbers are exact in any case.
    """
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def float32_precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed where the features in them, converted to float32, come from ``dtype``.

    Three products of narrower numbers, which is as exact as float32 up to a few units in the last place. Float16 has
    too small a range to split float32 into: gradients would vanish in it.
    """
    return "bf16x3" if dtype == torch.bfloat16 else product_precision(dtype)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b in float32, for a and b of one type as they come from memory."""
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def weighted_product(weights, b, total, PRECISION: tl.constexpr):
    """total + weights @ b, for weights in float32 and b as it comes from memory.

    Rounding the weights to 16 bits would show in results and spoil gradients, which are differences of such sums. For
    bfloat16 they are split in two numbers. Float16 has too small a range for that, but TF32 holds all of its numbers.
    """
    if b.dtype == tl.bfloat16:
        high = weights.to(b.dtype)
        low = (weights - high.to(tl.float32)).to(b.dtype)
        total = tl.dot(low, b, tl.dot(high, b, total))
    else:
        total = tl.dot(weights, b.to(tl.float32), total, input_precision=PRECISION)
    return total
