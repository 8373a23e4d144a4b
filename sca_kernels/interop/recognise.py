"""Published modules are told by their attributes and the arguments of ``forward``, wherever their class was defined."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn

from ..labels import LatentLayout

# ``nn.Module`` says that its attributes are tensors or modules.
Published = Any


class Kind(NamedTuple):
    """A published module.

    Attributes:
        name: of its class.
        attributes: which it has.
        arguments: of ``forward``.
    """

    name: str
    attributes: tuple[str, ...]
    arguments: tuple[str, ...]

    def misfit(self, module: nn.Module) -> str | None:
        """Why the module is not of this kind, or None."""
        for name in self.attributes:
            if not hasattr(module, name):
                return f"it has no attribute {name!r}"
        forwards = [vars(base)["forward"] for base in type(module).__mro__ if "forward" in vars(base)]
        given = tuple(inspect.signature(forwards[0]).parameters)[1:]
        if given != self.arguments:
            return f"its forward takes ({', '.join(given)}), not ({', '.join(self.arguments)})"
        return None


_MASKED = ("x", "segmentation_map", "style_codes")
ATTENTION = Kind(
    "MaskedAttention",
    ("q_linear", "v_linear", "k_linear", "out", "num_heads", "latent_dim_k"),
    ("X_to", "X_from", "mask_from", "return_attention"),
)
TRANSFORMER = Kind(
    "MaskedTransformer", ("attention", "ln_1", "fc", "ln_2"), ("X_to", "X_from", "mask", "return_attention")
)
MODULATION = Kind(
    "SCAMModulation",
    (
        *("num_labels", "style_dim", "use_mask_adain", "add_noise", "modulate", "attention_type", "norm_type"),
        *("lr_mul", "return_attention", "normalization_layer", "feature_map_pos_encoding", "latent_to_image"),
        *("mlp_lti_gamma", "mlp_lti_beta", "activation"),
    ),
    (*_MASKED, "content_code"),
)
TO_RGB = Kind("ToRGB", ("modulate_fmap", "conv_rgb"), (*_MASKED, "previous_rgb"))
BLOCK = Kind(
    "SCAMResUpscale",
    ("architecture", "last_block", "up", "mod_0", "mod_1", "conv_0", "conv_1"),
    (*_MASKED, "content_code", "previous_rgb"),
)
GENERATOR = Kind(
    "SCAMGenerator",
    (
        *("num_labels", "num_labels_split", "num_labels_bg", "num_style_tokens", "split_latents", "use_vae"),
        *("attention_type", "latent_pos_emb", "small_h", "small_w", "first_conv", "style_code_pos_encoding"),
        *("backbone", "last_act"),
    ),
    ("segmentation_map", "style_codes", "content_code"),
)
ENCODER = Kind(
    "SemanticAttentionTransformerEncoder",
    (
        *("num_latent_per_labels", "num_latents_bg", "num_latents", "latent_dim", "lr_mul", "image_conv"),
        *("reverse_conv", "use_self_attention", "use_vae", "return_attention", "type_of_initial_latents"),
        *("latents_mask", "backbone"),
    ),
    ("input", "segmentation_map"),
)
KINDS = (ATTENTION, TRANSFORMER, MODULATION, TO_RGB, BLOCK, GENERATOR, ENCODER)


def kind_of(module: nn.Module) -> Kind | None:
    """What a module is, or None."""
    return next((kind for kind in KINDS if kind.misfit(module) is None), None)


def near_miss(module: nn.Module) -> str | None:
    """Why a module that is named like a published one is none of them."""
    names = [base.__name__ for base in type(module).__mro__]
    return next((kind.misfit(module) for kind in KINDS if kind.name in names), None)


def changed_forward(module: nn.Module) -> str | None:
    """Why ``forward`` may not be the published one, although it takes the same arguments."""
    if "forward" in vars(module):
        return "its forward was replaced"
    forwards = [base for base in type(module).__mro__ if base is not nn.Module and "forward" in vars(base)]
    if len(forwards) > 1:
        return f"{forwards[0].__name__} overrides the forward of {forwards[1].__name__}"
    return None


def own_layout(module: Published, kind: Kind) -> LatentLayout | None:
    """The layout that a generator or an encoder knows."""
    if kind is GENERATOR:
        background, others, count = module.num_labels_bg, module.num_labels_split, module.num_labels
    elif kind is ENCODER:
        background, others = module.num_latents_bg, module.num_latent_per_labels
        if not others:
            return None
        count = (module.num_latents - background) // others + 1
    else:
        return None
    return LatentLayout((background, *(others,) * (count - 1)))


def latents_of(module: Published, kind: Kind) -> int | None:
    """Number of latents that a module is made for; None if it takes any."""
    if kind is TRANSFORMER:
        return int(module.ln_1.normalized_shape[0])
    if kind is MODULATION:
        return int(module.num_labels)
    if kind is BLOCK:
        return latents_of(module.mod_0, MODULATION) if kind_of(module.mod_0) is MODULATION else None
    if kind is TO_RGB and module.modulate_fmap and kind_of(module.mod_rgb) is MODULATION:
        return latents_of(module.mod_rgb, MODULATION)
    return None
