"""The parameters of published modules as the formulas of :mod:`sca_kernels.nn` take them.

They are looked up in every call, because ``load_state_dict(assign=True)`` and others put new ones in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..folding import AttentionProjections, FoldingCache, Projection
from ..labels import LabelMap, LatentLayout
from ..nn.attention import TransformerLayers
from ..nn.layers import NEGATIVE_SLOPE, project_rows
from ..nn.map_encoder import encode_map
from ..nn.modulation import MapBlend, ModulationLayers, Normalisation
from .recognise import Published

NORMALISATIONS: dict[str, Normalisation] = {"InstanceNorm": "instance", "LayerNorm": "layer", "BatchNorm": "batch"}


def projection(linear: Published) -> Projection:
    """Of an ``nn.Linear`` or ``EqualLinear``."""
    if isinstance(linear, nn.Linear):
        return Projection(linear.weight, linear.bias)
    return Projection(linear.weight, linear.bias, linear.scale, linear.lr_mul)


def attention_projections(attention: Published) -> AttentionProjections:
    """Of a ``MaskedAttention``. Keys come from ``v_linear``, values from ``k_linear``."""
    return AttentionProjections(
        query=projection(attention.q_linear),
        key=projection(attention.v_linear),
        value=projection(attention.k_linear),
        out=projection(attention.out[0]),
        num_heads=attention.num_heads,
    )


def transformer_layers(transformer: Published, cache: FoldingCache | None) -> TransformerLayers:
    """Of a ``MaskedTransformer``."""
    first, second = projection(transformer.fc[0]), projection(transformer.fc[2])

    def mlp(rows: Tensor) -> Tensor:
        return F.leaky_relu(two_layers(rows, first, second), NEGATIVE_SLOPE)

    attention = attention_projections(transformer.attention)
    return TransformerLayers(attention, transformer.ln_1, mlp, transformer.ln_2, cache)


def modulation_layers(
    modulation: Published, layout: LatentLayout, cache: FoldingCache | None, negative_slope: float
) -> ModulationLayers:
    """Of a ``SCAMModulation``."""
    norm = modulation.normalization_layer
    update: TransformerLayers | Callable[[Tensor], Tensor]
    if modulation.attention_type == "duplex":
        update = transformer_layers(modulation.image_to_latent, cache)
    else:
        first, second = projection(modulation.fc_itl[0]), projection(modulation.fc_itl[2])
        update = partial(two_layers, first=first, second=second)
    blend = None
    if modulation.use_mask_adain:
        blend = MapBlend(
            _map_encoder(modulation.segmap_encoder, layout), modulation.blending_gamma, modulation.blending_beta
        )
    return ModulationLayers(
        layout=layout,
        latent_update=update,
        attention=attention_projections(modulation.latent_to_image),
        gamma=projection(modulation.mlp_lti_gamma),
        beta=projection(modulation.mlp_lti_beta),
        normalisation=NORMALISATIONS[modulation.norm_type],
        batch_norm=norm if modulation.norm_type == "BatchNorm" else None,
        noise_strength=modulation.noise_var if modulation.add_noise else None,
        modulate=modulation.modulate,
        blend=blend,
        lr_mul=modulation.lr_mul,
        eps=norm.eps if modulation.norm_type != "LayerNorm" else 1e-5,
        negative_slope=negative_slope,
        empty="uniform",
        choice="auto",
        cache=cache,
    )


def two_layers(rows: Tensor, first: Projection, second: Projection) -> Tensor:
    return project_rows(F.leaky_relu(project_rows(rows, first), NEGATIVE_SLOPE), second)


def _map_encoder(encoder: Published, layout: LatentLayout) -> Callable[..., tuple[Tensor, Tensor]]:
    """A ``SegMapEncoder`` that looks up what its first convolution computes."""
    convolution = encoder.shared_mlp[0]
    weight, bias = convolution.weight, convolution.bias
    if not isinstance(convolution, nn.Conv2d):
        weight, bias = weight * convolution.scale, bias * convolution.lr_mul

    def encode(labels: LabelMap, *, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
        convolutions = encoder.gamma_mlp, encoder.mu_mlp
        return encode_map(labels, layout, weight, bias, *convolutions, memory_format=memory_format)

    return encode
