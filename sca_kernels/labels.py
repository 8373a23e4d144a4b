"""What the operators are told about labels: a label for every pixel, and a number of latents for every label."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import default_collate_fn_map

from .autocast import without_autocast
from .label_files import read_label_values
from .tracing import is_recording, is_tracing

_MAX_PIXELS = 2**31 - 1  # a plan names pixels with 32 bit integers


class LabelPlan(NamedTuple):
    """The pixels of B label maps of n pixels, grouped. All shapes follow from (B, n, s labels, tile size) alone.

    Attributes:
        order: (B, n) int32, the pixels sorted by label, then by tile, then by position in the image; pixels without a
            label come last.
        offsets: (B, s + 1) int64: the pixels of label l are order[b, offsets[b, l] : offsets[b, l + 1]].
        tile_counts: (B, tiles) int32: number of segments (labels, "none" included) in each tile.
        tile_segments: (B, tiles, min(tile pixels, s + 1), 3) int32: of each segment, in ascending order of labels with
            -1 ("none") last, the label, its first position in ``order`` and its number of pixels. Unused ones are
            arbitrary.
    """

    order: Tensor
    offsets: Tensor
    tile_counts: Tensor
    tile_segments: Tensor


def tile_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the tiles that an image is cut into: two-dimensional, so that a tile holds few labels."""
    if height >= 64 or width >= 64:
        return 8, 32
    if height >= 32 or width >= 32:
        return 8, 16
    return 8, 8


def plan_shapes(
    labels: Tensor, num_labels: int, tile_height: int, tile_width: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The shapes of the four tensors of a plan for labels of shape (B, H, W)."""
    batch, height, width = labels.shape
    tiles = -(-height // tile_height) * -(-width // tile_width)
    room = min(tile_height * tile_width, num_labels + 1)
    return (batch, height * width), (batch, num_labels + 1), (batch, tiles), (batch, tiles, room, 3)


@dataclass(frozen=True, eq=False)
class LabelMap:
    """The semantic label of every pixel of a batch of images.

    Made with :meth:`from_labels`, :meth:`from_mask` or :meth:`from_png`. It is immutable, a pytree, and passes through
    ``torch.compile``, ``torch.export``, ``pickle`` and a ``DataLoader`` (samples are collated along the batch).

    Attributes:
        labels: (B, H, W) int32, label of each pixel; -1 is "ignored". Values outside [0, num_labels) that slipped past
            the checks (on a GPU, or written later) are treated as ignored.
        num_labels: number of labels s.
        plan: the pixels grouped by label, as the kernels want them; made by :meth:`at`, otherwise None. It belongs to
            the labels as they were then; code that is compiled or captured with a map that has a plan believes it.

    Example:
        >>> label_map = LabelMap.from_labels(torch.tensor([[0, 0, 1], [1, 1, 255]]), num_labels=2, ignore_index=255)
        >>> label_map
        LabelMap(batch=1, height=2, width=3, num_labels=2, device=cpu)
        >>> label_map.at(4, 6).labels[0, 0].tolist()
        [0, 0, 0, 0, 1, 1]
    """

    labels: Tensor
    num_labels: int
    plan: LabelPlan | None = None
    _memo: dict[tuple[int, int], tuple[int, LabelMap]] = field(default_factory=dict, init=False)
    _plan_version: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        if self.plan is not None and not is_recording(self.labels):
            object.__setattr__(self, "_plan_version", _version(self.labels))

    @classmethod
    def from_labels(
        cls, labels: Tensor, num_labels: int, *, ignore_index: int | None = None, validate: bool | None = None
    ) -> LabelMap:
        """Takes integers.

        Args:
            labels: (B, H, W) or (H, W), any integer type. A contiguous int32 tensor is shared, not copied, unless
                ``ignore_index`` is given: a buffer that is written later, between replays of a CUDA graph say, counts
                from the next :meth:`at` on.
            num_labels: number of labels; the labels are 0 ... num_labels - 1.
            ignore_index: pixels of this value belong to no label. -1 always means that.
            validate: whether to check the values, which reads them back and so waits for a GPU. Default: on the CPU,
                when not compiling. Without it a value out of range counts as ignored.

        Raises:
            TypeError: if ``labels`` is not an integer tensor or ``num_labels`` not an integer.
            ValueError: if its shape is not as above, ``num_labels`` is not positive, or a value is out of range.
        """
        num_labels = _as_integer("num_labels", num_labels)
        _check_num_labels(num_labels)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels: expected a tensor of integers, got {given}")
        if labels.dim() not in (2, 3):
            raise ValueError(f"labels: expected shape (B, H, W) or (H, W), got {tuple(labels.shape)}")
        given_labels = labels
        if labels.dim() == 2:
            labels = labels.unsqueeze(0)
        if labels.dtype == torch.uint64:
            labels = labels.view(torch.int64)
            labels = torch.where(labels < 0, torch.iinfo(torch.int64).max, labels)
        elif labels.dtype != torch.int32 or ignore_index is not None:
            labels = labels.long()
        if ignore_index is not None:
            labels = torch.where(labels == ignore_index, -1, labels)
        if _wants_validation(validate, labels) and labels.numel():
            lowest, highest = (int(value) for value in labels.aminmax())
            if lowest < -1 or highest >= num_labels:
                ignored = "-1" if ignore_index is None else f"-1 or ignore_index={ignore_index}"
                raise ValueError(
                    f"labels: expected values in [0, {num_labels}) or {ignored}, got values in [{lowest}, {highest}]"
                )
        if labels.dtype == torch.int64:
            # A value that does not fit 32 bits must not wrap around into the range of the labels.
            labels = labels.clamp(-1, num_labels)
        labels = labels.to(torch.int32).contiguous()
        shared = not is_recording(labels) and labels.data_ptr() == given_labels.data_ptr()
        if shared and labels.is_inference():
            labels = labels.clone()  # such tensors do not count their versions, so nobody else may write to it
        return cls(labels, num_labels)

    @classmethod
    def from_mask(cls, mask: Tensor, *, validate: bool | None = None) -> LabelMap:
        """Takes a one-hot mask: a pixel belongs to the label whose plane is not zero there, or to none.

        Args:
            mask: (B, s, H, W) or (s, H, W), bool or any number type.
            validate: whether to check that no pixel belongs to two labels, which waits for a GPU. Default: on the
                CPU, when not compiling. Without it the lowest of the labels counts.

        Raises:
            TypeError: if ``mask`` is not a tensor.
            ValueError: if the shape is not as above or the mask is not one-hot.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
        if mask.dim() not in (3, 4):
            raise ValueError(f"mask: expected shape (B, s, H, W) or (s, H, W), got {tuple(mask.shape)}")
        if mask.dim() == 3:
            mask = mask.unsqueeze(0)
        _check_num_labels(mask.shape[1])
        if _wants_validation(validate, mask) and mask.numel():
            labels = labels_of_one_hot(mask)
            if is_one_hot(mask, labels):
                return cls(labels, mask.shape[1])
        belongs = (mask != 0).to(torch.uint8)
        if _wants_validation(validate, mask) and mask.numel():
            most = int(belongs.sum(1, dtype=torch.int32).max())
            if most > 1:
                raise ValueError(f"mask: expected a one-hot mask, got a pixel that belongs to {most} labels")
        labels = torch.where(belongs.amax(1) > 0, belongs.argmax(1), -1).to(torch.int32)
        return cls(labels.contiguous(), mask.shape[1])

    @classmethod
    def from_png(
        cls,
        path: str | PathLike[str] | Sequence[str | PathLike[str]],
        num_labels: int,
        *,
        ignore_index: int | None = 255,
    ) -> LabelMap:
        """Reads label images: 8 or 16 bit grey values or palette indices are the labels. Needs Pillow.

        Args:
            path: a file, or a sequence of files of one size that become a batch.
            num_labels: number of labels.
            ignore_index: pixels of this value belong to no label.

        Raises:
            ImportError: if Pillow is not installed.
            ValueError: if a file has colours instead of labels, sizes differ, or a value is out of range.
        """
        paths = [path] if isinstance(path, str | PathLike) else list(path)
        if not paths:
            raise ValueError("path: expected at least one file, got none")
        maps = []
        for name in paths:
            try:
                values = read_label_values(name)
            except ImportError as error:
                raise ImportError("LabelMap.from_png needs Pillow: pip install pillow") from error
            except ValueError as error:
                raise ValueError(f"path: {error} in {name}") from error
            try:
                maps.append(cls.from_labels(values, num_labels, ignore_index=ignore_index))
            except ValueError as error:
                raise ValueError(f"{error} in {name}") from error
        return _collate(maps)

    def at(self, height: int, width: int) -> LabelMap:
        """The map at another resolution, with its plan.

        Nearest neighbour, by exactly the rule of ``torch.nn.functional.interpolate(mode="nearest")`` for float32.
        Remembered per resolution until ``labels`` is written to; while compiling, exporting or capturing a CUDA graph
        it becomes part of the graph instead.
        """
        recording = is_recording(self.labels)
        version = -1 if recording else _version(self.labels)
        plan_holds = self.plan is not None and (recording or self._plan_version == version)
        if plan_holds and (height, width) == (self.height, self.width):
            return self
        if recording:
            return self._planned_at(height, width)
        known = self._memo.get((height, width))
        if known is None or known[0] != version:
            with torch.inference_mode(False):  # what is remembered may serve training later
                known = self._memo[height, width] = (version, self._planned_at(height, width))
        return known[1]

    def planned(self) -> LabelMap:
        """The map at its own resolution, with its plan; see :meth:`at`."""
        labels = self.labels
        if self.plan is not None and (is_recording(labels) or self._plan_version == _version(labels)):
            return self
        _, height, width = labels.shape
        return self.at(height, width)

    def _planned_at(self, height: int, width: int) -> LabelMap:
        if height < 0 or width < 0:
            raise ValueError(f"height, width: expected sizes of at least zero, got ({height}, {width})")
        if height * width > _MAX_PIXELS:
            raise ValueError(f"height, width: expected at most 2^31 - 1 pixels, got {height} x {width}")
        labels = self.labels
        if height == 0 or width == 0:
            labels = labels.new_empty((self.batch, height, width))
        elif (height, width) != (self.height, self.width):
            if self.height == 0 or self.width == 0:
                raise ValueError(f"height, width: a map without pixels cannot be resized to ({height}, {width})")
            rows = _nearest_index(self.height, height, labels.device)
            columns = _nearest_index(self.width, width, labels.device)
            labels = labels[:, rows][:, :, columns]
        tile_height, tile_width = tile_size(height, width)
        plan = torch.ops.sca.label_plan(labels, self.num_labels, tile_height, tile_width)
        return LabelMap(labels, self.num_labels, LabelPlan(*plan))

    @property
    def batch(self) -> int:
        return self.labels.shape[0]

    @property
    def height(self) -> int:
        return self.labels.shape[1]

    @property
    def width(self) -> int:
        return self.labels.shape[2]

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> LabelMap:
        """The map, and its plan, on a device."""
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=non_blocking), self)

    def pin_memory(self) -> LabelMap:
        """The map, and its plan, in page-locked memory. A ``DataLoader`` with ``pin_memory=True`` calls it."""
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.pin_memory(), self)

    def __repr__(self) -> str:
        return (
            f"LabelMap(batch={self.batch}, height={self.height}, width={self.width}, "
            f"num_labels={self.num_labels}, device={self.device})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"labels": self.labels, "num_labels": self.num_labels, "plan": _valid_plan(self)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        for name, value in {**state, "_memo": {}, "_plan_version": -1}.items():
            object.__setattr__(self, name, value)
        self.__post_init__()


@dataclass(frozen=True)
class LatentLayout:
    """How many latents each label owns. The latents of a label are adjacent, and labels follow one another.

    Host integers: nothing is read back from a GPU. Equal layouts compare and hash equal.

    Attributes:
        latents_per_label: number of latents of each label, zero allowed.
        count: number of latents m of all labels.
        max_per_label: the most latents of a label.
        cu_latents: prefix sums: the latents of label l are cu_latents[l] ... cu_latents[l + 1] - 1.

    Example:
        >>> layout = LatentLayout((8, 4, 0))
        >>> layout.cu_latents
        (0, 8, 12, 12)
        >>> LatentLayout.uniform(num_labels=19, latents=8).count
        152
    """

    latents_per_label: tuple[int, ...]
    count: int = field(init=False, repr=False, compare=False)
    max_per_label: int = field(init=False, repr=False, compare=False)
    cu_latents: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _tensors: dict[tuple[str, torch.device], Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given: Any = self.latents_per_label
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"latents_per_label: expected a sequence of integers, got {type(given).__name__}")
        counts = tuple(_as_integer("latents_per_label", count) for count in given)
        if not counts:
            raise ValueError("latents_per_label: expected a number of latents for at least one label, got none")
        if min(counts) < 0:
            raise ValueError(f"latents_per_label: expected numbers of at least zero, got {counts}")
        object.__setattr__(self, "latents_per_label", counts)
        object.__setattr__(self, "count", sum(counts))
        object.__setattr__(self, "max_per_label", max(counts))
        object.__setattr__(self, "cu_latents", (0, *accumulate(counts)))
        object.__setattr__(self, "_tensors", {})

    @classmethod
    def uniform(cls, num_labels: int, latents: int) -> LatentLayout:
        """The same number of latents for every label."""
        return cls((latents,) * num_labels)

    @property
    def num_labels(self) -> int:
        return len(self.latents_per_label)

    def __reduce__(self) -> tuple[type[LatentLayout], tuple[tuple[int, ...]]]:
        return LatentLayout, (self.latents_per_label,)

    def offsets(self, device: torch.device) -> Tensor:
        """``cu_latents`` as an int64 tensor (s + 1), made once for each device."""
        return self._tensor("offsets", device)

    def labels(self, device: torch.device) -> Tensor:
        """The label of each latent, int32 (m), made once for each device."""
        return self._tensor("labels", device)

    def present_in(self, label_map: LabelMap) -> LatentSelection:
        """The latents whose labels occur in each image of ``label_map``, which says at which resolution.

        Absent labels then cost nothing. The number of rows is that of the image with most of them on the CPU; while
        compiling, exporting or on a GPU, where nothing is read back, it is the most that any image of that size needs.

        Raises:
            TypeError: if ``label_map`` is not a label map.
            ValueError: if it has another number of labels.
        """
        if not isinstance(label_map, LabelMap):
            raise TypeError(f"label_map: expected a LabelMap, got {type(label_map).__name__}")
        if label_map.num_labels != self.num_labels:
            raise ValueError(
                f"label_map: expected {self.num_labels} labels like the layout, got {label_map.num_labels}"
            )
        plan = label_map.planned().plan
        assert plan is not None
        offsets, begins = plan.offsets, self.offsets(plan.offsets.device)
        owned = torch.where(offsets.diff() > 0, begins.diff(), 0)
        cu_latents = F.pad(owned.cumsum(1), (1, 0))
        if offsets.device.type == "cpu" and not is_recording(label_map.labels) and not is_tracing():
            count = max(int(cu_latents[:, -1].max()), min(self.count, 1)) if len(offsets) else min(self.count, 1)
        else:
            most_labels = min(self.num_labels, label_map.height * label_map.width)
            count = max(sum(sorted(self.latents_per_label, reverse=True)[:most_labels]), min(self.count, 1))
        label = _labels_of_rows(cu_latents, count)
        row = torch.arange(count, device=offsets.device)
        known = label.clamp(max=self.num_labels - 1)
        index = row + begins[known] - cu_latents.gather(1, known)
        return LatentSelection(self, torch.where(label < self.num_labels, index, 0), cu_latents)

    def _tensor(self, name: str, device: torch.device) -> Tensor:
        if is_tracing():
            return self._make_tensor(name, device)
        tensor = self._tensors.get((name, device))
        if tensor is None:
            with torch.inference_mode(False):  # what is remembered may serve training later
                tensor = self._tensors[name, device] = self._make_tensor(name, device)
        return tensor

    def _make_tensor(self, name: str, device: torch.device) -> Tensor:
        if name == "offsets":
            return torch.tensor(self.cu_latents, dtype=torch.int64, device=device)
        labels = [label for label, count in enumerate(self.latents_per_label) for _ in range(count)]
        return torch.tensor(labels, dtype=torch.int32, device=device)


@dataclass(frozen=True, eq=False)
class LatentSelection:
    """The latents of a layout whose labels occur in each image, made by :meth:`LatentLayout.present_in`.

    In an operator a selection stands for its layout with absent labels owning no latents. Its rows are those of the
    selected latents in the order of the layout, image by image; what is left over of the common number of rows is
    padding, which belongs to no label. A pytree.

    Attributes:
        layout: the layout.
        index: (B, m') int64, the latent that each row is; rows of padding repeat a latent of the layout.
        cu_latents: (B, s + 1) int64 prefix sums: the rows of label l are cu_latents[b, l] ... cu_latents[b, l + 1] - 1,
            and those from cu_latents[b, s] on are padding.

    Example:
        >>> label_map = LabelMap.from_labels(torch.tensor([[[0, 0, 2]], [[1, 1, 1]]]), num_labels=3)
        >>> selection = LatentLayout((1, 2, 1)).present_in(label_map)
        >>> selection.index.tolist()
        [[0, 3], [1, 2]]
        >>> selection.gather(torch.tensor([10.0, 20.0, 30.0, 40.0])).tolist()
        [[10.0, 40.0], [20.0, 30.0]]
    """

    layout: LatentLayout
    index: Tensor
    cu_latents: Tensor

    @property
    def batch(self) -> int:
        return self.index.shape[0]

    @property
    def count(self) -> int:
        """Number of rows m'."""
        return self.index.shape[1]

    @property
    def max_per_label(self) -> int:
        return self.layout.max_per_label

    @property
    def num_labels(self) -> int:
        return self.layout.num_labels

    @property
    def is_present(self) -> Tensor:
        """(B, m) bool: which latents of the layout are selected."""
        selected = self.cu_latents.diff() > 0
        return selected[:, self.layout.labels(self.index.device).long()]

    def gather(self, rows: Tensor) -> Tensor:
        """The selected rows (B, m', ...) of rows for each image (B, m, ...) or for all (m, ...).

        Rows whose first two sizes are B and m are for each image.

        Raises:
            ValueError: if the shape is not as above.
        """
        latents, (batch, count) = self.layout.count, self.index.shape
        if rows.dim() > 1 and rows.shape[1] == latents and batch in (1, rows.shape[0]):
            images, rest = rows.shape[0], rows.shape[2:]
            begin = torch.arange(images, device=self.index.device).unsqueeze(1) * latents
            selected = rows.flatten(0, 1).index_select(0, (self.index + begin).flatten())
            return selected.view(images, count, *rest)
        if rows.dim() > 0 and rows.shape[0] == latents:
            return rows.index_select(0, self.index.flatten()).view(batch, count, *rows.shape[1:])
        raise ValueError(f"rows: expected shape ({batch}, {latents}, ...) or ({latents}, ...), got {tuple(rows.shape)}")

    def offsets(self, device: torch.device) -> Tensor:
        """``cu_latents``, as a layout gives its own."""
        return self.cu_latents.to(device)

    def labels(self, device: torch.device) -> Tensor:
        """The label of each row, int64 (B, m'); s for padding."""
        return _labels_of_rows(self.cu_latents, self.count).to(device)


def labels_of_one_hot(mask: Tensor) -> Tensor:
    """The labels of a mask of zeros and ones (B, s, H, W), several times faster than by looking for the largest.

    Returns:
        int32 labels (B, H, W), -1 where all planes are zero and anything below s where the mask is not one-hot, which
        :func:`is_one_hot` tells.
    """
    exact = mask if mask.dtype in (torch.float32, torch.float64) else mask.float()
    with without_autocast(mask.device):
        numbers = torch.arange(mask.shape[1], dtype=exact.dtype, device=mask.device)
        label = torch.matmul(numbers, exact.flatten(2)).nan_to_num(0.0).clamp(0, mask.shape[1] - 1).long()
    label = label.view(mask.shape[0], 1, *mask.shape[2:])
    is_one = mask.gather(1, label) == 1
    return torch.where(is_one, label, -1).squeeze(1).to(torch.int32)


def is_one_hot(mask: Tensor, labels: Tensor) -> bool:
    """Whether a mask has ones where :func:`labels_of_one_hot` found them, and zeros everywhere else."""
    return bool(mask.count_nonzero() == (labels >= 0).sum())


def _labels_of_rows(cu_latents: Tensor, count: int) -> Tensor:
    rows = torch.arange(count, device=cu_latents.device).expand(cu_latents.shape[0], -1)
    return torch.searchsorted(cu_latents[:, 1:].contiguous(), rows.contiguous(), right=True)


def _as_integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected integers, got {type(value).__name__}") from None


def _check_num_labels(num_labels: int) -> None:
    if num_labels < 1:
        raise ValueError(f"num_labels: expected at least one label, got {num_labels}")


def _wants_validation(validate: bool | None, tensor: Tensor) -> bool:
    if validate is None:
        return tensor.device.type == "cpu" and not is_recording(tensor)
    return validate


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _nearest_index(source: int, target: int, device: torch.device) -> Tensor:
    # interpolate's own rule, rounding included, because it is interpolate that resizes the index.
    index = torch.arange(source, dtype=torch.float32, device=device)
    resized = F.interpolate(index.view(1, 1, source), size=target, mode="nearest").view(target).long()
    return resized.clamp(max=source - 1)  # beyond 2^24 a float32 index may round past the end


def _collate(batch: Sequence[LabelMap], *, collate_fn_map: Any = None) -> LabelMap:
    first = batch[0]
    for other in batch:
        if (other.height, other.width, other.num_labels) != (first.height, first.width, first.num_labels):
            raise ValueError(f"expected label maps of one size and number of labels, got {first} and {other}")
    return LabelMap(torch.cat([label_map.labels for label_map in batch]), first.num_labels)


def _valid_plan(label_map: LabelMap) -> LabelPlan | None:
    # A copy could not tell that the labels were written to after the plan was made.
    if not is_recording(label_map.labels) and label_map._plan_version not in (-1, _version(label_map.labels)):
        return None
    return label_map.plan


def _flatten(label_map: LabelMap) -> tuple[list[Any], int]:
    return [label_map.labels, _valid_plan(label_map)], label_map.num_labels


def _flatten_with_keys(label_map: LabelMap) -> tuple[list[tuple[Any, Any]], int]:
    (labels, plan), num_labels = _flatten(label_map)
    return [(pytree.GetAttrKey("labels"), labels), (pytree.GetAttrKey("plan"), plan)], num_labels


def _unflatten(children: Any, num_labels: int) -> LabelMap:
    labels, plan = children
    return LabelMap(labels, num_labels, plan)


pytree.register_pytree_node(
    LabelMap,
    _flatten,
    _unflatten,
    serialized_type_name="sca_kernels.LabelMap",
    flatten_with_keys_fn=_flatten_with_keys,
)
pytree.register_constant(LatentLayout)
pytree.register_pytree_node(
    LatentSelection,
    lambda selection: ([selection.index, selection.cu_latents], selection.layout),
    lambda children, layout: LatentSelection(layout, *children),
    serialized_type_name="sca_kernels.LatentSelection",
    to_dumpable_context=lambda layout: list(layout.latents_per_label),
    from_dumpable_context=LatentLayout,
    flatten_with_keys_fn=lambda selection: (
        [
            (pytree.GetAttrKey("index"), selection.index),
            (pytree.GetAttrKey("cu_latents"), selection.cu_latents),
        ],
        selection.layout,
    ),
)
default_collate_fn_map[LabelMap] = _collate
# Plain data, so torch.load need not be told to trust it.
torch.serialization.add_safe_globals([LabelMap, LabelPlan, LatentLayout, LatentSelection])
