"""Pooling of raw features by the compiled kernels for GPUs."""

import functools

from .. import cuda
from ..c_interface import semantic_pool as calls

semantic_pool = functools.partial(calls.semantic_pool, cuda)
semantic_pool_backward = functools.partial(calls.semantic_pool_backward, cuda)
