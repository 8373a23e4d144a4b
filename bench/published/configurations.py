"""The published configurations."""

from __future__ import annotations

from typing import Any

from .encoder import SemanticAttentionTransformerEncoder
from .generator import SCAMGenerator

STYLE_WIDTH = 256  # of a latent
ATTENTION_WIDTH = 256
LATENTS_PER_LABEL = 8


def make_generator(num_labels: int, height: int = 256, width: int = 256, **changes: Any) -> SCAMGenerator:
    """The generator of the default configuration, 80.7 million parameters for 19 labels.

    CelebAMask-HQ has 19 labels and ADE20K 151; iDesigner has 3, and 256 x 170 pixels. ``changes`` are other arguments.
    """
    return SCAMGenerator(**generator_arguments(num_labels, height, width, **changes))


def make_encoder(num_labels: int, **changes: Any) -> SemanticAttentionTransformerEncoder:
    """The encoder of the default configuration, 14.2 million parameters for 19 labels."""
    return SemanticAttentionTransformerEncoder(**encoder_arguments(num_labels, **changes))


def generator_arguments(num_labels: int, height: int = 256, width: int = 256, **changes: Any) -> dict[str, Any]:
    """All arguments of :func:`make_generator`'s generator."""
    return {
        "height": height,
        "width": width,
        "num_labels": num_labels,
        "num_filters_last_layer": 64,
        "num_up_layers": 6,
        "num_up_layers_with_mask_adain": 0,
        "style_dim": STYLE_WIDTH,
        "kernel_size": 3,
        "attention_latent_dim": ATTENTION_WIDTH,
        "num_heads": 1,
        "attention_type": "duplex",
        "num_output_channels": 3,
        "latent_pos_emb": "none",
        "architecture": "skip",
        "apply_spectral_norm": False,
        "split_latents": False,
        "num_labels_split": LATENTS_PER_LABEL,
        "num_labels_bg": LATENTS_PER_LABEL,
        **changes,
    }


def encoder_arguments(num_labels: int, **changes: Any) -> dict[str, Any]:
    """All arguments of :func:`make_encoder`'s encoder."""
    return {
        "num_labels": num_labels,
        "num_input_channels": 3,
        "positional_embedding_dim": 40,
        "num_latent_per_labels": LATENTS_PER_LABEL,
        "num_latents_bg": LATENTS_PER_LABEL,
        "latent_dim": STYLE_WIDTH,
        "num_blocks": 7,
        "attention_latent_dim": ATTENTION_WIDTH,
        "num_cross_heads": 1,
        "num_self_heads": 1,
        "image_conv": True,
        "conv_features_dim_first": 16,
        **changes,
    }
