"""Label-masked cross-attention: every token attends to the tokens of its own semantic label."""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .backends import backend
from .labels import LabelMap, LatentLayout, LatentSelection
from .ops.instance_modulate import instance_modulate
from .ops.semantic_cross_attention import semantic_cross_attention
from .ops.semantic_modulate import semantic_modulate
from .ops.semantic_pool import Pooled, merge_pools, semantic_pool

if TYPE_CHECKING:
    from .interop import SwapReport, swap_in, swap_out

__all__ = [
    "LabelMap",
    "LatentLayout",
    "LatentSelection",
    "Pooled",
    "SwapReport",
    "__version__",
    "backend",
    "instance_modulate",
    "merge_pools",
    "semantic_cross_attention",
    "semantic_modulate",
    "semantic_pool",
    "swap_in",
    "swap_out",
]


def __getattr__(name: str) -> Any:
    # Few programs swap, and the modules that it needs are not imported otherwise.
    if name in ("SwapReport", "swap_in", "swap_out"):
        from . import interop

        return getattr(interop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
