"""What a training step costs with the kernels, and what in the published formulation: the same network and weights."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.memory import peak_bytes
from bench.published import SCAMGenerator, SemanticAttentionTransformerEncoder, mask_of_latents
from bench.timing import relative_error
from sca_kernels import LabelMap
from scam_models import Scam, ScamConfiguration, published_state_dict

ROUNDS = 5
TOLERANCE = 1e-3  # of the relative error of images: what float32 makes of two orders of summation in a trained network

Loss = Callable[[Tensor], Tensor]


class PublishedScam(nn.Module):
    """A SCAM in the published formulation: every pixel is projected, dense masks cover all pairs."""

    def __init__(self, model: Scam) -> None:
        super().__init__()
        self.encoder = SemanticAttentionTransformerEncoder(**encoder_arguments(model.configuration))
        self.generator = SCAMGenerator(**generator_arguments(model.configuration))
        self.load_state_dict(published_state_dict(model))

    def forward(self, images: Tensor, one_hot: Tensor) -> Tensor:
        latents, _ = self.encoder(images, one_hot)
        return self.generator(one_hot, latents)


def encoder_arguments(configuration: ScamConfiguration) -> dict[str, object]:
    """The arguments of the published encoder; those that are not here have the published default."""
    encoder = configuration.encoder
    return {
        "num_input_channels": encoder.image_channels,
        "positional_embedding_dim": encoder.encoding_channels,
        "num_labels": encoder.layout.num_labels,
        "num_latent_per_labels": encoder.layout.max_per_label,
        "latent_dim": encoder.latent_dim,
        "num_blocks": encoder.num_blocks,
        "attention_latent_dim": encoder.attention_dim,
        "num_cross_heads": encoder.num_cross_heads,
        "num_self_heads": encoder.num_self_heads,
        "image_conv": encoder.pyramid,
        "conv_features_dim_first": encoder.first_channels // 2,
    }


def generator_arguments(configuration: ScamConfiguration) -> dict[str, object]:
    """The arguments of the published generator."""
    generator = configuration.generator
    return {
        "num_filters_last_layer": generator.last_channels,
        "num_up_layers": generator.num_blocks,
        "num_up_layers_with_mask_adain": 0,
        "height": generator.height,
        "width": generator.width,
        "num_labels": generator.layout.num_labels,
        "style_dim": generator.latent_dim,
        "kernel_size": generator.kernel_size,
        "attention_latent_dim": generator.attention_dim,
        "num_heads": generator.num_heads,
        "attention_type": "duplex" if generator.duplex else "simplex",
        "num_output_channels": generator.image_channels,
        "latent_pos_emb": "none",
        "architecture": generator.architecture,
        "apply_spectral_norm": generator.spectral,
        "split_latents": generator.split_latents,
        "num_labels_split": generator.layout.max_per_label,
        "add_noise": generator.noise,
    }


@dataclass(frozen=True)
class Cost:
    """Of one training step.

    Attributes:
        seconds: median.
        peak_bytes: the most tensor memory beyond weights, the optimiser's state and the images.
    """

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Costs by the name of the formulation, after they agreed.

    Attributes:
        costs: the kernels come first.
        image_error: largest relative difference of the images.
        loss_error: relative difference of the losses.
    """

    costs: Mapping[str, Cost]
    image_error: float
    loss_error: float


def compare_steps(model: Scam, images: Tensor, labels: LabelMap, loss: Loss) -> Comparison:
    """Trains with the kernels and with the published formulation, which take turns, on copies of the same weights.

    Args:
        model: is trained a few steps more.
        images, labels: what a step reconstructs.
        loss: of the reconstruction.

    Raises:
        RuntimeError: if reconstructions or losses do not agree beforehand.
    """
    published = PublishedScam(model)
    one_hot = mask_of_latents(labels.labels, torch.arange(labels.num_labels))
    with torch.no_grad():
        ours, theirs = model(images, labels), published(images, one_hot)
    image_error = relative_error(ours, theirs)
    loss_error = abs(float(loss(ours) / loss(theirs)) - 1)
    if max(image_error, loss_error) > TOLERANCE:
        raise RuntimeError(f"the formulations differ: images by {image_error:.1e}, losses by {loss_error:.1e}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler, which counts memory, tells when it starts
    steps = {
        "sca-kernels": _step(model, lambda: loss(model(images, labels))),
        "dense, as published": _step(published, lambda: loss(published(images, one_hot))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    # The first round is not counted; the optimisers allocated their states in it.
    costs = {name: Cost(statistics.median(seconds[name][1:]), peak_bytes(step)) for name, step in steps.items()}
    return Comparison(costs, image_error, loss_error)


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step that keeps no gradients, so that all of its memory is its own."""
    # Without a learning rate: the weights stay as they are, and both formulations compute the same in every step.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
