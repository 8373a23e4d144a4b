"""SCAM as a whole: reconstruction, and the transfer of subjects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sca_kernels import LabelMap

from .attention import LatentAttention, StrongestLatents
from .checkpoints import SavedModel, read_model, write_weights
from .configurations import ScamConfiguration
from .encoder import Encoder, EncoderBlock
from .errors import InputError
from .generator import Generator, GeneratorBlock
from .latents import Latents, between, take_latents
from .serialisation import first_difference, from_values, to_values


class Scam(nn.Module):
    """An encoder and a generator: images to latents for each label, and back.

    Args:
        encoder: makes the latents that ``generator`` takes.
        generator: of the same labels.

    Raises:
        ValueError: if they do not fit together.

    Source: Dufour et al., SCAM!, ECCV 2022.

    Example:
        >>> from scam_models import tiny
        >>> model = Scam.from_configuration(tiny())
        >>> labels = LabelMap.from_labels(torch.randint(0, 3, (2, 64, 64)), num_labels=3)
        >>> model(torch.rand(2, 3, 64, 64) * 2 - 1, labels).shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(self, encoder: Encoder, generator: Generator) -> None:
        super().__init__()
        self.configuration = ScamConfiguration(encoder.configuration, generator.configuration)
        self.encoder, self.generator = encoder, generator

    @classmethod
    def from_configuration(cls, configuration: ScamConfiguration) -> Scam:
        """A model with new weights."""
        return cls(Encoder(configuration.encoder), Generator(configuration.generator))

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, configuration: ScamConfiguration | None = None, *, averaged: bool = True
    ) -> Scam:
        """A trained model, in evaluation mode on the CPU.

        Args:
            path: a checkpoint of ``scam train``, or a file of :meth:`export`.
            configuration: what it must be made of. Default: what the file says.
            averaged: whether to take the averaged weights of a checkpoint, or those of its last step.

        Raises:
            FileNotFoundError: if there is no such file.
            InputError: if it is something else, or of another configuration.

        Example:
            >>> import tempfile
            >>> from scam_models import tiny
            >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
            >>> Scam.from_configuration(tiny()).export(path)
            >>> Scam.from_checkpoint(path).configuration == tiny()
            True
        """
        saved = read_model(path, averaged=averaged)
        if configuration is not None:
            difference = first_difference(saved.configuration["model"], to_values(configuration))
            if difference is not None:
                raise InputError(
                    f"{path}: {difference}, what was asked for; leave configuration out to take the file's own"
                )
        model = cls.from_configuration(from_values(ScamConfiguration, saved.configuration["model"], str(path)))
        model.load_state_dict(dict(saved.weights))
        return model.eval()

    def export(self, path: str | Path) -> None:
        """Writes the weights as safetensors, with the configuration as metadata.

        Args:
            path: a file that ends with ".safetensors".

        Raises:
            InputError: if the name ends otherwise, or the file cannot be written.
        """
        write_weights(path, SavedModel({"model": to_values(self.configuration)}, self.state_dict()))

    def forward(self, image: Tensor, labels: LabelMap) -> Tensor:
        """The same as :meth:`reconstruct`."""
        return self.reconstruct(image, labels)

    def encode(self, image: Tensor, labels: LabelMap) -> Latents:
        """The latents of images, see :class:`Encoder`."""
        latents: Latents = self.encoder(image, labels)
        return latents

    def generate(self, labels: LabelMap, latents: Latents) -> Tensor:
        """Images from latents, see :class:`Generator`."""
        image: Tensor = self.generator(labels, latents)
        return image

    def reconstruct(self, image: Tensor, labels: LabelMap) -> Tensor:
        """Images from their own latents.

        Args:
            image: (B, image_channels, height, width), from -1 to 1, of the generator's size.
            labels: of the same size.

        Returns:
            like ``image``.
        """
        return self.generate(labels, self.encode(image, labels))

    def transfer_subject(
        self,
        subject_image: Tensor,
        subject_labels: LabelMap,
        background_image: Tensor,
        background_labels: LabelMap,
        *,
        background: int | Iterable[int] = 0,
    ) -> Tensor:
        """The subject of one image before the background of another.

        The latents of the background come from ``background_image``, all others from ``subject_image``; the label map
        is that of the subject.

        Args:
            subject_image, background_image: (B, image_channels, height, width), from -1 to 1. That of the subject has
                the generator's size.
            subject_labels, background_labels: of the sizes of the images.
            background: the label, or labels, of the background.

        Returns:
            like ``subject_image``.

        Source: Dufour et al., SCAM!, ECCV 2022, subject transfer.

        Example:
            >>> from scam_models import tiny
            >>> model = Scam.from_configuration(tiny())
            >>> labels = LabelMap.from_labels(torch.randint(0, 3, (2, 64, 64)), num_labels=3)
            >>> one, other = torch.rand(2, 2, 3, 64, 64) * 2 - 1
            >>> model.transfer_subject(one, labels, other, labels).shape
            torch.Size([2, 3, 64, 64])
        """
        backgrounds = (background,) if isinstance(background, int) else background
        source = (background_image, background_labels)
        return self.transfer(subject_image, subject_labels, {label: source for label in backgrounds})

    def transfer(self, image: Tensor, labels: LabelMap, sources: Mapping[int, tuple[Tensor, LabelMap]]) -> Tensor:
        """Images that show some of their labels as other images show them.

        The latents of each label in ``sources`` come from the image there, all others from ``image``; the label map is
        ``labels``.

        Args:
            image: (B, image_channels, height, width), from -1 to 1, of the generator's size.
            labels: of the same size.
            sources: for each label that is taken from elsewhere B images of any size, and their label maps.

        Returns:
            like ``image``.

        Example:
            >>> from scam_models import tiny
            >>> model = Scam.from_configuration(tiny())
            >>> labels = LabelMap.from_labels(torch.randint(0, 3, (2, 64, 64)), num_labels=3)
            >>> one, other = torch.rand(2, 2, 3, 64, 64) * 2 - 1
            >>> model.transfer(one, labels, {2: (other, labels)}).shape
            torch.Size([2, 3, 64, 64])
        """
        # An image that several labels come from is encoded once.
        distinct = {id(source): source for source in sources.values()}
        encoded = {key: self.encode(*source) for key, source in distinct.items()}
        others = {label: encoded[id(source)] for label, source in sources.items()}
        latents = take_latents(self.encoder.configuration.layout, self.encode(image, labels), others)
        return self.generate(labels, latents)

    def interpolate(
        self,
        image: Tensor,
        labels: LabelMap,
        other_image: Tensor,
        other_labels: LabelMap,
        *,
        steps: int = 7,
        only: Iterable[int] | None = None,
    ) -> Tensor:
        """What lies between an image and the same with the latents of another one.

        The latents go from those of ``image`` to those of ``other_image`` on a straight line; the label map is always
        ``labels``. All have the same noise.

        Args:
            image: (1, image_channels, height, width), from -1 to 1, of the generator's size.
            labels: of the same size.
            other_image, other_labels: of any size.
            steps: number of images, the first and the last included, at least 2.
            only: the labels whose latents change. Default: all.

        Returns:
            (steps, image_channels, height, width).

        Raises:
            ValueError: if ``steps`` is less than 2 or a label is out of range.

        Example:
            >>> from scam_models import tiny
            >>> model = Scam.from_configuration(tiny())
            >>> labels = LabelMap.from_labels(torch.randint(0, 3, (1, 64, 64)), num_labels=3)
            >>> one, other = torch.rand(2, 1, 3, 64, 64) * 2 - 1
            >>> model.interpolate(one, labels, other, labels, steps=3).shape
            torch.Size([3, 3, 64, 64])
        """
        if steps < 2:
            raise ValueError(f"steps: expected at least 2, got {steps}")
        begin, end = self.encode(image, labels), self.encode(other_image, other_labels)
        if only is not None:
            end = take_latents(self.encoder.configuration.layout, begin, dict.fromkeys(only, end))
        devices = [image.device] if image.device.type == "cuda" else []
        frames = []
        for step in range(steps):
            with torch.random.fork_rng(devices):  # each draws its noise from the same state
                frames.append(self.generate(labels, between(begin, end, step / (steps - 1))))
        return torch.cat(frames)

    @torch.no_grad()
    def strongest_latents(self, labels: LabelMap, latents: Latents) -> StrongestLatents:
        """Which latent of its label each pixel attends to most, in the last modulation.

        Weights are the mean over heads, see :func:`sca_kernels.folding.attention_weights`.

        Args:
            labels, latents: as given to the generator.

        Returns:
            a :class:`StrongestLatents`, of the generator's size.

        Example:
            >>> from scam_models import tiny
            >>> model = Scam.from_configuration(tiny())
            >>> labels = LabelMap.from_labels(torch.full((1, 64, 64), 2), num_labels=3)
            >>> strongest = model.strongest_latents(labels, torch.randn(1, 12, 32))
            >>> bool((strongest.latent >= 8).all())  # the latents of label 2 are the last four
            True
        """
        return self.attention(labels, latents).strongest()

    @torch.no_grad()
    def attention(self, labels: LabelMap, latents: Latents) -> LatentAttention:
        """How much each pixel attends to each latent of its label, in the last modulation.

        Weights are the mean over heads, see :func:`sca_kernels.folding.attention_weights`.

        Args:
            labels, latents: as given to the generator.

        Returns:
            a :class:`LatentAttention`, of the generator's size.

        Example:
            >>> from scam_models import tiny
            >>> model = Scam.from_configuration(tiny())
            >>> labels = LabelMap.from_labels(torch.full((1, 64, 64), 2), num_labels=3)
            >>> attention = model.attention(labels, torch.randn(1, 12, 32))
            >>> bool((attention.weights.sum(1) - 1).abs().max() < 1e-5)
            True
        """
        block = self.generator.blocks[-1]
        assert isinstance(block, GeneratorBlock)
        weights: list[Tensor] = []

        def look(module: nn.Module, inputs: tuple[Tensor, LabelMap, Tensor], results: tuple[Tensor, Tensor]) -> None:
            x, map_of_x, _ = inputs
            weights.append(block.modulation_2.attention_weights(x, map_of_x, results[1]))

        handle = block.modulation_2.register_forward_hook(look)
        try:
            self.generator(labels, latents)
        finally:
            handle.remove()
        return LatentAttention.from_heads(weights[0], self.generator.configuration.layout, labels)

    @torch.no_grad()
    def encoder_attention(self, image: Tensor, labels: LabelMap, *, level: int = 0) -> LatentAttention:
        """How much of the attention that each pixel gets in the encoder comes from each latent of its label.

        The latents attend to one level of the image after the other. With a_jp for how much latent j attends to pixel
        p, summing to 1 over the pixels of its label, a pixel's weights are a_jp / sum_i a_ip over the latents i of its
        label; they are the mean over heads, see :func:`sca_kernels.folding.attention_shares`. Where :meth:`attention`
        sees labels and latents only, what divides a region here is what the image shows.

        Args:
            image, labels: as given to the encoder.
            level: what the latents attend to: 0, the image itself, or 1, 2, ..., each of half the height and width of
                the one before. Without a pyramid every level is the image, and blocks are numbered. A latent of level
                b is what it is in front of the block of that level; with ``reversed_levels`` the last block has
                level 0.

        Returns:
            a :class:`LatentAttention`, of the level's size: its label map is ``labels.at(height, width)``.

        Raises:
            TypeError: if ``labels`` is not a label map.
            ValueError: if the encoder has no such level, or as the encoder.

        Example:
            >>> from scam_models import tiny
            >>> model = Scam.from_configuration(tiny())
            >>> labels = LabelMap.from_labels(torch.full((1, 64, 64), 2), num_labels=3)
            >>> attention = model.encoder_attention(torch.rand(1, 3, 64, 64) * 2 - 1, labels, level=1)
            >>> attention.weights.shape, bool((attention.weights.sum(1) - 1).abs().max() < 1e-5)
            (torch.Size([1, 4, 32, 32]), True)
        """
        configuration = self.encoder.configuration
        if not 0 <= level < configuration.num_blocks:
            raise ValueError(f"level: expected one from 0 to {configuration.num_blocks - 1}, got {level}")
        block = self.encoder.blocks[-1 - level if configuration.reversed_levels else level]
        assert isinstance(block, EncoderBlock)
        weights: list[Tensor] = []

        def look(module: nn.Module, inputs: tuple[Tensor, Tensor, LabelMap]) -> None:
            weights.append(block.cross_attention.attention_shares(*inputs))

        handle = block.cross_attention.register_forward_pre_hook(look)
        try:
            self.encoder(image, labels)
        finally:
            handle.remove()
        return LatentAttention.from_heads(weights[0], configuration.layout, labels)
