"""Pooling of raw features by the compiled kernels for CPUs."""

import functools

from .. import cpu
from ..c_interface import semantic_pool as calls

semantic_pool = functools.partial(calls.semantic_pool, cpu)
semantic_pool_backward = functools.partial(calls.semantic_pool_backward, cpu)
