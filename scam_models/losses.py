"""The losses of SCAM, and their weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .discriminator import Judgement
from .vgg import Vgg19


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """What each loss is multiplied by; 0 leaves it out. The defaults are those of the paper.

    Attributes:
        adversarial: of :func:`generator_hinge_loss` and :func:`discriminator_hinge_loss`.
        perceptual: of :class:`PerceptualLoss`.
        l1: of the mean absolute difference of image and reconstruction.
        feature_matching: of :func:`feature_matching_loss`.
        r1: of :func:`r1_penalty`.

    Raises:
        ValueError: if a weight is negative.

    Example:
        >>> LossWeights(perceptual=0.0).l1
        10.0
    """

    adversarial: float = 1.0
    perceptual: float = 10.0
    l1: float = 10.0
    feature_matching: float = 0.0
    r1: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(f"{field.name}: expected a weight of at least 0, got {getattr(self, field.name)}")

    @property
    def needs_discriminator(self) -> bool:
        """Whether any of them asks a discriminator."""
        return self.adversarial > 0 or self.feature_matching > 0


def discriminator_hinge_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Tensor:
    """What the discriminator minimises: mean of max(0, 1 - D(real)) plus mean of max(0, 1 + D(fake)), over scales.

    Args:
        real, fake: what the discriminator says of real and of generated images.

    Returns:
        a scalar, the mean over scales.

    Gradients: of both.

    Source: Lim and Ye, Geometric GAN, 2017; Dufour et al., SCAM!, ECCV 2022.

    Example:
        >>> judgements = [Judgement(torch.full((1, 1, 2, 2), 0.25), ())]
        >>> discriminator_hinge_loss(judgements, judgements).item()
        2.0
    """
    return _over_scales(
        F.relu(1 - of_real.scores).mean() + F.relu(1 + of_fake.scores).mean()
        for of_real, of_fake in zip(real, fake, strict=True)
    )


def generator_hinge_loss(fake: Sequence[Judgement]) -> Tensor:
    """What the generator minimises: the mean of -D(fake).

    Args:
        fake: what the discriminator says of generated images.

    Returns:
        a scalar, the mean over scales.

    Gradients: of the judgements.

    Source: Lim and Ye, Geometric GAN, 2017; Dufour et al., SCAM!, ECCV 2022.

    Example:
        >>> generator_hinge_loss([Judgement(torch.full((1, 1, 2, 2), 0.25), ())]).item()
        -0.25
    """
    return _over_scales(-of_fake.scores.mean() for of_fake in fake)


def feature_matching_loss(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Tensor:
    """The mean absolute difference of the discriminator's features, summed over its layers.

    Args:
        real, fake: what the discriminator says of images and of their reconstructions.

    Returns:
        a scalar, the mean over scales.

    Gradients: of ``fake`` only.

    Source: Wang et al., High-resolution image synthesis with conditional GANs, CVPR 2018.

    Example:
        >>> one, other = (Judgement(torch.ones(1), (torch.full((2,), value),) * 3) for value in (0.0, 0.5))
        >>> feature_matching_loss([one], [other]).item()
        1.5
    """

    def of_scale(of_real: Judgement, of_fake: Judgement) -> Tensor:
        pairs = zip(of_real.features, of_fake.features, strict=True)
        return torch.stack([F.l1_loss(fake_features, features.detach()) for features, fake_features in pairs]).sum()

    return _over_scales(of_scale(*judgements) for judgements in zip(real, fake, strict=True))


def r1_penalty(real: Sequence[Judgement], images: Tensor) -> Tensor:
    """Half the squared gradient of the scores of real images, summed over each image.

        mean over images of 1/2 ||d sum(D(image)) / d image||^2

    Args:
        real: what the discriminator says of ``images``.
        images: (B, channels, height, width), which required gradients then.

    Returns:
        a scalar, the mean over scales.

    Gradients: of the discriminator, through the gradient.

    Source: Mescheder et al., Which training methods for GANs do actually converge?, ICML 2018.

    Example:
        >>> images = torch.ones(2, 3, 4, 4, requires_grad=True)
        >>> r1_penalty([Judgement(2 * images, ())], images).item()
        96.0
    """

    def of_scale(judgement: Judgement) -> Tensor:
        (gradient,) = torch.autograd.grad(judgement.scores.sum(), images, create_graph=True)
        return gradient.square().flatten(1).sum(1).mean() / 2

    return _over_scales(map(of_scale, real))


class PerceptualLoss(nn.Module):
    """The weighted mean absolute differences of the features of two images.

        sum over i of weight_i mean |features_i(image) - features_i(target)|

    Args:
        network: makes features of images, :class:`scam_models.vgg.Vgg19` in the paper. It is frozen and put into
            evaluation mode.
        weights: of its features.
        normalised: whether the images, which range from -1 to 1, are given the mean and variance of ImageNet first. The
            published code leaves that out.

    Source: Johnson et al., Perceptual losses for real-time style transfer and super-resolution, ECCV 2016; weights of
    Dufour et al., SCAM!, ECCV 2022.

    Example:
        >>> images = torch.zeros(1, 3, 32, 32)
        >>> PerceptualLoss(Vgg19())(images, images).item()
        0.0
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        weights: Sequence[float] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1),
        normalised: bool = False,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.weights, self.normalised = tuple(weights), normalised
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    @classmethod
    def from_file(cls, path: str | Path, *, normalised: bool = False) -> PerceptualLoss:
        """With VGG19 and the weights of a file, see :meth:`scam_models.vgg.Vgg19.from_file`."""
        return cls(Vgg19.from_file(path), normalised=normalised)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Leaves the network in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """A scalar from two (B, 3, height, width); only ``images`` get gradients."""
        with torch.no_grad():
            of_targets = self.network(self._prepare(targets))
        of_images = self.network(self._prepare(images))
        parts = zip(self.weights, of_images, of_targets, strict=True)
        return torch.stack([weight * F.l1_loss(one, other) for weight, one, other in parts]).sum()

    def _prepare(self, images: Tensor) -> Tensor:
        return ((images + 1) / 2 - self.mean) / self.deviation if self.normalised else images


def _over_scales(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(tuple(losses)).mean()
