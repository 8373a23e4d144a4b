"""Calls of instance_modulate, and how their results are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from devices import device_of, on_device
from folded import assert_close, channels_last
from tokens import TOLERANCE, error_ratio
from torch import Tensor

import sca_kernels
from sca_kernels import instance_modulate

Values = Mapping[str, Tensor | None]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MEMORY = {"channels first": torch.clone, "channels last": channels_last}
MAPS = ("x", "gamma", "beta")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call, and the gradient that flows into its result.

    Attributes:
        tensors: the arguments that take gradients, by name; mean and rstd stand for ``stats``.
        settings: all other arguments.
    """

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    grad_out: Tensor

    def changed(self, **changes: Any) -> Problem:
        return dataclasses.replace(self, **changes)

    def on(self, device: torch.device) -> Problem:
        return self.changed(
            tensors=on_device(dict(self.tensors), device),
            settings=on_device(dict(self.settings), device),
            grad_out=on_device(self.grad_out, device),
        )

    def with_tensors(self, **tensors: Tensor) -> Problem:
        return self.changed(tensors={**self.tensors, **tensors})

    def with_settings(self, **settings: Any) -> Problem:
        return self.changed(settings={**self.settings, **settings})

    def to(self, dtype: torch.dtype, parameters: torch.dtype | None = None) -> Problem:
        """The same numbers: x rounded to ``dtype``, gamma and beta to that or ``parameters``, the rest not so far."""
        wide = torch.promote_types(dtype, torch.float32)
        types = {"x": dtype, "gamma": parameters or dtype, "beta": parameters or dtype}
        noise = self.settings.get("noise")
        return self.changed(
            tensors={name: value.to(types.get(name, wide)) for name, value in self.tensors.items()},
            settings={**self.settings, **({"noise": noise.to(wide)} if isinstance(noise, Tensor) else {})},
            grad_out=self.grad_out.to(dtype),
        )

    def arranged(self, memory: Any, grad_memory: Any = None) -> Problem:
        """x and its like as ``memory`` puts them, the gradient of the result as ``grad_memory`` does."""
        maps = {name: memory(value) for name, value in self.tensors.items() if name in MAPS and value.dim() == 4}
        return self.with_tensors(**maps).changed(grad_out=(grad_memory or memory)(self.grad_out))


def make_problem(
    *,
    batch: int = 2,
    channels: int = 5,
    height: int = 7,
    width: int = 9,
    dtype: torch.dtype = torch.float32,
    gamma: str | None = None,
    beta: str | None = None,
    stats: bool = False,
    noise: str | None = None,
    strength: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Problem:
    """A call with random tensors; gamma and beta are a key of ``shapes`` below, noise "per_pixel" or "per_element"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = {
        "pixel": (batch, channels, height, width),
        "pixel of all images": (1, channels, height, width),
        "image and channel": (batch, channels),
        "channel": (channels,),
    }
    # A mean and a spread of its own for each channel, so that one taken for another shows.
    x = normal(batch, channels, height, width) * (normal(batch, channels, 1, 1).abs() + 0.5)
    tensors = {"x": x + 3 * normal(batch, channels, 1, 1)}
    if gamma is not None:
        tensors["gamma"] = normal(*shapes[gamma])
    if beta is not None:
        tensors["beta"] = normal(*shapes[beta])
    if stats:
        tensors["mean"], tensors["rstd"] = normal(batch, channels), normal(channels).abs() + 0.3
    if strength:
        tensors["noise_strength"] = normal(channels)
    if noise == "per_pixel":
        settings["noise"] = normal(batch, 1, height, width)
    elif noise == "per_element":
        settings["noise"], settings["noise_seed"] = "per_element", torch.tensor(seed - 7)
    return Problem(tensors, settings, normal(batch, channels, height, width)).to(dtype)


# What is given how, each at least twice; every kind of sum and of offset occurs with and without the activation.
CASES: dict[str, dict[str, Any]] = {
    "instance norm": {"negative_slope": 1.0},
    "activation": {"unbiased": True},
    "maps": {"gamma": "pixel", "beta": "pixel", "noise": "per_pixel", "strength": True},
    "maps of all images": {"gamma": "pixel of all images", "beta": "pixel of all images", "add_one": False},
    "channels": {"gamma": "channel", "beta": "channel", "noise": "per_element", "strength": True},
    "images": {"gamma": "image and channel", "beta": "image and channel", "add_one": False, "stats": True},
    "a map of factors": {"gamma": "pixel", "beta": "channel", "stats": True, "noise": "per_pixel"},
    "a map of offsets": {"gamma": "image and channel", "beta": "pixel", "noise": "per_element", "unbiased": True},
    "factors only": {"gamma": "pixel", "negative_slope": 1.0, "noise": "per_element", "strength": True},
    "offsets only": {"beta": "pixel", "negative_slope": 1.0, "noise": "per_pixel", "strength": True},
    "rectifier": {"gamma": "pixel", "beta": "pixel", "negative_slope": 0.0, "noise": "per_element", "strength": True},
    "given statistics": {"gamma": "pixel", "beta": "pixel", "stats": True, "negative_slope": 1.0},
    "noise alone": {"noise": "per_pixel", "strength": True, "eps": 0.5},
}


def call(problem: Problem, tensors: Mapping[str, Tensor]) -> Tensor:
    """The result of the call with these tensors in place of the problem's own."""
    arguments = {**tensors, **problem.settings}
    if "mean" in arguments:
        arguments["stats"] = (arguments.pop("mean"), arguments.pop("rstd"))
    return instance_modulate(**arguments)


def leaves(problem: Problem, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors; those ``wanted`` (by default all) take gradients."""
    return {
        name: tensor.detach().requires_grad_(wanted is None or name in wanted)
        for name, tensor in problem.tensors.items()
    }


def differentiate(problem: Problem, out: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The result as "out", and as "grad_<name>" the gradients of the inputs that take one."""
    asked = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    found = torch.autograd.grad(out, list(asked.values()), problem.grad_out) if asked else ()
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(asked, found, strict=True)}}


def solve(problem: Problem, backend: str, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """Result and gradients of a backend, which is forced: a test never compares the reference with itself."""
    problem = problem.on(device_of(backend))
    inputs = leaves(problem, wanted)
    with sca_kernels.backend(backend):
        out = call(problem, inputs)
    found: dict[str, Tensor] = on_device(differentiate(problem, out, inputs), torch.device("cpu"))
    return found


def expect(problem: Problem) -> dict[str, Tensor]:
    """The results of the reference in float64."""
    return solve(problem.to(torch.float64), "reference")


def away_from_kink(problem: Problem) -> Problem:
    """No gradient flows in where rounding could decide on which side of the activation's kink a number is."""
    linear = solve(problem.to(torch.float64).with_settings(negative_slope=1.0), "reference", wanted=())["out"]
    return problem.changed(grad_out=problem.grad_out.masked_fill(linear.abs() < 1e-4, 0))


def assert_accurate(problem: Problem, actual: Values, expected: Values) -> None:
    """Agrees with the reference in float64 as far as the types allow.

    What is of 16 bits is rounded once: it has at most 1.1 times the error of the reference in that type.
    """
    dtype = problem.tensors["x"].dtype
    if dtype in TOLERANCE and all(tensor.dtype == dtype for tensor in problem.tensors.values()):
        return assert_close(actual, expected, TOLERANCE[dtype])
    rounded = solve(problem, "reference")
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got, also = actual[name], rounded[name]
        assert got is not None and wanted is not None and got.dtype == also.dtype, name
        limit = 1.1 * error_ratio(also, wanted) + 1e-6
        ratio = error_ratio(got, wanted)
        assert ratio <= limit, f"{name}: error {ratio:.2e}, expected at most {limit:.2e}"
    return None


def assert_matches_reference(problem: Problem, backend: str = "cpu") -> dict[str, Tensor]:
    """The kernels agree with the reference on result and gradients; returns their results."""
    actual = solve(problem, backend)
    assert_accurate(problem, actual, expect(problem))
    return actual
