"""Semantic cross-attention by the compiled kernels for CPUs."""

import functools

from .. import cpu
from ..c_interface import semantic_cross_attention as calls

semantic_cross_attention = functools.partial(calls.semantic_cross_attention, cpu)
semantic_cross_attention_backward = functools.partial(calls.semantic_cross_attention_backward, cpu)
