"""The published generator and encoder: names and shapes, every option, and what is odd about them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import published_formulas
import pytest
import torch
import torch.nn.functional as F
from published_modules import (
    LAYOUT,
    STYLE,
    TINY_ENCODER,
    TINY_GENERATOR,
    Shapes,
    convolution,
    inputs,
    linear,
    make_modulation,
    make_tiny_generator,
    mask_of,
    one_hot,
    randomised,
    under,
)
from torch import Tensor, nn

from bench.published import (
    SCAMModulation,
    SCAMResUpscale,
    SinusoidalPositionalEmbedding,
    ToRGB,
    make_encoder,
    make_generator,
)


def attention(to: int, source: int) -> Shapes:
    return under(
        q_linear=linear(256, to), v_linear=linear(256, source), k_linear=linear(256, source), out__0=linear(to, 256)
    )


def transformer(latents: int, source: int) -> Shapes:
    norm = {"weight": (latents, 256), "bias": (latents, 256)}
    return under(attention=attention(256, source), ln_1=norm, fc__0=linear(256, 256), fc__2=linear(256, 256), ln_2=norm)


def modulation(channels: int, latents: int, duplex: bool = True) -> Shapes:
    shapes = under(
        feature_map_pos_encoding={"inv_freq": (channels // 4,)},
        latent_to_image=attention(channels, 256),
        mlp_lti_gamma=linear(channels, channels),
        mlp_lti_beta=linear(channels, channels),
    )
    if not duplex:
        return shapes | under(fc_itl__0=linear(256, 256), fc_itl__2=linear(256, 256))
    return shapes | under(image_to_latent=transformer(latents, channels)) | {"noise_var": (channels,)}


def generator_shapes(num_labels: int) -> Shapes:
    latents = 8 * num_labels
    channels = [1024, 1024, 1024, 512, 256, 128, 64]
    shapes = under(first_conv=convolution(1024, num_labels, 3))
    for block, (before, after) in enumerate(pairwise(channels)):
        to_rgb = under(conv_rgb=convolution(3, after, 1))
        if block < 5:
            to_rgb |= under(mod_rgb=modulation(after, latents, duplex=False))
        shapes |= under(
            **{
                f"backbone__SCAM_block_{block}": under(
                    mod_0=modulation(before, latents),
                    mod_1=modulation(after, latents),
                    conv_0__1=convolution(after, before, 3),
                    conv_1__1=convolution(after, after, 3),
                    torgb=to_rgb,
                )
            }
        )
    return shapes


def encoder_shapes(num_labels: int) -> Shapes:
    latents = 8 * num_labels
    shapes: Shapes = {"latents": (latents, 256), "latents_mask": (1, latents, latents)}
    before = 3
    for block, channels in enumerate([3, 32, 64, 128, 256, 512, 1024]):
        source, frequencies = (43, 10) if block == 0 else (channels, channels // 4)
        parts = {
            f"image_pos_embs__{block}": {"inv_freq": (frequencies,)},
            f"backbone__block_{block}": under(
                cross_attention=transformer(latents, source), self_attention=transformer(latents, 256)
            ),
        }
        if block:
            parts[f"convs__{block}__0"] = convolution(channels, before, 3)
        shapes |= under(**parts)
        before = channels
    return shapes


@pytest.mark.parametrize(
    "make, expected, num_labels, tensors, parameters",
    [
        (make_generator, generator_shapes, 3, 483, 78_991_186),
        (make_generator, generator_shapes, 19, 483, 80_711_506),
        (make_generator, generator_shapes, 151, 483, 94_904_146),
        (make_encoder, encoder_shapes, 3, 245, 12_301_632),
        (make_encoder, encoder_shapes, 19, 245, 14_169_408),
        (make_encoder, encoder_shapes, 151, 245, 29_578_560),
    ],
)
def test_state_dicts_of_the_published_configurations(
    make: Callable[[int], nn.Module],
    expected: Callable[[int], Shapes],
    num_labels: int,
    tensors: int,
    parameters: int,
) -> None:
    with torch.device("meta"):
        network = make(num_labels)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes == expected(num_labels)
    assert len(shapes) == tensors
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_portrait_sizes() -> None:
    """256 x 170 starts at 3 x 2; the last step is not a factor of two."""
    sizes = []
    with torch.device("meta"):
        generator, encoder = make_generator(3, 256, 170), make_encoder(3)
        image, labels = torch.empty(1, 3, 256, 170), torch.empty(1, 3, 256, 170)
        encoder.return_attention = True
        latents, nothing = encoder(image, labels)
        for block in generator.backbone.values():
            block.register_forward_pre_hook(lambda _, arguments: sizes.append(tuple(arguments[0].shape[1:])))
        generated = generator(labels, latents)
    assert nothing is None and latents.shape == (1, 24, 256) and generated.shape == image.shape
    assert sizes == [(1024, 3, 2), (1024, 6, 4), (1024, 12, 8), (512, 24, 16), (256, 48, 32), (128, 96, 64)]
    pyramid = [(256, 170), (128, 85), (64, 43), (32, 22), (16, 11), (8, 6), (4, 3)]
    assert [tuple(size) for size in encoder.image_sizes] == pyramid


@pytest.mark.parametrize(
    "height, width, layers, smallest",
    [(256, 256, 6, (4, 4)), (512, 340, 6, (8, 5)), (256, 170, 4, (15, 10)), (170, 256, 6, (2, 1))],
)
def test_first_feature_map(height: int, width: int, layers: int, smallest: tuple[int, int]) -> None:
    """That of a landscape is a portrait."""
    with torch.device("meta"):
        generator = make_generator(3, height, width, num_up_layers=layers, num_filters_last_layer=4)
    assert (generator.small_h, generator.small_w) == smallest


GENERATORS: dict[str, dict[str, Any]] = {
    "default": {},
    "simplex": {"attention_type": "simplex"},
    "resnet": {"architecture": "resnet"},
    "none": {"architecture": "none"},
    "spectral norm": {"apply_spectral_norm": True},
    "resnet, spectral norm": {"architecture": "resnet", "apply_spectral_norm": True},
    "equalised": {"use_equalized_lr": True, "lr_mul": 0.5},
    "equalised, spectral norm": {"use_equalized_lr": True, "apply_spectral_norm": True},
    "LayerNorm": {"norm_type": "LayerNorm"},
    "BatchNorm": {"norm_type": "BatchNorm"},
    "no noise": {"add_noise": False},
    "no modulation": {"modulate": False},
    "learned": {"latent_pos_emb": "learned"},
    "fourier": {"latent_pos_emb": "fourier"},
    "five blocks": {"num_up_layers": 5},
    "mask": {"num_up_layers_with_mask_adain": 2},
    "mask in all": {"num_up_layers_with_mask_adain": 3},
    "heads": {"num_heads": 4},
    "one by one": {"kernel_size": 1},
    "grey": {"num_output_channels": 1},
    "no background": {"num_labels_bg": 0},
    "background alike": {"num_labels_bg": None},
    "portrait": {"height": 48, "width": 33},
    "landscape": {"height": 64, "width": 96},
}


@pytest.mark.parametrize("options", GENERATORS.values(), ids=GENERATORS.keys())
def test_generator(options: dict[str, Any]) -> None:
    generator = make_tiny_generator(**options)
    height, width = generator.backbone[f"SCAM_block_{generator.num_up_layers - 1}"].up.size
    _, labels, _ = inputs(height, width)
    latents = torch.randn(2, generator.num_style_tokens, STYLE)
    image = generator(one_hot(labels).float(), latents)
    assert image.shape == (2, options.get("num_output_channels", 3), height, width)
    assert image.abs().max() <= 1 and image.std() > 0
    weight = generator.get_last_layer()
    assert weight.shape == (image.shape[1], 4, 1, 1)
    assert isinstance(weight, nn.Parameter) != bool(options.get("apply_spectral_norm"))
    other = generator(one_hot(1 - labels).float(), latents)
    assert not torch.allclose(image, other)


def parts(network: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in network.named_modules() if isinstance(module, kind)}


def test_parts_of_a_block() -> None:
    settings = {
        "num_labels": 8,
        "style_dim": STYLE,
        "kernel_size": 3,
        "attention_latent_dim": 12,
        "num_heads": 1,
        "apply_spectral_norm": False,
    }

    def modulations(**options: Any) -> set[str]:
        return parts(SCAMResUpscale(8, 4, **settings, **options), SCAMModulation)

    assert modulations() == {"mod_0", "mod_1", "torgb.mod_rgb"}
    assert modulations(last_block=True) == {"mod_0", "mod_1"}
    assert modulations(architecture="resnet") == {"mod_0", "mod_1", "mod_res"}
    assert modulations(architecture="none") == {"mod_0", "mod_1"}
    resnet = SCAMResUpscale(8, 4, architecture="resnet", last_block=True, **settings)
    assert {name for name in resnet.state_dict() if not name.startswith("mod_")} == {
        *under(conv_0__1=linear(4, 8), conv_1__1=linear(4, 4), torgb__conv_rgb=linear(3, 4)),
        "conv_res.weight",
    }
    assert not ToRGB(4, 3, **settings).mod_rgb.add_noise
    widening = SCAMResUpscale(4, 8, **settings)
    assert widening.conv_0[1].weight.shape == (4, 4, 3, 3) and widening.conv_1[1].weight.shape == (8, 4, 3, 3)
    spectral = SCAMResUpscale(8, 4, **(settings | {"apply_spectral_norm": True}))
    assert {name for name in spectral.state_dict() if name.startswith("conv_0")} == {
        f"conv_0.1.{name}" for name in ("bias", "weight_orig", "weight_u", "weight_v")
    }


@pytest.mark.parametrize("architecture", ["skip", "resnet", "none"])
@pytest.mark.parametrize("last_block", [False, True])
def test_block(architecture: Any, last_block: bool) -> None:
    """From its parts: two leaky ReLU before each convolution, the latents from one modulation to the next."""
    block = SCAMResUpscale(
        8, 4, LAYOUT.count, STYLE, 3, 12, 1, 3, "duplex", False, False, (9, 11), "InstanceNorm", architecture,
        last_block, False,
    )  # fmt: skip
    block = randomised(block)
    _, labels, latents = inputs(9, 11)
    mask, x = mask_of(labels), torch.randn(2, 8, 4, 6, dtype=torch.float64)
    previous = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    out, new_latents, rgb = block(x, mask, latents, None, previous)

    def enlarged(image: Tensor) -> Tensor:
        return F.interpolate(image, size=(9, 11), mode="nearest")

    features, expected_latents = block.mod_0(x, mask, latents)
    features = enlarged(block.conv_0[1](F.leaky_relu(features, 0.2)))
    features, expected_latents = block.mod_1(features, mask, expected_latents)
    features = block.conv_1[1](F.leaky_relu(features, 0.2))
    if architecture == "resnet":
        residual, _ = block.mod_res(enlarged(x), mask, latents)
        features = (features + F.conv2d(residual, block.conv_res.weight)) / 2**0.5
    torch.testing.assert_close(out, features)
    torch.testing.assert_close(new_latents, expected_latents)
    if architecture != "skip" and not last_block:
        assert rgb is None
        return
    if not last_block:
        features, _ = block.torgb.mod_rgb(features, mask, expected_latents)
    torch.testing.assert_close(rgb, block.torgb.conv_rgb(features) + enlarged(previous))


@pytest.mark.parametrize("blocks, with_mask", [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1, 2, 3]), (4, [0, 1, 2])])
def test_blocks_with_mask(blocks: int, with_mask: list[int]) -> None:
    """The last block has the mask where it should not, and lacks it where it should."""
    generator = make_tiny_generator(num_up_layers_with_mask_adain=blocks)
    modulated = [block.mod_0.use_mask_adain for block in generator.backbone.values()]
    assert [index for index, uses in enumerate(modulated) if uses] == with_mask


@pytest.mark.parametrize("attention_type", ["duplex", "simplex"])
def test_latents_from_block_to_block(attention_type: str) -> None:
    generator = make_tiny_generator(attention_type=attention_type)
    _, labels, latents = inputs()
    seen: list[Tensor] = []
    for block in generator.backbone.values():
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    generator(one_hot(labels).float(), latents.float())
    assert [torch.equal(latents.float(), given) for given in seen] == [True, *[attention_type != "duplex"] * 3]


def test_latents_of_the_generator() -> None:
    """Learned positions are added, split latents are one vector for each label, and others are drawn in training."""
    _, labels, latents = inputs()
    labels = one_hot(labels)

    def image(generator: nn.Module, latents: Any) -> Tensor:
        torch.manual_seed(0)
        return generator(labels, latents)

    plain = make_tiny_generator(num_labels_bg=3).double()
    latents = torch.cat([latents, latents[:, :1]], 1)
    expected = image(plain, latents)
    learned = make_tiny_generator(num_labels_bg=3, latent_pos_emb="learned").double()
    learned.load_state_dict(plain.state_dict(), strict=False)
    assert learned.style_code_pos_encoding.weights.shape == (9, STYLE)
    torch.testing.assert_close(image(learned, latents - learned.style_code_pos_encoding.weights), expected)
    split = make_tiny_generator(num_labels_bg=3, split_latents=True, style_dim=3 * STYLE).double()
    split.load_state_dict(plain.state_dict())
    torch.testing.assert_close(image(split, latents.reshape(2, 3, 3 * STYLE)), expected)

    drawn = make_tiny_generator(num_labels_bg=3, use_vae=True).double()
    drawn.load_state_dict(plain.state_dict())
    deviation = torch.rand_like(latents) + 0.1
    torch.testing.assert_close(image(drawn.eval(), (latents, 2 * deviation.log())), expected)
    torch.manual_seed(0)
    noise = torch.randn_like(latents)
    plain.zero_grad()
    torch.testing.assert_close(
        image(drawn.train(), (latents, 2 * deviation.log())), image(plain, latents + noise * deviation)
    )
    with pytest.raises(TypeError, match="style_codes"):
        drawn(labels, latents)


ENCODERS: dict[str, dict[str, Any]] = {
    "default": {},
    "image only": {"image_conv": False},
    "reversed": {"reverse_conv": True},
    "reversed without levels": {"image_conv": False, "reverse_conv": True},
    "no self-attention": {"use_self_attention": False},
    "fixed": {"type_of_initial_latents": "fixed_random"},
    "random": {"type_of_initial_latents": "random"},
    "equalised": {"use_equalized_lr": True, "lr_mul": 0.5},
    "heads": {"num_cross_heads": 4, "num_self_heads": 3},
    "no background": {"num_latents_bg": 0},
    "background alike": {"num_latents_bg": None},
    "no position": {"positional_embedding_dim": 0},
    "VAE": {"use_vae": True},
}


@pytest.mark.parametrize("options", ENCODERS.values(), ids=ENCODERS.keys())
def test_encoder(options: dict[str, Any]) -> None:
    encoder = make_encoder(3, **(TINY_ENCODER | options)).double()
    image, labels, _ = inputs(9, 12)
    encoded, nothing = encoder(image, one_hot(labels))
    assert nothing is None
    pairs = encoded if options.get("use_vae") else (encoded,)
    assert len(pairs) == (2 if options.get("use_vae") else 1)
    background = options.get("num_latents_bg", 2)
    count = 6 + (3 if background is None else background)
    for latents in pairs:
        assert latents.shape == (2, count, STYLE) and latents.dtype == torch.float64
        assert latents.std() > 0 and latents.isfinite().all()
    assert encoder.latents_mask.shape == (1, count, count)
    assert ("latents" in encoder.state_dict()) == (options.get("type_of_initial_latents", "learned") == "learned")
    assert any("self_attention" in name for name in encoder.state_dict()) == options.get("use_self_attention", True)


@pytest.mark.parametrize("lr_mul", [1.0, 0.5])
@pytest.mark.parametrize("reverse_conv", [False, True])
def test_encoder_from_its_parts(reverse_conv: bool, lr_mul: float) -> None:
    encoder = randomised(make_encoder(3, **TINY_ENCODER, reverse_conv=reverse_conv, lr_mul=lr_mul))
    image, labels, _ = inputs(9, 12)
    levels = [image]
    for convolution_layer in encoder.convs[1:]:
        convolved = F.conv2d(levels[-1], convolution_layer[0].weight, convolution_layer[0].bias, stride=2, padding=1)
        levels.append(F.leaky_relu(convolved, 0.2))
    assert [tuple(level.shape[1:]) for level in levels] == [(3, 9, 12), (4, 5, 6), (8, 3, 3)]
    masks = [F.interpolate(mask_of(labels), size=level.shape[2:], mode="nearest").flatten(2) for level in levels]
    pixels = [
        published_formulas.pixel_tokens(level, published_formulas.sinusoidal(channels, *level.shape[2:]), index == 0)
        for index, (level, channels) in enumerate(zip(levels, (4, 4, 8), strict=True))
    ]
    order = [2, 1, 0] if reverse_conv else [0, 1, 2]
    latent_labels = LAYOUT.labels(torch.device("cpu"))
    same = (latent_labels[:, None] == latent_labels).double()[None]
    latents = encoder.latents.expand(2, -1, -1) * lr_mul
    for block, level in zip(encoder.backbone.values(), order, strict=True):
        latents = block["cross_attention"](latents, pixels[level], masks[level])
        latents = block["self_attention"](latents, latents, same)
    torch.testing.assert_close(encoder(image, one_hot(labels))[0], latents)


def test_encoder_maps_each_latent_on_its_own() -> None:
    plain = make_encoder(3, **TINY_ENCODER).double()
    encoder = make_encoder(3, **TINY_ENCODER, use_vae=True).double()
    encoder.load_state_dict(plain.state_dict(), strict=False)
    image, labels, _ = inputs(9, 12)
    (latents, _), ((mean, log_variance), _) = plain(image, one_hot(labels)), encoder(image, one_hot(labels))
    for index, mapper in enumerate(encoder.vae_mapper):
        expected = mapper(latents[:, index])
        torch.testing.assert_close(torch.cat([mean[:, index], log_variance[:, index]], 1), expected)
    of_mapper = {name: tuple(tensor.shape) for name, tensor in mapper.state_dict().items()}
    assert of_mapper == linear(2 * STYLE, STYLE)


def test_return_attention_is_for_hooks() -> None:
    _, labels, latents = inputs(4, 6)
    mask, x = mask_of(labels), torch.randn(2, 4, 4, 6, dtype=torch.float64)
    module = make_modulation(add_noise=False)
    encoder = make_encoder(3, **TINY_ENCODER).double()
    expected, encoded = module(x, mask, latents), encoder(x[:, :3], one_hot(labels))
    shapes: list[tuple[int, ...]] = []
    attentions = [module.image_to_latent, module.latent_to_image, *(
        block["cross_attention"] for block in encoder.backbone.values()
    )]  # fmt: skip
    for layer in attentions:
        layer.register_forward_hook(lambda _, arguments, results: shapes.append(tuple(results[1].shape)))
    module.return_attention = encoder.return_attention = True
    assert all(map(torch.equal, module(x, mask, latents), expected))
    assert torch.equal(encoder(x[:, :3], one_hot(labels))[0], encoded[0])
    assert shapes == [(2, 1, 8, 24), (2, 1, 24, 8), (2, 1, 8, 24), (2, 1, 8, 6), (2, 1, 8, 2)]


def test_published_initialisation() -> None:
    """Of everything with a weight but the norms."""
    for network in (make_tiny_generator(), make_encoder(3, **TINY_ENCODER, use_equalized_lr=True)):
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.init_weight(False)
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
        network.init_weight()
        changed = {name for name, tensor in network.state_dict().items() if not torch.equal(before[name], tensor)}
        assert changed == {name for name in before if name.endswith(".weight") and ".ln_" not in name}
        assert max(network.get_parameter(name).abs().max().item() for name in changed) < 0.2


GENERATOR_ERRORS: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"num_up_layers": 3}, ValueError),
    ({"num_up_layers": 5}, ValueError),
    ({"num_up_layers_with_mask_adain": 5}, ValueError),
    ({"split_latents": True, "style_dim": 7}, ValueError),
    ({"latent_pos_emb": "fourrier"}, ValueError),
    ({"architecture": "unet"}, ValueError),
    ({"norm_type": "GroupNorm"}, ValueError),
    ({"architecture": "resnet", "use_equalized_lr": True}, TypeError),
    ({"split_latents": True, "style_dim": 3 * STYLE}, RuntimeError),
    ({"kernel_size": 2}, RuntimeError),
    ({"num_filters_last_layer": 2}, RuntimeError),
    ({"num_heads": 5}, RuntimeError),
]


@pytest.mark.parametrize("options, error", GENERATOR_ERRORS, ids=str)
def test_generators_that_fail(options: dict[str, Any], error: type[Exception]) -> None:
    _, labels, _ = inputs()
    with pytest.raises(error):
        generator = make_generator(3, **({"height": 32, "width": 32} | TINY_GENERATOR | options))
        count = 3 if generator.split_latents else generator.num_style_tokens
        generator(one_hot(labels).float(), torch.randn(2, count, options.get("style_dim", STYLE)))


def test_others_that_fail() -> None:
    image, labels, _ = inputs(9, 12)
    with pytest.raises(ValueError, match="type_of_initial_latents"):
        make_encoder(3, **TINY_ENCODER, type_of_initial_latents="zero")  # type: ignore[arg-type]
    encoder = make_encoder(3, **TINY_ENCODER, image_conv=False).double()
    with pytest.raises(RuntimeError):
        encoder(image, one_hot(labels)[..., ::2])
    with pytest.raises(ValueError, match="emb_type"):
        SinusoidalPositionalEmbedding(4, "multiply")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="upscale_size"):
        SCAMResUpscale(8, 4, 8, STYLE, 3, 12, 1, upscale_size=[4, 4])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spatial"):
        make_modulation().float()(torch.randn(1, 4, 1, 1), torch.ones(1, 8, 1, 1), torch.randn(1, 8, STYLE))
    generator = make_tiny_generator(num_labels_bg=3, split_latents=True, style_dim=3 * STYLE, use_vae=True)
    pair = torch.randn(2, 3, 6 * STYLE).chunk(2, -1)
    labels = one_hot(inputs()[1]).float()
    assert generator(labels, pair).shape == (2, 3, 32, 32)
    with pytest.raises(RuntimeError, match="view"):
        generator.eval()(labels, pair)
