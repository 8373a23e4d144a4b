"""The discriminator against the published formulas, written out; gradient normalisation; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokens import random_map
from torch import Tensor

from sca_kernels import LabelMap
from scam_models import Discriminator, DiscriminatorConfiguration

NUM_LABELS = 3


def make(**options: Any) -> Discriminator:
    torch.manual_seed(0)
    settings = {"num_labels": NUM_LABELS, "first_channels": 4, "gradient_normalised": False} | options
    return Discriminator(DiscriminatorConfiguration(**settings)).double()


def inputs(batch: int = 2, size: int = 32) -> tuple[Tensor, LabelMap]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 3, size, size, generator=generator, dtype=torch.float64) * 2 - 1
    return images, random_map(batch, size, size, NUM_LABELS, seed=2)


def planes_of(labels: LabelMap) -> Tensor:
    return F.one_hot(labels.labels.long() + 1, NUM_LABELS + 1)[..., 1:].permute(0, 3, 1, 2).double()


def patch_gan(weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Wang et al.: C64-C128-C256-C512 of 4 x 4 convolutions, two pixels of padding, the last two of stride 1."""
    results = []
    for layer, stride in enumerate((2, 2, 2, 1, 1)):
        x = F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], stride=stride, padding=2)
        if 0 < layer < 4:
            x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        if layer < 4:
            x = torch.where(x > 0, x, 0.2 * x)
        results.append(x)
    return results


def weights_of(discriminator: Discriminator, scale: int) -> dict[str, Tensor]:
    return dict(discriminator.scales[scale].convolutions.state_dict())


def halved(images: Tensor) -> Tensor:
    """The mean of the three by three pixels around every other pixel, as many of them as there are."""
    ones = torch.ones_like(images[:, :1])
    summed = F.conv2d(images.flatten(0, 1).unsqueeze(1), images.new_ones(1, 1, 3, 3), stride=2, padding=1)
    counted = F.conv2d(ones, images.new_ones(1, 1, 3, 3), stride=2, padding=1)
    return summed.view(*images.shape[:2], *summed.shape[2:]) / counted


@pytest.mark.parametrize("size", [32, 45])
def test_scores_and_features_are_the_published_ones(size: int) -> None:
    discriminator = make()
    images, labels = inputs(size=size)
    smaller = halved(images)
    planes = planes_of(labels)
    small_planes = planes_of(labels.at(*smaller.shape[2:]))
    expected = [
        patch_gan(weights_of(discriminator, 0), torch.cat([images, planes], 1)),
        patch_gan(weights_of(discriminator, 1), torch.cat([smaller, small_planes], 1)),
    ]
    for judgement, results in zip(discriminator(images, labels), expected, strict=True):
        torch.testing.assert_close([*judgement.features, judgement.scores], results)


def test_published_widths() -> None:
    configuration = DiscriminatorConfiguration(num_labels=19)
    assert configuration.channels == (22, 64, 128, 256, 512, 1)
    assert DiscriminatorConfiguration(num_labels=1, num_layers=6).channels == (4, 64, 128, 256, 512, 512, 512, 1)
    parameters = sum(parameter.numel() for parameter in Discriminator(configuration).parameters())
    of_one = sum(16 * before * behind + behind for before, behind in ((22, 64), (64, 128), (128, 256), (256, 512)))
    assert parameters == 2 * (of_one + 16 * 512 + 1)


def test_scores_are_divided_by_the_norm_of_their_gradient() -> None:
    images, labels = inputs()
    planes = planes_of(labels)
    plain = make()
    x = torch.cat([images, planes], 1).requires_grad_()
    fine = patch_gan(weights_of(plain, 0), x)[-1]
    coarse_x = torch.cat([halved(x[:, :3]), x[:, 3:, ::2, ::2]], 1)
    coarse = patch_gan(weights_of(plain, 1), coarse_x)[-1]
    normalised = make(gradient_normalised=True)(images, labels)
    for scores, judgement in zip((fine, coarse), normalised, strict=True):
        for image in range(2):
            (gradient,) = torch.autograd.grad(scores[image].sum(), x, retain_graph=True)
            divisor = gradient[image].square().sum().sqrt() + scores[image].abs()
            torch.testing.assert_close(judgement.scores[image], scores[image] / divisor)


def test_normalised_scores_do_not_change_when_all_scores_are_multiplied() -> None:
    images, labels = inputs()
    discriminator = make(gradient_normalised=True)
    before = [judgement.scores for judgement in discriminator(images, labels)]
    with torch.no_grad():
        for scale in discriminator.scales:
            scale.convolutions[-1].weight *= 5
            scale.convolutions[-1].bias *= 5
    after = [judgement.scores for judgement in discriminator(images, labels)]
    torch.testing.assert_close(before, after)
    assert max(float(scores.detach().abs().max()) for scores in after) < 1


def test_gradients_of_normalised_scores() -> None:
    """Numerical derivatives of weights and images: the second derivatives inside are complete."""
    discriminator = make(gradient_normalised=True, num_layers=2, first_channels=2, num_scales=2)
    images, labels = inputs(batch=1, size=6)
    weight = discriminator.scales[0].convolutions[1].weight.detach().clone().requires_grad_()

    def total(images: Tensor, weight: Tensor) -> Tensor:
        changed = {"scales.0.convolutions.1.weight": weight}
        judgements = torch.func.functional_call(discriminator, changed, (images, labels))
        return sum(judgement.scores.cos().sum() for judgement in judgements)

    assert torch.autograd.gradcheck(total, (images.requires_grad_(), weight), fast_mode=True)


def test_images_are_judged_one_by_one_and_not_normalised_in_evaluation_mode() -> None:
    images, labels = inputs()
    normalising = make(gradient_normalised=True)
    first = LabelMap.from_labels(labels.labels[:1], NUM_LABELS)
    for together, alone in zip(normalising(images, labels), normalising(images[:1], first), strict=True):
        torch.testing.assert_close(together.scores[:1], alone.scores)
    with torch.no_grad():
        in_training = normalising(images, labels)
        normalising.eval()
        plain = make()(images, labels)
        for judgement, other, trained in zip(normalising(images, labels), plain, in_training, strict=True):
            torch.testing.assert_close(judgement.scores, other.scores)
            assert not torch.allclose(judgement.scores, trained.scores)


def test_one_label_map_serves_all_images() -> None:
    images, _ = inputs()
    one = random_map(1, 32, 32, NUM_LABELS)
    both = LabelMap.from_labels(one.labels.expand(2, -1, -1), NUM_LABELS)
    torch.testing.assert_close(make()(images, one), make()(images, both))


def test_spectral_norms_are_one() -> None:
    discriminator = make(spectral=True)
    images, labels = inputs()
    for _ in range(300):
        discriminator(images, labels)
    for scale in discriminator.scales:
        norms = [torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() for conv in scale.convolutions]
        assert norms[1:4] == pytest.approx([1, 1, 1], rel=1e-3)
        assert norms[0] != pytest.approx(1, rel=1e-3)


ERRORS = {
    "channels": (lambda: make()(torch.zeros(2, 4, 32, 32), inputs()[1]), "images: expected shape"),
    "size": (lambda: make()(torch.zeros(2, 3, 32, 31), inputs()[1]), "label map of 32 x 31"),
    "labels": (lambda: make(num_labels=4)(*inputs()), "expected 4 labels"),
    "batch": (lambda: make()(inputs()[0], inputs(batch=3)[1]), "for 2 images or for one, got 3"),
    "number": (lambda: DiscriminatorConfiguration(num_labels=0), "num_labels: expected a positive number, got 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
