"""What encoders and generators are made of, and the published configurations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sca_kernels import LatentLayout
from sca_kernels.folding import Choice


@dataclass(frozen=True, kw_only=True)
class EncoderConfiguration:
    """What an :class:`scam_models.Encoder` is made of. The defaults are those of the published configurations.

    Attributes:
        layout: how many latents each label has.
        latent_dim: D, width of a latent.
        attention_dim: width of queries, keys and values.
        num_blocks: number of blocks, each of which attends to one level of the image.
        num_cross_heads: of the attention to the image.
        num_self_heads: of the attention among latents.
        image_channels: of the image.
        encoding_channels: of the encoding that is concatenated to the image, divisible by four.
        first_channels: of the first convolution; each of the others has twice as many as the one before.
        pyramid: whether the first block attends to the image and each of the others to a level of half the size of the
            one before. Otherwise all attend to the image.
        reversed_levels: whether the blocks attend to the levels from the last to the first.
        self_attention: whether the latents of a label attend to each other after each attention to the image.
        initial_latents: what the latents are at first: "learned"; "fixed", random numbers that stay the same; or
            "random", drawn in each call.
        variational: whether the result is a :class:`scam_models.LatentDistribution`.
        equalised, lr_mul: see :class:`sca_kernels.nn.Linear`; initial latents are multiplied by ``lr_mul`` in any case,
            unless they are drawn in each call.
        choice: how attentions are computed, see :func:`sca_kernels.folding.choose`.

    Raises:
        ValueError: if a number is not as above.

    Example:
        >>> EncoderConfiguration(layout=LatentLayout((16, 8, 8))).level_channels
        (3, 32, 64, 128, 256, 512, 1024)
    """

    layout: LatentLayout
    latent_dim: int = 256
    attention_dim: int = 256
    num_blocks: int = 7
    num_cross_heads: int = 1
    num_self_heads: int = 1
    image_channels: int = 3
    encoding_channels: int = 40
    first_channels: int = 32
    pyramid: bool = True
    reversed_levels: bool = False
    self_attention: bool = True
    initial_latents: Literal["learned", "fixed", "random"] = "learned"
    variational: bool = False
    equalised: bool = False
    lr_mul: float = 1.0
    choice: Choice = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "latent_dim", "attention_dim", "num_blocks", "image_channels", "first_channels")
        _check_heads(self, "num_cross_heads", "num_self_heads")
        _check_divisible_by_four("encoding_channels", self.encoding_channels)
        if self.pyramid:
            _check_divisible_by_four("first_channels", self.first_channels)
        _check_one_of("initial_latents", self.initial_latents, ("learned", "fixed", "random"))

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of what each block attends to, from the first level to the last."""
        if not self.pyramid:
            return (self.image_channels,) * self.num_blocks
        return (self.image_channels, *(self.first_channels << level for level in range(self.num_blocks - 1)))


@dataclass(frozen=True, kw_only=True)
class GeneratorConfiguration:
    """What a :class:`scam_models.Generator` is made of. The defaults are those of the published configurations.

    Attributes:
        layout: how many latents each label has.
        height, width: of the images.
        latent_dim: D, width of a latent.
        attention_dim: width of queries, keys and values.
        num_heads: of all attentions.
        num_blocks: number of blocks, at least four, each of which doubles the size; the last one goes to the images'.
        last_channels: of the last block, divisible by four; the blocks before have 2, 4, 8, 16, 16, ... times as many.
        image_channels: of the images.
        kernel_size: of the convolutions, odd.
        first_size: height and width that the first block starts from. Default: the smaller side of the image over
            2^num_blocks, rounded down, and the other side in proportion.
        duplex: whether the latents attend to the features and go from block to block. Otherwise two linear layers
            change them, and each block starts from those given.
        architecture: "skip": each block adds to the image; "resnet": the last one makes it, and each block adds its
            input to its result; "none": neither.
        normalisation: "instance", "layer" or "batch", see :class:`sca_kernels.nn.SemanticModulation`.
        noise: whether noise is added, in evaluation mode too.
        modulate: whether the features are modulated at all; without it they are only normalised.
        map_encoder_blocks: the blocks, counted from 0, whose modulations see the label map as well.
        learned_encoding: whether a learned table is added to the latents.
        split_latents: whether the latents of a label come one after the other in one vector. All labels must have the
            same number.
        spectral: whether the convolutions of the blocks have a spectral norm of 1.
        equalised, lr_mul: see :class:`sca_kernels.nn.Linear`.
        choice: how attentions are computed, see :func:`sca_kernels.folding.choose`.

    Raises:
        ValueError: if a number is not as above, or the image is too small for so many blocks.

    Example:
        >>> configuration = GeneratorConfiguration(layout=LatentLayout.uniform(3, 8), height=256, width=170)
        >>> configuration.sizes
        ((3, 2), (6, 4), (12, 8), (24, 16), (48, 32), (96, 64), (256, 170))
        >>> configuration.block_channels
        ((1024, 1024), (1024, 1024), (1024, 512), (512, 256), (256, 128), (128, 64))
    """

    layout: LatentLayout
    height: int
    width: int
    latent_dim: int = 256
    attention_dim: int = 256
    num_heads: int = 1
    num_blocks: int = 6
    last_channels: int = 64
    image_channels: int = 3
    kernel_size: int = 3
    first_size: tuple[int, int] | None = None
    duplex: bool = True
    architecture: Literal["skip", "resnet", "none"] = "skip"
    normalisation: Literal["instance", "layer", "batch"] = "instance"
    noise: bool = True
    modulate: bool = True
    map_encoder_blocks: tuple[int, ...] = ()
    learned_encoding: bool = False
    split_latents: bool = False
    spectral: bool = False
    equalised: bool = False
    lr_mul: float = 1.0
    choice: Choice = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "height", "width", "latent_dim", "attention_dim", "image_channels")
        _check_heads(self, "num_heads")
        _check_divisible_by_four("last_channels", self.last_channels)
        _check_one_of("architecture", self.architecture, ("skip", "resnet", "none"))
        _check_one_of("normalisation", self.normalisation, ("instance", "layer", "batch"))
        if self.num_blocks < 4:
            raise ValueError(f"num_blocks: expected at least 4, got {self.num_blocks}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {self.kernel_size}")
        if self.first_size is None and min(self.height, self.width) >> self.num_blocks < 2:
            raise ValueError(
                f"height, width: expected at least {2 << self.num_blocks} pixels for {self.num_blocks} blocks, "
                f"got {self.height} x {self.width}"
            )
        if self.first_size is not None and (len(self.first_size) != 2 or min(self.first_size) < 1):
            raise ValueError(f"first_size: expected a height and a width, got {self.first_size}")
        unknown = [block for block in self.map_encoder_blocks if not 0 <= block < self.num_blocks]
        if unknown:
            raise ValueError(f"map_encoder_blocks: expected blocks from 0 to {self.num_blocks - 1}, got {unknown}")
        if self.split_latents and len(set(self.layout.latents_per_label)) > 1:
            raise ValueError(
                f"split_latents: expected a layout with as many latents for every label, got {self.layout}"
            )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in front of the first block and behind each block."""
        height, width = self._first_size
        before_last = ((height << block, width << block) for block in range(self.num_blocks))
        return (*before_last, (self.height, self.width))

    @property
    def _first_size(self) -> tuple[int, int]:
        if self.first_size is not None:
            return self.first_size
        # The same expressions as in the published code, since they are rounded.
        aspect_ratio = self.width / self.height
        if aspect_ratio < 1:
            width = self.width >> self.num_blocks
            return round(width / aspect_ratio), width
        height = self.height >> self.num_blocks
        return height, round(height * aspect_ratio)

    @property
    def block_channels(self) -> tuple[tuple[int, int], ...]:
        """Channels in front of each block and behind it."""
        halved = [min(4, self.num_blocks - block) for block in range(self.num_blocks + 1)]
        channels = [self.last_channels << times for times in halved]
        return tuple(pairwise(channels))

    @property
    def latents_shape(self) -> tuple[int, int]:
        """Number and width of the latents as they are given to the generator."""
        if self.split_latents:
            return self.layout.num_labels, self.layout.max_per_label * self.latent_dim
        return self.layout.count, self.latent_dim


@dataclass(frozen=True)
class ScamConfiguration:
    """An encoder and a generator that fit together.

    Attributes:
        encoder, generator: their configurations.

    Raises:
        ValueError: if the generator takes other latents than the encoder makes.

    Example:
        >>> tiny().generator.layout == tiny().encoder.layout
        True
    """

    encoder: EncoderConfiguration
    generator: GeneratorConfiguration

    def __post_init__(self) -> None:
        made, generator = self.encoder, self.generator
        if made.layout.num_labels != generator.layout.num_labels:
            raise ValueError(
                f"generator.layout: expected {made.layout.num_labels} labels like the encoder's, "
                f"got {generator.layout.num_labels}"
            )
        owned = (1,) * generator.layout.num_labels if generator.split_latents else generator.layout.latents_per_label
        width = generator.latents_shape[1]
        if made.layout.latents_per_label != owned:
            raise ValueError(
                f"encoder.layout: expected the latents of each label that the generator takes, {owned}, "
                f"got {made.layout.latents_per_label}"
            )
        if made.latent_dim != width:
            raise ValueError(f"encoder.latent_dim: expected {width}, what the generator takes, got {made.latent_dim}")


def celebamask_hq(latents: int = 8) -> ScamConfiguration:
    """CelebAMask-HQ: 256 x 256 pixels, 19 labels, as published.

    Args:
        latents: of each label.

    Example:
        >>> celebamask_hq().generator.layout.count
        152
    """
    return _published(LatentLayout.uniform(19, latents), 256, 256)


def ade20k(latents: int = 8) -> ScamConfiguration:
    """ADE20K: 256 x 256 pixels, 151 labels, as published.

    Args:
        latents: of each label.

    Example:
        >>> ade20k().generator.layout.count
        1208
    """
    return _published(LatentLayout.uniform(151, latents), 256, 256)


def idesigner(latents: int = 8) -> ScamConfiguration:
    """iDesigner: 256 x 170 pixels, 3 labels (background, face, body), as published.

    Args:
        latents: of each label.

    Example:
        >>> idesigner().generator.sizes[-2:]
        ((96, 64), (256, 170))
    """
    return _published(LatentLayout.uniform(3, latents), 256, 170)


def tiny(layout: LatentLayout | None = None, height: int = 64, width: int = 64) -> ScamConfiguration:
    """The same networks with few and narrow layers, for tests and small machines.

    Args:
        layout: how many latents each label has. Default: 4 for each of 3 labels.
        height, width: of the images, at least 32.

    Example:
        >>> tiny().generator.block_channels
        ((128, 64), (64, 32), (32, 16), (16, 8))
    """
    layout = LatentLayout.uniform(3, 4) if layout is None else layout
    return ScamConfiguration(
        EncoderConfiguration(
            layout=layout, latent_dim=32, attention_dim=32, num_blocks=4, encoding_channels=8, first_channels=8
        ),
        GeneratorConfiguration(
            layout=layout,
            height=height,
            width=width,
            latent_dim=32,
            attention_dim=32,
            num_blocks=4,
            last_channels=8,
        ),
    )


def _published(layout: LatentLayout, height: int, width: int) -> ScamConfiguration:
    return ScamConfiguration(
        EncoderConfiguration(layout=layout), GeneratorConfiguration(layout=layout, height=height, width=width)
    )


def check_positive(configuration: object, *names: str) -> None:
    for name in names:
        if getattr(configuration, name) < 1:
            raise ValueError(f"{name}: expected a positive number, got {getattr(configuration, name)}")


def _check_heads(configuration: EncoderConfiguration | GeneratorConfiguration, *names: str) -> None:
    for name in names:
        heads = getattr(configuration, name)
        if heads < 1 or configuration.attention_dim % heads:
            raise ValueError(f"{name}: expected a divisor of attention_dim={configuration.attention_dim}, got {heads}")


def _check_divisible_by_four(name: str, channels: int) -> None:
    if channels < 1 or channels % 4:
        raise ValueError(f"{name}: expected a positive number divisible by four, got {channels}")


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
