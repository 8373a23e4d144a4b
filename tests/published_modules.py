"""Published modules at sizes that tests can afford, with inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.published import SCAMGenerator, SCAMModulation, make_generator, mask_of_latents
from sca_kernels import LatentLayout

# By name, as in a state dict.
Shapes = dict[str, tuple[int, ...]]

LAYOUT = LatentLayout((2, 3, 3))
STYLE = 8
TINY_GENERATOR = {
    "num_filters_last_layer": 4,
    "num_up_layers": 4,
    "style_dim": STYLE,
    "attention_latent_dim": 12,
    "num_labels_split": 3,
    "num_labels_bg": 2,
}
TINY_ENCODER = {
    "positional_embedding_dim": 4,
    "num_latent_per_labels": 3,
    "num_latents_bg": 2,
    "latent_dim": STYLE,
    "num_blocks": 3,
    "attention_latent_dim": 12,
    "conv_features_dim_first": 2,
}


def linear(out: int, into: int) -> Shapes:
    return {"weight": (out, into), "bias": (out,)}


def convolution(out: int, into: int, size: int) -> Shapes:
    return {"weight": (out, into, size, size), "bias": (out,)}


def under(**parts: Shapes) -> Shapes:
    """Joins parts, each under its name; ``__`` stands for a dot."""
    named = ((part.replace("__", "."), shapes) for part, shapes in parts.items())
    return {f"{part}.{name}": shape for part, shapes in named for name, shape in shapes.items()}


def inputs(height: int = 32, width: int = 32, lowest: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(2, 3, height, width) image, labels (2, height, width) from ``lowest`` to 1, and latents of three labels."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, height, width, dtype=torch.float64)
    labels = torch.randint(lowest, 2, (2, height, width))
    return image, labels, torch.randn(2, LAYOUT.count, STYLE, dtype=torch.float64)


def one_hot(labels: Tensor) -> Tensor:
    return mask_of_latents(labels, torch.arange(3)).double()


def mask_of(labels: Tensor) -> Tensor:
    return mask_of_latents(labels, LAYOUT.labels(torch.device("cpu"))).double()


def randomised(module: nn.Module) -> Any:
    """The module in float64 with random parameters, so that none of them is zero or one."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def make_modulation(channels: int = 4, **options: Any) -> SCAMModulation:
    settings = {"style_dim": STYLE, "attention_latent_dim": 12, "kernel_size": 3, "num_heads": 1}
    return randomised(SCAMModulation(LAYOUT.count, channels, **(settings | options)))


def make_tiny_generator(**options: Any) -> SCAMGenerator:
    size = {"height": 64 if options.get("num_up_layers") == 5 else 32}
    size["width"] = size["height"]
    return make_generator(3, **(size | TINY_GENERATOR | options))
