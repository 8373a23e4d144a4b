"""The layers of SCAM as modules, on folded kernels.

The parameters are those of the published layers, one to one, under names that say what they are. What a module computes
does not depend on how: projections are folded onto the latents wherever that is faster, see :mod:`sca_kernels.folding`.
In evaluation mode products of weights alone are remembered; modules can be compiled, copied and pickled.
"""

from .attention import SemanticAttentionTransformer, SemanticCrossAttention
from .encoding import sinusoidal_encoding
from .layers import AttentionLayers, Convolution, Linear
from .map_encoder import MapEncoder
from .modulation import SemanticModulation

__all__ = [
    "AttentionLayers",
    "Convolution",
    "Linear",
    "MapEncoder",
    "SemanticAttentionTransformer",
    "SemanticCrossAttention",
    "SemanticModulation",
    "sinusoidal_encoding",
]
