"""Calls of the operators of all kinds and at the published shapes: what is compiled, counted and, on a GPU, timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sca_kernels import (
    LabelMap,
    LatentLayout,
    instance_modulate,
    semantic_cross_attention,
    semantic_modulate,
    semantic_pool,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"

Results = Tensor | tuple[Tensor, ...]

MEMORY = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Attributes:
        operator: its name.
        name: what is special about it.
        dtype: of the feature map or of the tokens.
        prepare: makes the tensors, on PyTorch's default device, and returns a ``functools.partial`` of the operator.
        headline: whether it is one of the shapes that figures are published for.
    """

    operator: str
    name: str
    dtype: torch.dtype
    prepare: Callable[[], Callable[[], Results]]
    headline: bool = False

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}-{str(self.dtype).removeprefix('torch.')}"


def step_of(run: Callable[[], Results], gradients: list[Tensor] | None = None) -> Callable[[], list[Tensor]]:
    """A function that computes a call's results and the gradients of its arguments.

    Args:
        run: the call, a ``functools.partial`` if any of its results has a gradient.
        gradients: those that backward starts from. Default: random ones, the same at each call.
    """
    start = [] if gradients is None else gradients

    def step() -> list[Tensor]:
        results = run()
        outputs = [results] if isinstance(results, Tensor) else list(results)
        flowing = [output for output in outputs if output.requires_grad]
        if not flowing:
            return outputs
        if not start:
            start.extend(torch.randn_like(output) for output in flowing)
        return [*(output.detach() for output in outputs), *torch.autograd.grad(flowing, leaves_of(run), start)]

    return step


def leaves_of(run: Any) -> list[Tensor]:
    """The arguments of a ``functools.partial`` that take gradients."""
    return [value for value in (*run.args, *run.keywords.values()) if isinstance(value, Tensor) and value.requires_grad]


def all_calls(dtypes: Sequence[torch.dtype] = DTYPES, *, shrink: int = 1) -> Iterator[Call]:
    """Every kernel is launched by one of them, in each configuration that is shipped.

    Args:
        dtypes: of the feature maps and tokens.
        shrink: the sides of all maps are divided by it.
    """
    for dtype in dtypes:
        yield from instance_modulate_calls(dtype, shrink)
        yield from semantic_cross_attention_calls(dtype, shrink)
        yield from folded_calls(dtype, shrink)


def label_map(height: int, width: int, num_labels: int) -> LabelMap:
    """Squares of labels, as large as regions of a photograph are."""
    side = max(height // 8, 1)
    squares = torch.arange(height)[:, None] // side * 8 + torch.arange(width) // side
    return LabelMap.from_labels((squares * 7 % num_labels)[None], num_labels, validate=False).at(height, width)


def instance_modulate_calls(dtype: torch.dtype, shrink: int) -> Iterator[Call]:
    shape = (1, 64, 256 // shrink, 256 // shrink)

    def prepare(memory: torch.memory_format, by_pixel: bool) -> Callable[[], Results]:
        def feature_map() -> Tensor:
            return torch.randn(shape, dtype=dtype).to(memory_format=memory).requires_grad_()

        if by_pixel:
            options: dict[str, Any] = {
                "noise": torch.randn(1, 1, *shape[2:]),
                "noise_strength": torch.ones(shape[1], requires_grad=True),
            }
            parameters = [feature_map() for _ in range(2)]
        else:
            options = {
                "noise": "per_element",
                "noise_seed": torch.zeros(1, dtype=torch.int64),
                "stats": (torch.zeros(shape[1]), torch.ones(shape[1])),
                "add_one": False,
            }
            parameters = [torch.ones(shape[:2], requires_grad=True) for _ in range(2)]
        return functools.partial(instance_modulate, feature_map(), *parameters, **options)

    for order, memory in MEMORY.items():
        by_pixel = functools.partial(prepare, memory, True)
        yield Call("instance_modulate", f"by pixel, {order}", dtype, by_pixel, headline=True)
        by_channel = functools.partial(prepare, memory, False)
        yield Call("instance_modulate", f"by channel, {order}", dtype, by_channel)


def semantic_cross_attention_calls(dtype: torch.dtype, shrink: int) -> Iterator[Call]:
    labels = 19

    def prepare(query: str, key: str, latents: int, size: int, width: int) -> Callable[[], Results]:
        size //= shrink
        layout = LatentLayout.uniform(labels, latents)
        pixels = label_map(size, size, labels)
        sides = {"pixels": (pixels, size * size), "latents": (layout, layout.count)}
        (query_tokens, queries), (key_tokens, keys) = sides[query], sides[key]
        tensors = [torch.randn(1, 1, count, width, dtype=dtype, requires_grad=True) for count in (queries, keys, keys)]
        return functools.partial(semantic_cross_attention, *tensors, query_tokens, key_tokens, return_lse=False)

    for query, key, latents, size, width in (
        ("pixels", "latents", 8, 256, 256),
        ("pixels", "latents", 32, 64, 64),
        ("latents", "pixels", 8, 256, 256),
        ("latents", "latents", 8, 64, 64),
        ("pixels", "pixels", 8, 64, 64),
    ):
        call = functools.partial(prepare, query, key, latents, size, width)
        name = f"{query} to {key}, {latents} latents, width {width}"
        yield Call("semantic_cross_attention", name, dtype, call, headline=size == 256)


def folded_calls(dtype: torch.dtype, shrink: int) -> Iterator[Call]:
    """semantic_pool and semantic_modulate."""
    labels = 19

    def prepare(
        operator: str, channels: int, size: int, heads: int, latents: int, memory: torch.memory_format
    ) -> Callable[[], Results]:
        size //= shrink
        layout = LatentLayout.uniform(labels, latents)

        def rows(*width: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(1, heads, layout.count, *width) * scale).requires_grad_()

        named: dict[str, Any] = {
            "x": torch.randn(1, channels, size, size, dtype=dtype).to(memory_format=memory).requires_grad_(),
            "layout": layout,
            "labels": label_map(size, size, labels),
            "row_bias": rows(size),
            "col_bias": rows(size),
        }
        if operator == "semantic_pool":
            return functools.partial(semantic_pool, queries=rows(channels, scale=channels**-0.5), **named)
        return functools.partial(
            semantic_modulate,
            keys=rows(channels, scale=channels**-0.5),
            scale=rows(channels),
            shift=rows(channels),
            key_bias=rows(),
            scale_bias=torch.randn(channels, requires_grad=True),
            shift_bias=torch.randn(channels, requires_grad=True),
            noise=torch.randn(1, 1, size, size),
            noise_strength=torch.randn(channels, requires_grad=True),
            **named,
        )

    for operator in ("semantic_pool", "semantic_modulate"):
        for channels, size, heads, latents, order in (
            (64, 256, 1, 8, "channels first"),
            (64, 256, 1, 8, "channels last"),
            (128, 128, 1, 8, "channels first"),
            (512, 32, 1, 8, "channels first"),
            (64, 64, 1, 32, "channels first"),
            (64, 64, 2, 32, "channels first"),
            (64, 64, 4, 32, "channels first"),
            (64, 64, 1, 256, "channels first"),
        ):
            call = functools.partial(prepare, operator, channels, size, heads, latents, MEMORY[order])
            name = f"{channels} channels, {size} x {size}, {heads} heads of {latents} latents, {order}"
            yield Call(operator, name, dtype, call, headline=size >= 128)
