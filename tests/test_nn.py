"""The modules against the published formulas in float64, and inside PyTorch: copies, types, autocast, compilation."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import published_formulas as published
import pytest
import torch
import torch.nn.functional as F
from tokens import error_ratio, random_map
from torch import Tensor, nn

import sca_kernels
from sca_kernels import LabelMap, LatentLayout
from sca_kernels.folding import FoldingChoice
from sca_kernels.nn import (
    AttentionLayers,
    Linear,
    SemanticAttentionTransformer,
    SemanticCrossAttention,
    SemanticModulation,
    sinusoidal_encoding,
)

pytestmark = pytest.mark.usefixtures("native")

LAYOUT = LatentLayout((3, 1, 2, 2, 4))
CHANNELS, LATENT_DIM, ATTENTION_DIM = 8, 6, 12
LR_MUL = 0.5

FOLDED = FoldingChoice(True, "product", "all")
SELECTED = FoldingChoice(True, "chain", "out", selects=True)
PROJECTED = FoldingChoice(False, "chain", "out", selects=True)


def make_inputs(
    height: int = 6, width: int = 7, channels: int = CHANNELS, seed: int = 0
) -> tuple[Tensor, LabelMap, Tensor, Tensor]:
    """Features, labels at twice their resolution with one of them absent, latents and noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64) + 0.5
    latents = torch.randn(2, LAYOUT.count, LATENT_DIM, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 1, height, width, generator=generator, dtype=torch.float64)
    labels = random_map(2, 2 * height, 2 * width, LAYOUT.num_labels, without=(3,), seed=seed)
    return x.requires_grad_(), labels, latents.requires_grad_(), noise


def randomise(module: nn.Module, seed: int = 1) -> Any:
    """Every parameter random, those that start at zero or one included, in float64."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[1] if parameter.dim() == 2 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * fan_in**-0.5)
    return module


def parameters_of(module: nn.Module, *prefixes: str) -> dict[str, Tensor]:
    """By the names of the published formulas: without the names of the parts they are in."""
    found = {}
    for name, parameter in module.named_parameters():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        found[name] = parameter
    return found


def lr_mul_of(module: nn.Module) -> float | None:
    layer = next(part for part in module.modules() if isinstance(part, Linear))
    return layer.lr_mul if layer.equalised else None


def expected_transformer(
    module: SemanticAttentionTransformer, latents: Tensor, x: Tensor | None, labels: LabelMap | None
) -> Tensor:
    lr_mul, parameters = lr_mul_of(module), parameters_of(module, "attention.")
    if x is None or labels is None:
        of_latents = LAYOUT.labels(torch.device("cpu"))
        source, allowed = latents, (of_latents[:, None] == of_latents).expand(len(latents), -1, -1)
    else:
        concatenated = module.encoding_channels is not None
        channels = module.encoding_channels if module.encoding_channels is not None else x.shape[1]
        encoding = published.sinusoidal(channels, *x.shape[2:]) if channels else None
        source = published.pixel_tokens(x, encoding, concatenated)
        allowed = published.mask(labels.at(*x.shape[2:]), LAYOUT, len(x)).transpose(1, 2)
    attended = published.attention(
        latents, source, allowed, parameters, module.attention.num_heads, empty=module.empty, lr_mul=lr_mul
    )
    return published.transformer(latents, attended, parameters, lr_mul)


def expected_modulation(
    module: SemanticModulation, x: Tensor, labels: LabelMap, latents: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    lr_mul = lr_mul_of(module)
    if isinstance(module.latent_update, SemanticAttentionTransformer):
        latents = expected_transformer(module.latent_update, latents, x, labels)
    else:
        parameters = parameters_of(module.latent_update)
        inner = F.leaky_relu(published.linear(latents, parameters, "0", lr_mul), 0.2)
        latents = published.linear(inner, parameters, "2", lr_mul)
    parameters = parameters_of(module, "attention.")
    pixels = published.pixel_tokens(x, published.sinusoidal(x.shape[1], *x.shape[2:]))
    allowed = published.mask(labels.at(*x.shape[2:]), LAYOUT, len(x))
    attended = published.attention(
        pixels, latents, allowed, parameters, module.attention.num_heads, empty=module.empty, lr_mul=lr_mul
    )
    if lr_mul is not None:
        parameters = parameters | {"noise_strength": parameters["noise_strength"] * lr_mul}
    return published.modulation(x, attended, parameters, noise, lr_mul), latents


def assert_agrees(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...], leaves: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    """Results and the gradients of all leaves are the same; those of a key's bias are zeros."""
    sums = []
    for results in (found, expected):
        weights = [torch.linspace(-1, 2, part.numel(), dtype=part.dtype).view(part.shape).cos() for part in results]
        sums.append(sum((part * weight).sum() for part, weight in zip(results, weights, strict=True)))
    for got, wanted in zip(found, expected, strict=True):
        assert error_ratio(got, wanted) <= tolerance
    gradients = [torch.autograd.grad(total, list(leaves.values()), allow_unused=True) for total in sums]
    for name, got, wanted in zip(leaves, *gradients, strict=True):
        assert got is not None and wanted is not None, name
        if name.endswith("key.bias"):
            assert not got.any()
        else:
            assert error_ratio(got, wanted) <= tolerance, name


@pytest.mark.parametrize("choice", ["auto", FOLDED, SELECTED, PROJECTED, "projected"], ids=str)
@pytest.mark.parametrize("equalised", [False, True])
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("duplex", [False, True])
def test_modulation(duplex, num_heads, equalised, choice):
    x, labels, latents, noise = make_inputs()
    module = SemanticModulation(
        LAYOUT,
        CHANNELS,
        LATENT_DIM,
        ATTENTION_DIM,
        num_heads,
        duplex=duplex,
        equalised=equalised,
        lr_mul=LR_MUL if equalised else 1.0,
        choice=choice,
    )
    randomise(module)
    leaves = {"x": x, "latents": latents, **dict(module.named_parameters())}
    found = module(x, labels, latents, noise=noise)
    assert_agrees(found, expected_modulation(module, x, labels, latents, noise), leaves)


def test_modulation_of_a_large_image():
    x, labels, latents, noise = make_inputs(256, 170, channels=4)
    module = randomise(SemanticModulation(LAYOUT, 4, LATENT_DIM, ATTENTION_DIM, 2))
    leaves = {"x": x, "latents": latents, **dict(module.named_parameters())}
    found = module(x, labels, latents, noise=noise)
    assert_agrees(found, expected_modulation(module, x, labels, latents, noise), leaves)


@pytest.mark.parametrize("duplex", [False, True])
def test_modulation_with_empty_rows_of_zeros(duplex):
    x, labels, latents, noise = make_inputs()
    module = randomise(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, duplex=duplex, empty="zero"))
    leaves = {"x": x, "latents": latents, **dict(module.named_parameters())}
    found = module(x, labels, latents, noise=noise)
    assert_agrees(found, expected_modulation(module, x, labels, latents, noise), leaves)


@pytest.mark.parametrize("choice", ["auto", "projected"])
@pytest.mark.parametrize("duplex", [False, True])
@pytest.mark.parametrize("normalisation", ["instance", "layer", "batch"])
def test_normalisations(normalisation, duplex, choice):
    x, labels, latents, noise = make_inputs()
    settings: dict[str, Any] = {"duplex": duplex, "choice": choice}
    plain = randomise(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, **settings))
    module = SemanticModulation(
        LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, normalisation=normalisation, modulate=False, **settings
    ).double()
    missing, unexpected = module.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("batch_norm.") for name in missing)
    reference: nn.Module = {
        "instance": nn.InstanceNorm2d(CHANNELS),
        "layer": nn.LayerNorm(x.shape[1:], elementwise_affine=False),
        "batch": nn.BatchNorm2d(CHANNELS, affine=False).double(),
    }[normalisation]
    assert module.noise_strength is not None
    for training in (True, True, False):
        module.train(training)
        reference.train(training)
        out, updated = module(x, labels, latents, noise=noise)
        assert torch.equal(updated, plain(x, labels, latents, noise=noise)[1])
        expected = F.leaky_relu(reference(x) + module.noise_strength[:, None, None] * noise, 0.2)
        assert_agrees((out,), (expected,), {"x": x, "noise_strength": module.noise_strength})
    if normalisation == "batch":
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(module.state_dict()[f"batch_norm.{name}"], value)


@pytest.mark.parametrize("choice", ["auto", FOLDED, PROJECTED, "projected"], ids=str)
@pytest.mark.parametrize("encoded", [False, True])
def test_cross_attention(encoded, choice):
    x, labels, latents, _ = make_inputs()
    module = SemanticCrossAttention(
        LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, num_heads=3, encoded=encoded, choice=choice
    )
    randomise(module)
    encoding = published.sinusoidal(CHANNELS, *x.shape[2:]) if encoded else None
    allowed = published.mask(labels.at(*x.shape[2:]), LAYOUT, len(x))
    parameters = parameters_of(module, "attention.")
    expected = published.attention(published.pixel_tokens(x, encoding), latents, allowed, parameters, 3)
    expected = expected.transpose(1, 2).view_as(x)
    leaves = {"x": x, "latents": latents, **dict(module.named_parameters())}
    assert_agrees((module(x, labels, latents),), (expected,), leaves)


@pytest.mark.parametrize("choice", ["auto", FOLDED, SELECTED, PROJECTED, "projected"], ids=str)
@pytest.mark.parametrize("encoding_channels", [None, 0, 4])
def test_transformer_of_pixels(encoding_channels, choice):
    x, labels, latents, _ = make_inputs()
    module = SemanticAttentionTransformer(
        LAYOUT,
        LATENT_DIM,
        ATTENTION_DIM,
        num_heads=2,
        channels=CHANNELS,
        encoding_channels=encoding_channels,
        equalised=True,
        choice=choice,
    )
    randomise(module)
    leaves = {"x": x, "latents": latents, **dict(module.named_parameters())}
    found = module(latents, x, labels)
    assert_agrees((found,), (expected_transformer(module, latents, x, labels),), leaves)
    _, mean, variance = module.with_moments(latents, x, labels)
    if choice in ("projected", PROJECTED):
        assert mean is None and variance is None
    elif choice != "auto":
        expected = torch.var_mean(x, (2, 3), correction=0)
        assert_agrees((variance, mean), expected, {"x": x})


def test_transformer_of_latents():
    _, labels, latents, _ = make_inputs()
    module = randomise(SemanticAttentionTransformer(LAYOUT, LATENT_DIM, ATTENTION_DIM, num_heads=3))
    leaves = {"latents": latents, **dict(module.named_parameters())}
    assert_agrees((module(latents),), (expected_transformer(module, latents, None, None),), leaves)
    with pytest.raises(ValueError, match="expected None"):
        module(latents, latents, labels)


def test_levels_of_an_encoder():
    """An encoding that is concatenated to three channels, then one that is added; the latents attend in between."""
    image, labels, latents, _ = make_inputs(12, 14, channels=3)
    features = make_inputs(seed=2)[0]
    levels = [
        SemanticAttentionTransformer(LAYOUT, LATENT_DIM, ATTENTION_DIM, channels=3, encoding_channels=40),
        SemanticAttentionTransformer(LAYOUT, LATENT_DIM, ATTENTION_DIM),
        SemanticAttentionTransformer(LAYOUT, LATENT_DIM, ATTENTION_DIM, channels=CHANNELS),
    ]
    found = expected = latents
    leaves = {"image": image, "features": features, "latents": latents}
    for seed, (module, x) in enumerate(zip(levels, (image, None, features), strict=True)):
        randomise(module, seed)
        leaves |= {f"{seed}.{name}": parameter for name, parameter in module.named_parameters()}
        found = module(found) if x is None else module(found, x, labels)
        expected = expected_transformer(module, expected, x, None if x is None else labels)
    assert_agrees((found,), (expected,), leaves, tolerance=1e-9)


def test_sinusoidal_encoding():
    for (height, width, channels), concatenated in itertools.product([(5, 7, 8), (1, 3, 4), (256, 170, 40)], (0, 1)):
        encoding = sinusoidal_encoding(height, width, channels, concatenated=bool(concatenated), dtype=torch.float64)
        expected = published.sinusoidal(channels, height, width).unsqueeze(0)
        x = torch.zeros(2, channels, height, width, dtype=torch.float64)
        encoded = encoding.encode(x)[:, -channels:]
        torch.testing.assert_close(encoded, expected.expand(2, -1, -1, -1), rtol=0, atol=1e-14)
    assert sinusoidal_encoding(5, 7, 8).row is sinusoidal_encoding(5, 7, 8).row
    assert sinusoidal_encoding(5, 7, 8).row.dtype == torch.float32
    with torch.inference_mode():
        tables = sinusoidal_encoding(3, 9, 8)
    assert not tables.row.is_inference()
    with pytest.raises(ValueError, match="divisible by four"):
        sinusoidal_encoding(5, 7, 6)


def test_noise():
    x, labels, latents, _ = make_inputs()
    module = randomise(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM))
    torch.manual_seed(3)
    drawn = module(x, labels, latents)[0]
    torch.manual_seed(3)
    as_published = torch.randn(2, x.shape[3], x.shape[2], 1, dtype=torch.float64).transpose(1, 3)
    assert torch.equal(drawn, module(x, labels, latents, noise=as_published)[0])
    assert not torch.equal(drawn, module.eval()(x, labels, latents)[0])
    silent = SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, noise=False).double()
    silent.load_state_dict({name: value for name, value in module.state_dict().items() if name != "noise_strength"})
    with torch.no_grad():
        module.noise_strength.zero_()
        torch.testing.assert_close(silent(x, labels, latents)[0], module(x, labels, latents)[0])


def test_initial_values():
    torch.manual_seed(0)
    layer = Linear(400, 300, equalised=True, lr_mul=0.1)
    assert layer.weight.std().item() == pytest.approx(10, rel=0.02) and not layer.bias.any()
    assert "lr_mul=0.1" in repr(layer)
    torch.manual_seed(0)
    plain = Linear(40, 30)
    torch.manual_seed(0)
    assert torch.equal(plain.weight, nn.Linear(40, 30).weight)
    module = SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM)
    assert module.noise_strength is not None and not module.noise_strength.any()
    with pytest.raises(ValueError, match="num_heads: expected a divisor"):
        AttentionLayers(4, 4, 10, num_heads=3)
    with pytest.raises(ValueError, match="normalisation: expected"):
        SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, normalisation="group")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="encoding_channels: expected None"):
        SemanticAttentionTransformer(LAYOUT, LATENT_DIM, ATTENTION_DIM, encoding_channels=4)


@pytest.mark.parametrize("duplex", [False, True])
def test_copies(duplex):
    x, labels, latents, noise = make_inputs()
    module = randomise(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, duplex=duplex, choice=FOLDED))
    module.eval()
    with torch.no_grad():
        expected = module(x, labels, latents, noise=noise)
        assert len(module.attention.cache) > 0
        saved = io.BytesIO()
        torch.save(module.state_dict(), saved)
        saved.seek(0)
        loaded = SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, duplex=duplex, choice=FOLDED)
        loaded.double().eval().load_state_dict(torch.load(saved))
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
            found = other(x, labels, latents, noise=noise)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
            # A copy is on its own.
            other.attention.value.weight.mul_(2)
            assert not torch.equal(other(x, labels, latents, noise=noise)[0], expected[0])
        assert torch.equal(module(x, labels, latents, noise=noise)[0], expected[0])


def test_weights_change_between_evaluations():
    x, labels, latents, noise = make_inputs()
    module = randomise(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, choice=FOLDED))
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(module)
    for _ in range(3):
        module.train()
        module(x, labels, latents, noise=noise)[0].square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        average.update_parameters(module)
        for model in (module, average.module):
            model.eval()
            with torch.no_grad():
                found = model(x, labels, latents, noise=noise)
            expected = expected_modulation(model, x, labels, latents, noise)
            assert all(error_ratio(*pair) < 1e-10 for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("duplex", [False, True])
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_errors_are_no_larger_than_those_of_the_dense_formulas(duplex, features):
    """In float32; with features of 16 bits under autocast, which the small network of the latents obeys."""
    module = randomise(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, duplex=duplex)).float()
    x, labels, latents, noise = make_inputs(16, 12)
    inputs = [x.detach().to(features).requires_grad_(), latents.detach().float().requires_grad_()]
    results = []
    exact = copy.deepcopy(module).double()
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact_noise = noise.float().double()
    results.append(expected_modulation(exact, exact_inputs[0], labels, exact_inputs[1], exact_noise))
    with torch.autocast("cpu", torch.bfloat16, enabled=features == torch.bfloat16):
        results.append(module(inputs[0], labels, inputs[1], noise=noise.float()))
        results.append(expected_modulation(module, inputs[0], labels, inputs[1], noise.float()))
    assert results[1][0].dtype == features
    assert results[1][1].dtype == results[2][1].dtype
    for expected, found, dense in zip(*results, strict=True):
        # Another order of the same sums, and one more rounding to 16 bits at the end.
        assert error_ratio(found, expected) <= 2 * error_ratio(dense, expected) + 1e-6
    parameters = list(module.parameters())
    gradients = []
    for (out, updated), leaves in zip(
        results,
        ([*exact_inputs, *exact.parameters()], [*inputs, *parameters], [*inputs, *parameters]),
        strict=True,
    ):
        total = out.double().square().mean() + updated.double().square().mean()
        gradients.append(torch.autograd.grad(total, leaves, allow_unused=True))
    names = ["x", "latents", *dict(module.named_parameters())]
    for name, expected, found, dense in zip(names, *gradients, strict=True):
        if not name.endswith("key.bias"):
            assert found.dtype == dense.dtype
            assert error_ratio(found, expected) <= 2 * error_ratio(dense, expected) + 2e-5, name


def test_a_module_in_16_bits():
    x, labels, latents, noise = make_inputs()
    module = randomise(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM))
    expected = module(x, labels, latents, noise=noise)
    found = module.bfloat16()(x.bfloat16(), labels, latents.bfloat16(), noise=noise)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert error_ratio(got, wanted) < 5e-2
    sum(part.float().sum() for part in found).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.compiled
@pytest.mark.parametrize("duplex", [False, True])
def test_compiled(duplex):
    torch._dynamo.reset()
    x, labels, latents, noise = make_inputs()
    module = randomise(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, 2, duplex=duplex))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = {"x": x, "latents": latents, **dict(module.named_parameters())}
    expected = expected_modulation(module, x, labels, latents, noise)
    assert_agrees(compiled(x, labels, latents, noise=noise), expected, leaves)
    module.eval()
    with torch.no_grad():
        for got, wanted in zip(compiled(x, labels, latents, noise=noise), expected, strict=True):
            assert error_ratio(got, wanted) < 1e-10
        compiled(x, labels, latents)
        x, labels, latents, noise = make_inputs(9, 4, seed=2)  # sizes become symbolic
        for got, wanted in zip(
            compiled(x, labels, latents, noise=noise), module(x, labels, latents, noise=noise), strict=True
        ):
            assert error_ratio(got, wanted) < 1e-10


@pytest.mark.compiled
def test_exported_for_any_number_of_images():
    """Which takes a way that is given: the fastest depends on the sizes."""
    x, labels, latents, noise = make_inputs()
    module = randomise(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, choice=FOLDED))
    images = torch.export.Dim("images", min=2, max=5)
    shapes = {"x": {0: images}, "labels": [{0: images}, None], "latents": {0: images}, "noise": {0: images}}
    program = torch.export.export(module, (x, labels, latents), {"noise": noise}, dynamic_shapes=shapes).module()
    x, latents, noise = (torch.cat([tensor, tensor.flip(0)[:1]]).detach() for tensor in (x, latents, noise))
    labels = LabelMap(torch.cat([labels.labels, labels.labels[:1]]), labels.num_labels)
    found, expected = (model(x, labels, latents, noise=noise) for model in (program, module))
    assert all(error_ratio(*pair) < 1e-12 for pair in zip(found, expected, strict=True))


@pytest.mark.compiled
def test_compiled_transformers():
    torch._dynamo.reset()
    x, labels, latents, _ = make_inputs()

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross = SemanticAttentionTransformer(LAYOUT, LATENT_DIM, ATTENTION_DIM, channels=CHANNELS)
            self.itself = SemanticAttentionTransformer(LAYOUT, LATENT_DIM, ATTENTION_DIM)
            self.attention = SemanticCrossAttention(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM)

        def forward(self, x: Tensor, labels: LabelMap, latents: Tensor) -> Tensor:
            return self.attention(x, labels, self.itself(self.cross(latents, x, labels)))

    module = randomise(Encoder())
    leaves = {"x": x, "latents": latents, **dict(module.named_parameters())}
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(x, labels, latents)
    assert_agrees((found,), (module(x, labels, latents),), leaves)


def test_checkpointing():
    x, labels, latents, noise = make_inputs()
    module = randomise(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM))
    leaves = {"x": x, "latents": latents, **dict(module.named_parameters())}
    found = torch.utils.checkpoint.checkpoint(module, x, labels, latents, noise=noise, use_reentrant=False)
    assert_agrees(found, module(x, labels, latents, noise=noise), leaves, tolerance=0)


def test_backends_agree():
    x, labels, latents, noise = make_inputs()
    module = randomise(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM))
    leaves = {"x": x, "latents": latents, **dict(module.named_parameters())}
    with sca_kernels.backend("reference"):
        expected = module(x, labels, latents, noise=noise)
    assert_agrees(module(x, labels, latents, noise=noise), expected, leaves)
