"""From the dense masks of the published code to label maps, once for each mask, and back where its own code runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..labels import LabelMap, LatentLayout, is_one_hot, labels_of_one_hot
from ..tracing import is_recording, is_tracing

_Read = TypeVar("_Read")
# What a mask has a plane for.
Planes = Literal["labels", "latents"]


@dataclass(frozen=True, eq=False)
class Regions:
    """What swapped modules hand each other in the place of a mask.

    Attributes:
        labels: the label map, at any resolution.
        layout: of the latents.
        mask: as given by the user, (B, s, H, W), or (B, m, H, W) with a plane for each latent.
        planes: what it has a plane for.
    """

    labels: LabelMap
    layout: LatentLayout
    mask: Tensor
    planes: Planes
    _made: list[Tensor] = field(default_factory=list)

    def at(self, height: int, width: int) -> Regions:
        """With the label map at another resolution."""
        return replace(self, labels=self.labels.at(height, width))

    @property
    def dense(self) -> Tensor:
        """The mask with a plane for each latent, which a module that runs its own code wants."""
        if self.planes == "latents":
            return self.mask
        if not self._made:
            counts = torch.tensor(self.layout.latents_per_label, device=self.mask.device)
            self._made.append(self.mask.repeat_interleave(counts, 1))
        return self._made[0]


class Sides(NamedTuple):
    """Who attends to whom in a mask (B, T, F).

    Attributes:
        latents_attend: whether the tokens that attend are the latents.
        labels: of the other tokens, (B, 1, n); None if these are the latents too.
    """

    latents_attend: bool
    labels: LabelMap | None


def find_regions(mask: Tensor, layout: LatentLayout, planes: Planes, *, assume_one_hot: bool) -> Regions | str | None:
    """What a mask says, what is wrong with it, or None if nobody can look at it or its shape is another.

    Args:
        mask: as in :class:`Regions`.
        layout: of the latents.
        planes: what the mask should have a plane for.
        assume_one_hot: whether to believe that the mask is one-hot.
    """
    expected = layout.num_labels if planes == "labels" else layout.count
    if mask.dim() != 4 or mask.shape[1] != expected:
        return None
    labels = _find_labels(mask, mask, layout, planes, assume_one_hot)
    return Regions(labels, layout, mask, planes) if isinstance(labels, LabelMap) else labels


def find_sides(mask: Tensor, layout: LatentLayout, *, itself: bool, assume_one_hot: bool) -> Sides | str | None:
    """What the mask (B, T, F) of an attention says; otherwise as :func:`find_regions`.

    Args:
        mask: not zero where a token may attend to another.
        layout: of the latents.
        itself: whether tokens attend to themselves.
        assume_one_hot: whether to believe that tokens attend to those of their label.
    """
    if mask.dim() != 3:
        return None
    count = layout.count
    if itself:
        if mask.shape[1:] != (count, count):
            return None

        def compare() -> Sides | str:
            labels = layout.labels(mask.device)
            if assume_one_hot or torch.equal(mask != 0, (labels[:, None] == labels).expand_as(mask)):
                return Sides(True, None)
            return "the mask is not that of latents of the same label"

        return _remembered(mask, ("themselves", layout, assume_one_hot), compare, assume_one_hot)
    # With as many other tokens as latents it could be either side.
    if (mask.shape[1] == count) == (mask.shape[2] == count):
        return None
    latents_attend = mask.shape[1] == count
    planes = (mask if latents_attend else mask.transpose(1, 2)).unsqueeze(2)
    labels = _find_labels(mask, planes, layout, "latents", assume_one_hot)
    return Sides(latents_attend, labels) if isinstance(labels, LabelMap) else labels


def is_given_up() -> bool:
    """Whether an outer module runs its own code because of its mask, so that the inner ones need not look at it."""
    return not torch.compiler.is_compiling() and getattr(_given_up, "depth", 0) > 0


@contextmanager
def giving_up() -> Iterator[None]:
    """A block in which :func:`is_given_up`."""
    _given_up.depth = getattr(_given_up, "depth", 0) + 1
    try:
        yield
    finally:
        _given_up.depth -= 1


_given_up = threading.local()


def _find_labels(
    mask: Tensor, planes: Tensor, layout: LatentLayout, of: Planes, assume_one_hot: bool
) -> LabelMap | str | None:
    """The labels that ``planes``, a view of the mask, say."""
    if mask.requires_grad and torch.is_grad_enabled():
        return "the mask takes a gradient"

    def read() -> LabelMap | str:
        of_labels = planes if of == "labels" else _of_labels(planes, layout)
        labels = labels_of_one_hot(of_labels)
        if not assume_one_hot:
            if not is_one_hot(of_labels, labels):
                return _describe(of_labels)
            if of_labels is not planes and not torch.equal(_of_latents(of_labels, layout), planes):
                return "the mask's planes for the latents of a label differ"
        if of_labels is not planes:
            owners = [label for label, count in enumerate(layout.latents_per_label) if count]
            if len(owners) < layout.num_labels:
                table = torch.tensor([*owners, -1], dtype=torch.int32, device=labels.device)
                labels = table[labels.long()]
        return LabelMap(labels, layout.num_labels)

    return _remembered(mask, (of, layout, assume_one_hot), read, assume_one_hot)


def _of_labels(planes: Tensor, layout: LatentLayout) -> Tensor:
    """Of a mask with a plane for each latent the first of each label that owns any."""
    firsts = [begin for begin, count in zip(layout.cu_latents, layout.latents_per_label, strict=False) if count]
    return planes[:, firsts]


def _of_latents(planes: Tensor, layout: LatentLayout) -> Tensor:
    """The reverse."""
    counts = torch.tensor([count for count in layout.latents_per_label if count], device=planes.device)
    return planes.repeat_interleave(counts, 1)


def _describe(mask: Tensor) -> str:
    """Why a mask is not one-hot."""
    if not torch.equal(mask, (mask == 1).to(mask.dtype)):
        return "the mask has other numbers than zeros and ones"
    return f"the mask has a pixel that belongs to {int(mask.sum(1).max())} labels"


def _remembered(
    mask: Tensor, key: tuple[Hashable, ...], read: Callable[[], _Read], assume_one_hot: bool
) -> _Read | None:
    """What ``read`` returns, once for each mask until it is written to; None where nothing can be looked at."""
    if torch.compiler.is_compiling():
        return read() if assume_one_hot else None
    if torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None:
        return None  # what has been remembered would become constants
    if is_recording(mask) or is_tracing():
        return read() if assume_one_hot else None
    if mask.is_inference():  # it does not count its versions
        return read()
    version, found = _known.get(mask, (-1, {}))
    if version != mask._version:
        version, found = _known[mask] = mask._version, {}
    if key not in found:
        with torch.inference_mode(False), torch.no_grad():  # what is remembered may serve training later
            found[key] = read()
    return found[key]


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
