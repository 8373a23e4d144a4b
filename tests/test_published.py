"""The layers of the published modules, which ours are compared with, against the formulas of the paper."""

from __future__ import annotations

import math
from typing import Any

import published_formulas
import pytest
import torch
import torch.nn.functional as F
from published_modules import (
    LAYOUT,
    inputs,
    linear,
    make_modulation,
    mask_of,
    randomised,
    under,
)
from torch import Tensor, nn

from bench.published import (
    EqualConv2d,
    EqualLinear,
    MaskedAttention,
    MaskedTransformer,
    SameLabel,
    SCAMModulation,
    SinusoidalPositionalEmbedding,
    mask_of_latents,
    planes_of_latents,
)
from sca_kernels import LabelMap

# Names of the published parameters, and of the same ones in the formulas.
IN_FORMULAS = {
    "q_linear": "query",
    "v_linear": "key",
    "k_linear": "value",
    "out.0": "out",
    "ln_": "norm_",
    "fc.": "mlp.",
    "mlp_lti_": "",
    "noise_var": "noise_strength",
}


def formula_parameters(module: nn.Module) -> dict[str, Tensor]:
    parameters = {}
    for name, parameter in module.named_parameters():
        for published, ours in IN_FORMULAS.items():
            name = name.replace(published, ours)
        parameters[name] = parameter
    return parameters


@pytest.mark.parametrize("lr_mul", [None, 0.3])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("attention_type", ["duplex", "simplex"])
def test_modulation_is_the_formula(attention_type: str, num_heads: int, lr_mul: float | None) -> None:
    """Label 2 is absent and some pixels have no label: these latents and pixels attend to everything alike."""
    equalised: dict[str, Any] = {} if lr_mul is None else {"use_equalized_lr": True, "lr_mul": lr_mul}
    module = make_modulation(8, attention_type=attention_type, num_heads=num_heads, **equalised)
    _, labels, latents = inputs(8, 12, lowest=-1)
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    noise = torch.randn(2, 6, 4, 1, dtype=torch.float64)
    module.draw_noise = lambda x: noise  # type: ignore[method-assign]
    results = module(x, mask_of(labels), latents)

    label_map = LabelMap(labels[:, ::2, ::2], 3)
    allowed = published_formulas.mask(label_map, LAYOUT, 2)
    pixels = published_formulas.pixel_tokens(x, published_formulas.sinusoidal(8, 4, 6))
    if attention_type == "duplex":
        parameters = formula_parameters(module.image_to_latent)
        own = {name.removeprefix("attention."): value for name, value in parameters.items()}
        attended = published_formulas.attention(latents, pixels, allowed.transpose(1, 2), own, num_heads, lr_mul=lr_mul)
        latents = published_formulas.transformer(latents, attended, parameters, lr_mul)
    else:
        parameters = formula_parameters(module.fc_itl)
        latents = F.leaky_relu(published_formulas.linear(latents, parameters, "0", lr_mul), 0.2)
        latents = published_formulas.linear(latents, parameters, "2", lr_mul)
    parameters = formula_parameters(module.latent_to_image)
    attended = published_formulas.attention(pixels, latents, allowed, parameters, num_heads, lr_mul=lr_mul)
    scaled = noise.transpose(1, 3) * (lr_mul or 1)
    out = published_formulas.modulation(x, attended, formula_parameters(module), scaled, lr_mul)
    torch.testing.assert_close(results, (out, latents))


@pytest.mark.parametrize("attention_type", ["duplex", "simplex"])
def test_labels_in_place_of_masks(attention_type: str) -> None:
    module = make_modulation(attention_type=attention_type, num_heads=2, add_noise=False)
    _, labels, latents = inputs(4, 6, lowest=-1)
    x, latents = torch.randn(1, 4, 4, 6, dtype=torch.float64), latents[:1]
    of_pixels, of_latents = labels[:1].flatten(1), LAYOUT.labels(torch.device("cpu"))[None]
    results = module.exchange(x, latents, SameLabel(of_latents, of_pixels), SameLabel(of_pixels, of_latents))
    torch.testing.assert_close(results, module(x, mask_of(labels[:1]), latents))
    with pytest.raises(ValueError, match="return_attention"):
        module.return_attention = True
        module.exchange(x, latents, SameLabel(of_latents, of_pixels), SameLabel(of_pixels, of_latents))


def test_attention() -> None:
    """Keys come from ``v_linear`` and values from ``k_linear``; a row without a one attends to all alike."""
    module = randomised(MaskedAttention(6, 5, 12, 3))
    to, source = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 7, 5, dtype=torch.float64)
    mask = (torch.rand(2, 4, 7) < 0.5).double()
    mask[:, 1] = 0
    mask[:, 2, 0] = 0.25  # anything but zero is a one
    out, weights = module(to, source, mask, return_attention=True)
    assert torch.equal(out, module(to, source, mask))
    assert weights.shape == (2, 3, 4, 7)
    torch.testing.assert_close(weights[:, :, 1], torch.full((2, 3, 7), 1 / 7, dtype=torch.float64))
    blocked = (mask == 0)[:, None, [0, 2, 3]].expand(-1, 3, -1, -1)
    assert torch.all(weights[:, :, [0, 2, 3]][blocked] == 0)
    assert torch.all(weights[:, :, [0, 2, 3]][~blocked] > 0)
    assert torch.all(module(to, source, return_attention=True)[1] > 0)
    with torch.no_grad():
        module.k_linear.weight.mul_(2)
    changed, same_weights = module(to, source, mask, return_attention=True)
    assert torch.equal(weights, same_weights) and not torch.allclose(out, changed)
    with torch.no_grad():
        module.v_linear.weight.mul_(2)
    assert not torch.allclose(weights, module(to, source, mask, return_attention=True)[1])


def test_transformer_normalises_all_tokens_together() -> None:
    module = MaskedTransformer(6, 4, 5, 12, 3).double()
    rows = module(torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 7, 5, dtype=torch.float64))
    together = rows.flatten(1)
    torch.testing.assert_close(together.mean(1), torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(together.var(1, correction=0), torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0)
    assert rows.mean(2).abs().min() > 1e-3
    assert isinstance(module.fc[-1], nn.LeakyReLU)


@pytest.mark.parametrize("channels, emb_type", [(4, "add"), (12, "add"), (12, "concat"), (0, "concat")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_position(channels: int, emb_type: Any, dtype: torch.dtype) -> None:
    module = SinusoidalPositionalEmbedding(channels, emb_type).to(dtype)
    x = torch.randn(2, channels if emb_type == "add" else 3, 5, 7, dtype=dtype)
    expected = published_formulas.sinusoidal(channels, 5, 7, torch.float64).to(dtype) if channels else x[0, :0]
    expected = x + expected if emb_type == "add" else torch.cat([x, expected.expand(2, -1, -1, -1)], 1)
    torch.testing.assert_close(module(x), expected)
    exact = 10000 ** (-2 * torch.arange(channels // 4, dtype=torch.float64) / max(1, channels // 2))
    torch.testing.assert_close(module.inv_freq, exact.to(dtype), rtol=1e-6, atol=0)


def test_noise() -> None:
    """One number for each pixel, in evaluation mode too, drawn column after column."""
    module = make_modulation().eval().float()
    _, labels, latents = inputs(4, 6)
    x, mask, latents = torch.zeros(2, 4, 4, 6), mask_of(labels).float(), latents.float()
    torch.manual_seed(3)
    out, _ = module(x, mask, latents)
    torch.manual_seed(3)
    noise = torch.randn(2, 6, 4, 1)
    torch.manual_seed(3)
    assert torch.equal(out, module(x, mask, latents)[0])
    assert not torch.equal(out, module(x, mask, latents)[0])
    module.draw_noise = lambda x: noise  # type: ignore[method-assign]
    assert torch.equal(out, module(x, mask, latents)[0])
    with torch.no_grad():
        module.noise_var.zero_()
    before, _ = module(x, mask, latents)
    assert not torch.allclose(out, before)
    assert torch.equal(nn.init.zeros_(torch.empty(4)), SCAMModulation(8, 4, 8, 12, 3, 1).noise_var.detach())


@pytest.mark.parametrize(
    "norm_type, over", [("InstanceNorm", (2, 3)), ("LayerNorm", (1, 2, 3)), ("BatchNorm", (0, 2, 3))]
)
def test_normalisation(norm_type: Any, over: tuple[int, ...]) -> None:
    """Without gamma and beta only the normalisation is left."""
    module = make_modulation(norm_type=norm_type, modulate=False, add_noise=False)
    _, labels, latents = inputs(4, 6)
    x = 3 * torch.randn(2, 4, 4, 6, dtype=torch.float64) + 1
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    out, _ = module(x, mask_of(labels), latents)
    torch.testing.assert_close(out, F.leaky_relu((x - mean) / (variance + 1e-5).sqrt(), 0.2))
    running = {name for name in module.state_dict() if name.startswith("normalization_layer")}
    names = {"running_mean", "running_var", "num_batches_tracked"} if norm_type == "BatchNorm" else set()
    assert running == {f"normalization_layer.{name}" for name in names}
    evaluated, _ = module.eval()(x, mask_of(labels), latents)
    assert torch.allclose(out, evaluated) == (norm_type != "BatchNorm")


def test_mask_blended_into_the_modulation() -> None:
    module = make_modulation(use_mask_adain=True, add_noise=False)
    assert {name for name in module.state_dict() if "segmap" in name or "blending" in name} == {
        "blending_gamma",
        "blending_beta",
        *under(
            segmap_encoder__shared_mlp__0=linear(128, 8),
            segmap_encoder__gamma_mlp=linear(4, 128),
            segmap_encoder__mu_mlp=linear(4, 128),
        ),
    }
    _, labels, latents = inputs(4, 6)
    x, mask = torch.randn(2, 4, 4, 6, dtype=torch.float64), mask_of(labels)

    def modulated(gamma: float, beta: float) -> Tensor:
        with torch.no_grad():
            module.blending_gamma.fill_(gamma)
            module.blending_beta.fill_(beta)
        out, _ = module(x, mask, latents)
        return torch.where(out < 0, out / 0.2, out)

    by_latents, by_mask = modulated(100, 100), modulated(-100, -100)
    encoder = module.segmap_encoder
    hidden = F.relu(F.conv2d(mask, encoder.shared_mlp[0].weight, encoder.shared_mlp[0].bias, padding=1))
    gamma, beta = (
        F.conv2d(hidden, layer.weight, layer.bias, padding=1) for layer in (encoder.gamma_mlp, encoder.mu_mlp)
    )
    torch.testing.assert_close(by_mask, (1 + gamma) * F.instance_norm(x) + beta)
    module.use_mask_adain = False
    torch.testing.assert_close(by_latents, modulated(0, 0))
    module.use_mask_adain = True
    torch.testing.assert_close(modulated(0, 0), (by_latents + by_mask) / 2)
    share = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(modulated(1, 1), share * by_latents + (1 - share) * by_mask)
    module.lr_mul = 0.5
    torch.testing.assert_close(modulated(2, 2), share * by_latents + (1 - share) * by_mask)


def test_equalised_layers() -> None:
    linear_layer, convolution_layer = (
        randomised(EqualLinear(6, 4, lr_mul=0.5)),
        randomised(EqualConv2d(6, 4, 3, lr_mul=0.5)),
    )
    rows, image = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, 5, 7, dtype=torch.float64)
    expected = F.linear(rows, linear_layer.weight * 0.5 / 6**0.5, linear_layer.bias * 0.5)
    torch.testing.assert_close(linear_layer(rows), expected)
    expected = F.conv2d(image, convolution_layer.weight * 0.5 / 54**0.5, convolution_layer.bias * 0.5)
    torch.testing.assert_close(convolution_layer(image), expected)
    torch.manual_seed(0)
    assert EqualLinear(100, 100, bias_init=2, lr_mul=0.01).weight.std().item() == pytest.approx(100, rel=0.05)
    assert torch.all(EqualLinear(3, 4, bias_init=2).bias == 2)
    for made, argument in ((EqualLinear(6, 4, bias=False), rows), (EqualConv2d(6, 4, 1, bias=False), image)):
        with pytest.raises(TypeError):
            made(argument.float())


def test_masks() -> None:
    labels = torch.tensor([[[0, 1], [2, -1]]])
    maps = mask_of_latents(labels, torch.arange(3))
    assert maps.tolist() == [[[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]]]
    assert torch.equal(planes_of_latents(maps, 2, 3), mask_of_latents(labels, LAYOUT.labels(torch.device("cpu"))))


def test_without_modulation_some_weights_have_no_gradient() -> None:
    module = make_modulation(modulate=False)
    _, labels, latents = inputs(4, 6)
    out, updated = module(torch.randn(2, 4, 4, 6).double(), mask_of(labels), latents)
    (out.square().sum() + updated.square().sum()).backward()
    without = {name.split(".")[0] for name, parameter in module.named_parameters() if parameter.grad is None}
    assert without == {"latent_to_image", "mlp_lti_gamma", "mlp_lti_beta"}
