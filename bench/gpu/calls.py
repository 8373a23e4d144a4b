"""Calls of the operators of all kinds and at the published shapes: what is compiled, counted and, on a GPU, timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sca_kernels
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
BACKENDS = ("triton", "cuda")
LABELS = 19


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Attributes:
        operator: its name.
        name: what is special about it.
        dtype: of the feature map or of the tokens.
        prepare: makes the tensors, on PyTorch's default device, and returns a ``functools.partial`` of the operator.
        headline: whether it is one of the shapes that figures are published for.
        backends: those that have kernels for it.
    """

    operator: str
    name: str
    dtype: torch.dtype
    prepare: Callable[[], Callable[[], Results]]
    headline: bool = False
    backends: tuple[str, ...] = BACKENDS

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


def all_calls(dtypes: Sequence[torch.dtype] = DTYPES, *, shrink: int = 1, batch: int = 1) -> Iterator[Call]:
    """Every kernel is launched by one of them, in each configuration that is shipped.

    Args:
        dtypes: of the feature maps and tokens.
        shrink: the sides of all maps are divided by it.
        batch: the number of images, which share a label map.
    """
    for dtype in dtypes:
        yield from instance_modulate_calls(dtype, shrink, batch)
        yield from semantic_cross_attention_calls(dtype, shrink, batch)
        yield from folded_calls(dtype, shrink, batch)


def call_once(backend: str, operator: str, device: str = "cuda", shrink: int = 8) -> None:
    """Runs an operator's calls on small maps, forward and backward: what compute-sanitizer, which is slow, looks at."""
    # Triton would compile most of that time.
    dtypes = [torch.bfloat16] if backend == "triton" else DTYPES
    for call in all_calls(dtypes, shrink=shrink):
        if call.operator == operator and backend in call.backends and (call.headline or backend != "triton"):
            with torch.device(device), sca_kernels.backend(backend):
                step_of(call.prepare())()
    if device == "cuda":
        torch.cuda.synchronize()


def label_map(height: int, width: int, num_labels: int) -> LabelMap:
    """Squares of labels, as large as regions of a photograph are."""
    side = max(height // 8, 1)
    squares = torch.arange(height)[:, None] // side * 8 + torch.arange(width) // side
    return LabelMap.from_labels((squares * 7 % num_labels)[None], num_labels, validate=False).at(height, width)


def instance_modulate_calls(dtype: torch.dtype, shrink: int, batch: int) -> Iterator[Call]:
    for order, memory in MEMORY.items():
        for by_pixel in (True, False):
            prepare = functools.partial(
                prepare_instance_modulate, dtype, batch=batch, size=256 // shrink, memory=memory, by_pixel=by_pixel
            )
            name = f"by {'pixel' if by_pixel else 'channel'}, {order}"
            yield Call("instance_modulate", name, dtype, prepare, headline=by_pixel)


def semantic_cross_attention_calls(dtype: torch.dtype, shrink: int, batch: int) -> Iterator[Call]:
    for query, key, latents, size, width in (
        ("pixels", "latents", 8, 256, 256),
        ("pixels", "latents", 32, 64, 64),
        ("latents", "pixels", 8, 256, 256),
        ("latents", "latents", 8, 64, 64),
        ("pixels", "pixels", 8, 64, 64),
    ):
        prepare = functools.partial(
            prepare_attention, dtype, query, key, batch=batch, size=size // shrink, latents=latents, width=width
        )
        name = f"{query} to {key}, {latents} latents, width {width}"
        backends = ("triton",) if query == key == "pixels" else BACKENDS
        yield Call("semantic_cross_attention", name, dtype, prepare, headline=size == 256, backends=backends)


def folded_calls(dtype: torch.dtype, shrink: int, batch: int) -> Iterator[Call]:
    """semantic_pool and semantic_modulate."""
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
            prepare = functools.partial(
                prepare_folded, operator, dtype,
                batch=batch, channels=channels, size=size // shrink, heads=heads, latents=latents, memory=MEMORY[order],
            )  # fmt: skip
            name = f"{channels} channels, {size} x {size}, {heads} heads of {latents} latents, {order}"
            yield Call(operator, name, dtype, prepare, headline=size >= 128)


def prepare_instance_modulate(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    channels: int = 64,
    size: int,
    memory: torch.memory_format = torch.contiguous_format,
    by_pixel: bool = True,
) -> Callable[[], Results]:
    shape = (batch, channels, size, size)

    def feature_map() -> Tensor:
        return torch.randn(shape, dtype=dtype).to(memory_format=memory).requires_grad_()

    if by_pixel:
        options: dict[str, Any] = {
            "noise": torch.randn(1, 1, size, size),
            "noise_strength": torch.ones(channels, requires_grad=True),
        }
        parameters = [feature_map() for _ in range(2)]
    else:
        options = {
            "noise": "per_element",
            "noise_seed": torch.zeros(1, dtype=torch.int64),
            "stats": (torch.zeros(channels), torch.ones(channels)),
            "add_one": False,
        }
        parameters = [torch.ones((batch, channels), requires_grad=True) for _ in range(2)]
    return functools.partial(instance_modulate, feature_map(), *parameters, **options)


def prepare_attention(
    dtype: torch.dtype,
    query: str,
    key: str,
    *,
    batch: int = 1,
    size: int,
    latents: int,
    width: int,
    labels: LabelMap | None = None,
) -> Callable[[], Results]:
    """Of "pixels" or "latents" to either; ``labels`` is (1, size, size)."""
    pixels = labels or label_map(size, size, LABELS)
    layout = LatentLayout.uniform(pixels.num_labels, latents)
    sides = {"pixels": (pixels, size * size), "latents": (layout, layout.count)}
    (query_tokens, queries), (key_tokens, keys) = sides[query], sides[key]
    shapes = [(batch, 1, count, width) for count in (queries, keys, keys)]
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return functools.partial(semantic_cross_attention, *tensors, query_tokens, key_tokens, return_lse=False)


def prepare_folded(
    operator: str,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    channels: int,
    size: int,
    heads: int = 1,
    latents: int,
    memory: torch.memory_format = torch.contiguous_format,
    labels: LabelMap | None = None,
) -> Callable[[], Results]:
    """Of semantic_pool or semantic_modulate; ``labels`` is (1, size, size)."""
    labels = labels or label_map(size, size, LABELS)
    layout = LatentLayout.uniform(labels.num_labels, latents)

    def rows(*width: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(batch, heads, layout.count, *width) * scale).requires_grad_()

    named: dict[str, Any] = {
        "x": torch.randn(batch, channels, size, size, dtype=dtype).to(memory_format=memory).requires_grad_(),
        "layout": layout,
        "labels": labels,
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
