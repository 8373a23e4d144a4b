"""Encoder and generator under ``torch.compile`` and ``torch.export``, as one graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_scam_models import ENCODER, GENERATOR, gradients_of, make_inputs, make_model
from tokens import error_ratio

from scam_models import Scam

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.compiled]

# Every block is traced, so that there are no more than it takes to have a first and a last one.
SHORT = replace(ENCODER, num_blocks=2)
SILENT = replace(GENERATOR, noise=False)
MODELS: dict[str, Any] = {
    "default": (SHORT, SILENT),
    "simplex, reversed": (
        replace(SHORT, reversed_levels=True, self_attention=False, num_cross_heads=2),
        replace(SILENT, duplex=False, map_encoder_blocks=(0,), spectral=True, architecture="resnet"),
    ),
}


def counting_plans(made: list[int]) -> Any:
    """A backend that runs the graph as it is, and tells how many label maps it resizes."""
    # What comes after it, the tracing of PyTorch's own operators, is in the tests of training.

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        made.append(sum("label_plan" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    return compile_graph


@pytest.mark.parametrize("name", MODELS)
def test_training(name):
    torch._dynamo.reset()
    model = make_model(*MODELS[name]).double()
    image, labels = make_inputs(dtype=torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(image, labels)
    gradients = gradients_of(model, expected)
    model.load_state_dict(state)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(image, labels)
    assert error_ratio(found, expected) < 1e-10
    for parameter, gradient in gradients_of(model, found).items():
        wanted = gradients[parameter]
        assert (gradient - wanted).abs().max() <= 1e-9 * wanted.abs().max() + 1e-12, parameter


def test_inference():
    """Each resolution of the label map is made at most twice."""
    torch._dynamo.reset()
    model = make_model(SHORT, SILENT).double().eval()
    image, labels = make_inputs(dtype=torch.float64)
    plans: list[int] = []
    compiled = torch.compile(model, fullgraph=True, backend=counting_plans(plans))
    with torch.no_grad():
        assert error_ratio(compiled(image, labels), model(image, labels)) < 1e-10
    (count,) = plans
    assert count <= len(SHORT.level_channels) + 2 * len(GENERATOR.sizes)


def test_export():
    model = make_model(SHORT, SILENT).double().eval()
    image, labels = make_inputs(dtype=torch.float64)
    program = torch.export.export(model, (image, labels)).module()
    other_image, other_labels = make_inputs(dtype=torch.float64, seed=1)
    assert isinstance(model, Scam)
    with torch.no_grad():
        assert error_ratio(program(other_image, other_labels), model(other_image, other_labels)) < 1e-12
