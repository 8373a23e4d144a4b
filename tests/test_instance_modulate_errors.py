"""What bad input to instance_modulate gets: an error that names the argument, what was expected and what was given."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from sca_kernels import backend, cpu, instance_modulate

half, single, double = torch.bfloat16, torch.float32, torch.float64


def tensor(*shape: int, dtype: torch.dtype = single, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


X = tensor(2, 3, 4, 5)
NO_SHAPE = "expected shape (2 or 1, 3, 4, 5) like x, or one that broadcasts to (2, 3), got"
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x a list": ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    "integers": (
        {"x": tensor(2, 3, 4, 5, dtype=torch.int64)},
        TypeError,
        "x: expected float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "complex": (
        {"x": tensor(2, 3, 4, 5, dtype=torch.complex64)},
        TypeError,
        "x: expected float32, float64, bfloat16 or float16, got torch.complex64",
    ),
    "one image": ({"x": tensor(3, 4, 5)}, ValueError, "x: expected shape (B, C, height, width), got (3, 4, 5)"),
    "gamma a number": ({"gamma": 1.0}, TypeError, "gamma: expected a tensor, got float"),
    "beta a list": ({"beta": [1.0]}, TypeError, "beta: expected a tensor, got list"),
    "type of gamma": (
        {"gamma": tensor(3, dtype=half)},
        TypeError,
        "gamma: expected torch.float32 to go with x, got torch.bfloat16",
    ),
    "type of beta": (
        {"x": X.to(half), "beta": tensor(2, 3, 4, 5, dtype=double)},
        TypeError,
        "beta: expected torch.bfloat16 or torch.float32 to go with x, got torch.float64",
    ),
    "gamma for other pixels": (
        {"gamma": tensor(2, 3, 4, 4)},
        ValueError,
        f"gamma: {NO_SHAPE} (2, 3, 4, 4)",
    ),
    "beta for other images": ({"beta": tensor(3, 3, 4, 5)}, ValueError, f"beta: {NO_SHAPE} (3, 3, 4, 5)"),
    "gamma of one pixel": ({"gamma": tensor(2, 3, 1, 1)}, ValueError, f"gamma: {NO_SHAPE} (2, 3, 1, 1)"),
    "beta of one image": ({"beta": tensor(3, 4, 5)}, ValueError, f"beta: {NO_SHAPE} (3, 4, 5)"),
    "gamma for other channels": (
        {"gamma": tensor(4)},
        ValueError,
        "gamma: expected a shape that broadcasts to (2, 3), got (4,)",
    ),
    "device of gamma": (
        {"gamma": tensor(2, 3, 4, 5, device="meta")},
        ValueError,
        "gamma: expected a tensor on cpu like x, got one on meta",
    ),
    "device of beta": (
        {"beta": tensor(3, device="meta")},
        ValueError,
        "beta: expected a tensor on cpu like x, got one on meta",
    ),
    "mean alone": ({"stats": tensor(3)}, TypeError, "stats: expected a pair (mean, rstd) or None, got Tensor"),
    "type of mean": (
        {"x": X.to(half), "stats": (tensor(3, dtype=half), tensor(3))},
        TypeError,
        "stats[0] (mean): expected torch.float32, the type that x is computed in, got torch.bfloat16",
    ),
    "shape of rstd": (
        {"stats": (tensor(3), tensor(2, 1, 3))},
        ValueError,
        "stats[1] (rstd): expected a shape that broadcasts to (2, 3), got (2, 1, 3)",
    ),
    "noise of another name": (
        {"noise": "per_pixel"},
        ValueError,
        "noise: expected a tensor, 'per_element' or None, got 'per_pixel'",
    ),
    "noise a number": (
        {"noise": 1.0},
        TypeError,
        "noise: expected a tensor, 'per_element' or None, got float",
    ),
    "noise for each channel": (
        {"noise": tensor(2, 3, 4, 5)},
        ValueError,
        "noise: expected a shape that broadcasts to (2, 1, 4, 5), got (2, 3, 4, 5)",
    ),
    "noise that requires a gradient": (
        {"noise": tensor(4, 5).requires_grad_()},
        ValueError,
        "noise: expected a tensor that takes no gradient, got one that requires it",
    ),
    "device of noise": (
        {"noise": tensor(4, 5, device="meta")},
        ValueError,
        "noise: expected a tensor on cpu like x, got one on meta",
    ),
    "a seed without noise": (
        {"noise_seed": torch.tensor(1)},
        ValueError,
        'noise_seed: expected None unless noise="per_element", got a seed',
    ),
    "a seed with noise that is given": (
        {"noise": tensor(4, 5), "noise_seed": torch.tensor(1)},
        ValueError,
        'noise_seed: expected None unless noise="per_element", got a seed',
    ),
    "type of the seed": (
        {"noise": "per_element", "noise_seed": torch.tensor(1.0)},
        TypeError,
        "noise_seed: expected an int64 tensor, got torch.float32",
    ),
    "a number as seed": (
        {"noise": "per_element", "noise_seed": 5},
        TypeError,
        "noise_seed: expected an int64 tensor, got int",
    ),
    "two seeds": (
        {"noise": "per_element", "noise_seed": torch.tensor([1, 2])},
        ValueError,
        "noise_seed: expected one element, got shape (2,)",
    ),
    "strength without noise": (
        {"noise_strength": tensor(3)},
        ValueError,
        "noise_strength: expected None without noise, got a strength",
    ),
    "type of the strength": (
        {"noise": "per_element", "noise_strength": tensor(3, dtype=double)},
        TypeError,
        "noise_strength: expected torch.float32, the type that x is computed in, got torch.float64",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_bad_input_is_named(native, error, name):
    """The same words from every backend."""
    changes, kind, message = ERRORS[error]
    with backend(name), pytest.raises(kind, match=f"^{re.escape(message)}$"):
        instance_modulate(**{"x": X, **changes})


def test_noise_that_requires_a_gradient_in_inference(native):
    """Only where one would be lost it is refused."""
    noise = torch.randn(4, 5)
    with torch.no_grad():
        assert torch.equal(
            instance_modulate(X, noise=noise.clone().requires_grad_()), instance_modulate(X, noise=noise)
        )


def test_forced_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "_load_error", "the library was left at home")
    message = "backend 'cpu' cannot serve instance_modulate on cpu in torch.float32: the library was left at home"
    with backend("cpu"), pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        instance_modulate(X)


def test_any_device_is_served_by_the_reference():
    """Tensors that have sizes only: no kernel of this library knows their device."""
    x = tensor(2, 3, 4, 5, dtype=half, device="meta")
    out = instance_modulate(x, x, noise="per_element")
    assert out.device.type == "meta" and out.shape == x.shape and out.dtype == half


@pytest.mark.parametrize("name", ["x", "gamma", "beta", "mean", "rstd", "noise_strength"])
def test_gradients_of_gradients_are_refused(native, name):
    """Loudly, while the graph of the gradients is built, rather than as a gradient that silently has none itself."""
    tensors = {
        "x": torch.randn(2, 3, 4, 5), "gamma": torch.randn(2, 3, 4, 5), "beta": torch.randn(3),
        "mean": torch.randn(3), "rstd": torch.rand(3), "noise_strength": torch.randn(3),
    }  # fmt: skip
    tensors[name].requires_grad_()
    stats = (tensors.pop("mean"), tensors.pop("rstd"))
    wanted = {**tensors, "mean": stats[0], "rstd": stats[1]}[name]
    with backend("cpu"):
        out = instance_modulate(**tensors, stats=stats, noise="per_element")
    message = r"instance_modulate: gradients of gradients \(create_graph=True\) .*backend\('reference'\)"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(out.square().sum(), wanted, create_graph=True)


def test_forward_mode_is_refused_rather_than_dropped(native):
    """A derivative that is not computed is an error, not zero."""
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
            instance_modulate(dual)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(instance_modulate, (X,), (X,))
