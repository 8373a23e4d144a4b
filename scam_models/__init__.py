"""SCAM (Dufour et al., ECCV 2022): an encoder of images to latents for each label, and a generator of images.

Made of the layers in :mod:`sca_kernels.nn`.
"""

from .configurations import (
    EncoderConfiguration,
    GeneratorConfiguration,
    ScamConfiguration,
    ade20k,
    celebamask_hq,
    idesigner,
    tiny,
)
from .encoder import Encoder
from .generator import Generator
from .latents import LatentDistribution, Latents, take_latents
from .model import Scam, StrongestLatents
from .published import load_published_state_dict, published_state_dict

__all__ = [
    "Encoder",
    "EncoderConfiguration",
    "Generator",
    "GeneratorConfiguration",
    "LatentDistribution",
    "Latents",
    "Scam",
    "ScamConfiguration",
    "StrongestLatents",
    "ade20k",
    "celebamask_hq",
    "idesigner",
    "load_published_state_dict",
    "published_state_dict",
    "take_latents",
    "tiny",
]
