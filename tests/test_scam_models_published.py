"""Encoder and generator against the published ones, written anew in bench/published: results, gradients, state dicts.

In float64, with the weights that the state dict carries from one to the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokens import random_map
from torch import Tensor, nn

from bench import published
from sca_kernels import LabelMap, LatentLayout
from scam_models import (
    Encoder,
    EncoderConfiguration,
    Generator,
    GeneratorConfiguration,
    LatentDistribution,
    Latents,
    Scam,
    ade20k,
    celebamask_hq,
    idesigner,
    load_published_state_dict,
    published_state_dict,
)
from scam_models.published import encoder_configuration, generator_configuration, published_names

pytestmark = pytest.mark.usefixtures("native")

TOLERANCE = 1e-9
ABSENT = 2

GENERATOR: dict[str, Any] = {
    "num_filters_last_layer": 4,
    "num_up_layers": 4,
    "num_up_layers_with_mask_adain": 0,
    "height": 45,
    "width": 34,
    "num_labels": 4,
    "style_dim": 6,
    "kernel_size": 3,
    "attention_latent_dim": 8,
    "num_heads": 1,
    "attention_type": "duplex",
    "num_output_channels": 3,
    "latent_pos_emb": "none",
    "architecture": "skip",
    "apply_spectral_norm": False,
    "split_latents": False,
    "num_labels_split": 3,
}
EQUALISED = {"use_equalized_lr": True, "lr_mul": 0.5}
GENERATOR_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "heads": {"num_heads": 4},
    "simplex": {"attention_type": "simplex"},
    "simplex with heads": {"attention_type": "simplex", "num_heads": 2},
    "resnet": {"architecture": "resnet"},
    "resnet, simplex": {"architecture": "resnet", "attention_type": "simplex"},
    "no architecture": {"architecture": "none"},
    "layer norm": {"norm_type": "LayerNorm"},
    "layer norm, simplex": {"norm_type": "LayerNorm", "attention_type": "simplex"},
    "batch norm": {"norm_type": "BatchNorm"},
    "batch norm, simplex": {"norm_type": "BatchNorm", "attention_type": "simplex"},
    "no noise": {"add_noise": False},
    "no modulation": {"modulate": False},
    "equalised": EQUALISED,
    "lr_mul of noise": {"lr_mul": 0.5},
    "background": {"num_labels_bg": 7},
    "fewer for the background": {"num_labels_bg": 1},
    "no latents for the background": {"num_labels_bg": 0},
    "learned encoding": {"latent_pos_emb": "learned"},
    "split": {"split_latents": True, "style_dim": 18},
    "variational": {"use_vae": True},
    "spectral": {"apply_spectral_norm": True},
    "spectral, equalised": {"apply_spectral_norm": True, **EQUALISED},
    "spectral, resnet": {"apply_spectral_norm": True, "architecture": "resnet"},
    "map encoders": {"num_up_layers_with_mask_adain": 2},
    "map encoders, last block": {"num_up_layers_with_mask_adain": 3, "num_labels_bg": 5},
    "map encoders, all but the last": {"num_up_layers_with_mask_adain": 4, "architecture": "resnet"},
    "map encoders, equalised": {"num_up_layers_with_mask_adain": 3, **EQUALISED},
    "map encoders, layer norm": {"num_up_layers_with_mask_adain": 1, "norm_type": "LayerNorm"},
    "map encoders without modulation": {"num_up_layers_with_mask_adain": 1, "modulate": False},
    "large kernel": {"kernel_size": 5, "num_up_layers_with_mask_adain": 1},
    "square": {"height": 32, "width": 32},
    "landscape": {"height": 34, "width": 45},
    "five blocks": {"num_up_layers": 5, "height": 65, "width": 66},
    "other channels": {"num_output_channels": 1, "num_filters_last_layer": 8},
}
ENCODER: dict[str, Any] = {
    "num_input_channels": 3,
    "positional_embedding_dim": 8,
    "num_labels": 4,
    "num_latent_per_labels": 3,
    "latent_dim": 6,
    "num_blocks": 4,
    "attention_latent_dim": 8,
    "num_cross_heads": 1,
    "num_self_heads": 1,
    "image_conv": True,
    "conv_features_dim_first": 4,
}
ENCODER_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cross heads": {"num_cross_heads": 2},
    "self heads": {"num_self_heads": 4},
    "no pyramid": {"image_conv": False},
    "reversed": {"reverse_conv": True},
    "reversed without pyramid": {"reverse_conv": True, "image_conv": False},
    "no self-attention": {"use_self_attention": False},
    "background": {"num_latents_bg": 7},
    "no latents for the background": {"num_latents_bg": 0},
    "equalised": EQUALISED,
    "lr_mul of the latents": {"lr_mul": 0.5},
    "random latents": {"type_of_initial_latents": "random"},
    "variational": {"use_vae": True},
    "one block": {"num_blocks": 1},
    "grey": {"num_input_channels": 1, "conv_features_dim_first": 2},
}


def randomise(module: nn.Module) -> None:
    """Every parameter random, those that start at zero or one included, so large that nothing is lost or saturated."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values * (parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5))


def make_generators(**changes: Any) -> tuple[published.SCAMGenerator, Generator]:
    """The published generator and ours, with the same weights."""
    arguments = GENERATOR | changes
    expected = published.SCAMGenerator(**arguments).double()
    randomise(expected)
    found = Generator(generator_configuration(**arguments)).double()
    load_published_state_dict(found, expected.state_dict())
    return expected, found


def make_encoders(**changes: Any) -> tuple[published.SemanticAttentionTransformerEncoder, Encoder]:
    arguments = ENCODER | changes
    expected = published.SemanticAttentionTransformerEncoder(**arguments).double()
    randomise(expected)
    found = Encoder(encoder_configuration(**arguments)).double()
    load_published_state_dict(found, expected.state_dict())
    return expected, found


def make_labels(height: int, width: int, num_labels: int = 4) -> LabelMap:
    """Regions and single pixels, some without a label; the first image lacks a label, the second most of them."""
    noise = random_map(2, height, width, num_labels, without=(ABSENT,)).labels
    coarse = random_map(2, 4, 3, num_labels, without=(ABSENT,), seed=1).at(height, width).labels
    labels = torch.where(noise == 0, noise, coarse)
    labels[1] = torch.where(labels[1] > 0, 1, labels[1])
    assert (labels < 0).any() and (labels[0] == 3).any()
    return LabelMap(labels, num_labels)


def one_hot(labels: LabelMap) -> Tensor:
    return published.mask_of_latents(labels.labels, torch.arange(labels.num_labels)).double()


def make_latents(configuration: GeneratorConfiguration, *, variational: bool) -> Latents:
    generator = torch.Generator().manual_seed(2)
    tensors = [
        torch.randn(2, *configuration.latents_shape, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    ]
    return LatentDistribution(*tensors) if variational else tensors[0]


def tensors_of(results: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def gradients_of(results: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    total = sum(
        (result * torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result).cos()).sum()
        for result in results
    )
    assert isinstance(total, Tensor)
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True))


def assert_agree(
    expected: nn.Module, found: nn.Module, inputs: dict[str, Tensor], call: Callable[[nn.Module], list[Tensor]]
) -> None:
    """Results and gradients of all inputs and parameters are the same."""
    names = published_names(found)
    ours, theirs = dict(found.named_parameters()), dict(expected.named_parameters())
    results, gradients = [], []
    for model in (expected, found):
        torch.manual_seed(3)
        results.append(call(model))
        gradients.append(gradients_of(results[-1], inputs | dict(model.named_parameters())))
    for wanted, got in zip(*results, strict=True):
        assert got.shape == wanted.shape and wanted.std() > 1e-3
        assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    # A gradient that is zero but for rounding, such as that of a key's bias, has no size of its own to compare with.
    noise = 1e-13 * max(float(gradient.abs().max()) for gradient in gradients[0].values() if gradient is not None)
    compared = 0
    for name, wanted in gradients[0].items():
        if name.startswith("vae_mapper."):
            index = int(name.split(".")[1])
            whole = gradients[1][names[name]]
            got = None if whole is None else whole[index]
        else:
            got = gradients[1][name if name in inputs else names[name]]
        assert (got is None) == (wanted is None), name
        if got is not None and wanted is not None:
            compared += 1
            assert got.shape == wanted.shape, name
            assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max() + noise, name
    assert compared > 20
    assert {names[name] for name in theirs} == set(ours)
    for name, buffer in expected.named_buffers():
        if name in names:
            assert torch.allclose(found.get_buffer(names[name]).to(buffer), buffer, rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("option", GENERATOR_OPTIONS)
def test_generator(option, training):
    changes = GENERATOR_OPTIONS[option]
    expected, found = make_generators(**changes)
    if option == "split" and not training:
        changes = changes | {"use_vae": False}
    labels = make_labels(found.configuration.height, found.configuration.width)
    latents = make_latents(found.configuration, variational=expected.use_vae)
    inputs = {f"latents {index}": tensor for index, tensor in enumerate(tensors_of(latents))}
    # Two steps: batch norm and the power iteration change what the next call does.
    for _ in range(2 if training else 1):
        for model in (expected, found):
            model.train(training)
        assert_agree(
            expected,
            found,
            inputs,
            lambda model: [model(labels, latents) if model is found else model(one_hot(labels), latents)],
        )


@pytest.mark.parametrize("option", ENCODER_OPTIONS)
def test_encoder(option):
    expected, found = make_encoders(**ENCODER_OPTIONS[option])
    labels = make_labels(37, 26)
    generator = torch.Generator().manual_seed(2)
    channels = found.configuration.image_channels
    image = torch.randn(2, channels, 37, 26, generator=generator, dtype=torch.float64).requires_grad_()
    assert_agree(
        expected,
        found,
        {"image": image},
        lambda model: tensors_of(model(image, labels) if model is found else model(image, one_hot(labels))[0]),
    )


def test_fixed_latents():
    """The published code does not save them, so they are copied by hand."""
    expected, found = make_encoders(type_of_initial_latents="fixed_random", lr_mul=0.5)
    assert "latents" not in published_state_dict(found)
    assert found.initial_latents is not None
    found.initial_latents.copy_(expected.latents)
    expected.latents = expected.latents.double()
    labels, image = make_labels(37, 26), torch.randn(2, 3, 37, 26, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(found(image, labels), expected(image, one_hot(labels))[0], rtol=0, atol=1e-12)
    loaded = Encoder(found.configuration).double()
    loaded.load_state_dict(found.state_dict())
    assert torch.equal(loaded(image, labels), found(image, labels))


def test_layouts_that_differ(monkeypatch):
    """The published code knows two numbers of latents; with other planes in their place it computes any layout."""
    layout = LatentLayout((2, 5, 1, 3))

    def planes(segmentation_map: Tensor, *numbers: int) -> Tensor:
        return segmentation_map.repeat_interleave(torch.tensor(layout.latents_per_label), 1)

    monkeypatch.setattr("bench.published.encoder.planes_of_latents", planes)
    monkeypatch.setattr("bench.published.generator.planes_of_latents", planes)
    generator = published.SCAMGenerator(**GENERATOR | {"num_labels_split": 1, "num_labels_bg": 8}).double()
    encoder = published.SemanticAttentionTransformerEncoder(
        **ENCODER | {"num_latent_per_labels": 1, "num_latents_bg": 8}
    ).double()
    found = Scam(
        Encoder(
            EncoderConfiguration(
                layout=layout, latent_dim=6, attention_dim=8, num_blocks=4, encoding_channels=8, first_channels=8
            )
        ),
        Generator(
            GeneratorConfiguration(
                layout=layout, height=45, width=34, latent_dim=6, attention_dim=8, num_blocks=4, last_channels=4
            )
        ),
    ).double()
    randomise(found)
    expected = nn.ModuleDict({"encoder": encoder, "generator": generator})
    expected.load_state_dict(published_state_dict(found))
    labels = make_labels(45, 34)
    image = torch.randn(2, 3, 45, 34, dtype=torch.float64).requires_grad_()

    def call(model: nn.Module) -> list[Tensor]:
        if model is found:
            return [model(image, labels)]
        return [generator(one_hot(labels), encoder(image, one_hot(labels))[0])]

    assert_agree(expected, found, {"image": image}, call)


STATE_DICTS = [
    *((make_generators, changes) for changes in GENERATOR_OPTIONS.values()),
    *((make_encoders, changes) for changes in ENCODER_OPTIONS.values()),
]


def test_state_dicts_go_back_and_forth():
    """Bit by bit, and the published modules take what comes back."""
    for make, changes in STATE_DICTS:
        expected, found = make(**changes)
        state = published_state_dict(found)
        assert state.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(state[name].to(tensor), tensor), name
        expected.load_state_dict(state)
        other = type(found)(found.configuration).double()
        load_published_state_dict(other, state)
        for tensor, same in zip(other.state_dict().values(), found.state_dict().values(), strict=True):
            assert torch.equal(tensor, same)
        assert sorted(published_names(found).values()) == sorted(
            itertools.chain.from_iterable(
                [name] * (len(tensor) if name.startswith("distribution.") else 1)
                for name, tensor in found.state_dict().items()
            )
        )


def test_state_dicts_that_do_not_fit():
    expected, found = make_encoders()
    before = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    state = {name: torch.randn_like(tensor) for name, tensor in expected.state_dict().items()}
    state |= {name: tensor for name, tensor in expected.state_dict().items() if "inv_freq" in name or "mask" in name}

    def message(changed: dict[str, Any]) -> str:
        with pytest.raises(ValueError, match="state_dict: expected that of the published model") as error:
            load_published_state_dict(found, changed)
        assert all(torch.equal(before[name], tensor) for name, tensor in found.state_dict().items())
        return str(error.value)

    name = "backbone.block_0.cross_attention.attention.q_linear.weight"
    assert message({key: tensor for key, tensor in state.items() if key != name}).splitlines()[1:] == [
        f"  missing {name}"
    ]
    assert "unexpected more" in message(state | {"more": torch.zeros(1)})
    assert f"{name}: expected shape (8, 6), got (8, 7)" in message(state | {name: torch.zeros(8, 7)})
    other_mask = make_encoders(num_latents_bg=6, num_latent_per_labels=2)[0].latents_mask
    assert "latents_mask: expected the constant" in message(state | {"latents_mask": other_mask})
    assert "inv_freq: expected the constant" in message(state | {"image_pos_embs.0.inv_freq": torch.ones(2)})
    text = message(make_generators()[0].state_dict())
    assert len(text.splitlines()) == 22 and "more" in text.splitlines()[-1]
    load_published_state_dict(found, state)
    assert not torch.equal(found.convolutions[0].weight, before["convolutions.0.weight"])
    with pytest.raises(TypeError, match="model: expected a Scam, an Encoder or a Generator, got Linear"):
        load_published_state_dict(nn.Linear(1, 1), {})


def test_state_dict_of_both():
    (encoder, ours), (generator, our_generator) = make_encoders(), make_generators()
    model = Scam(ours, our_generator)
    both = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    both |= {f"generator.{name}": tensor for name, tensor in generator.state_dict().items()}
    other = Scam.from_configuration(model.configuration).double()
    load_published_state_dict(other, both)
    assert all(
        torch.equal(tensor, same)
        for tensor, same in zip(other.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert published_state_dict(model).keys() == both.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_pos_emb": "fourrier"}, "latent_pos_emb: expected 'learned' or 'none'"),
        ({"split_latents": True}, "style_dim: expected a multiple of num_labels_split=4, got 6"),
        ({"norm_type": "GroupNorm"}, "norm_type: expected one of 'InstanceNorm', 'LayerNorm', 'BatchNorm', got"),
        ({"architecture": "dense"}, "architecture: expected one of 'skip', 'resnet', 'none', got 'dense'"),
    ],
)
def test_published_arguments_that_do_not_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        generator_configuration(**GENERATOR | {"num_labels_split": 4} | arguments)


def test_default_configurations():
    """They are those of the published code, down to the last parameter."""
    with torch.device("meta"):
        for num_labels, width, preset in ((19, 256, celebamask_hq), (151, 256, ade20k), (3, 170, idesigner)):
            model = Scam.from_configuration(preset())
            parts = {
                "encoder": published.make_encoder(num_labels),
                "generator": published.make_generator(num_labels, 256, width),
            }
            expected = {
                f"{part}.{name}": tensor.shape
                for part, module in parts.items()
                for name, tensor in module.state_dict().items()
            }
            assert {name: tensor.shape for name, tensor in published_state_dict(model).items()} == expected


def test_a_double_leaky_relu_is_one():
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(F.leaky_relu(F.leaky_relu(x, 0.2), 0.2), F.leaky_relu(x, 0.2**2), rtol=1e-15, atol=0)
