"""Instance normalisation with modulation, noise and activation by the compiled kernels for CPUs."""

import functools

from .. import cpu
from ..c_interface import instance_modulate as calls

instance_modulate = functools.partial(calls.instance_modulate, cpu)
instance_modulate_backward = functools.partial(calls.instance_modulate_backward, cpu)
