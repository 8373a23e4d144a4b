"""Published networks and the same ones swapped: results, latents, every gradient, over all options."""

from __future__ import annotations

import copy

import pytest
import torch
from swapping import (
    LATENT_DIM,
    LAYOUT,
    assert_same,
    float64_noise,
    make_autoencoder,
    make_inputs,
    results_of,
    swapped_copy,
    without_own_code,
)
from test_scam_models_published import (
    ENCODER,
    ENCODER_OPTIONS,
    GENERATOR,
    GENERATOR_OPTIONS,
    make_labels,
    one_hot,
    randomise,
    tensors_of,
)
from torch import Tensor

import sca_kernels
from bench import published

pytestmark = pytest.mark.usefixtures("native", float64_noise.__name__)

__all__ = ["float64_noise"]
# Options that compute something else in evaluation mode, and some that do not.
ALSO_EVALUATED = ("default", "batch norm", "batch norm, simplex", "variational", "spectral", "map encoders, last block")
MODES = [(name, True) for name in GENERATOR_OPTIONS] + [(name, False) for name in ALSO_EVALUATED]


@pytest.mark.parametrize("option, training", MODES, ids=lambda value: value if isinstance(value, str) else "")
def test_generator(option, training):
    arguments = GENERATOR | GENERATOR_OPTIONS[option]
    expected = published.SCAMGenerator(**arguments).double()
    randomise(expected)
    found = swapped_copy(expected)
    mask = one_hot(make_labels(arguments["height"], arguments["width"]))
    shape = (2, expected.num_style_tokens, expected.latents_dim)
    if expected.split_latents:
        shape = (2, expected.num_labels, arguments["style_dim"])
    inputs = {f"latents {index}": torch.randn(shape).requires_grad_() for index in range(2)}
    latents = tuple(inputs.values()) if expected.use_vae else inputs["latents 0"]
    # Two steps: batch norm and the power iteration change what the next call does.
    for _ in range(2 if training else 1):
        for model in (expected, found):
            model.train(training)
        assert_same(expected, found, lambda model: [model(mask, latents)], inputs)


@pytest.mark.parametrize("option", ENCODER_OPTIONS)
def test_encoder(option):
    changes = ENCODER_OPTIONS[option]
    expected = published.SemanticAttentionTransformerEncoder(**ENCODER | changes).double()
    randomise(expected)
    found = swapped_copy(expected)
    _, mask = make_inputs(37, 26)
    channels = changes.get("num_input_channels", 3)
    image = torch.randn(2, channels, 37, 26).requires_grad_()

    def call(model: published.SemanticAttentionTransformerEncoder) -> list[Tensor]:
        latents, none = model(image, mask)
        assert none is None
        return tensors_of(latents)

    assert_same(expected, found, call, {"image": image})


def test_fixed_latents():
    """The published code does not save them, and keeps them in the type they were drawn in."""
    expected = published.SemanticAttentionTransformerEncoder(
        **ENCODER | {"type_of_initial_latents": "fixed_random", "lr_mul": 0.5}
    ).double()
    image, mask = make_inputs(37, 26)
    found = swapped_copy(expected)
    assert_same(expected, found, lambda model: [model(image, mask)[0]], {})


@pytest.mark.parametrize("changes", [{}, {"architecture": "resnet", "num_up_layers_with_mask_adain": 4}])
@pytest.mark.parametrize("part", ["block", "modulation", "image layer", "last image layer"])
def test_parts_of_a_generator(part, changes):
    """Called by themselves they take the mask that the published ones take, with a plane for each latent."""
    expected = published.SCAMGenerator(**GENERATOR | {"num_labels_bg": 2, "architecture": "skip"} | changes).double()
    randomise(expected)
    found = swapped_copy(expected)
    _, mask = make_inputs(21, 16)
    planes = mask.repeat_interleave(torch.tensor([2, 3, 3, 3]), 1)
    latents = torch.randn(2, 11, LATENT_DIM).requires_grad_()

    def call(model: published.SCAMGenerator) -> list[Tensor]:
        block = model.backbone["SCAM_block_2"]
        if part == "block":
            out, updated, rgb = block(x, planes, latents, None, image)
            return [out, updated] + ([] if rgb is None else [rgb])
        if part == "modulation":
            return list(block.mod_1(x[:, :8], planes, style_codes=latents))
        if part == "last image layer":
            return [model.backbone["SCAM_block_3"].torgb(x[:, :4], planes, latents, image)]
        if "torgb" not in block._modules:
            return list(block.mod_0(x, planes, latents))
        return [block.torgb(x[:, :8], planes, latents, image)]

    x, image = torch.randn(2, 16, 6, 5).requires_grad_(), torch.randn(2, 3, 6, 5).requires_grad_()
    assert_same(expected, found, call, {"x": x, "latents": latents})


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("name", ["attention", "transformer"])
def test_attentions(name, itself):
    """Latents attend to tokens, tokens to latents, and latents to each other, under dense masks."""
    width = LATENT_DIM if itself else 5
    made = {
        "attention": lambda: published.MaskedAttention(LATENT_DIM, width, 8, 2),
        "transformer": lambda: published.MaskedTransformer(LATENT_DIM, LAYOUT.count, width, 8, 2),
    }
    expected = made[name]().double()
    randomise(expected)
    found = swapped_copy(expected, latents_per_label=LAYOUT)
    labels = make_labels(5, 8).labels.flatten(1)
    of_latents = LAYOUT.labels(labels.device)
    latents, tokens = torch.randn(2, LAYOUT.count, LATENT_DIM).requires_grad_(), torch.randn(2, 40, 5).requires_grad_()
    if itself:
        mask = (of_latents[:, None] == of_latents).double().unsqueeze(0)
        assert_same(expected, found, lambda model: [model(latents, latents, mask)], {"latents": latents})
        return
    mask = (of_latents[:, None] == labels.unsqueeze(1)).double()
    assert_same(expected, found, lambda model: [model(latents, tokens, mask)], {"latents": latents, "tokens": tokens})
    dense, weights = expected(latents, tokens, mask, return_attention=True)
    assert all(
        torch.equal(one, other) for one, other in zip(found(latents, tokens, mask, True), (dense, weights), strict=True)
    )
    assert torch.equal(found(latents, tokens), expected(latents, tokens))
    if name == "attention":
        pixels = torch.randn(2, 40, LATENT_DIM).requires_grad_()
        back = published.MaskedAttention(LATENT_DIM, LATENT_DIM, 8, 1).double()
        swapped = swapped_copy(back, latents_per_label=LAYOUT.latents_per_label)
        assert_same(
            back, swapped, lambda model: [model(pixels, latents, mask.mT)], {"latents": latents, "pixels": pixels}
        )


def test_labels_without_latents_in_a_mask_of_latents():
    layout = sca_kernels.LatentLayout((2, 0, 3, 1))
    expected = published.SCAMModulation(layout.count, 8, LATENT_DIM, 8, 3, 1).double()
    randomise(expected)
    found = swapped_copy(expected, latents_per_label=layout)
    labels = make_labels(6, 7)
    planes = published.mask_of_latents(labels.labels, layout.labels(labels.device)).double()
    x, latents = torch.randn(2, 8, 6, 7).requires_grad_(), torch.randn(2, 6, LATENT_DIM).requires_grad_()
    assert_same(expected, found, lambda model: list(model(x, planes, latents)), {"x": x, "latents": latents})


def test_a_tall_image():
    """The size of iDesigner, which is no power of two times anything."""
    expected = make_autoencoder(height=256, width=170, num_up_layers=6)
    found = swapped_copy(expected)
    image, mask = make_inputs(256, 170)
    assert_same(expected, found, lambda model: [model(image, mask)], {})


@pytest.mark.parametrize("changes", [{}, {"attention_type": "simplex", "num_up_layers_with_mask_adain": 2}])
def test_float32(changes):
    """A unit of the many leaky ReLUs whose input rounds to the other side of zero has another gradient, in the original
    as in the swapped model. So both are compared with float64."""
    torch.set_default_dtype(torch.float32)
    exact = make_autoencoder(add_noise=False, **changes)
    original = copy.deepcopy(exact).float()

    def run(model: torch.nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        (result,), gradients = results_of(model, lambda model: [model(*make_inputs(dtype=dtype))], {})
        return result, torch.cat([gradient.flatten() for gradient in gradients.values() if gradient is not None])

    wanted = run(exact, torch.float64)
    of_original = run(original, torch.float32)
    of_swapped = run(swapped_copy(original), torch.float32)
    for exactly, other, found in zip(wanted, of_original, of_swapped, strict=True):
        assert found.dtype == other.dtype == torch.float32
        error = (other - exactly).norm() / exactly.norm()
        assert (found - exactly).norm() <= max(1e-4, 2 * error) * exactly.norm()
    assert (of_swapped[0] - of_original[0]).norm() <= 1e-4 * of_original[0].norm()


def test_ten_steps_stay_together():
    models = (expected := make_autoencoder().train()), swapped_copy(expected)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    image, mask = make_inputs()
    losses: list[list[float]] = [[], []]
    for step in range(10):
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = (model(image, mask) - image.tanh()).square().mean()
            loss.backward()
            optimizer.step()
            losses[index].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for one, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert (one - other).norm() <= 1e-7 * other.norm()


def test_inference_remembers_products_of_weights():
    """What is remembered follows the parameters, whoever changes them."""
    expected = make_autoencoder().eval()
    found = swapped_copy(expected)
    image, mask = make_inputs()
    caches = [module.forward.cache for module in found.modules() if "forward" in vars(module)]

    def compare() -> None:
        results = []
        for model in (expected, found):
            torch.manual_seed(0)
            results.append(model(image, mask))
        assert (results[1] - results[0]).norm() <= 1e-9 * results[0].norm()

    with torch.no_grad(), torch.inference_mode():
        compare()
    with torch.no_grad(), without_own_code():
        found(image, mask)
    assert any(len(cache) for cache in caches)
    with torch.no_grad():
        for model in (expected, found):
            torch.manual_seed(1)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        compare()
        state = {name: tensor * 1.01 for name, tensor in expected.state_dict().items()}
        for model in (expected, found):
            model.load_state_dict(state, assign=True)
        compare()
