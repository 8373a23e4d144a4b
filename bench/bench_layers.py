"""The attention layers of encoder and generator beside the published ones: one training step, layer by layer.

Each layer gets what it gets inside the whole model and is computed alone: forward, and backward from a random gradient
of its results to its inputs and weights. ``ours`` and ``published`` must agree on all results and gradients. The masks
of the published layers and our label maps with their plans, one for each size of feature maps, are made beforehand.
Convolutions, nearest upsampling and tanh are the same before and after and left out; the leaky ReLU in front of a
published convolution, which ours has in the modulation, is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sca_kernels import LabelMap
from sca_kernels.nn import SemanticAttentionTransformer, SemanticModulation
from scam_models import Scam
from scam_models.published import published_names

from . import label_maps
from .published import NEGATIVE_SLOPE
from .run import Run
from .timing import Contender, Pace
from .whole_models import CONFIGURATIONS, SEED, Problem

# A parameter of each kind of layer, and how many words of its published name are the layer's own.
_LANDMARKS: dict[type[nn.Module], tuple[str, int]] = {
    SemanticModulation: ("gamma.weight", 2),
    SemanticAttentionTransformer: ("attention.query.weight", 3),
}
_IMAGE_CHANNELS = 3
# Units on the other side of the kink of a leaky ReLU after rounding: gradients of float32 agree less than results.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 0.02}


class Layer(NamedTuple):
    """A layer of a model, and the positional arguments that the model calls it with, copied."""

    module: nn.Module
    arguments: tuple[Any, ...]


def names_of_layers(model: Scam) -> Iterator[tuple[str, str]]:
    """The names of our attention layers, and of the published ones, in the order of the model."""
    published_by_name = {ours: published for published, ours in published_names(model).items()}
    outer = ""
    for name, module in model.named_modules():
        if type(module) not in _LANDMARKS or (outer and name.startswith(outer)):
            continue
        outer = f"{name}."
        landmark, words = _LANDMARKS[type(module)]
        yield name, published_by_name[outer + landmark].rsplit(".", words)[0]


def layers_of(model: nn.Module, names: Sequence[str], run: Callable[[], object]) -> list[Layer]:
    """The layers of these names, as they are called while the model runs."""
    found: dict[str, Layer] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            # The same tensor may be given twice.
            copies = {id(a): a.detach().clone() for a in arguments if isinstance(a, Tensor)}
            found[name] = Layer(module, tuple(copies.get(id(a), a) for a in arguments))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        torch.manual_seed(SEED)
        run()
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]


def contender(
    name: str,
    layer: Layer,
    weights: Sequence[Tensor],
    positions: Sequence[int],
    shape: Mapping[str, int],
    *,
    negative_slope: float = 1.0,
) -> Contender:
    """Forward and backward.

    Args:
        name: of the contender.
        layer: that is run.
        weights: whose gradients are wanted.
        positions: of the arguments whose gradients are wanted.
        shape: what is computed, for the record.
        negative_slope: of a leaky ReLU behind the layer.

    Returns:
        a contender with the results and the gradients of weights and arguments.
    """
    wanted = [*weights, *(layer.arguments[position].requires_grad_() for position in positions)]

    def step() -> tuple[Tensor, ...]:
        torch.manual_seed(SEED)  # of the noise
        given = layer.module(*layer.arguments)
        first, *others = (given,) if isinstance(given, Tensor) else given
        if negative_slope != 1:
            first = F.leaky_relu(first, negative_slope)
        results = (first, *others)
        gradients = torch.autograd.grad(results, wanted, [_start(result) for result in results])
        return (*(result.detach() for result in results), *gradients)

    return Contender(name, step, (), shape, restore=_as_rows)


def _start(result: Tensor) -> Tensor:
    """A gradient to start from: numbers that are quick to make and no two of which are alike."""
    return torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)


def _as_rows(tensor: Tensor) -> Tensor:
    """A feature map as tokens, which the published encoder has in its place."""
    return tensor.flatten(2).transpose(1, 2) if tensor.dim() == 4 else tensor


def _positions(layer: Layer) -> tuple[int, ...]:
    """Of features and latents among the arguments, which are the same in the published layer."""
    if isinstance(layer.module, SemanticModulation):
        return 0, 2
    is_from_features = len(layer.arguments) > 1 and layer.arguments[1].shape[1] != _IMAGE_CHANNELS
    return (0, 1) if is_from_features else (0,)


def _size(layer: Layer) -> list[str]:
    maps = [a.shape for a in layer.arguments if isinstance(a, Tensor) and a.dim() == 4]
    return [f"{channels} channels, {height} x {width}" for _, channels, height, width in maps]


@pytest.mark.parametrize("name", ["CelebAMask-HQ", "ADE20K"])
def test_layers(run: Run, name: str) -> None:
    sizes = run.choose(CONFIGURATIONS[name].reduced(), CONFIGURATIONS[name])
    problem = Problem(sizes, label_maps.parts)
    published, model = problem.published, problem.our_model().train()
    labels = LabelMap(problem.labels, sizes.num_labels)
    names = list(names_of_layers(model))
    after = layers_of(model, [ours for ours, _ in names], lambda: model(problem.image, labels))
    before = layers_of(published, [theirs for _, theirs in names], lambda: published(problem.image, problem.one_hot))
    for (title, prefix), layer, original in zip(names, after, before, strict=True):
        positions = _positions(layer)
        # Where ours ends with the leaky ReLU of the modulation and that of the convolution.
        slope = getattr(layer.module, "negative_slope", NEGATIVE_SLOPE) / NEGATIVE_SLOPE
        weights = _weights(model, title, published, prefix)
        as_published = contender(
            "published", original, [theirs for _, theirs in weights], positions, problem.shape, negative_slope=slope
        )
        as_published = replace(as_published, expected=tuple(map(_as_rows, as_published.run())))
        ours = contender("ours", layer, [ours for ours, _ in weights], positions, problem.shape)
        run.compare(
            [replace(ours, expected=as_published.expected), as_published],
            table=f"Layer by layer, training step: {name}, {sizes.num_labels} labels, k = 8, float32",
            row=", ".join((title, *_size(layer))),
            dtype=sizes.dtype,
            tolerance=TOLERANCE[sizes.dtype],
            pace=Pace(seconds=1.5, turn_seconds=0.3, fewest_rounds=2),
        )


def _weights(model: Scam, name: str, published: nn.Module, prefix: str) -> list[tuple[Tensor, Tensor]]:
    """The weights of a layer of ours and of the published one. The bias of a key has no influence."""
    ours, theirs = dict(model.named_parameters()), dict(published.named_parameters())
    return [
        (ours[own], theirs[key])
        for key, own in published_names(model).items()
        if key.startswith(f"{prefix}.") and own.startswith(f"{name}.") and not key.endswith("v_linear.bias")
    ]
