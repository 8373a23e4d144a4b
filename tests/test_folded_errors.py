"""What bad input to semantic_pool and semantic_modulate gets: an error that names the argument, expected and given."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, cpu, semantic_modulate, semantic_pool

half, double = torch.bfloat16, torch.float64
LAYOUT = LatentLayout((2, 3))


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def pixels(*shape: int, num_labels: int = 2, device: str = "cpu") -> LabelMap:
    return LabelMap(torch.zeros(shape, dtype=torch.int32, device=device), num_labels)


def pool(**changes: Any) -> Any:
    """A correct call of five latents and twelve pixels, and then the changes."""
    good = {
        "queries": tensor(2, 3, 5, 8),
        "x": tensor(2, 8, 3, 4),
        "layout": LAYOUT,
        "labels": pixels(2, 3, 4),
        "row_bias": tensor(2, 3, 5, 3),
        "col_bias": tensor(2, 3, 5, 4),
    }
    return semantic_pool(**{**good, **changes})


def modulate(**changes: Any) -> Any:
    good = {
        "x": tensor(2, 8, 3, 4),
        "keys": tensor(2, 3, 5, 8),
        "scale": tensor(2, 3, 5, 8),
        "shift": tensor(2, 3, 5, 8),
        "layout": LAYOUT,
        "labels": pixels(2, 3, 4),
        "key_bias": tensor(2, 3, 5),
        "row_bias": tensor(2, 3, 5, 3),
        "col_bias": tensor(2, 3, 5, 4),
    }
    return semantic_modulate(**{**good, **changes})


CALLS = {"semantic_pool": pool, "semantic_modulate": modulate}
Errors = dict[str, tuple[dict[str, Any], type[Exception], str]]

# Of both operators.
COMMON: Errors = {
    "no tensor": ({"x": [[1.0]]}, TypeError, "x: expected a tensor, got list"),
    "integers": (
        {"x": tensor(2, 8, 3, 4, dtype=torch.int64)},
        TypeError,
        "x: expected float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "complex": (
        {"x": tensor(2, 8, 3, 4, dtype=torch.complex64)},
        TypeError,
        "x: expected float32, float64, bfloat16 or float16, got torch.complex64",
    ),
    "x without images": (
        {"x": tensor(8, 3, 4)},
        ValueError,
        "x: expected shape (B, C, height, width), got (8, 3, 4)",
    ),
    "a tensor as labels": (
        {"labels": torch.zeros(2, 3, 4, dtype=torch.int32)},
        TypeError,
        "labels: expected a LabelMap, got Tensor",
    ),
    "a map as layout": (
        {"layout": pixels(2, 3, 4)},
        TypeError,
        "layout: expected a LatentLayout or a LatentSelection, got LabelMap",
    ),
    "numbers as layout": (
        {"layout": (2, 3)},
        TypeError,
        "layout: expected a LatentLayout or a LatentSelection, got tuple",
    ),
    "size of labels": (
        {"labels": pixels(2, 6, 8)},
        ValueError,
        "labels: expected a label map of 3 x 4 pixels like x, got 6 x 8 (use at(height, width) to resize it)",
    ),
    "rows and columns of labels": (
        {"labels": pixels(2, 4, 3)},
        ValueError,
        "labels: expected a label map of 3 x 4 pixels like x, got 4 x 3 (use at(height, width) to resize it)",
    ),
    "images of labels": (
        {"labels": pixels(3, 3, 4)},
        ValueError,
        "labels: expected label maps for 2 images or for one, got 3",
    ),
    "no images of labels": (
        {"labels": pixels(0, 3, 4)},
        ValueError,
        "labels: expected label maps for 2 images or for one, got 0",
    ),
    "device of labels": (
        {"labels": pixels(2, 3, 4, device="meta")},
        ValueError,
        "labels: expected a label map on cpu like x, got one on meta",
    ),
    "number of labels": (
        {"layout": LatentLayout((2, 2, 1))},
        ValueError,
        "layout: expected 2 labels like labels, got 3",
    ),
    "device of a selection": (
        {"layout": LAYOUT.present_in(pixels(2, 3, 4, device="meta"))},
        ValueError,
        "layout: expected a selection on cpu like x, got one on meta",
    ),
    "images of a selection": (
        {"layout": LAYOUT.present_in(pixels(3, 3, 4))},
        ValueError,
        "layout: expected a selection for 2 images or for one, got 3",
    ),
    "row_bias for columns": (
        {"row_bias": tensor(2, 3, 5, 4)},
        ValueError,
        "row_bias: expected shape (2, 3, 5, 3), got (2, 3, 5, 4)",
    ),
    "col_bias for rows": (
        {"col_bias": tensor(2, 3, 5, 3)},
        ValueError,
        "col_bias: expected shape (2, 3, 5, 4), got (2, 3, 5, 3)",
    ),
    "row_bias without heads": (
        {"row_bias": tensor(2, 5, 3)},
        ValueError,
        "row_bias: expected shape (2, 3, 5, 3), got (2, 5, 3)",
    ),
    "type of row_bias": (
        {"row_bias": tensor(2, 3, 5, 3, dtype=half)},
        TypeError,
        "row_bias: expected torch.float32, the type that x is computed in, got torch.bfloat16",
    ),
    "type of col_bias": (
        {"col_bias": tensor(2, 3, 5, 4, dtype=double)},
        TypeError,
        "col_bias: expected torch.float32, the type that x is computed in, got torch.float64",
    ),
    "device of col_bias": (
        {"col_bias": tensor(2, 3, 5, 4, device="meta")},
        ValueError,
        "col_bias: expected a tensor on cpu like x, got one on meta",
    ),
    "a number as row_bias": ({"row_bias": 1.0}, TypeError, "row_bias: expected a tensor, got float"),
    "empty": ({"empty": "mean"}, ValueError, "empty: expected 'uniform' or 'zero', got 'mean'"),
    "empty of another type": ({"empty": None}, ValueError, "empty: expected 'uniform' or 'zero', got None"),
}


def rows_errors(name: str) -> Errors:
    """Of a table of rows (B, H, m, C)."""
    first = name in ("queries", "keys")
    expected = "(B, H, m, C)" if first else "(2, 3, 5, 8)"
    return {
        f"no tensor as {name}": ({name: None}, TypeError, f"{name}: expected a tensor, got NoneType"),
        f"{name} without heads": (
            {name: tensor(2, 5, 8)}, ValueError, f"{name}: expected shape {expected}, got (2, 5, 8)",
        ),
        f"images of {name}": (
            {name: tensor(1, 3, 5, 8)}, ValueError, f"{name}: expected shape (2, 3, 5, 8), got (1, 3, 5, 8)",
        ),
        f"latents of {name}": (
            {name: tensor(2, 3, 6, 8)}, ValueError, f"{name}: expected shape (2, 3, 5, 8), got (2, 3, 6, 8)",
        ),
        f"channels of {name}": (
            {name: tensor(2, 3, 5, 7)}, ValueError, f"{name}: expected shape (2, 3, 5, 8), got (2, 3, 5, 7)",
        ),
        f"type of {name}": (
            {name: tensor(2, 3, 5, 8, dtype=double)},
            TypeError,
            f"{name}: expected torch.float32, the type that x is computed in, got torch.float64",
        ),
        f"type of {name} with x of 16 bits": (
            {"x": tensor(2, 8, 3, 4, dtype=half), name: tensor(2, 3, 5, 8, dtype=half)},
            TypeError,
            f"{name}: expected torch.float32, the type that x is computed in, got torch.bfloat16",
        ),
        f"device of {name}": (
            {name: tensor(2, 3, 5, 8, device="meta")},
            ValueError,
            f"{name}: expected a tensor on cpu like x, got one on meta",
        ),
    }  # fmt: skip


def per_channel_errors(argument: str, name: str, wrap: Any) -> Errors:
    """Of a table that is broadcast to (B, C)."""
    return {
        f"a number as {name}": ({**wrap(1.0)}, TypeError, f"{name}: expected a tensor, got float"),
        f"type of {name}": (
            {**wrap(tensor(2, 8, dtype=half))},
            TypeError,
            f"{name}: expected torch.float32, the type that x is computed in, got torch.bfloat16",
        ),
        f"shape of {name}": (
            {**wrap(tensor(2, 7))},
            ValueError,
            f"{name}: expected a shape that broadcasts to (2, 8), got (2, 7)",
        ),
        f"images of {name}": (
            {**wrap(tensor(3, 8))},
            ValueError,
            f"{name}: expected a shape that broadcasts to (2, 8), got (3, 8)",
        ),
        f"pixels of {name}": (
            {**wrap(tensor(2, 8, 1, 1))},
            ValueError,
            f"{name}: expected a shape that broadcasts to (2, 8), got (2, 8, 1, 1)",
        ),
        f"device of {name}": (
            {**wrap(tensor(2, 8, device="meta"))},
            ValueError,
            f"{name}: expected a tensor on cpu like x, got one on meta",
        ),
    }


def seed(*shape: int, **options: Any) -> dict[str, Any]:
    return {"noise": "per_element", "noise_seed": torch.zeros(shape, **{"dtype": torch.int64, **options})}


NOISE: Errors = {
    "another word for noise": (
        {"noise": "gaussian"}, ValueError, "noise: expected a tensor, 'per_element' or None, got 'gaussian'",
    ),
    "a number as noise": (
        {"noise": 0.5}, TypeError, "noise: expected a tensor, 'per_element' or None, got float",
    ),
    "integers as noise": (
        {"noise": tensor(3, 4, dtype=torch.int64)},
        TypeError,
        "noise: expected floating-point numbers, got torch.int64",
    ),
    "noise that requires a gradient": (
        {"noise": tensor(3, 4).requires_grad_()},
        ValueError,
        "noise: expected a tensor that takes no gradient, got one that requires it",
    ),
    "noise for each channel": (
        {"noise": tensor(2, 8, 3, 4)},
        ValueError,
        "noise: expected a shape that broadcasts to (2, 1, 3, 4), got (2, 8, 3, 4)",
    ),
    "noise of another size": (
        {"noise": tensor(4, 3)}, ValueError, "noise: expected a shape that broadcasts to (2, 1, 3, 4), got (4, 3)",
    ),
    "device of noise": (
        {"noise": tensor(3, 4, device="meta")},
        ValueError,
        "noise: expected a tensor on cpu like x, got one on meta",
    ),
    "a seed without noise": (
        {"noise_seed": torch.tensor(0)},
        ValueError,
        'noise_seed: expected None unless noise="per_element", got a seed',
    ),
    "a seed with given noise": (
        {"noise": tensor(3, 4), "noise_seed": torch.tensor(0)},
        ValueError,
        'noise_seed: expected None unless noise="per_element", got a seed',
    ),
    "a number as seed": (
        {"noise": "per_element", "noise_seed": 3}, TypeError, "noise_seed: expected an int64 tensor, got int",
    ),
    "type of seed": (
        seed(1, dtype=torch.int32), TypeError, "noise_seed: expected an int64 tensor, got torch.int32",
    ),
    "two seeds": (seed(2), ValueError, "noise_seed: expected one element, got shape (2,)"),
    "no seed": (seed(0), ValueError, "noise_seed: expected one element, got shape (0,)"),
    "device of seed": (
        seed(1, device="meta"), ValueError, "noise_seed: expected a tensor on cpu like x, got one on meta",
    ),
    "strength without noise": (
        {"noise_strength": tensor(8)}, ValueError, "noise_strength: expected None without noise, got a strength",
    ),
}  # fmt: skip

STATS: Errors = {
    "a tensor as stats": (
        {"stats": tensor(2, 8)}, TypeError, "stats: expected a pair (mean, rstd) or None, got Tensor",
    ),
    "one statistic": (
        {"stats": (tensor(8),)}, ValueError, "stats: expected a pair (mean, rstd), got 1 elements",
    ),
    "three statistics": (
        {"stats": (tensor(8),) * 3}, ValueError, "stats: expected a pair (mean, rstd), got 3 elements",
    ),
}  # fmt: skip

TOGETHER: Errors = {
    "empty_scale alone": (
        {"empty_scale": tensor(8)},
        ValueError,
        "empty_shift: expected empty_scale and empty_shift together, got None",
    ),
    "empty_shift alone": (
        {"empty_shift": tensor(8)},
        ValueError,
        "empty_scale: expected empty_scale and empty_shift together, got None",
    ),
    "a selection with the uniform rule": (
        {
            "layout": LAYOUT.present_in(pixels(2, 3, 4)),
            **{name: tensor(2, 3, 2, 8) for name in ("keys", "scale", "shift")},
            **dict.fromkeys(("key_bias", "row_bias", "col_bias")),
        },
        ValueError,
        "empty_scale, empty_shift: expected both with a selection and empty='uniform', "
        "since it holds not all of the rows whose mean that is, got None",
    ),
    "key_bias with rows": (
        {"key_bias": tensor(2, 3, 5, 3)},
        ValueError,
        "key_bias: expected shape (2, 3, 5), got (2, 3, 5, 3)",
    ),
    "type of key_bias": (
        {"key_bias": tensor(2, 3, 5, dtype=half)},
        TypeError,
        "key_bias: expected torch.float32, the type that x is computed in, got torch.bfloat16",
    ),
}  # fmt: skip


def with_other(name: str, other: str) -> Any:
    return lambda value: {name: value, other: tensor(8)}


ERRORS: dict[tuple[str, str], tuple[dict[str, Any], type[Exception], str]] = {
    **{(operator, error): case for operator in CALLS for error, case in COMMON.items()},
    **{("semantic_pool", error): case for error, case in rows_errors("queries").items()},
    **{
        ("semantic_modulate", error): case
        for errors in (
            *(rows_errors(name) for name in ("keys", "scale", "shift")),
            *(
                per_channel_errors(name, name, lambda value, name=name: {name: value})
                for name in ("scale_bias", "shift_bias")
            ),
            per_channel_errors("empty_scale", "empty_scale", with_other("empty_scale", "empty_shift")),
            per_channel_errors("empty_shift", "empty_shift", with_other("empty_shift", "empty_scale")),
            per_channel_errors("stats", "stats[0] (mean)", lambda value: {"stats": (value, tensor(8))}),
            per_channel_errors("stats", "stats[1] (rstd)", lambda value: {"stats": [tensor(8), value]}),
            per_channel_errors(
                "noise_strength", "noise_strength", lambda value: {"noise": tensor(3, 4), "noise_strength": value}
            ),
            NOISE,
            STATS,
            TOGETHER,
        )
        for error, case in errors.items()
    },
}


@pytest.mark.parametrize(("operator", "error"), ERRORS, ids=lambda part: part)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input_is_named(native, operator, error, backend):
    """The same words from every backend."""
    changes, kind, message = ERRORS[operator, error]
    with sca_kernels.backend(backend), pytest.raises(kind, match=f"^{re.escape(message)}$"):
        CALLS[operator](**changes)


@pytest.mark.parametrize("operator", CALLS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_call_that_is_changed_is_correct(native, operator, backend):
    with sca_kernels.backend(backend):
        CALLS[operator]()


@pytest.mark.parametrize("operator", CALLS)
def test_bad_input_is_named_under_autocast(native, operator):
    """Nothing is cast, so a wrong type stays one."""
    name = {"semantic_pool": "queries", "semantic_modulate": "keys"}[operator]
    with (
        torch.autocast("cpu"),
        pytest.raises(TypeError, match=f"^{name}: expected torch.float32, .* got torch.bfloat16$"),
    ):
        CALLS[operator](**{name: tensor(2, 3, 5, 8, dtype=half)})


@pytest.mark.parametrize("operator", CALLS)
def test_forced_backend_that_cannot_run_says_why(monkeypatch, operator):
    monkeypatch.setattr(cpu, "_load_error", "the library was left at home")
    message = f"backend 'cpu' cannot serve {operator} on cpu in torch.float32: the library was left at home"
    with sca_kernels.backend("cpu"), pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        CALLS[operator]()


@pytest.mark.parametrize("operator", CALLS)
def test_without_the_library_the_reference_serves(monkeypatch, operator):
    """By default, and with the same result."""
    with sca_kernels.backend("reference"):
        expected = CALLS[operator]()
    monkeypatch.setattr(cpu, "_load_error", "the library was left at home")
    actual = CALLS[operator]()
    if operator == "semantic_modulate":
        expected, actual = (expected,), (actual,)
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)
