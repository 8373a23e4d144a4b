"""The operators as PyTorch sees them: schemas, argument checks, fake kernels, autograd and dispatch."""

from . import instance_modulate, label_plan, semantic_cross_attention, semantic_modulate, semantic_pool

__all__ = ["instance_modulate", "label_plan", "semantic_cross_attention", "semantic_modulate", "semantic_pool"]
