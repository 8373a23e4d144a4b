"""Whole modulations beside the published ones: label plan, folding and the update of the latents are all counted.

* ``ours``: :class:`sca_kernels.nn.SemanticModulation` with a label map that is new in every call, as if it came with a
  new image, and has the image's resolution; it is :func:`bench.label_maps.parts`, twenty parts of a photograph.
  ``ours, all labels``: with :func:`bench.label_maps.regions`, in which all labels occur (at 8 x 8 as many as fit).
* ``published``: :class:`bench.published.SCAMModulation` with the first map. Its mask of all latents, which has the
  image's resolution, is made beforehand. It takes equally long for any map. ``compiled``: that under ``torch.compile``.
  ``autocast``: that under autocast to bfloat16, and so less exact, where the processor has it.

All get the same noise, which is drawn beforehand.

Forward is inference: no gradients are recorded, and ours may remember products of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sca_kernels import LabelMap, LatentLayout
from sca_kernels.nn import SemanticModulation

from . import goals, label_maps, timing
from .contenders import autocast as in_bfloat16
from .feature_maps import noticeable, without_gradient_at_kinks
from .published import ATTENTION_WIDTH, STYLE_WIDTH, SameLabel, SCAMModulation, mask_of_latents
from .races import PASSES
from .run import Run
from .timing import Contender, skipped

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

LATENTS = 8
IMAGE_SIDE = 256
SHAPES = [(64, 256), (128, 128), (512, 32), (1024, 8)]
KINDS = {False: "simplex", True: "duplex"}
# Compiling takes longer than all the rest.
COMPILED = [(64, 256, 19), (64, 256, 151)]

# Parameters of the published module and of ours.
RENAMED = {
    "latent_to_image": "attention",
    "image_to_latent": "latent_update",
    "fc_itl": "latent_update",
    "mlp_lti_": "",
    "q_linear": "query",
    "v_linear": "key",
    "k_linear": "value",
    "out.0": "out",
    "ln_": "norm_",
    ".fc.": ".mlp.",
    "noise_var": "noise_strength",
}

# From features and latents to the modulated features and the new latents.
Modulation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class PublishedModulation(SCAMModulation):
    """The published module at the sizes of the published configurations, with given noise (1, width, height, 1)."""

    def __init__(self, channels: int, latents: int, duplex: bool, noise: Tensor) -> None:
        super().__init__(
            num_labels=latents,
            feature_map_dim=channels,
            style_dim=STYLE_WIDTH,
            attention_latent_dim=ATTENTION_WIDTH,
            kernel_size=3,
            num_heads=1,
            attention_type=KINDS[duplex],
        )
        self.noise = noise

    def draw_noise(self, x: Tensor) -> Tensor:
        return self.noise


@dataclass(frozen=True)
class Problem:
    """One modulation to compute.

    Attributes:
        published: the published module, which holds the weights.
        x, latents: what takes gradients besides the weights.
        labels: (1, IMAGE_SIDE, IMAGE_SIDE), of the image.
        layout: of the latents.
        gradients: of the results, for backward to start from.
        compared: which gradients are returned, of x, latents and the weights in the order of ``published``.
        expected: the results and these gradients in float64.
    """

    published: PublishedModulation
    x: Tensor
    latents: Tensor
    labels: Tensor
    layout: LatentLayout
    gradients: tuple[Tensor, Tensor]
    compared: Sequence[int]
    expected: tuple[Tensor, ...]

    @property
    def shape(self) -> dict[str, int]:
        """What a result is recorded with."""
        _, channels, height, width = self.x.shape
        return {
            "channels": channels,
            "height": height,
            "width": width,
            "latents_per_label": self.layout.max_per_label,
            "labels": self.layout.num_labels,
            "labels_present": int(torch.unique(_resized(self.labels, height, width)).numel()),
        }

    def entry(self, name: str, modulate: Modulation, parameters: Sequence[Tensor], backward: bool) -> Contender:
        """A modulation with its parameters, in the order of ``published``, as a contender."""
        x, latents = (tensor.detach().requires_grad_() for tensor in (self.x, self.latents))
        leaves = [x, latents, *parameters]

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return modulate(x, latents)

        def forward_and_backward() -> tuple[Tensor, ...]:
            results = modulate(x, latents)
            gradients = torch.autograd.grad(results, leaves, self.gradients)
            return *(result.detach() for result in results), *(gradients[index] for index in self.compared)

        return Contender(
            name,
            forward_and_backward if backward else forward,
            self.expected if backward else self.expected[:2],
            self.shape,
        )


@pytest.mark.parametrize("duplex", KINDS, ids=KINDS.get)
@pytest.mark.parametrize("num_labels", [19, 151])
@pytest.mark.parametrize("channels, side", SHAPES)
def test_modulation(run: Run, channels: int, side: int, num_labels: int, duplex: bool) -> None:
    scaled = run.choose((min(channels, 40), max(4, side // 16), 32), (channels, side, IMAGE_SIDE))
    problem = _problem(label_maps.parts, num_labels, duplex, *scaled)
    all_labels = _problem(label_maps.regions, num_labels, duplex, *scaled)
    latent_labels = problem.layout.labels(torch.device("cpu"))
    mask = mask_of_latents(problem.labels, latent_labels)
    published = problem.published
    weights = list(published.parameters())

    def published_by(forward: Callable[..., tuple[Tensor, Tensor]]) -> Modulation:
        return lambda x, latents: forward(x, mask, latents)

    is_compiled = (channels, side, num_labels) in COMPILED
    compiled = published_by(run.compile(published.forward)) if is_compiled else None
    present = [entry.shape["labels_present"] for entry in (problem, all_labels)]
    for backward, name in PASSES.items():
        entries = [
            _ours("ours", problem, duplex, backward),
            _ours("ours, all labels", all_labels, duplex, backward),
            problem.entry("published", published_by(published.forward), weights, backward),
        ]
        absent = []
        if timing.has_bfloat16():
            entries.append(in_bfloat16(problem.entry("autocast", published_by(published.forward), weights, backward)))
        else:
            absent.append(skipped("autocast", problem.shape, "this processor has no bfloat16"))
        if compiled is not None:
            entries.append(problem.entry("compiled", compiled, weights, backward))
        run.compare(
            entries,
            table=f"Modulation, {KINDS[duplex]}, {name}: k = {LATENTS}, D = {ATTENTION_WIDTH}, float32; everything "
            "counted",
            row=f"{channels} channels, {side} x {side}, {num_labels} labels ({present[0]}, {present[1]} present)",
            goals=goals.module(num_labels, backward) if (channels, side) == SHAPES[0] else (),
            absent=absent,
            seconds=1.0,
        )


@pytest.mark.parametrize("duplex", KINDS, ids=KINDS.get)
@pytest.mark.parametrize("count", [1, 2])
def test_threads(run: Run, count: int, duplex: bool) -> None:
    channels, side, image_side = run.choose((40, 16, 32), (*SHAPES[0], IMAGE_SIDE))
    problem = _problem(label_maps.parts, 19, duplex, channels, side, image_side)
    published = problem.published
    mask = mask_of_latents(problem.labels, problem.layout.labels(torch.device("cpu")))
    weights = list(published.parameters())

    def as_published(x: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        return published(x, mask, latents)

    with timing.threads(count):
        for backward, name in PASSES.items():
            run.compare(
                [
                    _ours("ours", problem, duplex, backward),
                    problem.entry("published", as_published, weights, backward),
                ],
                table=f"Threads, modulation, {KINDS[duplex]}, {name}: 64 channels, 256 x 256, 19 labels, "
                f"k = {LATENTS}, D = {ATTENTION_WIDTH}, float32; everything counted",
                row=f"{count} thread{'s' * (count > 1)}",
                seconds=1.0,
            )


def _problem(
    labels_of: Callable[[int, int, int], Tensor],
    num_labels: int,
    duplex: bool,
    channels: int,
    side: int,
    image_side: int,
) -> Problem:
    torch.manual_seed(0)
    layout = LatentLayout.uniform(num_labels, LATENTS)
    published = PublishedModulation(channels, layout.count, duplex, torch.randn(1, side, side, 1))
    nn.init.normal_(published.noise_var)
    _keep_from_kinks(published)
    labels = labels_of(image_side, image_side, num_labels)
    x = torch.randn(1, channels, side, side)
    latents = torch.randn(1, layout.count, STYLE_WIDTH)

    exact = copy.deepcopy(published).double()
    leaves = [tensor.double().requires_grad_() for tensor in (x, latents)]
    pixel_labels, latent_labels = _resized(labels, side, side).flatten(1), layout.labels(x.device)[None]
    masks = SameLabel(latent_labels, pixel_labels), SameLabel(pixel_labels, latent_labels)
    results = exact.exchange(*leaves, *masks)
    starts = torch.randn_like(x), torch.randn_like(latents)
    without_gradient_at_kinks(starts[0], results[0])
    leaves += exact.parameters()
    gradients = torch.autograd.grad(results, leaves, [start.double() for start in starts])
    compared = noticeable(gradients)
    expected = (*(result.detach() for result in results), *(gradients[index] for index in compared))
    return Problem(published, x, latents, labels, layout, starts, compared, expected)


def _keep_from_kinks(published: PublishedModulation) -> None:
    """Keeps nearly all units of the latents' networks on one side of their leaky ReLU, half of them on either.

    Otherwise rounding decides the gradient of one of the many units now and then.
    """
    for network in published.modules():
        if isinstance(network, nn.Sequential):
            for linear, activation in pairwise(network):
                if isinstance(activation, nn.LeakyReLU):
                    linear.weight.data /= 4
                    linear.bias.data = 0.5 - torch.arange(linear.out_features) % 2


def _ours(name: str, problem: Problem, duplex: bool, backward: bool) -> Contender:
    channels, num_labels = problem.x.shape[1], problem.layout.num_labels
    module = SemanticModulation(problem.layout, channels, STYLE_WIDTH, ATTENTION_WIDTH, duplex=duplex)
    parameters = {_renamed(name): parameter for name, parameter in problem.published.named_parameters()}
    noise = problem.published.noise.transpose(1, 3)
    module.load_state_dict(parameters)
    module.train(backward)
    own = dict(module.named_parameters())

    def modulate(x: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        out, new_latents = module(x, LabelMap(problem.labels, num_labels), latents, noise=noise)
        return out, new_latents

    return problem.entry(name, modulate, [own[name] for name in parameters], backward)


def _renamed(name: str) -> str:
    for published, ours in RENAMED.items():
        name = name.replace(published, ours)
    return name


def _resized(labels: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(labels.unsqueeze(1).double(), size=(height, width), mode="nearest")[:, 0].to(labels.dtype)
