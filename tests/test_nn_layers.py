"""Convolutions, the map encoder, the modulation that blends with it, and attention weights to look at."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import published_formulas as published
import pytest
import torch
import torch.nn.functional as F
from tokens import error_ratio, random_map
from torch import Tensor, nn

from sca_kernels import LabelMap, LatentLayout
from sca_kernels.folding import FoldingChoice, SeparableEncoding, attention_shares, attention_weights
from sca_kernels.nn import (
    AttentionLayers,
    Convolution,
    Linear,
    MapEncoder,
    SemanticAttentionTransformer,
    SemanticModulation,
    sinusoidal_encoding,
)
from sca_kernels.nn.layers import project_pixels

pytestmark = pytest.mark.usefixtures("native")

LAYOUT = LatentLayout((3, 0, 2, 1, 4))
CHANNELS, LATENT_DIM, ATTENTION_DIM = 8, 6, 12
FOLDED = FoldingChoice(True, "product", "all")


def make_labels(height: int = 7, width: int = 9) -> LabelMap:
    """Labels of two images, some pixels without one, and one label absent."""
    return random_map(2, height, width, LAYOUT.num_labels, without=(3,))


def planes_of(labels: LabelMap) -> Tensor:
    """(B, m, height, width), one where a pixel has the label of a latent."""
    return (labels.labels.unsqueeze(1) == LAYOUT.labels(labels.device)[:, None, None]).double()


def randomised(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values * (parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1))
    return module


def assert_agree(found: list[Tensor], expected: list[Tensor], leaves: list[Tensor]) -> None:
    gradients = []
    for results in (found, expected):
        total = sum((part * torch.linspace(-1, 2, part.numel()).view_as(part).cos()).sum() for part in results)
        assert isinstance(total, Tensor)
        gradients.append(torch.autograd.grad(total, leaves))
    for got, wanted in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max() + 1e-13


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_equalised_convolution(bias, size):
    torch.manual_seed(0)
    layer = randomised(Convolution(3, 4, size, stride=2, bias=bias, equalised=True, lr_mul=0.5))
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    weight = layer.weight * (0.5 / (3 * size**2) ** 0.5)
    expected = F.conv2d(x, weight, layer.bias * 0.5 if bias else None, stride=2, padding=size // 2)
    assert_agree([layer(x)], [expected], [x, *layer.parameters()])


def test_plain_convolution_is_that_of_pytorch():
    torch.manual_seed(0)
    layer = Convolution(3, 4, 3)
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(1, 3, 5, 6)
    assert torch.equal(layer(x), plain(x))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    torch.manual_seed(0)
    equalised = Convolution(40, 50, 3, equalised=True, lr_mul=0.1)
    assert equalised.weight.std().item() == pytest.approx(10, rel=0.03) and not equalised.bias.any()
    assert "equalised, lr_mul=0.1, spectral" in repr(Convolution(4, 4, 1, equalised=True, lr_mul=0.1, spectral=True))
    with pytest.raises(ValueError, match="kernel_size: expected an odd number, got 4"):
        Convolution(3, 4, 4)


def test_spectral_norm():
    """Step by step like ``torch.nn.utils.spectral_norm``, two calls before each backward pass included."""
    torch.manual_seed(0)
    layer = Convolution(3, 4, 3, spectral=True).double()
    reference = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3, padding=1).double())
    names = {"weight_orig": "weight", "bias": "bias", "weight_u": "left_vector", "weight_v": "right_vector"}
    reference.load_state_dict({theirs: layer.state_dict()[ours] for theirs, ours in names.items()})
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    for training in (True, True, False):
        layer.train(training)
        reference.train(training)
        found, expected = ([module(x), module(x + 1)] for module in (layer, reference))
        gradients = []
        for results, parameters in (
            (found, [layer.weight, layer.bias]),
            (expected, [reference.weight_orig, reference.bias]),
        ):
            gradients.append(torch.autograd.grad(sum(part.square().sum() for part in results), parameters))
        for got, wanted in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.left_vector, reference.weight_u, rtol=0, atol=1e-14)
        torch.testing.assert_close(layer.right_vector, reference.weight_v, rtol=0, atol=1e-14)
    layer.train()
    with torch.no_grad():
        for _ in range(200):
            layer(x)
        weight, _ = layer.effective_parameters()
    assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1)
    assert torch.equal(copy.deepcopy(layer).left_vector, layer.left_vector)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_of_pixels(bias):
    layer = randomised(Linear(5, 3, bias, equalised=True, lr_mul=0.5))
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    expected = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert_agree([project_pixels(x, layer.projection)], [expected], [x, *layer.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        assert project_pixels(x.float(), layer.float().projection).dtype == torch.float32


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("equalised", [False, True])
def test_map_encoder(equalised, size):
    """It looks up what the convolution of one plane for each latent computes."""
    labels = make_labels()
    encoder = randomised(MapEncoder(LAYOUT, CHANNELS, 16, size, equalised=equalised, lr_mul=0.5 if equalised else 1.0))
    hidden = F.relu(encoder.shared(planes_of(labels)))
    expected = [encoder.gamma(hidden), encoder.beta(hidden)]
    assert_agree(list(encoder(labels)), expected, list(encoder.parameters()))
    with pytest.raises(ValueError, match="labels: expected 5 labels, got 6"):
        encoder(LabelMap(labels.labels, 6))


def test_map_encoder_without_known_labels():
    """Labels out of range, which are not checked on a GPU, count as none."""
    encoder = randomised(MapEncoder(LAYOUT, CHANNELS, 16))
    wrong = torch.full((1, 4, 5), 7, dtype=torch.int32)
    none = LabelMap.from_labels(torch.full((1, 4, 5), -1), LAYOUT.num_labels)
    for got, wanted in zip(encoder(LabelMap(wrong, LAYOUT.num_labels)), encoder(none), strict=True):
        assert torch.equal(got, wanted)


def modulation(**settings: Any) -> tuple[SemanticModulation, list[Any]]:
    """A modulation and its inputs."""
    module = randomised(SemanticModulation(LAYOUT, CHANNELS, LATENT_DIM, ATTENTION_DIM, **settings))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, CHANNELS, 7, 9, generator=generator, dtype=torch.float64).requires_grad_()
    latents = torch.randn(2, LAYOUT.count, LATENT_DIM, generator=generator, dtype=torch.float64).requires_grad_()
    return module, [x, make_labels(14, 18), latents]


@pytest.mark.parametrize("choice", ["auto", FOLDED, "projected"], ids=str)
@pytest.mark.parametrize("lr_mul", [1.0, 0.5])
def test_blended_modulation(lr_mul, choice):
    module, (x, labels, latents) = modulation(
        duplex=False, noise=False, map_encoder=True, lr_mul=lr_mul, choice=choice, negative_slope=0.04
    )
    parameters = {name.removeprefix("attention."): parameter for name, parameter in module.named_parameters()}
    updated = module.latent_update(latents)
    pixels = published.pixel_tokens(x, published.sinusoidal(CHANNELS, 7, 9))
    allowed = published.mask(labels.at(7, 9), LAYOUT, 2)
    attended = published.attention(pixels, updated, allowed, parameters, 1)
    hidden = F.relu(module.map_encoder.shared(planes_of(labels.at(7, 9))))
    gamma, beta = (
        share * published.linear(attended, parameters, name).mT.view_as(x) + (1 - share) * layer(hidden)
        for name, share, layer in (
            ("gamma", (module.gamma_blend * lr_mul).sigmoid(), module.map_encoder.gamma),
            ("beta", (module.beta_blend * lr_mul).sigmoid(), module.map_encoder.beta),
        )
    )
    expected = F.leaky_relu((1 + gamma) * F.instance_norm(x) + beta, 0.04)
    leaves = [x, latents, *(parameter for name, parameter in parameters.items() if name != "key.bias")]
    assert_agree([module(x, labels, latents)[0]], [expected], leaves)


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_blended_modulation_in_other_types_and_orders(order, features):
    module, (x, labels, latents) = modulation(map_encoder=True, noise=False)
    expected = module(x, labels, latents)
    module.float()
    x = x.detach().to(features).contiguous(memory_format=order).requires_grad_()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, _ = module(x, labels, latents.detach().float())
        assert out.dtype == features and out.is_contiguous(memory_format=order)
        assert error_ratio(out, expected[0]) < (1e-5 if features == torch.float32 and not enabled else 3e-2)
        out.float().square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("map_encoder", [False, True])
def test_slope(map_encoder):
    """A slope of 0.04 is that of two leaky ReLUs of 0.2."""
    module, inputs = modulation(noise=False, map_encoder=map_encoder)
    steeper, _ = modulation(noise=False, map_encoder=map_encoder, negative_slope=0.04)
    expected = F.leaky_relu(module(*inputs)[0], 0.2)
    torch.testing.assert_close(steeper(*inputs)[0], expected, rtol=1e-13, atol=1e-13)


def by_place(weights: Tensor, labels: LabelMap) -> Tensor:
    """From (B, H, m, n) for all latents to (B, H, k, height, width) for those of each pixel's label."""
    planes = weights.new_zeros(*weights.shape[:2], LAYOUT.max_per_label, labels.height, labels.width)
    for label, (begin, end) in enumerate(pairwise(LAYOUT.cu_latents)):
        of_label = (labels.labels == label)[:, None, None]
        planes[:, :, : end - begin] += weights[:, :, begin:end].unflatten(3, planes.shape[3:]) * of_label
    return planes


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("concatenated", [False, True])
def test_attention_weights(concatenated, num_heads):
    labels = make_labels()
    extra = 4 if concatenated else 0
    layers = randomised(AttentionLayers(CHANNELS + extra, LATENT_DIM, ATTENTION_DIM, num_heads, out_dim=CHANNELS))
    x, latents, encoding = features_and_latents(extra)
    found = attention_weights(x, latents, LAYOUT, labels, layers.projections, encoding=encoding)
    assert found.shape == (2, num_heads, 4, 7, 9)

    query = layers.query(encoding.encode(x).flatten(2).mT).unflatten(2, (num_heads, -1))
    key = layers.key(latents).unflatten(2, (num_heads, -1))
    logits = torch.einsum("bnhd,bmhd->bhmn", query, key) / (ATTENTION_DIM // num_heads) ** 0.5
    owned = (planes_of(labels).flatten(2) > 0).unsqueeze(1)
    expected = by_place(torch.where(owned, logits, -torch.inf).softmax(2).nan_to_num(), labels)
    assert_agree([found], [expected], [x, latents, layers.query.weight, layers.key.weight])
    assert not found[:, :, :, 0, 0][labels.labels[:, 0, 0] < 0].any()


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("concatenated", [False, True])
def test_attention_shares(concatenated, num_heads):
    """Weights of all latents over all pixels, as the definition has them, divided by what each pixel gets."""
    labels = make_labels()
    extra = 4 if concatenated else 0
    layers = randomised(AttentionLayers(LATENT_DIM, CHANNELS + extra, ATTENTION_DIM, num_heads))
    x, latents, encoding = features_and_latents(extra)
    found = attention_shares(latents, x, LAYOUT, labels, layers.projections, encoding=encoding)
    assert found.shape == (2, num_heads, 4, 7, 9)

    query = layers.query(latents).unflatten(2, (num_heads, -1))
    key = layers.key(encoding.encode(x).flatten(2).mT).unflatten(2, (num_heads, -1))
    logits = torch.einsum("bmhd,bnhd->bhmn", query, key) / (ATTENTION_DIM // num_heads) ** 0.5
    owned = (planes_of(labels).flatten(2) > 0).unsqueeze(1)
    given = by_place(torch.where(owned, logits, -1e3).softmax(3) * owned, labels)
    total = given.sum(2, keepdim=True)
    has_latents = total > 0
    expected = torch.where(has_latents, given / total.where(has_latents, 1), 0)
    assert_agree([found], [expected], [x, latents, layers.query.weight, layers.key.weight])
    assert 0 < has_latents.double().mean() < 1 and not found.where(~has_latents, 0).any()


def test_attention_shares_of_pixels_that_get_next_to_nothing():
    """Their weights are zero in float32; the shares are not."""
    labels = LabelMap.from_labels(torch.full((2, 7, 9), 4), LAYOUT.num_labels)
    layers = randomised(AttentionLayers(LATENT_DIM, CHANNELS, ATTENTION_DIM))
    x, latents, encoding = features_and_latents(0)
    x = x.detach() * 60
    latents = latents.detach()
    exact = attention_shares(latents, x, LAYOUT, labels, layers.projections, encoding=encoding)
    query, key = layers.query(latents), layers.key(encoding.encode(x).flatten(2).mT)
    weights = ((query @ key.mT) / ATTENTION_DIM**0.5).float().softmax(2)[:, -4:]
    assert (weights.sum(1) == 0).any()
    single = attention_shares(latents.float(), x.float(), LAYOUT, labels, layers.float().projections, encoding=encoding)
    torch.testing.assert_close(single.sum(2), torch.ones(2, 1, 7, 9))
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-3)


def test_attention_shares_of_a_block_of_latents():
    """Where each label has one pixel alone, every latent of it gives all to that pixel; otherwise shares are uneven."""
    layout = LatentLayout((3, 2))
    block = randomised(SemanticAttentionTransformer(layout, LATENT_DIM, 6, channels=CHANNELS, encoding_channels=4))
    latents, x = torch.randn(1, 5, LATENT_DIM).double(), torch.randn(1, CHANNELS, 2, 2).double()
    labels = LabelMap.from_labels(torch.tensor([[0, 1], [-1, -1]]), num_labels=2)
    shares = block.attention_shares(latents, x, labels)
    expected = torch.tensor([[1 / 3, 1 / 2, 0, 0], [1 / 3, 1 / 2, 0, 0], [1 / 3, 0, 0, 0]]).double()
    torch.testing.assert_close(shares.flatten(3)[0, 0], expected)
    finer = block.attention_shares(latents, x, labels.at(4, 4))
    assert torch.equal(finer, shares)


def features_and_latents(extra: int) -> tuple[Tensor, Tensor, SeparableEncoding]:
    """Features, latents, and an encoding that has ``extra`` channels of its own, if any."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, CHANNELS, 7, 9, generator=generator, dtype=torch.float64).requires_grad_()
    latents = torch.randn(2, LAYOUT.count, LATENT_DIM, generator=generator, dtype=torch.float64).requires_grad_()
    encoding = sinusoidal_encoding(7, 9, extra or CHANNELS, concatenated=extra > 0, dtype=torch.float64)
    return x, latents, encoding


def test_attention_weights_of_a_modulation():
    """Those with which it mixes what the latents say."""
    module, (x, labels, latents) = modulation(num_heads=2, noise=False)
    out, updated = module(x, labels, latents)
    weights = module.attention_weights(x, labels, updated)
    value = module.attention.value(updated).unflatten(2, (2, -1))
    layout = LAYOUT
    inner = torch.zeros(2, 7, 9, ATTENTION_DIM, dtype=torch.float64)
    resized = labels.at(7, 9).labels
    for label in range(layout.num_labels):
        begin, end = layout.cu_latents[label], layout.cu_latents[label + 1]
        mixed = torch.einsum("bhkyx,bkhd->byxhd", weights[:, :, : end - begin], value[:, begin:end]).flatten(3)
        inner = torch.where((resized == label).unsqueeze(3), mixed, inner)
    attended = module.attention.out(inner)
    gamma, beta = (layer(attended).permute(0, 3, 1, 2) for layer in (module.gamma, module.beta))
    expected = F.leaky_relu((1 + gamma) * F.instance_norm(x) + beta, 0.2)
    owns = torch.tensor(layout.latents_per_label)[resized.clamp(min=0).long()] > 0
    has_latents = ((resized >= 0) & owns).unsqueeze(1)
    torch.testing.assert_close(torch.where(has_latents, out, 0), torch.where(has_latents, expected, 0))


@pytest.mark.compiled
def test_compiled_blended_modulation():
    torch._dynamo.reset()
    module, (x, labels, latents) = modulation(map_encoder=True, noise=False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = [x, latents, *module.parameters()]
    assert_agree(list(compiled(x, labels, latents)), list(module(x, labels, latents)), leaves)


@pytest.mark.compiled
def test_compiled_ways_of_folding():
    torch._dynamo.reset()
    for values in ("chain", "out", "all"):
        choice = FoldingChoice(True, "chain", values)
        module, (x, labels, latents) = modulation(noise=False, choice=choice)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        leaves = [x, latents, *module.parameters()]
        assert_agree(list(compiled(x, labels, latents)), list(module(x, labels, latents)), leaves)
