"""A call's arguments in the type that is computed in, the latents that it needs, and the way that was chosen for it."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..labels import LabelMap, LatentLayout, LatentSelection
from ..tracing import is_recording, is_tracing
from .cache import FoldingCache
from .cost import Choice, FoldingChoice, FoldingProblem, choose
from .layers import AttentionProjections, Projection, SeparableEncoding

Empty = Literal["uniform", "zero"]
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Call:
    """A call of an attention between pixels and latents, ready to be computed in the way that was chosen.

    Attributes:
        pixels_attend: to the latents; otherwise the latents to them.
        x: the features.
        latents: all of them, of the type that is computed in, like the layers and the encoding.
        layout: of all latents.
        labels: at x's resolution.
        attention, encoding, empty: as given.
        tails: linear layers behind the attention.
        given: all layers as given, by which products are remembered.
        choice: the way.
        present: the latents of labels that are present, if the choice is to use no others.
        cache: remembers products; None if nothing may be remembered.
    """

    pixels_attend: bool
    x: Tensor
    latents: Tensor
    layout: LatentLayout
    labels: LabelMap
    attention: AttentionProjections
    tails: tuple[Projection, ...]
    given: tuple[Projection, ...]
    encoding: SeparableEncoding | None
    empty: Empty
    choice: FoldingChoice
    present: Present | None
    cache: FoldingCache | None

    @property
    def dtype(self) -> torch.dtype:
        return self.latents.dtype

    @property
    def table_dtype(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def tokens(self) -> LatentLayout | LatentSelection:
        return self.layout if self.present is None else self.present.selection

    @property
    def used_latents(self) -> Tensor:
        """(B, m', D), those that ``tokens`` tells of."""
        return self.latents if self.present is None else self.present.selection.gather(self.latents)

    def once(self, name: str, make: Callable[[], _Made]) -> _Made:
        """What ``make`` returns, a product of weights alone."""
        if self.cache is None:
            return make()
        return self.cache.product(name, self.given, self.dtype, make)


def folding_type(tensors: Iterable[Tensor], layers: Iterable[Projection]) -> torch.dtype:
    """What rows are folded in: float64 where anything is, otherwise float32."""
    for tensor in chain(tensors, *(layer.tensors for layer in layers)):
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def prepare(
    use: Literal["pool", "attend", "modulate"],
    x: Tensor,
    latents: Tensor,
    layout: LatentLayout,
    labels: LabelMap,
    attention: AttentionProjections,
    tails: tuple[Projection, ...],
    encoding: SeparableEncoding | None,
    empty: Empty,
    choice: Choice,
    cache: FoldingCache | None,
) -> Call:
    batch, channels, height, width = x.shape
    labels = labels.at(height, width)
    given = (*attention.layers, *tails)
    dtype = folding_type((x, latents), given)
    if cache is not None and not cache.serves(given):
        cache = None
    grad = torch.is_grad_enabled()
    problem = FoldingProblem(
        use=use,
        images=batch,
        height=height,
        width=width,
        channels=channels,
        layout_latents=layout.count,
        latents=layout.count,
        latent_dim=latents.shape[2],
        attention_dim=attention.query.out_features,
        num_heads=attention.num_heads,
        latents_per_label=layout.count / layout.num_labels,
        encoding=0 if encoding is None else encoding.row.shape[1],
        concatenated=encoding is not None and encoding.concatenated,
        weights_grad=grad and any(tensor.requires_grad for layer in given for tensor in layer.tensors),
        latents_grad=grad and latents.requires_grad,
        features_grad=grad and x.requires_grad,
        cached=cache is not None,
        foldable=use != "attend" or attention.out.out_features == channels,
        device=x.device.type,
    )
    way, present = _choose_latents(problem, choice, layout, labels)
    return Call(
        pixels_attend=use != "pool",
        x=x,
        latents=latents.to(dtype),
        layout=layout,
        labels=labels,
        attention=attention.to(dtype),
        tails=tuple(tail.to(dtype) for tail in tails),
        given=given,
        encoding=None if encoding is None else encoding.to(dtype),
        empty=empty,
        choice=way,
        present=present,
        cache=cache,
    )


class Present(NamedTuple):
    """The latents of labels that are present.

    Attributes:
        selection: of the layout.
        is_present: (B or 1, m), which latents are selected.
        row: (B or 1, m), where each of them is in the selection; any row for the others.
        leaves_out_pixels: whether there may be a pixel without latents.
    """

    selection: LatentSelection
    is_present: Tensor
    row: Tensor
    leaves_out_pixels: bool

    def scatter(self, rows: Tensor, absent: Tensor) -> Tensor:
        """Rows (B, m', D) back to (B, m, D), with the row (B, D) for all latents that are not selected."""
        batch, count, width = rows.shape
        begin = torch.arange(batch, device=rows.device).unsqueeze(1) * count
        # A picked row rather than a written one: the gradient of each row is then one number plus zeros.
        picked = (
            rows.reshape(-1, width).index_select(0, (self.row + begin).flatten()).view(batch, self.row.shape[1], width)
        )
        return torch.where(self.is_present.unsqueeze(-1), picked, absent.unsqueeze(1))


_presences: weakref.WeakKeyDictionary[LabelMap, dict[LatentLayout, Present]] = weakref.WeakKeyDictionary()


def _choose_latents(
    problem: FoldingProblem, choice: Choice, layout: LatentLayout, labels: LabelMap
) -> tuple[FoldingChoice, Present | None]:
    """How a call is computed, and the latents of labels that are present if no others are used."""
    reads_back = labels.device.type == "cpu" and not is_recording(labels.labels) and not is_tracing()
    expected = layout.count
    if not isinstance(choice, FoldingChoice):
        most_labels = min(layout.num_labels, operator.index(labels.height * labels.width))
        expected = sum(sorted(layout.latents_per_label, reverse=True)[:most_labels])
    if reads_back:
        # Half of them, until one looks; what an earlier call found must not decide, or equal calls would differ.
        expected = min(expected, -(-layout.count // 2))
    way = choose(replace(problem, latents=expected), choice)
    if not way.selects:
        return way, None
    known = _presences.get(labels, {}).get(layout) if reads_back else None
    if known is None:
        known = _find_present(layout, labels, reads_back)
        if reads_back:
            _presences.setdefault(labels, {})[layout] = known
    if known.selection.count != expected:
        way = choose(replace(problem, latents=known.selection.count), choice)
    return way, known if way.selects else None


def _find_present(layout: LatentLayout, labels: LabelMap, reads_back: bool) -> Present:
    with torch.inference_mode(False) if reads_back else nullcontext():  # what is remembered may serve training later
        selection = layout.present_in(labels)
        is_present = selection.is_present
        row = (is_present.cumsum(1) - 1).clamp(min=0)
        leaves_out_pixels = True
        if reads_back:
            plan = labels.plan
            assert plan is not None
            pixels = plan.offsets.diff()
            owned = layout.offsets(labels.device).diff() > 0
            leaves_out_pixels = bool(((pixels * owned).sum(1) < labels.height * labels.width).any())
    return Present(selection, is_present, row, leaves_out_pixels)
