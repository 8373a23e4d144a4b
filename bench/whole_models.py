"""Encoder and generator of the published configurations, and all ways to compute them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sca_kernels
from sca_kernels import LabelMap
from scam_models import Encoder, Generator, Scam, load_published_state_dict
from scam_models.published import encoder_configuration, generator_configuration, published_names

from . import label_maps
from .published import (
    NEGATIVE_SLOPE,
    SCAMGenerator,
    SCAMModulation,
    SemanticAttentionTransformerEncoder,
    encoder_arguments,
    generator_arguments,
    mask_of_latents,
)
from .run import Run
from .timing import Contender

SEED = 3
PASSES = {False: "inference", True: "training step"}
# Of results and of gradients; in bfloat16, where the published networks are as far off, of all gradients together.
TOLERANCE = {
    torch.float64: {False: 1e-9, True: 1e-9},
    torch.float32: {False: 5e-5, True: 0.1},
    torch.bfloat16: {False: 0.1, True: 0.4},
}
Compiler = Callable[[nn.Module], Callable[..., Tensor]]
SMALL_WIDTH = 8
SMALL_ENCODER = {
    "num_blocks": 4,
    "positional_embedding_dim": 8,
    "latent_dim": SMALL_WIDTH,
    "attention_latent_dim": SMALL_WIDTH,
    "num_latent_per_labels": 2,
    "num_latents_bg": 2,
    "conv_features_dim_first": 4,
}
SMALL_GENERATOR = {
    "num_up_layers": 4,
    "num_filters_last_layer": 4,
    "style_dim": SMALL_WIDTH,
    "attention_latent_dim": SMALL_WIDTH,
    "num_labels_split": 2,
    "num_labels_bg": 2,
}


@dataclass(frozen=True)
class Sizes:
    """What is computed.

    Attributes:
        name: of the data set whose configuration it is.
        num_labels, height, width: of the images.
        batch: number of images.
        dtype: of all numbers; bfloat16: autocast, and float32 for the rest.
        small: whether the networks are narrow and have fewer layers.
    """

    name: str
    num_labels: int
    height: int = 256
    width: int = 256
    batch: int = 1
    dtype: torch.dtype = torch.float32
    small: bool = False

    def reduced(self) -> Sizes:
        """The same with small networks and images, and in float64 in the place of float32."""
        dtype = torch.float64 if self.dtype == torch.float32 else self.dtype
        height, width = self.height * 50 // 256, self.width * 50 // 256
        num_labels, batch = 3 + self.num_labels // 16, min(self.batch, 2)
        return replace(self, num_labels=num_labels, height=height, width=width, batch=batch, dtype=dtype, small=True)


CONFIGURATIONS = {
    "CelebAMask-HQ": Sizes("CelebAMask-HQ", 19),
    "ADE20K": Sizes("ADE20K", 151),
    "iDesigner": Sizes("iDesigner", 3, 256, 170),
}


def no_compiler(network: nn.Module) -> Callable[..., Tensor]:
    return network


class PublishedScam(nn.Module):
    """The published encoder and generator."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.encoder_arguments = encoder_arguments(sizes.num_labels, **(SMALL_ENCODER if sizes.small else {}))
        changes = SMALL_GENERATOR if sizes.small else {}
        self.generator_arguments = generator_arguments(sizes.num_labels, sizes.height, sizes.width, **changes)
        self.encoder = SemanticAttentionTransformerEncoder(**self.encoder_arguments)
        self.generator = SCAMGenerator(**self.generator_arguments)

    def forward(self, image: Tensor, one_hot: Tensor) -> Tensor:
        latents, _ = self.encoder(image, one_hot)
        return self.generator(one_hot, latents)


class PublishedConvolutions(nn.Module):
    """The published modules with attention and modulation taken out: what :class:`Convolutions` must compute."""

    def __init__(self, published: PublishedScam) -> None:
        super().__init__()
        self.encoder, self.generator = copy.deepcopy(published.encoder), copy.deepcopy(published.generator)
        for module in self.generator.modules():
            if isinstance(module, SCAMModulation):
                module.forward = _only_activate

    def forward(self, image: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
        last_level = nn.Sequential(*self.encoder.convs)(image)
        generator = self.generator
        latents = one_hot.new_zeros((len(image), generator.num_style_tokens, generator.latents_dim))
        return last_level, generator(one_hot, latents)

    def weights(self) -> list[Tensor]:
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        return list(chain.from_iterable((module.weight, module.bias) for module in convolutions))


def _only_activate(x: Tensor, planes: Tensor, latents: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return F.leaky_relu(x, NEGATIVE_SLOPE), latents


class Convolutions(nn.Module):
    """Encoder and generator without attention and modulation: their convolutions, upsamplings and activations.

    Nothing else is left: no masks, two leaky ReLUs in a row are one, and those whose input nobody else reads are in
    place.

    Args:
        convolutions: in the order of the published modules, copied.
        sizes: of the image behind each block of the generator.
    """

    def __init__(self, convolutions: Sequence[nn.Conv2d], sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        blocks = 3 * len(sizes)
        copies = copy.deepcopy(list(convolutions))
        self.of_encoder = nn.ModuleList(copies[: -blocks - 1])
        self.first, *rest = copies[-blocks - 1 :]
        self.of_blocks = nn.ModuleList(rest)
        self.sizes = sizes

    def forward(self, image: Tensor, small_map: Tensor) -> tuple[Tensor, Tensor]:
        """The last level of the encoder and the generated image, from an image and a one-hot map of the first size."""
        level = image
        for convolution in self.of_encoder:
            level = F.leaky_relu(convolution(level), NEGATIVE_SLOPE, inplace=True)
        x = self.first(small_map)
        result: Tensor | None = None
        for block, size in enumerate(self.sizes):
            convolution_1, convolution_2, to_image = self.of_blocks[3 * block : 3 * block + 3]
            # The first result is the input of nothing else, the others are also made an image of.
            x = convolution_1(F.leaky_relu(x, NEGATIVE_SLOPE**2, inplace=block == 0))
            x = F.interpolate(x, size=size, mode="nearest")
            x = convolution_2(F.leaky_relu(x, NEGATIVE_SLOPE**2, inplace=True))
            is_last = block == len(self.sizes) - 1
            added = to_image(x if is_last else F.leaky_relu(x, NEGATIVE_SLOPE))
            result = added if result is None else added + F.interpolate(result, size=size, mode="nearest")
        assert result is not None
        return level, result.tanh()


class Problem:
    """Images to reconstruct.

    Args:
        sizes: see :class:`Sizes`.
        labels_of: makes the label map.

    Attributes:
        sizes: the same.
        published: the published networks, which hold the weights.
        image: (B, 3, height, width).
        labels: (B, height, width); the maps of a batch are mirrored, so that they differ.
        one_hot: (B, labels, height, width), the same for the published networks.
    """

    def __init__(self, sizes: Sizes, labels_of: Callable[[int, int, int], Tensor]) -> None:
        self.sizes = sizes
        torch.manual_seed(0)
        dtype = torch.float32 if sizes.dtype == torch.bfloat16 else sizes.dtype
        self.published = PublishedScam(sizes).to(dtype)
        for name, parameter in self.published.named_parameters():
            if name.endswith("noise_var"):
                nn.init.normal_(parameter, std=0.3)
        labels = labels_of(sizes.height, sizes.width, sizes.num_labels)
        mirrored = [labels, labels.flip(2), labels.flip(1), labels.flip(1, 2)]
        self.labels = torch.cat([mirrored[index % len(mirrored)] for index in range(sizes.batch)])
        self.one_hot = mask_of_latents(self.labels, torch.arange(sizes.num_labels)).to(dtype)
        self.image = torch.rand((sizes.batch, 3, sizes.height, sizes.width), dtype=dtype) * 2 - 1
        self._starts: dict[torch.Size, Tensor] = {}
        self._published_results: dict[bool, tuple[Tensor, ...]] = {}

    @property
    def shape(self) -> dict[str, int]:
        """What a result is recorded with."""
        sizes = self.sizes
        return {
            "batch": sizes.batch,
            "height": sizes.height,
            "width": sizes.width,
            "labels": sizes.num_labels,
            "labels_present": int(torch.unique(self.labels).numel()),
        }

    def as_published(
        self, name: str, *, backward: bool, compiled_by: Compiler = no_compiler, autocast: bool = True
    ) -> Contender:
        """The published networks."""
        run = compiled_by(self.published)
        expected = self._expected(backward) if autocast else ()
        return self._contender(
            name, lambda: (run(self.image, self.one_hot),), self._weights.values(), expected, backward, autocast
        )

    def swapped(self, name: str, *, backward: bool) -> Contender:
        """The published networks with our kernels swapped in, and with a mask that is new to them in every call."""
        model = copy.deepcopy(self.published).train(backward)
        report = sca_kernels.swap_in(model)
        assert report.rows and not report.left_alone, str(report)
        own = dict(model.named_parameters())

        def reconstruct() -> tuple[Tensor, ...]:
            return (model(self.image, self.one_hot.detach()),)

        weights = [own[key] for key in self._weights]
        return self._contender(name, reconstruct, weights, self._expected(backward), backward)

    def ours(
        self,
        name: str,
        *,
        backward: bool,
        memory_format: torch.memory_format | None = None,
        compiled_by: Compiler = no_compiler,
    ) -> Contender:
        """Our networks, with a label map that is new in every call, as if it came with a new image."""
        model = self._our_model(memory_format).train(backward)
        own, names = dict(model.named_parameters()), published_names(model)
        run = compiled_by(model)

        def reconstruct() -> tuple[Tensor, ...]:
            return (run(self.image, LabelMap(self.labels, self.sizes.num_labels)),)

        weights = [own[names[key]] for key in self._weights]
        return self._contender(name, reconstruct, weights, self._expected(backward), backward)

    def convolutions(
        self, name: str, *, backward: bool, ours: bool, memory_format: torch.memory_format | None = None
    ) -> Contender:
        """What is left without attention and modulation, of our networks or of the published ones."""
        model: nn.Module = self._our_model(memory_format) if ours else self.published
        given = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        generator = self._our_model(None).generator.configuration
        network = Convolutions(given, generator.sizes[1:])
        small_map = F.interpolate(self.one_hot, size=generator.sizes[0])
        if memory_format is not None:
            network = network.to(memory_format=memory_format)
        expected = self._expected_convolutions(backward)
        weights = list(network.parameters())
        return self._contender(name, lambda: network(self.image, small_map), weights, expected, backward)

    def _contender(
        self,
        name: str,
        forward: Callable[[], tuple[Tensor, ...]],
        weights: Iterable[Tensor],
        expected: tuple[Tensor, ...],
        backward: bool,
        autocast: bool = True,
    ) -> Contender:
        """Returns the results, or with ``backward`` the gradients of the weights."""
        is_cast = autocast and self.sizes.dtype == torch.bfloat16
        weights = list(weights)

        def infer() -> tuple[Tensor, ...]:
            torch.manual_seed(SEED)  # of the noise
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
                return forward()

        def train() -> tuple[Tensor, ...]:
            torch.manual_seed(SEED)
            with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
                results = forward()
            return torch.autograd.grad(results, weights, [self._start(result) for result in results])

        # In 16 bits a gradient that is small beside the others is mostly rounding errors.
        return Contender(name, train if backward else infer, expected, self.shape, joint=is_cast)

    def _start(self, result: Tensor) -> Tensor:
        """A gradient to start from."""
        if result.shape not in self._starts:
            generator = torch.Generator().manual_seed(result.numel())
            self._starts[result.shape] = torch.randn(result.shape, generator=generator, dtype=self.image.dtype)
        return self._starts[result.shape].to(result.dtype)

    def _our_model(self, memory_format: torch.memory_format | None) -> Scam:
        published = self.published
        model = Scam(
            Encoder(encoder_configuration(**published.encoder_arguments)),
            Generator(generator_configuration(**published.generator_arguments)),
        ).to(self.image.dtype)
        load_published_state_dict(model, published.state_dict())
        return model if memory_format is None else model.to(memory_format=memory_format)

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        """By published name. The bias of a key has no influence: its gradient is rounding errors."""
        return {
            name: parameter
            for name, parameter in self.published.named_parameters()
            if not name.endswith("v_linear.bias")
        }

    def _expected(self, backward: bool) -> tuple[Tensor, ...]:
        """Results or gradients of the published networks without autocast."""
        if backward not in self._published_results:
            self._published_results[backward] = self.as_published("exact", backward=backward, autocast=False).run()
        return self._published_results[backward]

    def _expected_convolutions(self, backward: bool) -> tuple[Tensor, ...]:
        network = PublishedConvolutions(self.published)
        with torch.set_grad_enabled(backward):
            results = network(self.image, self.one_hot)
        if not backward:
            return results
        return torch.autograd.grad(results, network.weights(), [self._start(result) for result in results])


def make_problems(run: Run, sizes: Sizes) -> tuple[Problem, Problem | None]:
    """With a photograph's label map, and with one in which all labels occur."""
    sizes = run.choose(sizes.reduced(), sizes)
    if sizes.name == "iDesigner":
        return Problem(sizes, label_maps.photograph), None
    return Problem(sizes, label_maps.parts), Problem(sizes, label_maps.regions)
