"""Label-masked cross-attention: every token attends to the tokens of its own semantic label."""

from ._version import __version__
from .backends import backend
from .labels import LabelMap, LatentLayout, LatentSelection
from .ops.instance_modulate import instance_modulate
from .ops.semantic_cross_attention import semantic_cross_attention
from .ops.semantic_modulate import semantic_modulate
from .ops.semantic_pool import Pooled, merge_pools, semantic_pool

__all__ = [
    "LabelMap",
    "LatentLayout",
    "LatentSelection",
    "Pooled",
    "__version__",
    "backend",
    "instance_modulate",
    "merge_pools",
    "semantic_cross_attention",
    "semantic_modulate",
    "semantic_pool",
]
