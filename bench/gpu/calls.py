"""Calls of the operators of all kinds and at the published shapes: what is compiled, and what traffic is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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
    yield from ()
