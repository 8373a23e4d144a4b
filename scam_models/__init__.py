"""SCAM (Dufour et al., ECCV 2022): an encoder of images to latents for each label, and a generator of images.

Made of the layers in :mod:`sca_kernels.nn`.
"""

from .attention import LatentAttention, StrongestLatents
from .configurations import (
    EncoderConfiguration,
    GeneratorConfiguration,
    ScamConfiguration,
    ade20k,
    celebamask_hq,
    idesigner,
    tiny,
)
from .discriminator import Discriminator, DiscriminatorConfiguration, Judgement
from .encoder import Encoder
from .errors import InputError
from .generator import Generator
from .latents import LatentDistribution, Latents, take_latents
from .losses import (
    LossWeights,
    PerceptualLoss,
    discriminator_hinge_loss,
    feature_matching_loss,
    generator_hinge_loss,
    r1_penalty,
)
from .model import Scam
from .published import load_published_state_dict, published_state_dict

__all__ = [
    "Discriminator",
    "DiscriminatorConfiguration",
    "Encoder",
    "EncoderConfiguration",
    "Generator",
    "GeneratorConfiguration",
    "InputError",
    "Judgement",
    "LatentAttention",
    "LatentDistribution",
    "Latents",
    "LossWeights",
    "PerceptualLoss",
    "Scam",
    "ScamConfiguration",
    "StrongestLatents",
    "ade20k",
    "celebamask_hq",
    "discriminator_hinge_loss",
    "feature_matching_loss",
    "generator_hinge_loss",
    "idesigner",
    "load_published_state_dict",
    "published_state_dict",
    "r1_penalty",
    "take_latents",
    "tiny",
]
