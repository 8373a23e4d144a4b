"""SCAM's generator: from a label map and latents to an image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sca_kernels import LabelMap
from sca_kernels.nn import Convolution, SemanticModulation

from .configurations import GeneratorConfiguration
from .encoder import NEGATIVE_SLOPE, check_labels, one_hot_planes
from .latents import LatentDistribution, Latents, check_latents


class ImageLayer(nn.Module):
    """From features to the channels of the image: a simplex modulation without noise and a 1 x 1 convolution.

    Args:
        configuration: of the generator.
        channels: of the features.
        modulation: whether there is one.
        map_encoder: whether it sees the label map.
    """

    def __init__(
        self, configuration: GeneratorConfiguration, channels: int, *, modulation: bool, map_encoder: bool
    ) -> None:
        super().__init__()
        self.modulation: SemanticModulation | None = None
        if modulation:
            self.modulation = _modulation(configuration, channels, map_encoder, duplex=False, noise=False)
        self.convolution = _convolution(configuration, channels, configuration.image_channels, 1)

    def forward(self, x: Tensor, labels: LabelMap, latents: Tensor) -> Tensor:
        """(B, channels, height, width), a label map of any resolution and (B, m, D) to (B, image channels, ...)."""
        if self.modulation is not None:
            x, _ = self.modulation(x, labels, latents)
        return self.convolution(x)


class GeneratorBlock(nn.Module):
    """Modulates features and changes their size and channels.

        h = convolution_2(modulation_2(up(convolution_1(modulation_1(x)))))

    where each modulation ends with two leaky ReLUs and ``up`` takes the nearest neighbour. "skip" adds what an image
    layer makes of h to the image so far; "resnet" adds another way to h:

        (h + residual_convolution(residual_modulation(up(x)))) / sqrt(2)

    Args:
        configuration: of the generator.
        index: which block this is.
    """

    def __init__(self, configuration: GeneratorConfiguration, index: int) -> None:
        super().__init__()
        before, behind = configuration.block_channels[index]
        between, size = min(before, behind), configuration.kernel_size
        is_last = index == configuration.num_blocks - 1
        self.height, self.width = configuration.sizes[index + 1]
        map_encoder = index in configuration.map_encoder_blocks
        settings: dict[str, Any] = {"duplex": configuration.duplex, "noise": configuration.noise}
        self.residual_modulation: SemanticModulation | None = None
        self.residual_convolution: Convolution | None = None
        if configuration.architecture == "resnet":
            self.residual_modulation = _modulation(configuration, before, map_encoder, **settings)
            self.residual_convolution = _convolution(configuration, before, behind, 1, bias=False)
        # A leaky ReLU in the modulation and one in front of the convolution, as published.
        settings["negative_slope"] = NEGATIVE_SLOPE**2
        self.modulation_1 = _modulation(configuration, before, map_encoder, **settings)
        self.convolution_1 = _convolution(configuration, before, between, size)
        self.modulation_2 = _modulation(configuration, between, map_encoder, **settings)
        self.convolution_2 = _convolution(configuration, between, behind, size)
        self.image_layer: ImageLayer | None = None
        if configuration.architecture == "skip" or is_last:
            self.image_layer = ImageLayer(configuration, behind, modulation=not is_last, map_encoder=map_encoder)

    def forward(
        self, x: Tensor, labels: LabelMap, latents: Tensor, image: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The features, the latents and the image so far, or None, behind the block from those in front of it."""
        # Resized once for all layers: what is compiled remembers no label maps.
        smaller, labels = labels.at(*x.shape[2:]), labels.at(self.height, self.width)
        residual = None
        if self.residual_modulation is not None and self.residual_convolution is not None:
            residual, _ = self.residual_modulation(self._up(x), labels, latents)
            residual = self.residual_convolution(residual)
        x, latents = self.modulation_1(x, smaller, latents)
        x = self._up(self.convolution_1(x))
        x, latents = self.modulation_2(x, labels, latents)
        x = self.convolution_2(x)
        if residual is not None:
            x = (residual + x) * 2**-0.5
        if self.image_layer is not None:
            added = self.image_layer(x, labels, latents)
            image = added if image is None else added + self._up(image)
        return x, latents, image

    def _up(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(self.height, self.width), mode="nearest")


class Generator(nn.Module):
    """SCAM's generator: from a label map and latents for each label to an image.

    A convolution of the one-hot label map at the lowest resolution starts it, each :class:`GeneratorBlock` doubles the
    size, and tanh ends it.

    Args:
        configuration: see :class:`GeneratorConfiguration`.

    Source: Dufour et al., SCAM!, ECCV 2022.

    Example:
        >>> from scam_models import tiny
        >>> generator = Generator(tiny().generator)
        >>> labels = LabelMap.from_labels(torch.randint(0, 3, (2, 64, 64)), num_labels=3)
        >>> generator(labels, torch.randn(2, 12, 32)).shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(self, configuration: GeneratorConfiguration) -> None:
        super().__init__()
        self.configuration = configuration
        layout, channels = configuration.layout, configuration.block_channels[0][0]
        self.latent_encoding: nn.Parameter | None = None
        if configuration.learned_encoding:
            self.latent_encoding = nn.Parameter(torch.zeros(layout.count, configuration.latent_dim))
        self.first_convolution = Convolution(
            layout.num_labels,
            channels,
            configuration.kernel_size,
            equalised=configuration.equalised,
            lr_mul=configuration.lr_mul,
        )
        self.blocks = nn.ModuleList(GeneratorBlock(configuration, index) for index in range(configuration.num_blocks))

    def forward(self, labels: LabelMap, latents: Latents) -> Tensor:
        """Images.

        Args:
            labels: of the configuration's size, for B images or one for all.
            latents: (B, m, D), or, with ``split_latents``, (B, labels, latents of a label * D); or a distribution over
                them, of which a sample is taken while training and the mean in evaluation mode.

        Returns:
            (B, image_channels, height, width), from -1 to 1.

        Raises:
            TypeError: if ``labels`` is not a label map or ``latents`` neither a tensor nor a distribution.
            ValueError: if sizes or numbers of images, labels or latents do not agree.
        """
        configuration = self.configuration
        check_labels(labels, configuration.layout.num_labels, configuration.height, configuration.width)
        if isinstance(latents, LatentDistribution):
            latents = latents.sample() if self.training else latents.mean
        check_latents("latents", latents, labels.batch, configuration.latents_shape)
        latents = latents.reshape(len(latents), configuration.layout.count, configuration.latent_dim)
        if self.latent_encoding is not None:
            latents = latents + self.latent_encoding
        planes = one_hot_planes(labels.at(*configuration.sizes[0]), self.first_convolution.weight.dtype)
        x = self.first_convolution(planes).expand(len(latents), -1, -1, -1)
        image = None
        for block in self.blocks:
            x, updated, image = block(x, labels, latents, image)
            if configuration.duplex:
                latents = updated
        assert image is not None
        return image.tanh()


def _modulation(
    configuration: GeneratorConfiguration, channels: int, map_encoder: bool, **settings: Any
) -> SemanticModulation:
    return SemanticModulation(
        configuration.layout,
        channels,
        configuration.latent_dim,
        configuration.attention_dim,
        configuration.num_heads,
        normalisation=configuration.normalisation,
        modulate=configuration.modulate,
        map_encoder=map_encoder,
        map_kernel_size=configuration.kernel_size,
        equalised=configuration.equalised,
        lr_mul=configuration.lr_mul,
        choice=configuration.choice,
        **settings,
    )


def _convolution(
    configuration: GeneratorConfiguration, before: int, behind: int, kernel_size: int, *, bias: bool = True
) -> Convolution:
    return Convolution(
        before,
        behind,
        kernel_size,
        bias=bias,
        equalised=configuration.equalised,
        lr_mul=configuration.lr_mul,
        spectral=configuration.spectral,
    )
