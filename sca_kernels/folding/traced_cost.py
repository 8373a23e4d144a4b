"""The fastest way as code that is compiled sees it: a constant, found once and not traced."""

from __future__ import annotations

from typing import Any

import torch

from .cost import FoldingProblem, fastest


@torch.compiler.assume_constant_result
def choose_while_tracing(choice: str, *problem: Any) -> tuple[Any, ...]:
    """The attributes of the :class:`FoldingChoice` for those of a :class:`FoldingProblem`."""
    way = fastest(FoldingProblem(*problem), choice)
    return way.folded, way.logits, way.values, way.selects
