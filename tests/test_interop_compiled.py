"""Swapped models under ``torch.compile``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from swapping import make_autoencoder, make_inputs, results_of, swapped_copy
from test_scam_models_compiled import counting_plans
from torch import Tensor

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.compiled]

# Every block is traced, so that there are no more than it takes to have a first and a last one.
SHORT: dict[str, Any] = {"encoder_blocks": 2, "add_noise": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "simplex, resnet": {
        "attention_type": "simplex",
        "architecture": "resnet",
        "num_up_layers_with_mask_adain": 1,
        "norm_type": "BatchNorm",
    },
}


def call(model: Any) -> list[Tensor]:
    return [model(*make_inputs())]


@pytest.mark.parametrize("name", OPTIONS)
def test_training(name):
    """One graph, and the gradients of the original."""
    torch._dynamo.reset()
    expected = make_autoencoder(**SHORT, **OPTIONS[name]).train()
    found = swapped_copy(expected, assume_one_hot=True)
    image, mask = make_inputs()
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    (wanted,), gradients = results_of(expected, lambda model: [model(image, mask)], {})
    torch.manual_seed(3)
    result = compiled(image, mask)
    assert (result - wanted).norm() <= 1e-9 * wanted.norm()
    (result * torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result).cos()).sum().backward()
    largest = max(float(gradient.norm()) for gradient in gradients.values() if gradient is not None)
    for parameter_name, parameter in found.named_parameters():
        gradient = gradients[parameter_name]
        assert (parameter.grad is None) == (gradient is None), parameter_name
        if parameter.grad is not None and gradient is not None:
            assert (parameter.grad - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12 * largest, parameter_name


@pytest.mark.parametrize("assume_one_hot", [False, True])
def test_inference(assume_one_hot):
    """Without the user's word on the mask the own code is compiled; with it, a resolution is planned at most twice."""
    torch._dynamo.reset()
    expected = make_autoencoder(**SHORT).eval()
    found = swapped_copy(expected, assume_one_hot=assume_one_hot)
    plans: list[int] = []
    compiled = torch.compile(found, fullgraph=True, backend=counting_plans(plans))
    image, mask = make_inputs()
    with torch.no_grad():
        wanted = expected(image, mask)
        assert (compiled(image, mask) - wanted).norm() <= 1e-9 * wanted.norm()
    (count,) = plans
    levels, blocks = len(expected.encoder.convs), len(expected.generator.backbone)
    assert count == 0 if not assume_one_hot else 0 < count <= levels + 2 * blocks
