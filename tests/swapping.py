"""Published models and the same ones swapped: how they are made and compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from test_scam_models_published import ENCODER, GENERATOR, gradients_of, make_labels, one_hot, randomise
from torch import Tensor, nn

import sca_kernels
from bench import published
from sca_kernels import LatentLayout

SWAPPED_CLASSES = (
    published.MaskedAttention,
    published.MaskedTransformer,
    published.SCAMModulation,
    published.ToRGB,
    published.SCAMResUpscale,
    published.SCAMGenerator,
    published.SemanticAttentionTransformerEncoder,
)
LAYOUT = LatentLayout((3, 3, 3, 3))
LATENT_DIM = 6


class Autoencoder(nn.Module):
    """What a user has: the published networks somewhere in a model."""

    def __init__(self, height: int = 45, width: int = 34, encoder_blocks: int = 4, **changes: Any) -> None:
        super().__init__()
        size = {"height": height, "width": width}
        self.encoder = published.SemanticAttentionTransformerEncoder(**ENCODER | {"num_blocks": encoder_blocks})
        self.generator = published.SCAMGenerator(**GENERATOR | size | changes)
        self.other = nn.Conv2d(3, 3, 1)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.generator(mask, self.encoder(self.other(image), mask)[0])


@pytest.fixture
def float64_noise() -> Iterator[None]:
    """The published code draws noise in PyTorch's default type, here that of the models."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def make_autoencoder(dtype: torch.dtype = torch.float64, **changes: Any) -> Autoencoder:
    model = Autoencoder(**changes).to(dtype)
    randomise(model)
    return model


def make_inputs(height: int = 45, width: int = 34, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two images and their masks; some pixels have no label, and some labels no pixels."""
    generator = torch.Generator().manual_seed(4)
    image = torch.randn((2, 3, height, width), generator=generator, dtype=torch.float64)
    return image.to(dtype), one_hot(make_labels(height, width)).to(dtype)


def swapped_copy(model: nn.Module, **settings: Any) -> Any:
    """A copy in which everything is swapped."""
    found = copy.deepcopy(model)
    report = sca_kernels.swap_in(found, **settings)
    assert report.rows and not report.left_alone, str(report)
    return found


@contextmanager
def without_own_code() -> Iterator[None]:
    """A block in which the published code of the modules that can be swapped must not run."""

    def fail(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the published code runs")

    patches = [mock.patch.object(published_class, "forward", fail) for published_class in SWAPPED_CLASSES]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def results_of(
    model: nn.Module, call: Callable[[Any], list[Tensor]], inputs: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Results of a call, and the gradients of inputs and parameters."""
    torch.manual_seed(3)
    results = call(model)
    return results, gradients_of(results, inputs | dict(model.named_parameters()))


def assert_same(
    expected: nn.Module,
    found: nn.Module,
    call: Callable[[Any], list[Tensor]],
    inputs: dict[str, Tensor],
    tolerance: float = 1e-9,
) -> None:
    """Results, the gradient of every input and parameter, buffers, and the random numbers that were drawn."""
    wanted, wanted_gradients = results_of(expected, call, inputs)
    state = torch.get_rng_state()
    with without_own_code():
        got, gradients = results_of(found, call, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert other.std() > 1e-3
        assert (one - other).norm() <= tolerance * other.norm()
    largest = max(float(gradient.norm()) for gradient in wanted_gradients.values() if gradient is not None)
    for name, other in wanted_gradients.items():
        one = gradients[name]
        assert (one is None) == (other is None), name
        if one is None or other is None:
            continue
        if name.endswith("v_linear.bias"):  # zero but for rounding: the softmax does not see it
            assert max(one.norm(), other.norm()) <= 1e-2 * tolerance * largest, name
        else:
            assert (one - other).norm() <= tolerance * other.norm() + 1e-4 * tolerance * largest, name
    for (name, one), other in zip(found.named_buffers(), expected.buffers(), strict=True):
        assert one.dtype == other.dtype and torch.allclose(one, other, rtol=1e-9, atol=1e-12), name
