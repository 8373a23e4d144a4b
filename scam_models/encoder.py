"""The encoder SAT: latents attend to the pixels of their label, level by level of an image."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sca_kernels import LabelMap
from sca_kernels.nn import Convolution, SemanticAttentionTransformer

from .configurations import EncoderConfiguration
from .latents import DistributionLayer, Latents

NEGATIVE_SLOPE = 0.2


class EncoderBlock(nn.Module):
    """The latents attend to a level of the image, and then to each other.

    Args:
        configuration: of the encoder.
        channels: of the level.
        concatenated: whether the encoding is concatenated to the level, rather than added.
    """

    def __init__(self, configuration: EncoderConfiguration, channels: int, concatenated: bool) -> None:
        super().__init__()
        settings: dict[str, Any] = {
            "layout": configuration.layout,
            "latent_dim": configuration.latent_dim,
            "attention_dim": configuration.attention_dim,
            "equalised": configuration.equalised,
            "lr_mul": configuration.lr_mul,
            "choice": configuration.choice,
        }
        self.cross_attention = SemanticAttentionTransformer(
            num_heads=configuration.num_cross_heads,
            channels=channels,
            encoding_channels=configuration.encoding_channels if concatenated else None,
            **settings,
        )
        self.self_attention: SemanticAttentionTransformer | None = None
        if configuration.self_attention:
            self.self_attention = SemanticAttentionTransformer(num_heads=configuration.num_self_heads, **settings)

    def forward(self, latents: Tensor, level: Tensor, labels: LabelMap) -> Tensor:
        """(B, m, D), (B, channels, height, width) and a label map of any resolution to (B, m, D)."""
        latents = self.cross_attention(latents, level, labels)
        return latents if self.self_attention is None else self.self_attention(latents)


class Encoder(nn.Module):
    """SAT: from an image and its label map to latents for each label.

    The levels of the image are the image itself and its convolutions (3 x 3, stride 2, leaky ReLU). In each block the
    latents attend to the pixels of their label in one level, then to each other:

        z = block_b(z, level_b),    block = self_attention(cross_attention(z, level))

    where both are a :class:`sca_kernels.nn.SemanticAttentionTransformer`. The sinusoidal encoding is concatenated to
    the image and added to the other levels.

    Args:
        configuration: see :class:`EncoderConfiguration`.

    Source: Dufour et al., SCAM!, ECCV 2022, the semantic attention transformer encoder.

    Example:
        >>> from scam_models import tiny
        >>> encoder = Encoder(tiny().encoder)
        >>> labels = LabelMap.from_labels(torch.randint(0, 3, (2, 64, 64)), num_labels=3)
        >>> encoder(torch.rand(2, 3, 64, 64) * 2 - 1, labels).shape
        torch.Size([2, 12, 32])
    """

    def __init__(self, configuration: EncoderConfiguration) -> None:
        super().__init__()
        self.configuration = configuration
        count, width, lr_mul = configuration.layout.count, configuration.latent_dim, configuration.lr_mul
        self.initial_latents: Tensor | None
        if configuration.initial_latents == "learned":
            self.initial_latents = nn.Parameter(torch.randn(count, width) / lr_mul)
        else:
            fixed = torch.randn(count, width) if configuration.initial_latents == "fixed" else None
            self.register_buffer("initial_latents", fixed)
        channels = configuration.level_channels
        self.convolutions = nn.ModuleList()
        if configuration.pyramid:
            self.convolutions.extend(
                Convolution(before, behind, 3, stride=2, equalised=configuration.equalised, lr_mul=lr_mul)
                for before, behind in pairwise(channels)
            )
        levels = range(configuration.num_blocks)
        self.blocks = nn.ModuleList(
            EncoderBlock(configuration, channels[level], concatenated=level == 0 or not configuration.pyramid)
            for level in (reversed(levels) if configuration.reversed_levels else levels)
        )
        self.distribution = DistributionLayer(count, width) if configuration.variational else None

    def forward(self, image: Tensor, labels: LabelMap) -> Latents:
        """The latents of images.

        Args:
            image: (B, image_channels, height, width), usually from -1 to 1; any size.
            labels: of the size of the images, for B of them or one for all.

        Returns:
            (B, m, D), or a :class:`LatentDistribution` if the configuration is variational.

        Raises:
            TypeError: if ``labels`` is not a label map.
            ValueError: if sizes or numbers of channels, images or labels do not agree.
        """
        self._check(image, labels)
        latents = self._initial_latents(image)
        if self.configuration.reversed_levels:
            levels = [image]
            for convolution in self.convolutions:
                levels.append(_next_level(convolution, levels[-1]))
            if not self.configuration.pyramid:
                levels = levels * len(self.blocks)
            for block, level in zip(self.blocks, reversed(levels), strict=True):
                latents = block(latents, level, labels)
        else:
            level = image
            for index, block in enumerate(self.blocks):
                if index > 0 and self.configuration.pyramid:
                    level = _next_level(self.convolutions[index - 1], level)
                latents = block(latents, level, labels)
        return latents if self.distribution is None else self.distribution(latents)

    def _initial_latents(self, image: Tensor) -> Tensor:
        configuration = self.configuration
        if self.initial_latents is None:
            weight = next(self.parameters())
            shape = (len(image), configuration.layout.count, configuration.latent_dim)
            return torch.randn(shape, dtype=weight.dtype, device=weight.device)
        latents = self.initial_latents.expand(len(image), -1, -1)
        return latents if configuration.lr_mul == 1 else latents * configuration.lr_mul

    def _check(self, image: Tensor, labels: LabelMap) -> None:
        channels = self.configuration.image_channels
        if image.dim() != 4 or image.shape[1] != channels:
            raise ValueError(f"image: expected shape (B, {channels}, height, width), got {tuple(image.shape)}")
        check_labels(labels, self.configuration.layout.num_labels, image.shape[2], image.shape[3])
        if labels.batch not in (1, len(image)):
            raise ValueError(f"labels: expected label maps for {len(image)} images or for one, got {labels.batch}")


def _next_level(convolution: nn.Module, level: Tensor) -> Tensor:
    return F.leaky_relu(convolution(level), NEGATIVE_SLOPE, inplace=True)


def check_labels(labels: LabelMap, num_labels: int, height: int, width: int) -> None:
    if not isinstance(labels, LabelMap):
        raise TypeError(f"labels: expected a LabelMap, got {type(labels).__name__}")
    if labels.num_labels != num_labels:
        raise ValueError(
            f"labels: expected {num_labels} labels like the layout of the configuration, got {labels.num_labels}"
        )
    if (labels.height, labels.width) != (height, width):
        raise ValueError(
            f"labels: expected a label map of {height} x {width} pixels, got {labels.height} x {labels.width} "
            f"(use at({height}, {width}) to resize it)"
        )


def one_hot_planes(labels: LabelMap, dtype: torch.dtype) -> Tensor:
    """(B, labels, height, width): 1 where a pixel has the label, 0 elsewhere."""
    every = torch.arange(labels.num_labels, dtype=labels.labels.dtype, device=labels.labels.device)
    return (labels.labels.unsqueeze(1) == every[:, None, None]).to(dtype)
