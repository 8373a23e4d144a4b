"""Modulation of normalised features by the compiled kernels for GPUs."""

import functools

from .. import cuda
from ..c_interface import semantic_modulate as calls

semantic_modulate = functools.partial(calls.semantic_modulate, cuda)
semantic_modulate_backward = functools.partial(calls.semantic_modulate_backward, cuda)
