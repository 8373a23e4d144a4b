"""The operators as PyTorch sees them: schemas, argument checks, fake kernels, autograd and dispatch."""

from . import label_plan, semantic_cross_attention

__all__ = ["label_plan", "semantic_cross_attention"]
