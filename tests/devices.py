"""Where a backend's tensors must be, and how those of a test get there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sca_kernels import cuda, triton


def device_of(backend: str) -> torch.device:
    """The CPU, except for kernels for GPUs that are neither interpreted nor emulated."""
    on_a_gpu = {"triton": not triton.INTERPRETED, "cuda": cuda.why_not() is None}
    return torch.device("cuda" if on_a_gpu.get(backend) else "cpu")


def on_device(values: Any, device: torch.device) -> Any:
    """The tensors of a pytree on a device, with the strides that they have."""
    return pytree.tree_map_only(Tensor, lambda tensor: _copy(tensor, device), values)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    if tensor.numel() == 0:
        return tensor.to(device)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps)
    memory = tensor.detach().as_strided((span,), (1,)).to(device)
    return memory.as_strided(tensor.shape, tensor.stride()).requires_grad_(tensor.requires_grad)
