"""Instance normalisation with modulation, noise and activation by the compiled kernels for GPUs."""

import functools

from .. import cuda
from ..c_interface import instance_modulate as calls

instance_modulate = functools.partial(calls.instance_modulate, cuda)
instance_modulate_backward = functools.partial(calls.instance_modulate_backward, cuda)
