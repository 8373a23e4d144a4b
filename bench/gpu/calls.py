"""Calls of the operators of all kinds and at the published shapes: what is compiled, and what traffic is counted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sca_kernels import instance_modulate

MEMORY = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Attributes:
        operator: its name.
        name: what is special about it.
        dtype: of the feature map or of the tokens.
        run: makes the tensors and calls the operator.
        headline: whether it is one of the shapes that figures are published for.
    """

    operator: str
    name: str
    dtype: torch.dtype
    run: Callable[[], Tensor | tuple[Tensor, ...]]
    headline: bool = False

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}-{str(self.dtype).removeprefix('torch.')}"


def all_calls() -> Iterator[Call]:
    """Every kernel is launched by one of them, in each configuration that is shipped."""
    for dtype in DTYPES:
        yield from instance_modulate_calls(dtype)


def instance_modulate_calls(dtype: torch.dtype) -> Iterator[Call]:
    shape = (1, 64, 256, 256)

    def modulate(memory: torch.memory_format, by_pixel: bool, **options: Any) -> Tensor:
        def feature_map() -> Tensor:
            return torch.empty(shape, dtype=dtype).to(memory_format=memory).requires_grad_()

        def channel_table() -> Tensor:
            return torch.empty(shape[:2], requires_grad=True)

        parameter = feature_map if by_pixel else channel_table
        return instance_modulate(feature_map(), parameter(), parameter(), **options)

    for order, memory in MEMORY.items():
        noise = torch.empty(1, 1, *shape[2:])
        strength = torch.empty(shape[1], requires_grad=True)
        by_pixel = functools.partial(modulate, memory, True, noise=noise, noise_strength=strength)
        yield Call("instance_modulate", f"by pixel, {order}", dtype, by_pixel, headline=True)
        by_channel = functools.partial(
            modulate, memory, False, noise="per_element", stats=(torch.empty(64), torch.empty(64)), add_one=False
        )
        yield Call("instance_modulate", f"by channel, {order}", dtype, by_channel)
