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
from .encoder import Encoder, EncoderBlock
from .generator import Generator, GeneratorBlock, ImageLayer
from .latents import DistributionLayer, LatentDistribution, Latents, take_latents
from .model import Scam, StrongestLatents
from .published import load_published_state_dict, published_state_dict

__all__ = [
    "DistributionLayer",
    "Encoder",
    "EncoderBlock",
    "EncoderConfiguration",
    "Generator",
    "GeneratorBlock",
    "GeneratorConfiguration",
    "ImageLayer",
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
