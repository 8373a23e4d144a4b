"""Modulation of normalised features by the compiled kernels for CPUs."""

import functools

from .. import cpu
from ..c_interface import semantic_modulate as calls

semantic_modulate = functools.partial(calls.semantic_modulate, cpu)
semantic_modulate_backward = functools.partial(calls.semantic_modulate_backward, cpu)
