"""What speaks against computing a published module from its parameters, without calling the modules it consists of."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

from ..nn.layers import NEGATIVE_SLOPE
from .parameters import NORMALISATIONS
from .recognise import Published


def is_hooked(module: nn.Module) -> bool:
    """Whether something is called when the module is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def of_hooks(module: nn.Module) -> str | None:
    """That something listens to calls of this module, or of all modules."""
    if torch_module._has_any_global_hook():
        return "there is a hook on all modules"
    return "it carries a hook" if is_hooked(module) else None


def of_attention(module: Published, name: str = "") -> str | None:
    """In the parts of a ``MaskedAttention``. Their names begin with ``name``."""
    out = module.out
    if type(out) is not nn.Sequential or len(out) != 1:
        return f"{name}out is not one linear layer"
    return (
        _of_part(out, f"{name}out")
        or _of_linear(module.q_linear, f"{name}q_linear")
        or _of_linear(module.v_linear, f"{name}v_linear")
        or _of_linear(module.k_linear, f"{name}k_linear")
        or _of_linear(out[0], f"{name}out.0")
    )


def of_transformer(module: Published, name: str = "") -> str | None:
    """In the parts of a ``MaskedTransformer``."""
    return (
        _of_part(module.attention, f"{name}attention")
        or of_attention(module.attention, f"{name}attention.")
        or _of_layer_norm(module.ln_1, f"{name}ln_1")
        or _of_layer_norm(module.ln_2, f"{name}ln_2")
        or _of_two_layers(module.fc, f"{name}fc", ends_with_activation=True)
    )


def of_modulation(module: Published) -> str | None:
    """In the parts of a ``SCAMModulation``."""
    if module.return_attention:
        return "return_attention is set"
    channels = module.mlp_lti_gamma.weight.shape[0]
    found = (
        _of_part(module.latent_to_image, "latent_to_image")
        or of_attention(module.latent_to_image, "latent_to_image.")
        or _of_linear(module.mlp_lti_gamma, "mlp_lti_gamma")
        or _of_linear(module.mlp_lti_beta, "mlp_lti_beta")
        or _of_normalisation(module.normalization_layer, module.norm_type)
        or of_position(module.feature_map_pos_encoding, "feature_map_pos_encoding", channels)
        or _of_activation(module.activation, "activation")
    )
    if found is not None:
        return found
    if module.attention_type == "duplex":
        found = _of_part(module.image_to_latent, "image_to_latent")
        found = found or of_transformer(module.image_to_latent, "image_to_latent.")
    else:
        found = _of_two_layers(module.fc_itl, "fc_itl", ends_with_activation=False)
    if found is None and module.use_mask_adain:
        return _of_map_encoder(module.segmap_encoder)
    return found


def of_encoder(module: Published) -> str | None:
    """In the parts of an encoder."""
    if module.return_attention:
        return "return_attention is set"
    embeddings = module.image_pos_embs if module.image_conv else [module.image_pos_emb]
    for index, embedding in enumerate(embeddings):
        name = f"image_pos_embs.{index}" if module.image_conv else "image_pos_emb"
        found = of_position(embedding, name, None, "add" if index else "concat")
        if found is not None:
            return found
    for name, block in module.backbone.items():
        for part, transformer in block.items():
            path = f"backbone.{name}.{part}"
            found = _of_part(transformer, path) or of_transformer(transformer, f"{path}.")
            if found is not None:
                return found
    return None


def starts_with_activation(convolution: nn.Module) -> bool:
    """Whether a convolution of a block is a leaky ReLU, which can join the one in front of it, and one more layer."""
    return (
        type(convolution) is nn.Sequential
        and len(convolution) == 2
        and _of_part(convolution, "") is None
        and _of_activation(convolution[0], "") is None
    )


def of_position(module: Published, name: str, channels: int | None, emb_type: str = "add") -> str | None:
    """In a ``SinusoidalPositionalEmbedding``; ``channels`` is what it must add."""
    frequencies = getattr(module, "inv_freq", None)
    if frequencies is None or getattr(module, "emb_type", None) != emb_type:
        return f"{name} is not the published one"
    if channels is not None and frequencies.shape != (channels // 4,):
        return f"{name} is made for other than {channels} channels"
    return _of_part(module, name)


def _of_part(module: nn.Module, name: str) -> str | None:
    if is_hooked(module):
        return f"{name} carries a hook"
    return f"the forward of {name} was replaced" if _is_replaced(module) else None


def _is_replaced(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return forward is not None and not getattr(forward, "is_swapped_in", False)


def _of_linear(module: Published, name: str) -> str | None:
    parameters = module._parameters
    if "parametrizations" in module._modules:
        return f"{name} is parametrized"
    is_plain = type(module) is nn.Linear or type(module).forward is nn.Linear.forward
    if not is_plain and not _is_equalised(module):
        return f"{name} is a {type(module).__name__}"
    if "weight" not in parameters or "bias" not in parameters:
        return f"the parameters of {name} are computed"
    return _of_part(module, name)


def _is_equalised(module: Published) -> bool:
    return (
        not isinstance(module, nn.Linear | nn.Conv2d)
        and not module._modules
        and hasattr(module, "scale")
        and hasattr(module, "lr_mul")
        and module._parameters.get("bias") is not None
    )


def _of_layer_norm(module: Published, name: str) -> str | None:
    if type(module) is not nn.LayerNorm or module.weight is None or module.bias is None:
        return f"{name} is not a layer norm with a weight and a bias"
    return _of_part(module, name)


def _of_activation(module: Published, name: str) -> str | None:
    if type(module) is not nn.LeakyReLU or module.negative_slope != NEGATIVE_SLOPE:
        return f"{name} is not a leaky ReLU of slope {NEGATIVE_SLOPE}"
    return _of_part(module, name)


def _of_two_layers(module: Published, name: str, *, ends_with_activation: bool) -> str | None:
    if type(module) is not nn.Sequential or len(module) != 3 + ends_with_activation:
        return f"{name} is not the published network"
    return (
        _of_part(module, name)
        or _of_linear(module[0], f"{name}.0")
        or _of_activation(module[1], f"{name}.1")
        or _of_linear(module[2], f"{name}.2")
        or (_of_activation(module[3], f"{name}.3") if ends_with_activation else None)
    )


_NORM_TYPES: dict[str, type[nn.Module]] = {
    "InstanceNorm": nn.InstanceNorm2d,
    "BatchNorm": nn.BatchNorm2d,
    "LayerNorm": nn.Identity,
}


def _of_normalisation(module: Published, norm_type: str) -> str | None:
    name = "normalization_layer"
    if norm_type not in NORMALISATIONS or type(module) is not _NORM_TYPES[norm_type]:
        return f"{name} is a {type(module).__name__}"
    if norm_type != "LayerNorm" and (module.affine or module.track_running_stats != (norm_type == "BatchNorm")):
        return f"{name} has other settings than the published one"
    return _of_part(module, name)


def _of_map_encoder(module: Published) -> str | None:
    name = "segmap_encoder"
    shared = module.shared_mlp
    if type(shared) is not nn.Sequential or len(shared) != 2 or type(shared[1]) is not nn.ReLU:
        return f"{name}.shared_mlp is not a convolution and a ReLU"
    return (
        _of_part(module, name)
        or _of_part(shared, f"{name}.shared_mlp")
        or _of_part(shared[1], f"{name}.shared_mlp.1")
        or _of_convolution(shared[0], f"{name}.shared_mlp.0")
    )


def _of_convolution(module: Published, name: str) -> str | None:
    if "parametrizations" in module._modules:
        return f"{name} is parametrized"
    if type(module) is nn.Conv2d:
        is_known = module.dilation == (1, 1) and module.groups == 1 and module.padding_mode == "zeros"
    else:
        is_known = _is_equalised(module)
    if not is_known or "weight" not in module._parameters:
        return f"{name} is not the published convolution"
    height, width = module.weight.shape[2:]
    if height != width or height % 2 == 0 or not _fits(module.stride, 1) or not _fits(module.padding, height // 2):
        return f"{name} does not keep the size"
    return _of_part(module, name)


def _fits(setting: int | tuple[int, int], expected: int) -> bool:
    return setting in (expected, (expected, expected))
