"""The losses against their formulas, with VGG19 laid out as torchvision does; files with weights; errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scam_models.discriminator import Judgement
from scam_models.errors import InputError
from scam_models.losses import (
    LossWeights,
    PerceptualLoss,
    discriminator_hinge_loss,
    feature_matching_loss,
    generator_hinge_loss,
    r1_penalty,
)
from scam_models.vgg import Vgg19


def judgements(seed: int, *, scales: int = 2) -> list[Judgement]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    # Different sizes per scale: a mean over all scores together would be another number.
    return [
        Judgement(3 * random(2, 1, 4 - scale, 5), (random(2, 3, 4, 4), random(2, 6, 2, 2))) for scale in range(scales)
    ]


def test_hinge_losses() -> None:
    real, fake = judgements(0), judgements(1)
    for_discriminator, for_generator = 0.0, 0.0
    for of_real, of_fake in zip(real, fake, strict=True):
        on_real, on_fake = of_real.scores.flatten().tolist(), of_fake.scores.flatten().tolist()
        for_discriminator += sum(max(0, 1 - score) for score in on_real) / len(on_real) / 2
        for_discriminator += sum(max(0, 1 + score) for score in on_fake) / len(on_fake) / 2
        for_generator -= sum(on_fake) / len(on_fake) / 2
    assert discriminator_hinge_loss(real, fake).item() == pytest.approx(for_discriminator)
    assert generator_hinge_loss(fake).item() == pytest.approx(for_generator)


def test_feature_matching() -> None:
    real, fake = judgements(0), judgements(1)
    expected = 0.0
    for of_real, of_fake in zip(real, fake, strict=True):
        for features, fake_features in zip(of_real.features, of_fake.features, strict=True):
            expected += (features - fake_features).abs().sum().item() / features.numel() / 2
    loss = feature_matching_loss(real, fake)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert all(features.grad is None for judgement in real for features in judgement.features)
    assert all(features.grad is not None for judgement in fake for features in judgement.features)


def test_r1_penalty_of_quadratic_scores() -> None:
    """Scores w x^2 have the gradient 2 w x: half its square is 2 w^2 x^2, and that has the derivative 4 w x^2."""
    images = torch.rand(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    factors = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty([Judgement(factor * images.square(), ()) for factor in factors], images)
    squares = images.detach().square().sum() / 3
    assert penalty.item() == pytest.approx(float((2 * factors.square() * squares).mean()))
    penalty.backward()
    assert factors.grad is not None
    torch.testing.assert_close(factors.grad, (4 * factors * squares / 2).detach())


@pytest.fixture(scope="module")
def torchvision_layout() -> nn.Sequential:
    """``torchvision.models.vgg19().features``, by its configuration E."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4, 0):
        if width:
            layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.ReLU()]
            channels = width
        else:
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    torch.manual_seed(0)
    features = nn.Sequential(*layers)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.1)
    return features


@pytest.fixture(scope="module")
def weights_file(torchvision_layout: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    state_dict = {f"features.{name}": tensor for name, tensor in torchvision_layout.state_dict().items()}
    torch.save(state_dict | {"classifier.0.weight": torch.zeros(1)}, path)
    return path


def images_and_targets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1).unbind()
    return first, second


# Where relu1_1, relu2_1, ... relu5_1 are in torchvision's list.
PLACES = {1: 1 / 32, 6: 1 / 16, 11: 1 / 8, 20: 1 / 4, 29: 1.0}


@pytest.mark.parametrize("normalised", [False, True])
def test_perceptual_loss(torchvision_layout: nn.Sequential, weights_file: Path, normalised: bool) -> None:
    loss = PerceptualLoss.from_file(weights_file, normalised=normalised)
    images, targets = images_and_targets()
    one, other = images.clone(), targets.clone()
    if normalised:
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        one, other = (
            (((x / 2 + 0.5).permute(0, 2, 3, 1) - mean) / deviation).permute(0, 3, 1, 2) for x in (one, other)
        )
    expected = 0.0
    with torch.no_grad():
        for place, layer in enumerate(torchvision_layout[:30]):
            one, other = layer(one), layer(other)
            if place in PLACES:
                expected += PLACES[place] * float((one - other).abs().mean())
    images.requires_grad_(), targets.requires_grad_()
    value = loss(images, targets)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert images.grad is not None and targets.grad is None
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not loss.train().network.training


def broken_files(tmp_path: Path, good: Path) -> dict[str, tuple[Path, str]]:
    state_dict = torch.load(good, weights_only=True)

    def saved(name: str, content: Any) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    without = {name: tensor for name, tensor in state_dict.items() if name != "features.5.bias"}
    (tmp_path / "text").write_text("not weights")
    (tmp_path / "cut").write_bytes(good.read_bytes()[:1000])
    return {
        "a tensor is missing": (saved("a", without), "features.5.bias is missing"),
        "another shape": (
            saved("b", state_dict | {"features.5.bias": torch.zeros(3)}),
            r"features.5.bias has shape \(3,\) instead of \(128,\)",
        ),
        "not a state dict": (saved("c", [1, 2]), "got a list"),
        "code": (saved("d", {"features.0.weight": Path("x")}), "cannot read it"),
        "text": (tmp_path / "text", "cannot read it"),
        "cut short": (tmp_path / "cut", "cannot read it"),
    }


def test_files_with_other_content(weights_file: Path, tmp_path: Path) -> None:
    for path, message in broken_files(tmp_path, weights_file).values():
        with pytest.raises(InputError, match=message) as raised:
            Vgg19.from_file(path)
        assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError):
        Vgg19.from_file(tmp_path / "nowhere")


def test_default_weights_are_those_of_the_paper() -> None:
    weights = LossWeights()
    assert (weights.adversarial, weights.perceptual, weights.l1) == (1, 10, 10)
    assert (weights.feature_matching, weights.r1) == (0, 0)


NEEDS: dict[str, tuple[Callable[[], LossWeights], bool]] = {
    "all": (LossWeights, True),
    "matching only": (lambda: LossWeights(adversarial=0, feature_matching=10), True),
    "without": (lambda: LossWeights(adversarial=0), False),
}


@pytest.mark.parametrize("name", NEEDS)
def test_needs_discriminator(name: str) -> None:
    make, needs = NEEDS[name]
    assert make().needs_discriminator is needs


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_weights_are_not_negative(weight: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"l1: expected a weight of at least 0, got {weight}")):
        LossWeights(l1=weight)
