"""Encoder, generator and both together: shapes and gradients of all options, transfer, copies, types, errors."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokens import error_ratio, random_map
from torch import Tensor, nn

import scam_models
from sca_kernels import LabelMap, LatentLayout
from sca_kernels.nn import sinusoidal_encoding
from scam_models import (
    Encoder,
    EncoderConfiguration,
    Generator,
    GeneratorConfiguration,
    LatentDistribution,
    Scam,
    ScamConfiguration,
    take_latents,
    tiny,
)
from scam_models.generator import GeneratorBlock

pytestmark = pytest.mark.usefixtures("native")

LAYOUT = LatentLayout((5, 2, 1, 3))
HEIGHT, WIDTH = 45, 34
ENCODER = EncoderConfiguration(
    layout=LAYOUT, latent_dim=8, attention_dim=8, num_blocks=3, encoding_channels=8, first_channels=8
)
GENERATOR = GeneratorConfiguration(
    layout=LAYOUT, height=HEIGHT, width=WIDTH, latent_dim=8, attention_dim=8, num_blocks=4, last_channels=4
)
UNIFORM = LatentLayout.uniform(LAYOUT.num_labels, 2)


def make_model(encoder: EncoderConfiguration = ENCODER, generator: GeneratorConfiguration = GENERATOR) -> Scam:
    """A model in which the noise counts."""
    torch.manual_seed(0)
    model = Scam(Encoder(encoder), Generator(generator))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("noise_strength", "latent_encoding", "_blend")):
                parameter.normal_(std=0.3)
    return model


def make_inputs(
    height: int = HEIGHT, width: int = WIDTH, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, LabelMap]:
    """Two images and their labels, of which one occurs in the second image only."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 3, height, width, generator=generator, dtype=torch.float64) * 2 - 1
    labels = random_map(2, 6, 5, LAYOUT.num_labels, seed=seed).at(height, width).labels.clone()
    labels[0] = torch.where(labels[0] == 3, 1, labels[0])
    return image.to(dtype), LabelMap(labels, LAYOUT.num_labels)


def seeded(model: nn.Module, *inputs: Any) -> Any:
    torch.manual_seed(3)
    return model(*inputs)


def gradients_of(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 2, image.numel(), dtype=image.dtype).view_as(image).cos()
    (image * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


ENCODERS = {
    "default": ENCODER,
    "no pyramid": replace(ENCODER, pyramid=False),
    "reversed": replace(ENCODER, reversed_levels=True),
    "no self-attention": replace(ENCODER, self_attention=False),
    "heads": replace(ENCODER, num_cross_heads=2, num_self_heads=4),
    "fixed": replace(ENCODER, initial_latents="fixed"),
    "random": replace(ENCODER, initial_latents="random"),
    "variational": replace(ENCODER, variational=True),
    "equalised": replace(ENCODER, equalised=True, lr_mul=0.5),
}
GENERATORS = {
    "simplex": replace(GENERATOR, duplex=False),
    "resnet": replace(GENERATOR, architecture="resnet"),
    "none": replace(GENERATOR, architecture="none"),
    "layer": replace(GENERATOR, normalisation="layer"),
    "batch": replace(GENERATOR, normalisation="batch"),
    "silent": replace(GENERATOR, noise=False),
    "heads": replace(GENERATOR, num_heads=2),
    "map encoders": replace(GENERATOR, map_encoder_blocks=(1, 3)),
    "learned encoding": replace(GENERATOR, learned_encoding=True),
    "spectral": replace(GENERATOR, spectral=True),
    "equalised resnet": replace(GENERATOR, equalised=True, lr_mul=0.5, architecture="resnet"),
    "first size": replace(GENERATOR, first_size=(4, 3)),
    "split": replace(GENERATOR, layout=UNIFORM, split_latents=True),
}
OF_SPLIT = replace(ENCODER, layout=LatentLayout.uniform(LAYOUT.num_labels, 1), latent_dim=16, self_attention=False)
CONFIGURATIONS = {
    **{f"encoder, {name}": (encoder, GENERATOR) for name, encoder in ENCODERS.items()},
    **{
        f"generator, {name}": (OF_SPLIT if generator.split_latents else ENCODER, generator)
        for name, generator in GENERATORS.items()
    },
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_shapes_and_gradients(name):
    model = make_model(*CONFIGURATIONS[name])
    image, labels = make_inputs()
    latents = model.encode(image, labels)
    for part in latents if isinstance(latents, LatentDistribution) else [latents]:
        assert part.shape == (2, *model.generator.configuration.latents_shape)
    found = seeded(model, image, labels)
    assert found.shape == image.shape and found.abs().max() <= 1 and found.std() > 0
    gradients = gradients_of(model, found)
    for parameter_name, _ in model.named_parameters():
        gradient = gradients[parameter_name]
        assert gradient.isfinite().all(), parameter_name
        # A softmax does not see the bias of a key.
        assert gradient.any() or parameter_name.endswith("key.bias"), parameter_name
    model.eval()
    with torch.inference_mode():
        assert seeded(model, image, labels).shape == image.shape


@pytest.mark.parametrize("name", ["encoder, default", "generator, map encoders", "generator, spectral"])
def test_repeats_are_the_same_bits(name):
    model = make_model(*CONFIGURATIONS[name])
    image, labels = make_inputs()
    state = copy.deepcopy(model.state_dict())
    results = []
    for _ in range(2):
        model.load_state_dict(state)
        # A label map that is new, as is everything remembered with it.
        found = seeded(model, image, LabelMap(labels.labels.clone(), labels.num_labels))
        results.append({"image": found, **gradients_of(model, found)})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("name", ["encoder, default", "generator, map encoders", "generator, resnet"])
def test_channels_last_memory(name):
    model = make_model(*CONFIGURATIONS[name]).double()
    image, labels = make_inputs(dtype=torch.float64)
    expected = seeded(model, image, labels)
    expected_gradients = gradients_of(model, expected)
    model.to(memory_format=torch.channels_last)
    orders = []
    for part in model.modules():
        if isinstance(part, GeneratorBlock):
            part.register_forward_hook(
                lambda _, inputs, results: orders.append(results[0].is_contiguous(memory_format=torch.channels_last))
            )
    found = seeded(model, image.contiguous(memory_format=torch.channels_last), labels)
    assert orders == [True] * 4
    assert error_ratio(found, expected) < 1e-12
    for parameter_name, gradient in gradients_of(model, found).items():
        wanted = expected_gradients[parameter_name]
        assert (gradient - wanted).abs().max() <= 1e-9 * wanted.abs().max() + 1e-12, parameter_name


@pytest.mark.parametrize("name", ["encoder, default", "encoder, variational", "generator, map encoders"])
def test_autocast(name):
    """The images in 16 bits, near to those in 32; parameters and their gradients stay in 32."""
    model = make_model(*CONFIGURATIONS[name])
    image, labels = make_inputs()
    expected = seeded(model, image, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = seeded(model, image, labels)
    assert found.dtype == torch.bfloat16
    assert error_ratio(found.float(), expected) < 0.1
    gradients = gradients_of(model, found.float())
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["encoder, fixed", "generator, batch", "generator, spectral"])
def test_copies(name):
    model = make_model(*CONFIGURATIONS[name])
    image, labels = make_inputs()
    model(image, labels)
    model.eval()
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    torch.manual_seed(1)
    loaded = Scam.from_configuration(model.configuration).eval()
    loaded.load_state_dict(torch.load(saved))
    with torch.no_grad():
        expected = seeded(model, image, labels)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(seeded(other, image, labels), expected)
            other.generator.blocks[0].modulation_1.attention.value.weight.mul_(2)
            assert not torch.equal(seeded(other, image, labels), expected)
        assert torch.equal(seeded(model, image, labels), expected)


def test_one_label_map_for_all_images():
    model = make_model(generator=replace(GENERATOR, map_encoder_blocks=(0,)))
    image, labels = make_inputs()
    one = LabelMap(labels.labels[:1], labels.num_labels)
    both = LabelMap(one.labels.expand(2, -1, -1).contiguous(), labels.num_labels)
    torch.testing.assert_close(seeded(model, image, one), seeded(model, image, both))


def test_label_maps_are_resized_once():
    model = make_model()
    image, labels = make_inputs()
    model(image, labels)
    sizes = set(GENERATOR.sizes) | {(45, 34), (23, 17), (12, 9)}
    assert labels._memo.keys() == sizes


def test_images_do_not_mix():
    """Without noise each image of a batch is what it is alone."""
    model = make_model(generator=replace(GENERATOR, noise=False)).double().eval()
    image, labels = make_inputs(dtype=torch.float64)
    together = model(image, labels)
    for index in range(2):
        alone = model(image[index : index + 1], LabelMap(labels.labels[index : index + 1], labels.num_labels))
        assert error_ratio(together[index : index + 1], alone) < 1e-12


def test_distributions():
    torch.manual_seed(0)
    mean, log_variance = torch.tensor([-1.0, 2.0]).expand(1, 50_000, 2), torch.tensor([0.0, -2.0]).expand(1, 50_000, 2)
    sample = LatentDistribution(mean, log_variance).sample()
    torch.testing.assert_close(sample.mean((0, 1)), mean[0, 0], rtol=0, atol=0.03)
    torch.testing.assert_close(sample.var((0, 1)), log_variance[0, 0].exp(), rtol=0.03, atol=0)

    generator = Generator(replace(GENERATOR, noise=False))
    _, labels = make_inputs()
    distribution = LatentDistribution(torch.randn(2, LAYOUT.count, 8), torch.zeros(2, LAYOUT.count, 8))
    assert not torch.equal(generator(labels, distribution), generator(labels, distribution))
    generator.eval()
    assert torch.equal(generator(labels, distribution), generator(labels, distribution.mean))


def test_latents_are_taken_label_by_label():
    base, one, other = (torch.randn(2, LAYOUT.count, 8, requires_grad=True) for _ in range(3))
    mixed = take_latents(LAYOUT, base, {0: one, 2: other})
    assert isinstance(mixed, Tensor)
    expected = torch.cat([one[:, :5], base[:, 5:7], other[:, 7:8], base[:, 8:]], 1)
    assert torch.equal(mixed, expected)
    gradients = torch.autograd.grad(mixed.square().sum(), [base, one, other])
    assert torch.equal(sum(gradients), 2 * expected)
    distributions = [LatentDistribution(tensor, tensor + 1) for tensor in (base, one, other)]
    taken = take_latents(LAYOUT, distributions[0], {0: distributions[1], 2: distributions[2]})
    assert torch.equal(taken[0], expected) and torch.equal(taken[1], expected + 1)
    assert torch.equal(take_latents(LAYOUT, base, {}), base)
    for message, arguments in {
        "others: expected labels from 0 to 3, got 4": (base, {4: one}),
        r"others\[1\]: expected shape \(2, 11, 8\) like base, got \(1, 11, 8\)": (base, {1: one[:1]}),
        r"base: expected shape \(B, 11, D\) to fit the layout, got \(2, 10, 8\)": (base[:, 1:], {}),
    }.items():
        with pytest.raises(ValueError, match=message):
            take_latents(LAYOUT, *arguments)
    with pytest.raises(TypeError, match=r"others\[1\]: expected a Tensor like base, got LatentDistribution"):
        take_latents(LAYOUT, base, {1: distributions[0]})


@pytest.mark.parametrize("background", [0, (0, 3)])
@pytest.mark.parametrize("variational", [False, True])
def test_transfer(variational, background):
    model = make_model(replace(ENCODER, variational=variational)).eval()
    (subject, subject_labels), (other, other_labels) = make_inputs(), make_inputs(seed=1)
    with torch.no_grad():
        found = seeded(
            lambda: model.transfer_subject(subject, subject_labels, other, other_labels, background=background)
        )
        latents = [model.encode(*inputs) for inputs in ((subject, subject_labels), (other, other_labels))]
        latents = [part.mean if isinstance(part, LatentDistribution) else part for part in latents]
        own, taken = latents
        expected_latents = own.clone()
        expected_latents[:, :5] = taken[:, :5]
        if background != 0:
            expected_latents[:, 8:] = taken[:, 8:]
        expected = seeded(model.generate, subject_labels, expected_latents)
        assert torch.equal(found, expected)
        assert not torch.equal(found, seeded(model, subject, subject_labels))
        same = seeded(lambda: model.transfer_subject(subject, subject_labels, subject, subject_labels))
        torch.testing.assert_close(same, seeded(model, subject, subject_labels))
        larger, larger_labels = make_inputs(60, 50, seed=1)
        assert model.transfer_subject(subject, subject_labels, larger, larger_labels).shape == subject.shape


@pytest.mark.parametrize("generator", [replace(GENERATOR, num_heads=2), GENERATORS["split"]], ids=["heads", "split"])
def test_strongest_latents(generator):
    """Found here from the dense attention of the last modulation."""
    model = make_model(OF_SPLIT if generator.split_latents else ENCODER, replace(generator, noise=False))
    image, labels = make_inputs()
    modulation = model.generator.blocks[-1].modulation_2
    seen: list[Any] = []
    handle = modulation.register_forward_hook(lambda _, inputs, results: seen.append((inputs[0], results[1])))
    latents = model.encode(image, labels)
    found = model.strongest_latents(labels, latents)
    handle.remove()
    assert not modulation._forward_hooks
    layout = generator.layout
    weights = dense_attention(modulation, *seen[0], labels, layout)
    of_pixels = torch.where(labels.labels >= 0, weights.mean(1).argmax(1).view_as(labels.labels), -1)
    assert torch.equal(found.latent, of_pixels)
    strongest = torch.where(labels.labels >= 0, weights.mean(1).amax(1).view_as(found.weight), 0)
    torch.testing.assert_close(found.weight, strongest)
    owners = layout.labels(image.device)[found.latent.clamp(min=0)]
    assert torch.equal(torch.where(found.latent >= 0, owners, -1), labels.labels)


def dense_attention(modulation: Any, x: Tensor, latents: Tensor, labels: LabelMap, layout: LatentLayout) -> Tensor:
    """(B, heads, m, n): how much each pixel attends to all latents, zero for those of other labels."""
    attention = modulation.attention
    heads = attention.num_heads
    encoded = sinusoidal_encoding(x.shape[2], x.shape[3], x.shape[1]).encode(x)
    query = attention.query(encoded.flatten(2).mT).unflatten(2, (heads, -1)).transpose(1, 2)
    key = attention.key(latents).unflatten(2, (heads, -1)).transpose(1, 2)
    logits = key @ query.mT / key.shape[-1] ** 0.5
    owned = layout.labels(x.device)[:, None] == labels.labels.flatten(1).unsqueeze(1)
    return torch.where(owned.unsqueeze(1), logits, -1e4).softmax(2)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("name", ["heads", "reversed", "no pyramid", "variational"])
def test_encoder_attention(name, level):
    """Found here from the dense attention of the block of the level, by the definition."""
    configuration = ENCODERS[name]
    model = make_model(configuration).double()
    image, labels = make_inputs(dtype=torch.float64)
    block = model.encoder.blocks[2 - level if configuration.reversed_levels else level].cross_attention
    seen: list[Any] = []
    handle = block.register_forward_hook(lambda _, inputs, results: seen.append(inputs))
    found = model.encoder_attention(image, labels, level=level)
    handle.remove()
    assert len(seen) == 1 and not block._forward_pre_hooks
    latents, x, _ = seen[0]
    assert torch.equal(x, image) == (level == 0 or not configuration.pyramid)
    height, width = (45, 34) if not configuration.pyramid else ((45, 34), (23, 17), (12, 9))[level]
    resized = labels.at(height, width).labels
    assert found.weights.shape == (2, LAYOUT.max_per_label, height, width) and found.first.shape == (2, height, width)

    heads = block.attention.num_heads
    concatenated = level == 0 or not configuration.pyramid
    channels = configuration.encoding_channels if concatenated else x.shape[1]
    encoding = sinusoidal_encoding(height, width, channels, concatenated=concatenated, dtype=torch.float64)
    query = block.attention.query(latents).unflatten(2, (heads, -1)).transpose(1, 2)
    key = block.attention.key(encoding.encode(x).flatten(2).mT).unflatten(2, (heads, -1)).transpose(1, 2)
    logits = query @ key.mT / key.shape[-1] ** 0.5
    owned = (LAYOUT.labels(image.device)[:, None] == resized.flatten(1).unsqueeze(1)).unsqueeze(1)
    given = torch.where(owned, logits, -1e4).softmax(3) * owned
    expected = (given / given.sum(2, keepdim=True).clamp(min=1e-200)).mean(1).unflatten(2, (height, width))
    for latent in range(LAYOUT.count):
        torch.testing.assert_close(found.of_latent(latent), expected[:, latent])
    assert torch.equal(found.strongest().latent < 0, resized < 0)
    assert (resized < 0).any() and (resized[0] != 3).all()  # pixels without a label, and a label without pixels


@pytest.mark.parametrize("level", [-1, 3])
def test_encoder_attention_of_a_level_that_is_not_there(level):
    with pytest.raises(ValueError, match=f"level: expected one from 0 to 2, got {level}"):
        make_model().encoder_attention(*make_inputs(), level=level)


ENCODER_ERRORS: dict[str, Any] = {
    r"image: expected shape \(B, 3, height, width\), got \(2, 1, 45, 34\)": lambda image, labels: (
        image[:, :1],
        labels,
    ),
    r"image: expected shape \(B, 3, height, width\), got \(3, 45, 34\)": lambda image, labels: (image[0], labels),
    "labels: expected a label map of 44 x 34 pixels, got 45 x 34": lambda image, labels: (image[:, :, 1:], labels),
    "labels: expected 4 labels like the layout of the configuration, got 5": lambda image, labels: (
        image,
        LabelMap(labels.labels, 5),
    ),
    "labels: expected label maps for 1 images or for one, got 2": lambda image, labels: (image[:1], labels),
}
GENERATOR_ERRORS: dict[str, Any] = {
    r"got 20 x 34 \(use at\(45, 34\) to resize it\)": lambda labels, latents: (labels.at(20, 34), latents),
    "labels: expected 4 labels like the layout of the configuration, got 5": lambda labels, latents: (
        LabelMap(labels.labels, 5),
        latents,
    ),
    r"latents: expected shape \(2, 11, 8\), got \(2, 10, 8\)": lambda labels, latents: (labels, latents[:, 1:]),
    r"latents: expected shape \(2, 11, 8\), got \(2, 11, 7\)": lambda labels, latents: (labels, latents[:, :, 1:]),
    r"latents: expected shape \(2, 11, 8\), got \(1, 11, 8\)": lambda labels, latents: (labels, latents[:1]),
}


def test_errors():
    model = make_model()
    image, labels = make_inputs()
    latents = torch.randn(2, LAYOUT.count, 8)
    for module, inputs, errors in (
        (model.encoder, (image, labels), ENCODER_ERRORS),
        (model.generator, (labels, latents), GENERATOR_ERRORS),
    ):
        for message, change in errors.items():
            with pytest.raises(ValueError, match=message):
                module(*change(*inputs))
    with pytest.raises(TypeError, match="labels: expected a LabelMap, got Tensor"):
        model(image, labels.labels)
    with pytest.raises(TypeError, match="latents: expected a tensor or a LatentDistribution, got list"):
        model.generate(labels, [latents])


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (ENCODER, {"num_cross_heads": 3}, "num_cross_heads: expected a divisor of attention_dim=8, got 3"),
        (ENCODER, {"encoding_channels": 6}, "encoding_channels: expected a positive number divisible by four, got 6"),
        (ENCODER, {"first_channels": 2}, "first_channels: expected a positive number divisible by four, got 2"),
        (ENCODER, {"num_blocks": 0}, "num_blocks: expected a positive number, got 0"),
        (ENCODER, {"initial_latents": "zero"}, "initial_latents: expected one of 'learned', 'fixed', 'random', got"),
        (GENERATOR, {"num_blocks": 3}, "num_blocks: expected at least 4, got 3"),
        (GENERATOR, {"num_blocks": 5}, "height, width: expected at least 64 pixels for 5 blocks, got 45 x 34"),
        (GENERATOR, {"kernel_size": 2}, "kernel_size: expected an odd number, got 2"),
        (GENERATOR, {"num_heads": 0}, "num_heads: expected a divisor of attention_dim=8, got 0"),
        (GENERATOR, {"last_channels": 5}, "last_channels: expected a positive number divisible by four, got 5"),
        (GENERATOR, {"architecture": "dense"}, "architecture: expected one of 'skip', 'resnet', 'none', got 'dense'"),
        (GENERATOR, {"normalisation": "group"}, "normalisation: expected one of"),
        (GENERATOR, {"first_size": (0, 2)}, r"first_size: expected a height and a width, got \(0, 2\)"),
        (GENERATOR, {"map_encoder_blocks": (0, 4)}, r"map_encoder_blocks: expected blocks from 0 to 3, got \[4\]"),
        (GENERATOR, {"split_latents": True}, "split_latents: expected a layout with as many latents for every label"),
    ],
)
def test_errors_of_configurations(make, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(make, **changes)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"layout": LatentLayout((5, 2, 1))}, "generator.layout: expected 3 labels like the encoder's, got 4"),
        (
            {"layout": UNIFORM},
            r"encoder.layout: expected the latents of each label that the generator takes, \(5, 2, 1",
        ),
        ({"latent_dim": 16}, "encoder.latent_dim: expected 8, what the generator takes, got 16"),
    ],
)
def test_parts_that_do_not_fit(encoder, message):
    with pytest.raises(ValueError, match=message):
        ScamConfiguration(replace(ENCODER, **encoder), GENERATOR)
    with pytest.raises(ValueError, match=message):
        Scam(Encoder(replace(ENCODER, **encoder)), Generator(GENERATOR))


def test_sizes():
    for height, width, first in ((256, 256, (4, 4)), (256, 170, (3, 2)), (170, 256, (2, 3)), (512, 340, (8, 5))):
        configuration = GeneratorConfiguration(layout=LAYOUT, height=height, width=width)
        assert configuration.sizes[0] == first and configuration.sizes[-1] == (height, width)
        assert configuration.sizes[5] == (first[0] * 32, first[1] * 32)
    assert replace(GENERATOR, first_size=(4, 3)).sizes == ((4, 3), (8, 6), (16, 12), (32, 24), (45, 34))


def test_public_names():
    for name in scam_models.__all__:
        assert getattr(scam_models, name) is not None
    assert hash(tiny()) == hash(tiny()) and tiny() == pickle.loads(pickle.dumps(tiny()))


def test_training_learns():
    """A few steps bring a reconstruction nearer to its image."""
    torch.manual_seed(0)
    model = Scam.from_configuration(tiny(LAYOUT, 32, 32))
    image, labels = make_inputs(32, 32)
    image = (labels.labels.unsqueeze(1) / 4 + torch.linspace(-0.5, 0.5, 32)).expand(image.shape)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = (model(image, labels) - image).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
