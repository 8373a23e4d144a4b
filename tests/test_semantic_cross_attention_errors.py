"""What bad input gets: an error that names the argument, what was expected and what was given."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, LatentSelection, cpu, semantic_cross_attention


def arguments(**changes: Any) -> dict[str, Any]:
    """A correct call with twelve pixels as queries and five latents as keys, and then the changes."""
    pixels = LabelMap.from_labels(torch.zeros(2, 3, 4, dtype=torch.int32), num_labels=2)
    good = {
        "query": torch.randn(2, 3, 12, 8),
        "key": torch.randn(2, 3, 5, 8),
        "value": torch.randn(2, 3, 5, 6),
        "query_tokens": pixels,
        "key_tokens": LatentLayout((2, 3)),
    }
    return {**good, **changes}


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def pixels(*shape: int, num_labels: int = 2, device: str = "cpu") -> LabelMap:
    return LabelMap(torch.zeros(shape, dtype=torch.int32, device=device), num_labels)


def selection(batch: int = 2, layout: tuple[int, ...] = (5, 3), device: str = "cpu") -> LatentSelection:
    """The latents of label 0, by default the five keys."""
    chosen = LatentLayout(layout).present_in(pixels(batch, 3, 4, num_labels=len(layout)))
    return LatentSelection(chosen.layout, chosen.index.to(device), chosen.cu_latents.to(device))


half, double = torch.bfloat16, torch.float64

ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "type of query": (
        {"query": tensor(2, 3, 12, 8, dtype=torch.int64)},
        TypeError,
        "query: expected float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "complex": (
        {"query": tensor(2, 3, 12, 8, dtype=torch.complex64)},
        TypeError,
        "query: expected float32, float64, bfloat16 or float16, got torch.complex64",
    ),
    "type of key": (
        {"key": tensor(2, 3, 5, 8, dtype=half)},
        TypeError,
        "key: expected torch.float32 like query, got torch.bfloat16",
    ),
    "type of value": (
        {"value": tensor(2, 3, 5, 6, dtype=double)},
        TypeError,
        "value: expected torch.float32 like query, got torch.float64",
    ),
    "query without heads": (
        {"query": tensor(2, 12, 8)},
        ValueError,
        "query: expected shape (B, H, N, D), got (2, 12, 8)",
    ),
    "key without heads": ({"key": tensor(2, 5, 8)}, ValueError, "key: expected shape (B, H, N, D), got (2, 5, 8)"),
    "value without heads": ({"value": tensor(5, 6)}, ValueError, "value: expected shape (B, H, N, D), got (5, 6)"),
    "batch of key": (
        {"key": tensor(1, 3, 5, 8)},
        ValueError,
        "key: expected shape (2, 3, Nk, 8) to match query, got (1, 3, 5, 8)",
    ),
    "heads of key": (
        {"key": tensor(2, 1, 5, 8)},
        ValueError,
        "key: expected shape (2, 3, Nk, 8) to match query, got (2, 1, 5, 8)",
    ),
    "width of key": (
        {"key": tensor(2, 3, 5, 7)},
        ValueError,
        "key: expected shape (2, 3, Nk, 8) to match query, got (2, 3, 5, 7)",
    ),
    "batch of value": (
        {"value": tensor(1, 3, 5, 6)},
        ValueError,
        "value: expected shape (2, 3, 5, Dv) to match key, got (1, 3, 5, 6)",
    ),
    "heads of value": (
        {"value": tensor(2, 2, 5, 6)},
        ValueError,
        "value: expected shape (2, 3, 5, Dv) to match key, got (2, 2, 5, 6)",
    ),
    "tokens of value": (
        {"value": tensor(2, 3, 4, 6)},
        ValueError,
        "value: expected shape (2, 3, 5, Dv) to match key, got (2, 3, 4, 6)",
    ),
    "pixels of queries": (
        {"query_tokens": pixels(2, 3, 3)},
        ValueError,
        "query_tokens: expected a label map of 12 pixels, the tokens of query, got 3 x 3 (use at(height, width) to"
        " resize it)",
    ),
    "pixels of keys": (
        {"key_tokens": pixels(2, 2, 3)},
        ValueError,
        "key_tokens: expected a label map of 5 pixels, the tokens of key, got 2 x 3 (use at(height, width) to"
        " resize it)",
    ),
    "latents of queries": (
        {"query_tokens": LatentLayout((12, 1))},
        ValueError,
        "query_tokens: expected a layout of 12 latents, the tokens of query, got 13",
    ),
    "latents of keys": (
        {"key_tokens": LatentLayout((2, 2))},
        ValueError,
        "key_tokens: expected a layout of 5 latents, the tokens of key, got 4",
    ),
    "images of queries": (
        {"query_tokens": pixels(3, 3, 4)},
        ValueError,
        "query_tokens: expected label maps for 2 images or for one, got 3",
    ),
    "images of keys": (
        {"key_tokens": pixels(0, 1, 5)},
        ValueError,
        "key_tokens: expected label maps for 2 images or for one, got 0",
    ),
    "labels of keys": (
        {"key_tokens": LatentLayout((2, 2, 1))},
        ValueError,
        "key_tokens: expected 2 labels like query_tokens, got 3",
    ),
    "labels of queries": (
        {"query_tokens": pixels(2, 3, 4, num_labels=1)},
        ValueError,
        "key_tokens: expected 1 labels like query_tokens, got 2",
    ),
    "a tensor as query_tokens": (
        {"query_tokens": torch.zeros(2, 3, 4, dtype=torch.int32)},
        TypeError,
        "query_tokens: expected a LabelMap, a LatentLayout or a LatentSelection, got Tensor",
    ),
    "no key_tokens": (
        {"key_tokens": None},
        TypeError,
        "key_tokens: expected a LabelMap, a LatentLayout or a LatentSelection, got NoneType",
    ),
    "latents of a selection": (
        {"key_tokens": selection(layout=(4, 3)), "empty": "zero"},
        ValueError,
        "key_tokens: expected a selection of 5 latents, the tokens of key, got 4",
    ),
    "images of a selection": (
        {"key_tokens": selection(batch=3), "empty": "zero"},
        ValueError,
        "key_tokens: expected a selection for 2 images or for one, got 3",
    ),
    "labels of a selection": (
        {"key_tokens": selection(layout=(5, 3, 1)), "empty": "zero"},
        ValueError,
        "key_tokens: expected 2 labels like query_tokens, got 3",
    ),
    "device of a selection": (
        {"key_tokens": selection(device="meta"), "empty": "zero"},
        ValueError,
        "key_tokens: expected a selection on cpu like query, got one on meta",
    ),
    "a selection with the uniform rule": (
        {"key_tokens": selection()},
        ValueError,
        "empty_value: expected it with a selection of keys and empty='uniform', since that holds not all of the values"
        " whose mean that is, got None",
    ),
    "empty_value of another kind": (
        {"empty_value": 0.0},
        TypeError,
        "empty_value: expected a tensor or None, got float",
    ),
    "type of empty_value": (
        {"empty_value": tensor(2, 3, 6, dtype=double)},
        TypeError,
        "empty_value: expected torch.float32 like query, got torch.float64",
    ),
    "shape of empty_value": (
        {"empty_value": tensor(2, 6)},
        ValueError,
        "empty_value: expected a shape that broadcasts to (2, 3, 6), got (2, 6)",
    ),
    "device of empty_value": (
        {"empty_value": tensor(2, 3, 6, device="meta")},
        ValueError,
        "empty_value: expected a tensor on cpu like query, got one on meta",
    ),
    "device of key": (
        {"key": tensor(2, 3, 5, 8, device="meta")},
        ValueError,
        "key: expected a tensor on cpu like query, got one on meta",
    ),
    "device of value": (
        {"value": tensor(2, 3, 5, 6, device="meta")},
        ValueError,
        "value: expected a tensor on cpu like query, got one on meta",
    ),
    "device of the label map": (
        {"query_tokens": pixels(2, 3, 4, device="meta")},
        ValueError,
        "query_tokens: expected a label map on cpu like query, got one on meta",
    ),
    "empty": ({"empty": "mean"}, ValueError, "empty: expected 'uniform' or 'zero', got 'mean'"),
    "empty of another type": ({"empty": None}, ValueError, "empty: expected 'uniform' or 'zero', got None"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input_is_named(native, error, backend):
    """The same words from every backend."""
    changes, kind, message = ERRORS[error]
    with sca_kernels.backend(backend), pytest.raises(kind, match=f"^{re.escape(message)}$"):
        semantic_cross_attention(**arguments(**changes))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_something_that_is_no_tensor_is_named(name):
    with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got list"):
        semantic_cross_attention(**arguments(**{name: [[1.0]]}))


@pytest.mark.parametrize("autocast", [False, True])
def test_integers_are_refused(autocast):
    """Under autocast as well, which casts floating-point numbers only."""
    integers = {name: value.long() for name, value in arguments().items() if isinstance(value, Tensor)}
    with torch.autocast("cpu", enabled=autocast), pytest.raises(TypeError, match=r"^query: expected float32, .*int64$"):
        semantic_cross_attention(**arguments(**integers))


def test_types_that_autocast_leaves_different_are_refused():
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"^key: expected torch.bfloat16 like query, got .*64$"):
        semantic_cross_attention(**arguments(key=tensor(2, 3, 5, 8, dtype=double)))


def test_forced_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "_load_error", "the library was left at home")
    message = (
        "backend 'cpu' cannot serve semantic_cross_attention on cpu in torch.float32: the library was left at home"
    )
    with sca_kernels.backend("cpu"), pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        semantic_cross_attention(**arguments())


def on_meta(good: dict[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, LatentLayout) else value.to("meta") for name, value in good.items()}


def test_forced_backend_on_another_device_says_why(native):
    message = (
        "backend 'cpu' cannot serve semantic_cross_attention on meta in torch.float32: it runs on cpu, not on meta"
    )
    with sca_kernels.backend("cpu"), pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        semantic_cross_attention(**on_meta(arguments()))


def test_any_device_is_served_by_the_reference():
    """Tensors that have sizes only: no kernel of this library knows their device."""
    out, lse = semantic_cross_attention(**on_meta(arguments()), return_lse=True)
    assert out.device.type == "meta" and out.shape == (2, 3, 12, 6) and lse.shape == (2, 3, 12)


@pytest.mark.parametrize("through", ["out", "lse"])
@pytest.mark.parametrize("sides", ["pixel-latent", "latent-pixel", "latent-latent", "pixel-pixel"])
def test_gradients_of_gradients_are_refused(native, sides, through):
    """Loudly, while the graph of the gradients is built, rather than as a gradient that silently has none itself."""
    tokens: dict[str, tuple[Any, int]] = {"pixel": (pixels(2, 3, 4), 12), "latent": (LatentLayout((2, 3)), 5)}
    (query_tokens, queries), (key_tokens, keys) = (tokens[side] for side in sides.split("-"))
    inputs = [torch.randn(2, 1, count, 4, requires_grad=True) for count in (queries, keys, keys)]
    with sca_kernels.backend("cpu"):
        out, lse = semantic_cross_attention(*inputs, query_tokens, key_tokens, return_lse=True)
    result = out if through == "out" else lse
    message = r"semantic_cross_attention: gradients of gradients \(create_graph=True\) .*backend\('reference'\)"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(result.square().sum(), inputs, create_graph=True, allow_unused=True)


def test_forward_mode_is_refused_rather_than_dropped(native):
    """A derivative that is not computed is an error, not zero."""
    good = arguments()

    def attend(query: Tensor) -> Tensor:
        return semantic_cross_attention(**{**good, "query": query})

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(good["query"], torch.ones_like(good["query"]))
        with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
            attend(dual)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(attend, (good["query"],), (good["query"],))
