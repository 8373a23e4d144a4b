"""Label-masked cross-attention: every token attends to the tokens of its own semantic label."""

from ._version import __version__
from .backends import backend
from .labels import LabelMap, LatentLayout
from .ops.semantic_cross_attention import semantic_cross_attention

__all__ = [
    "LabelMap",
    "LatentLayout",
    "__version__",
    "backend",
    "semantic_cross_attention",
]
