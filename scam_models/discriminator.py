"""The discriminator: two PatchGANs, which see an image and its label map at two scales."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sca_kernels import LabelMap

from .configurations import check_positive
from .encoder import NEGATIVE_SLOPE, check_labels, one_hot_planes

KERNEL_SIZE, PADDING = 4, 2
MOST_CHANNELS = 512


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfiguration:
    """What a :class:`Discriminator` is made of. The defaults are those of the published configurations.

    Attributes:
        num_labels: of the label maps.
        image_channels: of the images.
        num_scales: number of PatchGANs, each of which sees half the size of the one before.
        num_layers: number of convolutions in front of the one that makes the scores. The last of them has stride 1.
        first_channels: of the first convolution; each of the others has twice as many as the one before, up to 512.
        spectral: whether the convolutions that are followed by a normalisation have a spectral norm of 1.
        gradient_normalised: whether scores are divided by the norm of their gradient while training.

    Raises:
        ValueError: if a number is not positive.

    Example:
        >>> DiscriminatorConfiguration(num_labels=19).channels
        (22, 64, 128, 256, 512, 1)
    """

    num_labels: int
    image_channels: int = 3
    num_scales: int = 2
    num_layers: int = 4
    first_channels: int = 64
    spectral: bool = False
    gradient_normalised: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "num_labels", "image_channels", "num_scales", "num_layers", "first_channels")

    @property
    def channels(self) -> tuple[int, ...]:
        """In front of the first convolution of a PatchGAN and behind each."""
        widths = (min(self.first_channels << layer, MOST_CHANNELS) for layer in range(self.num_layers))
        return (self.image_channels + self.num_labels, *widths, 1)


class Judgement(NamedTuple):
    """What a PatchGAN says of images.

    Attributes:
        scores: (B, 1, h, w), one for each patch: high for real images.
        features: behind each convolution but the last.

    Example:
        >>> Judgement(torch.ones(1, 1, 2, 2), ()).scores.mean().item()
        1.0
    """

    scores: Tensor
    features: tuple[Tensor, ...]


class PatchGan(nn.Module):
    """Convolutions (4 x 4, stride 2, leaky ReLU) to a score for each patch, instance-normalised from the second on.

    Args:
        configuration: of the discriminator.
    """

    def __init__(self, configuration: DiscriminatorConfiguration) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        last = configuration.num_layers
        for layer, (before, behind) in enumerate(pairwise(configuration.channels)):
            stride = 2 if layer == 0 or layer < last - 1 else 1
            convolution = nn.Conv2d(before, behind, KERNEL_SIZE, stride=stride, padding=PADDING)
            if configuration.spectral and 0 < layer < last:
                nn.utils.parametrizations.spectral_norm(convolution)
            self.convolutions.append(convolution)

    def forward(self, x: Tensor) -> Judgement:
        """(B, image channels + labels, height, width) to scores and features."""
        features: list[Tensor] = []
        for layer, convolution in enumerate(self.convolutions[:-1]):
            x = convolution(x)
            if layer > 0:
                x = F.instance_norm(x)
            x = F.leaky_relu(x, NEGATIVE_SLOPE)
            features.append(x)
        return Judgement(_widened(self.convolutions[-1](x)), tuple(features))


class Discriminator(nn.Module):
    """Scores images, given their label maps, patch by patch and at several scales.

    A PatchGAN sees the image and the one-hot label map, the next one the average-pooled image and the map at the
    nearest pixels. While training, each image's map of scores D may be divided by the norm of its gradient,

        D / (||dD/d(image, map)|| + |D|),    D in the gradient being the sum of the scores,

    so that scores lie between -1 and 1 and the discriminator has a Lipschitz constant. Learning from such scores needs
    second derivatives, so this is plain PyTorch.

    Args:
        configuration: see :class:`DiscriminatorConfiguration`.

    Source: Dufour et al., SCAM!, ECCV 2022; Wang et al., High-resolution image synthesis with conditional GANs, CVPR
    2018; Wu et al., Gradient normalization for generative adversarial networks, ICCV 2021.

    Example:
        >>> discriminator = Discriminator(DiscriminatorConfiguration(num_labels=3, first_channels=8))
        >>> labels = LabelMap.from_labels(torch.randint(0, 3, (2, 64, 64)), num_labels=3)
        >>> fine, coarse = discriminator(torch.rand(2, 3, 64, 64) * 2 - 1, labels)
        >>> fine.scores.shape, coarse.scores.shape
        (torch.Size([2, 1, 11, 11]), torch.Size([2, 1, 7, 7]))
        >>> bool((fine.scores.abs() < 1).all())
        True
    """

    def __init__(self, configuration: DiscriminatorConfiguration) -> None:
        super().__init__()
        self.configuration = configuration
        self.scales = nn.ModuleList(PatchGan(configuration) for _ in range(configuration.num_scales))

    def forward(self, images: Tensor, labels: LabelMap) -> list[Judgement]:
        """Judges images.

        Args:
            images: (B, image_channels, height, width), from -1 to 1.
            labels: of the same size, for B images or one for all.

        Returns:
            of each scale, the finest first.

        Gradients: of images and weights, twice.

        Raises:
            TypeError: if ``labels`` is not a label map.
            ValueError: if sizes or numbers of channels, images or labels do not agree.
        """
        configuration, channels = self.configuration, self.configuration.image_channels
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(f"images: expected shape (B, {channels}, height, width), got {tuple(images.shape)}")
        check_labels(labels, configuration.num_labels, images.shape[2], images.shape[3])
        if labels.batch not in (1, len(images)):
            raise ValueError(f"labels: expected label maps for {len(images)} images or for one, got {labels.batch}")
        if self.training and configuration.gradient_normalised:
            with torch.enable_grad():
                return self._normalised(images, labels)
        return self._judge(self._joined(images, labels))

    def _joined(self, images: Tensor, labels: LabelMap) -> Tensor:
        planes = one_hot_planes(labels, images.dtype).expand(len(images), -1, -1, -1)
        return torch.cat([images, planes], 1)

    def _judge(self, x: Tensor) -> list[Judgement]:
        judgements, channels = [], self.configuration.image_channels
        for scale, network in enumerate(self.scales):
            if scale > 0:
                smaller = F.avg_pool2d(x[:, :channels], 3, stride=2, padding=1, count_include_pad=False)
                planes = F.interpolate(x[:, channels:], size=smaller.shape[2:], mode="nearest")
                x = torch.cat([smaller, planes], 1)
            judgements.append(network(x))
        return judgements

    def _normalised(self, images: Tensor, labels: LabelMap) -> list[Judgement]:
        x = self._joined(images, labels)
        if not x.requires_grad:
            x.requires_grad_()
        judgements = []
        for scores, features in self._judge(x):
            (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
            norm = torch.linalg.vector_norm(_widened(gradient), dim=(1, 2, 3), keepdim=True)
            judgements.append(Judgement(scores / (norm + scores.abs()), features))
        return judgements


def _widened(x: Tensor) -> Tensor:
    """At least float32: autocast makes narrow scores, and a mean of them would be rounded."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
