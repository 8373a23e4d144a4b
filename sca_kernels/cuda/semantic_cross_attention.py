"""Semantic cross-attention by the compiled kernels for GPUs."""

import functools

from .. import cuda
from ..c_interface import semantic_cross_attention as calls

semantic_cross_attention = functools.partial(calls.semantic_cross_attention, cuda)
semantic_cross_attention_backward = functools.partial(calls.semantic_cross_attention_backward, cuda)
