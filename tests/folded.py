"""Calls of the operators that take feature maps, and how their results are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from devices import device_of, on_device
from tokens import TOLERANCE, error_ratio, label_map, mostly, random_map
from torch import Tensor

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, LatentSelection, semantic_modulate, semantic_pool

Values = Mapping[str, Tensor | None]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
POOL_BIASES = ("row_bias", "col_bias")
POOL_RESULTS = ("pooled", "lse", "row_mass", "col_mass", "mean", "second_moment")
# Optional tables of semantic_modulate; those of one group are given together.
MODULATE_OPTIONS = (
    ("key_bias",), ("row_bias",), ("col_bias",), ("scale_bias",), ("shift_bias",),
    ("empty_scale", "empty_shift"), ("mean", "rstd"), ("noise_strength",),
)  # fmt: skip
ALL_OPTIONS = tuple(name for group in MODULATE_OPTIONS for name in group)

# Settings of semantic_modulate with every optional argument alone, with none and with all of them.
MODULATE_VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {"options": ()},
    **{" and ".join(group): {"options": group} for group in MODULATE_OPTIONS[:-1]},
    "noise per pixel": {"options": (), "noise": "per_pixel"},
    "noise per element": {"options": (), "noise": "per_element"},
    "noise per pixel with strength": {"options": ("noise_strength",), "noise": "per_pixel"},
    "noise per element with strength": {"options": ("noise_strength",), "noise": "per_element"},
    "everything": {"options": ALL_OPTIONS[:-1]},
    "everything and noise per pixel": {"options": ALL_OPTIONS, "noise": "per_pixel"},
    "everything and noise per element": {"options": ALL_OPTIONS, "noise": "per_element"},
    "everything but statistics": {"options": (*ALL_OPTIONS[:7], "noise_strength"), "noise": "per_pixel"},
}
MODULATE_RULES: dict[str, dict[str, Any]] = {
    "uniform": {"empty": "uniform", "add_one": True, "negative_slope": 0.2},
    "zero, not activated": {"empty": "zero", "add_one": True, "negative_slope": 1.0},
    "uniform, without one": {"empty": "uniform", "add_one": False, "negative_slope": 0.0},
    "zero, another eps": {"empty": "zero", "add_one": False, "negative_slope": -0.5, "eps": 0.25},
}

# Five labels with unequal numbers of latents, one of which has none; one label has no pixels, some pixels no label.
LAYOUT = LatentLayout((3, 1, 0, 2, 5))
LABELS = random_map(2, 7, 9, 5, without=[3], seed=1)
# Different labels in each image, so that rows of a selection are left over in the second.
MAPS = {
    "one absent": LABELS,
    "different labels": label_map([[[0, 0, 3, 4]] * 3, [[1, -1, 1, 2]] * 3], 5),
    "one image has none": label_map([[[0, 4, 3, 1]] * 3, [[-1, 2, 2, -1]] * 3], 5),
    "none": label_map(torch.full((2, 3, 4), -1), 5),
    "one map": random_map(1, 3, 4, 5, without=[0, 4]),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call, and the gradients that flow into its results.

    Attributes:
        operator: the name of the operator.
        tensors: the arguments that take gradients, by name; mean and rstd stand for ``stats``.
        layout, labels: the arguments of these names.
        settings: all other arguments.
        gradients: by name of the result; None or missing for a result that takes no gradient.
    """

    operator: str
    tensors: Mapping[str, Tensor]
    layout: LatentLayout | LatentSelection
    labels: LabelMap
    settings: Mapping[str, Any]
    gradients: Mapping[str, Tensor | None]

    def changed(self, **changes: Any) -> Problem:
        return dataclasses.replace(self, **changes)

    def on(self, device: torch.device) -> Problem:
        return self.changed(
            tensors=on_device(dict(self.tensors), device),
            layout=on_device(self.layout, device),
            labels=on_device(self.labels, device),
            settings=on_device(dict(self.settings), device),
            gradients=on_device(dict(self.gradients), device),
        )

    def with_tensors(self, **tensors: Tensor) -> Problem:
        return self.changed(tensors={**self.tensors, **tensors})

    def without_tensors(self, *names: str) -> Problem:
        return self.changed(tensors={name: value for name, value in self.tensors.items() if name not in names})

    def with_settings(self, **settings: Any) -> Problem:
        return self.changed(settings={**self.settings, **settings})

    def with_gradients(self, **gradients: Tensor | None) -> Problem:
        return self.changed(gradients={**self.gradients, **gradients})

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers, with x and its like rounded to ``dtype`` and everything else to what it is computed in."""
        wide = torch.promote_types(dtype, torch.float32)
        noise = self.settings.get("noise")
        return self.changed(
            tensors={name: value.to(dtype if name == "x" else wide) for name, value in self.tensors.items()},
            settings={**self.settings, **({"noise": noise.to(wide)} if isinstance(noise, Tensor) else {})},
            gradients={
                name: None if value is None else value.to(dtype if name == "out" else wide)
                for name, value in self.gradients.items()
            },
        )


def pool_problem(
    labels: LabelMap = LABELS,
    layout: LatentLayout | LatentSelection = LAYOUT,
    *,
    batch: int = 2,
    heads: int = 2,
    channels: int = 16,
    dtype: torch.dtype = torch.float32,
    options: Collection[str] = POOL_BIASES,
    seed: int = 0,
    **settings: Any,
) -> Problem:
    """A call of ``semantic_pool`` with random tensors and random gradients of all results."""
    normal = _normals(seed)
    height, width = labels.height, labels.width
    rows = (batch, heads, layout.count)
    tensors = {
        "queries": normal(*rows, channels) / max(channels, 1) ** 0.5,
        "x": normal(batch, channels, height, width),
    }
    biases = {"row_bias": normal(*rows, height), "col_bias": normal(*rows, width)}
    gradients = {
        "pooled": normal(*rows, channels),
        "lse": normal(*rows),
        "row_mass": normal(*rows, height),
        "col_mass": normal(*rows, width),
        "mean": normal(batch, channels),
        "second_moment": normal(batch, channels),
    }
    tensors.update((name, biases[name]) for name in options)
    return Problem("semantic_pool", tensors, layout, labels, settings, gradients).to(dtype)


def modulate_problem(
    labels: LabelMap = LABELS,
    layout: LatentLayout | LatentSelection = LAYOUT,
    *,
    batch: int = 2,
    heads: int = 2,
    channels: int = 16,
    dtype: torch.dtype = torch.float32,
    options: Collection[str] = ("key_bias", "row_bias", "col_bias", "scale_bias", "shift_bias"),
    noise: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Problem:
    """A call of ``semantic_modulate`` with random tensors and a random gradient.

    Args:
        options: which optional tables are given.
        noise: "per_pixel", with columns farther apart than rows, "per_element" or None.
    """
    normal = _normals(seed)
    height, width = labels.height, labels.width
    rows = (batch, heads, layout.count)
    tensors = {
        "x": normal(batch, channels, height, width),
        "keys": normal(*rows, channels) / max(channels, 1) ** 0.5,
        "scale": normal(*rows, channels),
        "shift": normal(*rows, channels),
    }
    tables = {
        "key_bias": normal(*rows),
        "row_bias": normal(*rows, height),
        "col_bias": normal(*rows, width),
        **{name: normal(batch, channels) for name in ALL_OPTIONS[3:]},
    }
    tables["rstd"] = tables["rstd"].abs() + 0.1
    tensors.update((name, tables[name]) for name in options)
    if noise == "per_pixel":
        settings["noise"] = normal(batch, 1, width, height).transpose(2, 3)
    elif noise == "per_element":
        settings.update(noise=noise, noise_seed=torch.tensor([-(2**62) + 12345]))
    gradients = {"out": normal(batch, channels, height, width)}
    return Problem("semantic_modulate", tensors, layout, labels, settings, gradients).to(dtype)


def _normals(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


BUILDERS = {"semantic_pool": pool_problem, "semantic_modulate": modulate_problem}


# Everything that is optional, and the same for each image.
EVERYTHING: dict[str, dict[str, Any]] = {
    "semantic_pool": {"options": POOL_BIASES},
    "semantic_modulate": {"options": ALL_OPTIONS, "noise": "per_pixel"},
}


def full_problem(operator: str, **arguments: Any) -> Problem:
    return BUILDERS[operator](**{"channels": 8, **EVERYTHING[operator], **arguments})


def few_pixels_eps(height: int, width: int) -> float:
    """Of one pixel or two, the statistics leave little more of x than rounding, times 1 / sqrt(eps)."""
    return 1.0 if height * width <= 2 else 1e-5


def apply(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The results of the call with these tensors in place of the problem's own."""
    arguments = {**tensors, **problem.settings, "layout": problem.layout, "labels": problem.labels}
    if problem.operator == "semantic_pool":
        return semantic_pool(**arguments)._asdict()
    if "mean" in arguments:
        arguments["stats"] = (arguments.pop("mean"), arguments.pop("rstd"))
    return {"out": semantic_modulate(**arguments)}


def solve(problem: Problem, backend: str, wanted: Collection[str] | None = None) -> dict[str, Tensor | None]:
    """Results, and as "grad_<name>" the gradients of the tensors ``wanted`` (by default all), of a backend.

    It is forced: a test never compares the reference with itself.
    """
    problem = problem.on(device_of(backend))
    tensors = {
        name: tensor.detach().requires_grad_(wanted is None or name in wanted)
        for name, tensor in problem.tensors.items()
    }
    with sca_kernels.backend(backend):
        results = apply(problem, tensors)
    asked_for = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    flows = [
        (result, gradient)
        for name, result in results.items()
        if (gradient := problem.gradients.get(name)) is not None and result.requires_grad
    ]
    found: Sequence[Tensor] = [torch.zeros_like(tensor) for tensor in asked_for.values()]
    if flows and asked_for:
        outputs, incoming = zip(*flows, strict=True)
        inputs = list(asked_for.values())
        found = torch.autograd.grad(outputs, inputs, incoming, allow_unused=True, materialize_grads=True)
    gradients = dict(zip(asked_for, found, strict=True))
    solution: dict[str, Tensor | None] = {name: result.detach() for name, result in results.items()}
    solution.update((f"grad_{name}", gradients.get(name)) for name in tensors)
    here: dict[str, Tensor | None] = on_device(solution, torch.device("cpu"))
    return here


def leaves(problem: Problem) -> dict[str, Tensor]:
    return {name: tensor.clone().requires_grad_() for name, tensor in problem.tensors.items()}


def differentiate(
    problem: Problem, results: Mapping[str, Tensor], inputs: Mapping[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """Results and gradients, named as those of ``solve``."""
    flows = [problem.gradients[name] for name in results]
    found = torch.autograd.grad(list(results.values()), list(inputs.values()), flows, **options)
    return {
        **{name: result.detach() for name, result in results.items()},
        **{f"grad_{name}": gradient for name, gradient in zip(inputs, found, strict=True)},
    }


def expect(problem: Problem) -> dict[str, Tensor | None]:
    """The results of the reference in float64."""
    return solve(problem.to(torch.float64), "reference")


def away_from_kink(problem: Problem) -> Problem:
    """No gradient flows in where rounding could decide on which side of the activation's kink a number is."""
    if problem.operator == "semantic_pool" or problem.gradients["out"] is None:
        return problem
    linear = solve(problem.to(torch.float64).with_settings(negative_slope=1.0), "reference", wanted=())["out"]
    assert linear is not None
    return problem.with_gradients(out=problem.gradients["out"].masked_fill(linear.abs() < 1e-4, 0))


def assert_close(actual: Values, expected: Values, tolerance: float) -> None:
    """Each result agrees within ``tolerance``, as a ratio of norms, and is there or not as expected."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got = actual[name]
        assert (got is None) == (wanted is None), name
        if got is not None and wanted is not None:
            ratio = error_ratio(got, wanted)
            assert ratio <= tolerance, f"{name}: error {ratio:.2e}, expected at most {tolerance:.0e}"


def assert_same_bits(actual: Values, expected: Values) -> None:
    """Each result is the same, the sign of zero and the bits of NaN included."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got = actual[name]
        assert (got is None) == (wanted is None), name
        if got is not None and wanted is not None:
            assert got.shape == wanted.shape, name
            integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
            different = (got.contiguous().view(integers) != wanted.contiguous().view(integers)).sum().item()
            assert different == 0, f"{name}: {different} of {got.numel()} elements differ"


def assert_accurate(problem: Problem, actual: Values, expected: Values, *, ill_conditioned: bool = False) -> None:
    """Agrees with the reference in float64 as far as the types allow.

    What is kept in float32 or float64 agrees to the tolerance of that type. What is of x's type, and 16 bits, has at
    most 1.5 times the error that the reference makes in that type; twice it where it is rounded twice, since the
    gradient of x is written before the statistics' part in it is known. With ``ill_conditioned`` everything is
    compared with the reference in that way, if it makes an error that is more than the tolerance.
    """
    dtype = problem.tensors["x"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    of_x = {"out", "grad_x"}
    relative = set(actual) if ill_conditioned else of_x if dtype != wide else set()
    rounded = solve(problem, "reference") if relative else {}
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got = actual[name]
        assert got is not None and wanted is not None, name
        assert got.dtype == (dtype if name in of_x else wide), name
        limit = TOLERANCE[wide]
        if name in relative:
            also = rounded[name]
            assert also is not None
            factor = 2 if name == "grad_x" and problem.operator == "semantic_modulate" else 1.5
            limit = max(limit, factor * error_ratio(also, wanted))
        ratio = error_ratio(got, wanted)
        assert ratio <= limit, f"{name}: error {ratio:.2e}, expected at most {limit:.2e}"


def assert_matches_reference(
    problem: Problem, tolerance: float | None = None, backend: str = "cpu"
) -> dict[str, Tensor | None]:
    """The kernels agree with the reference in float64 on results and gradients; returns their results."""
    actual, expected = solve(problem, backend), expect(problem)
    if tolerance is None:
        assert_accurate(problem, actual, expected)
    else:
        assert_close(actual, expected, tolerance)
    return actual


def image(values: Values, index: int) -> dict[str, Tensor | None]:
    """The part of results and gradients that belongs to an image."""
    return {name: None if value is None else value[index : index + 1] for name, value in values.items()}


# Maps and layouts that are easy to get wrong: for one image or two, with the number of images of x.
EDGES: dict[str, tuple[LabelMap, LatentLayout, int]] = {
    "absent label": (label_map([[0, 2], [2, 0]], 3), LatentLayout((2, 3, 1)), 1),
    "ignored pixels": (label_map([[0, -1], [-1, 1]], 2), LatentLayout((2, 3)), 1),
    "empty in the last image only": (label_map([[[0, 1], [1, 0]], [[0, 2], [-1, 0]]], 3), LatentLayout((2, 1, 0)), 2),
    "all pixels ignored": (label_map([[-1, -1], [-1, -1]], 2), LatentLayout((2, 3)), 1),
    "single pixel": (label_map([[1]], 2), LatentLayout((2, 3)), 1),
    "single ignored pixel": (label_map([[-1]], 2), LatentLayout((2, 3)), 1),
    "single label": (random_map(1, 4, 5, 1), LatentLayout((4,)), 1),
    "no pixels": (label_map(torch.zeros(1, 0, 0, dtype=torch.int32), 2), LatentLayout((2, 3)), 1),
    "no rows": (label_map(torch.zeros(1, 0, 5, dtype=torch.int32), 2), LatentLayout((2, 3)), 2),
    "no columns": (label_map(torch.zeros(2, 5, 0, dtype=torch.int32), 2), LatentLayout((2, 3)), 2),
    "no latents for a label": (random_map(2, 3, 5, 3), LatentLayout((2, 0, 3)), 2),
    "no latents": (random_map(2, 3, 5, 3), LatentLayout((0, 0, 0)), 2),
    "all pixels of one label": (label_map(torch.full((2, 9, 9), 1), 3), LatentLayout((2, 3, 1)), 2),
    "every pixel its own label": (label_map(torch.arange(99).view(1, 9, 11), 99), LatentLayout((1, 2, 0) * 33), 1),
    "one map for all images": (random_map(1, 5, 7, 3), LatentLayout((2, 3, 1)), 3),
    "one latent per label": (random_map(2, 9, 9, 4), LatentLayout((1, 1, 1, 1)), 2),
    "many latents": (random_map(2, 9, 9, 3), LatentLayout((70, 0, 65)), 2),
    "a label of many pixels": (mostly(1, random_map(1, 28, 31, 3)), LatentLayout((2, 5, 1)), 1),
    "many labels": (random_map(1, 20, 20, 150), LatentLayout((2, 0, 1) * 50), 1),
    "a row of pixels": (random_map(2, 1, 700, 3), LatentLayout((2, 3, 1)), 2),
    "a column of pixels": (random_map(2, 700, 1, 3), LatentLayout((2, 3, 1)), 2),
}


def channels_last(x: Tensor) -> Tensor:
    # By hand, since PyTorch leaves maps of one channel or one pixel as they are.
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


MEMORY = {"channels first": torch.clone, "channels last": channels_last}


def arranged(problem: Problem, memory: str, gradient_memory: str = "channels first") -> Problem:
    """x, and the gradient that is like it, as a key of ``MEMORY`` says."""
    out = problem.gradients.get("out")
    gradients = {} if out is None else {"out": MEMORY[gradient_memory](out)}
    return problem.with_tensors(x=MEMORY[memory](problem.tensors["x"])).with_gradients(**gradients)


def cropped(x: Tensor) -> Tensor:
    """A view of a larger map, which holds NaN elsewhere."""
    return torch.nn.functional.pad(x, (1, 2, 3, 1), value=torch.nan)[:, :, 3:-1, 1:-2]


def cropped_channels_last(x: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x, (1, 2, 3, 1, 2, 1), value=torch.nan)
    return channels_last(padded)[:, 2:-1, 3:-1, 1:-2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def every_third_column(x: Tensor) -> Tensor:
    apart = x.new_full((*x.shape, 3), torch.nan)
    apart[..., 0] = x
    return apart.flatten(3)[..., ::3]


def every_other_channel(x: Tensor) -> Tensor:
    return channels_last(torch.stack((x, torch.full_like(x, torch.nan)), 2).flatten(1, 2))[:, ::2]


def batch_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def unaligned(x: Tensor) -> Tensor:
    """One element past the beginning of an allocation."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


ARRANGEMENTS = (
    channels_last, cropped, cropped_channels_last, transposed, every_third_column, every_other_channel, batch_last,
    unaligned,
)  # fmt: skip
# Sizes of one, repeated: the numbers change.
EXPANSIONS = {
    "image": (0,), "channel": (1,), "row": (2,), "column": (3,), "pixel": (2, 3), "number": (0, 1, 2, 3),
}  # fmt: skip


def expanded(x: Tensor, dimensions: Sequence[int]) -> Tensor:
    shape = x.shape
    for dimension in dimensions:
        x = x.narrow(dimension, 0, 1)
    return x.expand(shape)
