"""State dicts and constructor arguments of the published SCAM code, for the models here.

The published names are those of https://github.com/nicolas-dufour/SCAM. Tables say what corresponds, module by module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sca_kernels import LatentLayout
from sca_kernels.nn import (
    AttentionLayers,
    Convolution,
    MapEncoder,
    SemanticAttentionTransformer,
    SemanticModulation,
)

from .configurations import EncoderConfiguration, GeneratorConfiguration
from .encoder import Encoder, EncoderBlock
from .generator import Generator, GeneratorBlock, ImageLayer
from .latents import DistributionLayer
from .model import Scam

# The children and parameters of our modules, and where the published code has them. "{index}" counts the modules of a
# list from 0, "{next}" from 1. What is in no table has the same names in both.
_TABLES: dict[type[nn.Module], dict[str, str]] = {
    Scam: {"encoder": "encoder", "generator": "generator"},
    Encoder: {
        "initial_latents": "latents",
        "convolutions": "convs.{next}.0",
        "blocks": "backbone.block_{index}",
        "distribution": "vae_mapper",
    },
    EncoderBlock: {"cross_attention": "cross_attention", "self_attention": "self_attention"},
    Generator: {
        "latent_encoding": "style_code_pos_encoding.weights",
        "first_convolution": "first_conv",
        "blocks": "backbone.SCAM_block_{index}",
    },
    GeneratorBlock: {
        "residual_modulation": "mod_res",
        "residual_convolution": "conv_res",
        "modulation_1": "mod_0",
        "convolution_1": "conv_0.1",
        "modulation_2": "mod_1",
        "convolution_2": "conv_1.1",
        "image_layer": "torgb",
    },
    ImageLayer: {"modulation": "mod_rgb", "convolution": "conv_rgb"},
    SemanticModulation: {
        "attention": "latent_to_image",
        "gamma": "mlp_lti_gamma",
        "beta": "mlp_lti_beta",
        "batch_norm": "normalization_layer",
        "noise_strength": "noise_var",
        "map_encoder": "segmap_encoder",
        "gamma_blend": "blending_gamma",
        "beta_blend": "blending_beta",
    },
    MapEncoder: {"shared": "shared_mlp.0", "gamma": "gamma_mlp", "beta": "mu_mlp"},
    SemanticAttentionTransformer: {"attention": "attention", "norm_1": "ln_1", "mlp": "fc", "norm_2": "ln_2"},
    # As published, the keys come from "v_linear" and the values from "k_linear".
    AttentionLayers: {"query": "q_linear", "key": "v_linear", "value": "k_linear", "out": "out.0"},
}
_SPECTRAL = {"weight": "weight_orig", "left_vector": "weight_u", "right_vector": "weight_v"}


class _Entry(NamedTuple):
    """A published tensor.

    Attributes:
        published: its name.
        name: of the tensor of ours that holds it; none for a constant.
        tensor: of ours, or the constant.
    """

    published: str
    name: str | None
    tensor: Tensor


def load_published_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copies the weights of a published model.

    Every tensor of the state dict is used: constants that the published code keeps in it are compared.

    Args:
        model: a :class:`Scam`, whose published names begin with "encoder." and "generator.", or one of its two parts.
        state_dict: of the published model with the same arguments.

    Raises:
        TypeError: if ``model`` is none of these.
        ValueError: if tensors are missing, or not expected, have another shape, or constants have other values. Nothing
            was copied then.

    Example:
        >>> from scam_models import Encoder, tiny
        >>> one, other = Encoder(tiny().encoder), Encoder(tiny().encoder)
        >>> load_published_state_dict(other, published_state_dict(one))
        >>> torch.equal(one.initial_latents, other.initial_latents)
        True
    """
    entries = _entries_of(model)
    names = {entry.published for entry in entries}
    problems = [f"missing {name}" for name in sorted(names - state_dict.keys())]
    problems += [f"unexpected {name}" for name in sorted(state_dict.keys() - names)]
    for entry in entries:
        given = state_dict.get(entry.published)
        if given is None:
            continue
        if given.shape != entry.tensor.shape:
            expected = tuple(entry.tensor.shape)
            problems.append(f"{entry.published}: expected shape {expected}, got {tuple(given.shape)}")
        elif entry.name is None and not torch.allclose(given.to(entry.tensor), entry.tensor, rtol=1e-5, atol=0):
            problems.append(f"{entry.published}: expected the constant that follows from the configuration")
    if problems:
        shown = "\n  ".join(problems[:_MOST_PROBLEMS])
        hidden = len(problems) - _MOST_PROBLEMS
        more = f"\n  and {hidden} more" if hidden > 0 else ""
        raise ValueError(f"state_dict: expected that of the published model with these arguments, got\n  {shown}{more}")
    with torch.no_grad():
        for entry in entries:
            if entry.name is not None:
                entry.tensor.copy_(state_dict[entry.published])


_MOST_PROBLEMS = 20


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the published model with the same weights has.

    Args:
        model: a :class:`Scam`, an :class:`Encoder` or a :class:`Generator`.

    Returns:
        tensors that share memory with the model's, as those of ``model.state_dict()``, and the constants that the
        published code keeps. "fixed" initial latents, which the published code does not save, are not there.

    Raises:
        TypeError: if ``model`` is none of these.

    Example:
        >>> from scam_models import Generator, tiny
        >>> names = published_state_dict(Generator(tiny().generator))
        >>> names["backbone.SCAM_block_0.mod_0.latent_to_image.q_linear.weight"].shape
        torch.Size([32, 128])
    """
    return {entry.published: entry.tensor for entry in _entries_of(model)}


def published_names(model: nn.Module) -> dict[str, str]:
    """For each published tensor that is a parameter or buffer here, its name here.

    Args:
        model: a :class:`Scam`, an :class:`Encoder` or a :class:`Generator`.

    Raises:
        TypeError: if ``model`` is none of these.

    Example:
        >>> from scam_models import Encoder, tiny
        >>> published_names(Encoder(tiny().encoder))["convs.1.0.weight"]
        'convolutions.0.weight'
    """
    return {entry.published: entry.name for entry in _entries_of(model) if entry.name is not None}


def _entries_of(model: nn.Module) -> list[_Entry]:
    if not isinstance(model, Scam | Encoder | Generator):
        raise TypeError(f"model: expected a Scam, an Encoder or a Generator, got {type(model).__name__}")
    return list(_entries(model, "", ""))


def _entries(module: nn.Module, ours: str, published: str) -> Iterator[_Entry]:
    """The tensors of a module; the names begin with ``ours`` and ``published``, which end with a dot unless empty."""
    yield from (_Entry(published + name, None, constant) for name, constant in _constants(module))
    table = _table(module)
    if isinstance(module, DistributionLayer):
        for name, tensor in module.named_parameters():
            yield from (
                _Entry(f"{published}{index}.{name}", f"{ours}{name}", row) for index, row in enumerate(tensor.detach())
            )
        return
    own: list[tuple[str, Tensor]] = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, of_module in own:
        if not (isinstance(module, Encoder) and module.configuration.initial_latents == "fixed"):
            yield _Entry(published + table.get(name, name), ours + name, of_module.detach())
    for name, child in module.named_children():
        place = table.get(name, name)
        if isinstance(child, nn.ModuleList):
            for index, part in enumerate(child):
                yield from _entries(
                    part, f"{ours}{name}.{index}.", f"{published}{place.format(index=index, next=index + 1)}."
                )
        else:
            yield from _entries(child, f"{ours}{name}.", f"{published}{place}.")


def _table(module: nn.Module) -> dict[str, str]:
    if isinstance(module, Convolution):
        return _SPECTRAL if module.spectral else {}
    table = _TABLES.get(type(module), {})
    if isinstance(module, SemanticModulation):
        is_duplex = isinstance(module.latent_update, SemanticAttentionTransformer)
        return table | {"latent_update": "image_to_latent" if is_duplex else "fc_itl"}
    return table


def _constants(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a published module that follow from its arguments."""
    if isinstance(module, SemanticModulation):
        yield "feature_map_pos_encoding.inv_freq", _frequencies(module.gamma.in_features)
    if isinstance(module, Encoder):
        configuration = module.configuration
        labels = configuration.layout.labels(torch.device("cpu"))
        yield "latents_mask", (labels[:, None] == labels).float().unsqueeze(0)
        if configuration.pyramid:
            widths = (configuration.encoding_channels, *configuration.level_channels[1:])
            for level, width in enumerate(widths):
                yield f"image_pos_embs.{level}.inv_freq", _frequencies(width)
        else:
            yield "image_pos_emb.inv_freq", _frequencies(configuration.encoding_channels)


def _frequencies(channels: int) -> Tensor:
    # In float32 and in this order, so that they are the published bits.
    half = channels // 2
    return 1 / 10000 ** (torch.arange(0, half, 2).float() / half)


def encoder_configuration(
    *,
    num_input_channels: int,
    positional_embedding_dim: int,
    num_labels: int,
    num_latent_per_labels: int,
    latent_dim: int,
    num_blocks: int,
    attention_latent_dim: int,
    num_cross_heads: int,
    num_self_heads: int,
    type_of_initial_latents: str = "learned",
    image_conv: bool = False,
    reverse_conv: bool = False,
    num_latents_bg: int | None = None,
    conv_features_dim_first: int = 16,
    content_dim: int = 512,
    use_vae: bool = False,
    use_self_attention: bool = True,
    use_equalized_lr: bool = False,
    lr_mul: float = 1.0,
) -> EncoderConfiguration:
    """The configuration of the published encoder with these arguments, which are named as published.

    Raises:
        ValueError: if they describe no encoder.

    Example:
        >>> arguments = dict(num_input_channels=3, positional_embedding_dim=40, num_labels=19, num_latent_per_labels=8)
        >>> arguments |= dict(latent_dim=256, num_blocks=7, attention_latent_dim=256, num_cross_heads=1)
        >>> configuration = encoder_configuration(**arguments, num_self_heads=1, image_conv=True)
        >>> configuration == EncoderConfiguration(layout=LatentLayout.uniform(19, 8))
        True
    """
    return EncoderConfiguration(
        layout=_layout(num_labels, num_latent_per_labels, num_latents_bg),
        latent_dim=latent_dim,
        attention_dim=attention_latent_dim,
        num_blocks=num_blocks,
        num_cross_heads=num_cross_heads,
        num_self_heads=num_self_heads,
        image_channels=num_input_channels,
        encoding_channels=positional_embedding_dim,
        first_channels=2 * conv_features_dim_first,
        pyramid=image_conv,
        reversed_levels=reverse_conv,
        self_attention=use_self_attention,
        initial_latents=_choose(
            "type_of_initial_latents",
            type_of_initial_latents,
            {"learned": "learned", "fixed_random": "fixed", "random": "random"},
        ),
        variational=use_vae,
        equalised=use_equalized_lr,
        lr_mul=lr_mul,
    )


def generator_configuration(
    *,
    num_filters_last_layer: int,
    num_up_layers: int,
    num_up_layers_with_mask_adain: int,
    height: int,
    width: int,
    num_labels: int,
    style_dim: int,
    kernel_size: int,
    attention_latent_dim: int,
    num_heads: int,
    attention_type: str,
    num_output_channels: int,
    latent_pos_emb: str = "learned",
    architecture: str = "skip",
    apply_spectral_norm: bool = True,
    split_latents: bool = True,
    num_labels_split: int = 1,
    num_labels_bg: int | None = None,
    norm_type: str = "InstanceNorm",
    add_noise: bool = True,
    modulate: bool = True,
    use_equalized_lr: bool = False,
    use_vae: bool = False,
    lr_mul: float = 1.0,
) -> GeneratorConfiguration:
    """The configuration of the published generator with these arguments, which are named as published.

    What the published code does with them is kept: the last block sees the label map if
    ``num_up_layers_with_mask_adain`` is ``num_up_layers - 1``, and does not if it is ``num_up_layers``; a landscape
    starts from a portrait.

    Raises:
        ValueError: if they describe no generator.

    Example:
        >>> arguments = dict(num_filters_last_layer=64, num_up_layers=6, num_up_layers_with_mask_adain=0)
        >>> arguments |= dict(height=256, width=256, num_labels=19, style_dim=256, kernel_size=3, num_heads=1)
        >>> arguments |= dict(attention_latent_dim=256, attention_type="duplex", num_output_channels=3)
        >>> arguments |= dict(latent_pos_emb="none", apply_spectral_norm=False, split_latents=False)
        >>> configuration = generator_configuration(**arguments, num_labels_split=8)
        >>> configuration == GeneratorConfiguration(layout=LatentLayout.uniform(19, 8), height=256, width=256)
        True
    """
    if latent_pos_emb == "fourrier":
        raise ValueError("latent_pos_emb: expected 'learned' or 'none', got 'fourrier', which the published code lacks")
    if split_latents and style_dim % num_labels_split:
        raise ValueError(f"style_dim: expected a multiple of num_labels_split={num_labels_split}, got {style_dim}")
    smaller = min(height, width) >> num_up_layers
    last = num_up_layers - 1
    seen = set(range(min(num_up_layers_with_mask_adain, last)))
    if num_up_layers_with_mask_adain == last:
        seen.add(last)
    return GeneratorConfiguration(
        layout=_layout(num_labels, num_labels_split, num_labels_bg),
        height=height,
        width=width,
        latent_dim=style_dim // num_labels_split if split_latents else style_dim,
        attention_dim=attention_latent_dim,
        num_heads=num_heads,
        num_blocks=num_up_layers,
        last_channels=num_filters_last_layer,
        image_channels=num_output_channels,
        kernel_size=kernel_size,
        first_size=(smaller, round(smaller / (width / height))) if width > height else None,
        duplex=attention_type == "duplex",
        architecture=_choose("architecture", architecture, {"skip": "skip", "resnet": "resnet", "none": "none"}),
        normalisation=_choose(
            "norm_type", norm_type, {"InstanceNorm": "instance", "LayerNorm": "layer", "BatchNorm": "batch"}
        ),
        noise=add_noise,
        modulate=modulate,
        map_encoder_blocks=tuple(sorted(seen)),
        learned_encoding=latent_pos_emb == "learned",
        split_latents=split_latents,
        spectral=apply_spectral_norm,
        equalised=use_equalized_lr,
        lr_mul=lr_mul,
    )


def _layout(num_labels: int, latents: int, latents_of_background: int | None) -> LatentLayout:
    background = latents if latents_of_background is None else latents_of_background
    return LatentLayout((background, *(latents,) * (num_labels - 1)))


def _choose(name: str, value: str, known: Mapping[str, Any]) -> Any:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    return known[value]
