"""Instance modulation beside instance norm alone, and beside the operations that it puts together.

* ``ours``: this library's operator.
* ``instance_norm``: of the same feature map and nothing else, the yardstick. Its backward gives the gradient of the map
  alone.
* ``separate``: instance norm, modulation, noise and leaky ReLU as operations of PyTorch, one after another; where noise
  is one number per element, it draws them from PyTorch's generator. ``compiled``: the same under ``torch.compile``.
  ``norm, compiled``: PyTorch's instance norm as it is, and the operations after it compiled into one.
* ``copy``: of the feature map into memory that is already there: one read and one write. What must be moved is, in
  copies, one and a half forward (two reads, one write), and for each map that is given half a one more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sca_kernels import instance_modulate
from sca_kernels.reference.noise import per_element_noise

from . import memory, timing
from .goals import OVERHEAD
from .report import Goal
from .run import Run
from .timing import Contender, Figure

Parameters = Mapping[str, Tensor]
Compute = Callable[[Tensor, Parameters], Tensor]

PASSES = {False: "forward", True: "forward + backward"}
# Channels and side of the feature maps of the published models at 256 x 256.
SHAPES = ((64, 256), (128, 128), (256, 64), (512, 32), (1024, 16), (1024, 8))
EPS = 1e-5
SEED = 5


@dataclass(frozen=True)
class Kind:
    """What a feature map goes through besides the instance norm."""

    name: str
    parameters: Literal["none", "pixel", "channel"]
    noise: Literal["none", "per pixel", "per element"]
    negative_slope: float = 0.2


NORM = Kind("instance norm alone", "none", "none", negative_slope=1.0)
MAPS = Kind("maps of gamma and beta, noise per pixel, leaky ReLU", "pixel", "per pixel")
CHANNELS = Kind("gamma and beta per channel, noise per pixel, leaky ReLU", "channel", "per pixel")
ELEMENTS = Kind("maps of gamma and beta, noise per element, leaky ReLU", "pixel", "per element")


@dataclass(frozen=True)
class Form:
    """Type of a feature map and its order in memory."""

    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def describe(self) -> str:
        return f"{'channels last' if self.channels_last else 'NCHW'}, {str(self.dtype).removeprefix('torch.')}"


FORMS = [Form(dtype, last) for dtype in (torch.float32, torch.bfloat16) for last in (False, True)]
FLOAT32 = [form for form in FORMS if form.dtype == torch.float32]


@dataclass(frozen=True)
class Problem:
    """One call to compute, for one image.

    Attributes:
        x: (1, C, height, width).
        parameters: every other tensor that takes a gradient, by the name of its argument.
        noise: (1, 1, height, width), or (1, C, height, width) where there is a number for each element.
        grad_out: the gradient that backward starts from.
    """

    kind: Kind
    x: Tensor
    parameters: Parameters
    noise: Tensor | None
    grad_out: Tensor

    @property
    def shape(self) -> dict[str, int]:
        """What a result is recorded with."""
        _, channels, height, width = self.x.shape
        return {"channels": channels, "height": height, "width": width, "bytes": self.x.nbytes}

    def task(self, compute: Compute, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
        """A function that computes the result, with ``backward`` also the gradients of x and all parameters."""
        if not backward:
            return lambda: (compute(self.x, self.parameters),)
        x = self.x.detach().requires_grad_()
        parameters = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        leaves = [x, *parameters.values()]

        def forward_and_backward() -> tuple[Tensor, ...]:
            out = compute(x, parameters)
            return out.detach(), *torch.autograd.grad(out, leaves, self.grad_out)

        return forward_and_backward

    def in_float64(self) -> Problem:
        return replace(
            self,
            x=self.x.double(),
            parameters={name: value.double() for name, value in self.parameters.items()},
            noise=None if self.noise is None else self.noise.double(),
            grad_out=self.grad_out.double(),
        )

    def entry(self, name: str, compute: Compute, backward: bool, expected: Sequence[Tensor]) -> Contender:
        return Contender(name, self.task(compute, backward), tuple(expected), self.shape)


def problem(kind: Kind, channels: int, side: int, form: Form) -> Problem:
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if form.channels_last else torch.contiguous_format

    def feature_map() -> Tensor:
        values = torch.randn(1, channels, side, side, generator=generator)
        return values.to(form.dtype).contiguous(memory_format=memory_format)

    def numbers() -> Tensor:
        return torch.randn(channels, generator=generator)

    parameters = {}
    if kind.parameters != "none":
        make = feature_map if kind.parameters == "pixel" else numbers
        parameters = {"gamma": make() * 0.3, "beta": make() * 0.3}
    noise = None
    if kind.noise != "none":
        parameters["noise_strength"] = numbers() * 0.1
        noise = torch.randn(1, 1, side, side, generator=generator)
    if kind.noise == "per element":
        noise = per_element_noise(torch.tensor(SEED), 1, channels, side, side, torch.float32)
    made = Problem(kind, feature_map() + 0.5, parameters, noise, feature_map())
    if kind.negative_slope != 1:
        exact = made.in_float64()
        clear_at_kinks(made.grad_out, exactly(exact)(exact.x, exact.parameters))
    return made


def clear_at_kinks(gradient: Tensor, out: Tensor) -> None:
    """Clears the gradient of results so close to zero that rounding may put them on the other side of the kink."""
    gradient.masked_fill_(out.abs() < (1e-4 if gradient.dtype == torch.float32 else 0.05), 0)


def ours(problem: Problem) -> Compute:
    kind = problem.kind
    noise = "per_element" if kind.noise == "per element" else problem.noise
    seed = torch.tensor(SEED) if kind.noise == "per element" else None
    return lambda x, parameters: instance_modulate(
        x, **parameters, noise=noise, noise_seed=seed, eps=EPS, negative_slope=kind.negative_slope
    )


def separate(
    problem: Problem,
    noise: Callable[[Tensor], Tensor] | None = None,
    normalise: Callable[[Tensor], Tensor] | None = None,
    compiled_by: Callable[[Compute], Compute] = lambda function: function,
) -> Compute:
    """The formula in operations of PyTorch; ``noise`` gives another than the problem's own.

    What comes after the norm may be compiled.
    """
    negative_slope = problem.kind.negative_slope
    normalise = normalise or instance_norm

    def per_pixel(values: Tensor) -> Tensor:
        return values if values.dim() == 4 else values[:, None, None]

    def pointwise(out: Tensor, parameters: Parameters) -> Tensor:
        if "gamma" in parameters:
            gamma, beta = (per_pixel(parameters[name]).to(out.dtype) for name in ("gamma", "beta"))
            out = torch.addcmul(beta, out, 1 + gamma)
        numbers = problem.noise if noise is None else noise(out)
        if numbers is not None:
            out = out + (per_pixel(parameters["noise_strength"]) * numbers).to(out.dtype)
        return out if negative_slope == 1 else F.leaky_relu(out, negative_slope)

    after_norm = compiled_by(pointwise)
    return lambda x, parameters: after_norm(normalise(x), parameters)


def instance_norm(x: Tensor) -> Tensor:
    out = F.instance_norm(x, eps=EPS)
    if out.requires_grad and x.stride(1) == 1:
        # For B = 1 on a CPU its own gradient would be wrong otherwise (PyTorch 2.13).
        out.register_hook(lambda gradient: gradient.contiguous())
    return out


def exactly(problem: Problem) -> Compute:
    """The formula with nothing in it but plain arithmetic; what everyone is checked against, in float64."""

    def normalise(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        return (x - mean) * (variance + EPS).rsqrt()

    return separate(problem, normalise=normalise)


def drawn(x: Tensor) -> Tensor:
    """Noise per element from PyTorch's generator, the same in every call, so that the result can be checked."""
    torch.manual_seed(SEED)
    return torch.randn(x.shape, dtype=torch.float32)


def race(
    run: Run,
    kind: Kind,
    channels: int,
    side: int,
    form: Form,
    goals: Mapping[bool, Sequence[Goal]],
    *,
    title: str = "instance_modulate",
    row: str = "",
    compiled: bool = True,
) -> None:
    side, channels = run.choose(max(8, side // 16), side), run.choose(min(20, channels), channels)
    made = problem(kind, channels, side, form)
    exact = made.in_float64()
    expected = exact.task(exactly(exact), backward=True)()
    norm = replace(made, kind=NORM, parameters={}, noise=None)
    exact_norm = replace(exact, kind=NORM, parameters={}, noise=None)
    expected_of_norm = exact_norm.task(exactly(exact_norm), backward=True)()
    target = torch.empty_like(made.x)
    for backward, name in PASSES.items():
        some = slice(None if backward else 1)
        entries = [
            made.entry("ours", ours(made), backward, expected[some]),
            norm.entry("instance_norm", separate(norm), backward, expected_of_norm[some]),
            Contender("copy", lambda: (target.copy_(made.x),), (made.x,), made.shape),
        ]
        if kind.noise == "per element":
            # Other numbers, whose result is another, and its kinks elsewhere.
            other = replace(made, noise=drawn(made.x), grad_out=made.grad_out.clone())
            out = exactly(other.in_float64())(exact.x, exact.parameters)
            clear_at_kinks(other.grad_out, out)
            exact_other = other.in_float64()
            of_other = exact_other.task(exactly(exact_other), backward=True)()[some]
            entries.append(other.entry("separate", separate(other, drawn), backward, of_other))
        elif kind is not NORM:
            entries.append(made.entry("separate", separate(made), backward, expected[some]))
            if compiled and kind is MAPS and form == Form():
                together = run.compile(separate(made))
                entries.append(made.entry("compiled", together, backward, expected[some]))
                after_norm = separate(made, compiled_by=run.compile)
                entries.append(made.entry("norm, compiled", after_norm, backward, expected[some]))
        run.compare(
            entries,
            table=f"{title}, {name}: {kind.name}, {form.describe()}",
            row=row or f"{channels} channels, {side} x {side}",
            dtype=form.dtype,
            goals=goals.get(backward, ()) if form.dtype == torch.float32 and side >= 32 else (),
            seconds=1.2 if side >= 128 else 0.5,
        )


@pytest.mark.parametrize("form", FORMS, ids=Form.describe)
@pytest.mark.parametrize("channels, side", SHAPES)
def test_instance_norm(run: Run, channels: int, side: int, form: Form) -> None:
    goals = dict.fromkeys(PASSES, (Goal("ours", "instance_norm", at_most=1.0),))
    race(run, NORM, channels, side, form, goals)


@pytest.mark.parametrize("form", FORMS, ids=Form.describe)
@pytest.mark.parametrize("channels, side", SHAPES)
@pytest.mark.parametrize("kind", [MAPS, CHANNELS], ids=["maps", "channels"])
def test_modulation(run: Run, kind: Kind, channels: int, side: int, form: Form) -> None:
    goals = dict.fromkeys(PASSES, (Goal("separate", "ours", at_least=1.5),))
    race(run, kind, channels, side, form, goals)


@pytest.mark.parametrize("form", FLOAT32, ids=Form.describe)
@pytest.mark.parametrize("channels, side", [(64, 256), (512, 32)])
def test_noise_per_element(run: Run, channels: int, side: int, form: Form) -> None:
    goals = dict.fromkeys(PASSES, (Goal("separate", "ours", at_least=1.5),))
    race(run, ELEMENTS, channels, side, form, goals)


@pytest.mark.parametrize("count", [1, 2])
def test_threads(run: Run, count: int) -> None:
    with timing.threads(count):
        row = f"{count} thread{'s' * (count > 1)}"
        race(run, MAPS, *SHAPES[0], Form(), {}, title="Threads, instance_modulate", row=row, compiled=False)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_overhead(run: Run, with_gradients: bool) -> None:
    """A call so small that only the way to the kernel counts."""
    made = problem(NORM, 8, 4, Form())
    exact = made.in_float64()
    expected = exact.task(exactly(exact), backward=False)()
    x = made.x.clone().requires_grad_(with_gradients)
    microsecond = 1e-3
    run.compare(
        [
            Contender(name, lambda compute=compute: (compute(x, {}),), expected, made.shape, microsecond)
            for name, compute in (("ours", ours(made)), ("instance_norm", separate(made)))
        ],
        table="instance_modulate, overhead of a call: 8 channels, 4 x 4 pixels, forward",
        row="with gradients" if with_gradients else "without gradients",
        unit="us",
        goals=OVERHEAD,
        seconds=1.0,
    )


def test_peak_memory(run: Run) -> None:
    """Forward + backward beside the least that must be there, and beside the separate operations."""
    assert memory.counts_correctly(), "the profiler does not report allocations as expected"
    made = problem(MAPS, run.choose(16, 64), run.choose(64, 256), Form())
    assert made.noise is not None
    inputs = (made.x, *made.parameters.values(), made.noise, made.grad_out)
    input_bytes = sum(tensor.nbytes for tensor in inputs)
    peaks = {"inputs and results": sum(tensor.nbytes for tensor in made.task(ours(made), backward=True)())}
    for name, compute in (("ours", ours(made)), ("separate", separate(made))):
        peaks[name] = memory.peak_bytes(made.task(compute, backward=True))
    figures = []
    for name, peak in peaks.items():
        mebibytes = (input_bytes + peak) / 2**20
        figures.append(
            Figure(name, made.shape, median=mebibytes, lower=mebibytes, upper=mebibytes, rounds=(mebibytes,))
        )
    # The order in which a table is read: ours first.
    figures.sort(key=lambda figure: figure.name != "ours")
    run.record(
        figures,
        table=f"instance_modulate, peak memory of forward + backward: {MAPS.name}, 64 channels, 256 x 256, float32",
        row="tensor memory",
        unit="MiB",
        goals=(Goal("ours", "inputs and results", at_most=1.05),),
    )
