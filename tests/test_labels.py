"""LabelMap and LatentLayout, outside of torch.compile and DataLoader."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import math
import pickle
import re
import struct
import sys
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from sca_kernels import LabelMap, LatentLayout
from sca_kernels.labels import LabelPlan, is_one_hot, labels_of_one_hot, tile_size
from sca_kernels.reference.label_plan import label_plan

CPU = torch.device("cpu")
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def tensor(rows: list[Any], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def assert_planned(label_map: LabelMap) -> None:
    """Checks that the plan is that of the labels as they are now."""
    assert label_map.plan is not None
    expected = label_plan(label_map.labels, label_map.num_labels, *tile_size(label_map.height, label_map.width))
    for name, part in zip(LabelPlan._fields[:3], expected, strict=False):
        assert torch.equal(getattr(label_map.plan, name), part), name


class TestFromLabels:
    @pytest.mark.parametrize("dtype", [torch.bool, *SIGNED, *UNSIGNED], ids=str)
    def test_every_integer_type(self, dtype: torch.dtype) -> None:
        label_map = LabelMap.from_labels(tensor([[0, 1, 1], [1, 0, 0]], dtype), 2)
        assert label_map.labels.dtype == torch.int32
        assert label_map.labels.tolist() == [[[0, 1, 1], [1, 0, 0]]]
        assert label_map.num_labels == 2
        assert label_map.plan is None

    def test_batch_and_size(self) -> None:
        label_map = LabelMap.from_labels(torch.zeros(3, 4, 5, dtype=torch.int64), 2)
        assert (label_map.batch, label_map.height, label_map.width) == (3, 4, 5)
        assert label_map.device == CPU

    @pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 5, 0), (0, 0)])
    def test_no_pixels(self, shape: tuple[int, ...]) -> None:
        label_map = LabelMap.from_labels(torch.zeros(shape, dtype=torch.int64), 2)
        assert tuple(label_map.labels.shape) == (shape if len(shape) == 3 else (1, *shape))

    @pytest.mark.parametrize(
        ("values", "dtype", "ignore_index", "expected"),
        [
            ([0, 1, -1], torch.int32, None, [0, 1, -1]),
            ([0, 1, -1], torch.int8, None, [0, 1, -1]),
            ([0, 255, 2], torch.uint8, 255, [0, -1, 2]),
            ([0, 65535, 2], torch.uint16, 65535, [0, -1, 2]),
            ([0, -100, -1], torch.int64, -100, [0, -1, -1]),
            ([0, -1, 2], torch.int32, -1, [0, -1, 2]),
            ([0, 1, 2], torch.int32, 1, [0, -1, 2]),
            ([0, 2**40, 2], torch.int64, 2**40, [0, -1, 2]),
            ([0, 1, 1], torch.bool, 0, [-1, 1, 1]),
            ([0, 1, 2], torch.uint8, 300, [0, 1, 2]),  # nothing equals it, and nothing wraps around to it
            ([0, 44, 2], torch.uint8, 44, [0, -1, 2]),
        ],
    )
    def test_ignored(
        self, values: list[int], dtype: torch.dtype, ignore_index: int | None, expected: list[int]
    ) -> None:
        given = tensor([values], dtype)
        label_map = LabelMap.from_labels(given, 3, ignore_index=ignore_index)
        assert label_map.labels.tolist() == [[expected]]
        assert given.tolist() == tensor([values], dtype).tolist()

    @pytest.mark.parametrize(
        ("value", "dtype"),
        [
            (3, torch.int32),
            (-2, torch.int32),
            (-2, torch.int8),
            (255, torch.uint8),
            (65535, torch.uint16),
            (2**32 - 1, torch.uint32),
            (2**31, torch.int64),
            (2**32, torch.int64),  # 0, -1 and 1 in 32 bits
            (2**32 - 1, torch.int64),
            (-(2**32) + 1, torch.int64),
            (2**63 - 1, torch.int64),
            (-(2**63), torch.int64),
        ],
    )
    def test_value_out_of_range(self, value: int, dtype: torch.dtype) -> None:
        labels = tensor([[[0, value]]], dtype)
        lowest, highest = min(0, value), max(0, value)
        message = f"labels: expected values in [0, 3) or -1, got values in [{lowest}, {highest}]"
        with pytest.raises(ValueError, match=re.escape(message)):
            LabelMap.from_labels(labels, 3)
        # Unchecked, such a pixel has no label; above all not one that its lowest 32 bits happen to name.
        unchecked = LabelMap.from_labels(labels, 3, validate=False).at(1, 2)
        assert not 0 <= unchecked.labels[0, 0, 1] < 3
        assert unchecked.plan is not None
        assert unchecked.plan.offsets.tolist() == [[0, 1, 1, 1]]

    @pytest.mark.parametrize("value", [2**63, 2**64 - 1])
    def test_value_that_only_uint64_holds(self, value: int) -> None:
        labels = tensor([[[0, value]]], torch.uint64)
        # PyTorch computes little in this type, so the message need not give the value itself.
        with pytest.raises(ValueError, match=r"labels: expected values in \[0, 3\) or -1, got values in \[0, \d+\]"):
            LabelMap.from_labels(labels, 3)
        assert LabelMap.from_labels(labels, 3, validate=False).at(1, 2).plan.offsets.tolist() == [[0, 1, 1, 1]]

    def test_out_of_range_message_names_ignore_index(self) -> None:
        message = r"labels: expected values in \[0, 3\) or -1 or ignore_index=255, got values in \[-1, 254\]"
        with pytest.raises(ValueError, match=message):
            LabelMap.from_labels(tensor([[255, 254]], torch.uint8), 3, ignore_index=255)

    @pytest.mark.parametrize(
        ("labels", "num_labels", "error", "message"),
        [
            (torch.zeros(1, 2, 2), 3, TypeError, "labels: expected a tensor of integers, got torch.float32"),
            (
                torch.zeros(1, 2, 2, dtype=torch.complex64),
                3,
                TypeError,
                "labels: expected a tensor of integers, got torch.complex64",
            ),
            ([[0, 1]], 3, TypeError, "labels: expected a tensor of integers, got list"),
            (numpy.zeros((2, 2), int), 3, TypeError, "labels: expected a tensor of integers, got ndarray"),
            (torch.zeros(4, dtype=torch.int32), 3, ValueError, "labels: expected shape (B, H, W) or (H, W), got (4,)"),
            (
                torch.zeros(1, 1, 2, 2, dtype=torch.int32),
                3,
                ValueError,
                "labels: expected shape (B, H, W) or (H, W), got (1, 1, 2, 2)",
            ),
            (torch.zeros(1, 1, dtype=torch.int32), 0, ValueError, "num_labels: expected at least one label, got 0"),
            (torch.zeros(1, 1, dtype=torch.int32), -1, ValueError, "num_labels: expected at least one label, got -1"),
            (torch.zeros(1, 1, dtype=torch.int32), 2.5, TypeError, "num_labels: "),
        ],
    )
    def test_errors(self, labels: Any, num_labels: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=re.escape(message)):
            LabelMap.from_labels(labels, num_labels)

    def test_validation_reads_no_values_of_other_devices(self) -> None:
        label_map = LabelMap.from_labels(torch.zeros(1, 2, 2, dtype=torch.int64, device="meta"), 3)
        assert label_map.device.type == "meta"


class TestSharing:
    @pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (3, 4, 6)])
    def test_int32_is_shared_and_writes_count_from_the_next_at(self, shape: tuple[int, ...]) -> None:
        buffer = torch.zeros(shape, dtype=torch.int32)
        label_map = LabelMap.from_labels(buffer, 3)
        assert label_map.labels.data_ptr() == buffer.data_ptr()
        own, resized = label_map.at(4, 6), label_map.at(8, 3)
        buffer.fill_(1)
        for before, size in ((own, (4, 6)), (resized, (8, 3))):
            after = label_map.at(*size)
            assert after is not before
            assert after.labels.unique().tolist() == [1]
            assert_planned(after)
            assert label_map.at(*size) is after

    def test_writes_count_for_a_planned_map(self) -> None:
        buffer = torch.zeros(1, 4, 6, dtype=torch.int32)
        planned = LabelMap.from_labels(buffer, 3).at(4, 6)
        buffer[0, 1:3] = 2
        assert_planned(planned.at(4, 6))

    @pytest.mark.parametrize(
        "copied",
        [
            pytest.param(lambda label_map: label_map.to("cpu"), id="to"),
            pytest.param(copy.copy, id="copy"),
            pytest.param(copy.deepcopy, id="deepcopy"),
            pytest.param(lambda label_map: pickle.loads(pickle.dumps(label_map)), id="pickle"),
            pytest.param(lambda label_map: pytree.tree_map(lambda leaf: leaf, label_map), id="tree_map"),
        ],
    )
    def test_copies_of_a_planned_map_do_not_believe_an_outdated_plan(
        self, copied: Callable[[LabelMap], LabelMap]
    ) -> None:
        buffer = torch.zeros(1, 4, 6, dtype=torch.int32)
        planned = LabelMap.from_labels(buffer, 3).at(4, 6)
        buffer[0, 1:3] = 2
        assert_planned(copied(planned).at(4, 6))

    @pytest.mark.parametrize(
        ("dtype", "ignore_index"), [(torch.int64, None), (torch.int32, 255), (torch.int64, 255), (torch.uint8, None)]
    )
    def test_anything_else_is_copied(self, dtype: torch.dtype, ignore_index: int | None) -> None:
        buffer = torch.zeros(1, 4, 6, dtype=dtype)
        label_map = LabelMap.from_labels(buffer, 3, ignore_index=ignore_index)
        before = label_map.at(4, 6)
        buffer.fill_(1)
        assert label_map.at(4, 6) is before
        assert label_map.labels.unique().tolist() == [0]

    def test_inference_tensors_are_copied_since_they_do_not_count_writes(self) -> None:
        with torch.inference_mode():
            buffer = torch.zeros(1, 4, 6, dtype=torch.int32)
            inside = LabelMap.from_labels(buffer, 3)
        for label_map in (inside, LabelMap.from_labels(buffer, 3)):
            assert label_map.labels.data_ptr() != buffer.data_ptr()
            with torch.inference_mode():
                before = label_map.at(4, 6)
                buffer.fill_(1)
                assert label_map.at(4, 6) is before
                buffer.fill_(0)
            assert_planned(before)

    def test_ordinary_tensors_are_shared_in_inference_mode_too(self) -> None:
        buffer = torch.zeros(1, 4, 6, dtype=torch.int32)
        with torch.inference_mode():
            label_map = LabelMap.from_labels(buffer, 3)
            before = label_map.at(4, 6)
            buffer.fill_(1)
            assert label_map.at(4, 6) is not before
            assert_planned(label_map.at(4, 6))


class TestFromMask:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16], ids=str)
    def test_one_hot(self, dtype: torch.dtype) -> None:
        labels = torch.randint(0, 4, (2, 5, 7))
        mask = F.one_hot(labels, 4).movedim(3, 1).to(dtype)
        label_map = LabelMap.from_mask(mask)
        assert label_map.num_labels == 4
        assert label_map.labels.dtype == torch.int32
        assert torch.equal(label_map.labels, labels.int())
        assert torch.equal(LabelMap.from_mask(mask[1]).labels, labels[1:].int())

    def test_not_zero_is_enough_and_zero_everywhere_is_ignored(self) -> None:
        mask = torch.tensor([[[0.5, 0.0, 0.0, -0.0]], [[0.0, -3.0, 0.0, 0.0]], [[0.0, 0.0, 1e-30, 0.0]]])
        assert LabelMap.from_mask(mask).labels.tolist() == [[[0, 1, 2, -1]]]

    def test_two_labels(self) -> None:
        mask = torch.zeros(2, 4, 3, 3)
        mask[1, 1:, 2, 2] = 1
        mask[0, 2, 0, 0] = 1
        with pytest.raises(ValueError, match="mask: expected a one-hot mask, got a pixel that belongs to 3 labels"):
            LabelMap.from_mask(mask)
        labels = LabelMap.from_mask(mask, validate=False).labels
        assert labels[1, 2, 2] == 1
        assert labels[0, 0, 0] == 2
        assert (labels == -1).sum() == 2 * 9 - 2

    def test_as_many_labels_at_a_pixel_as_an_unsigned_byte_holds(self) -> None:
        with pytest.raises(ValueError, match="belongs to 256 labels"):
            LabelMap.from_mask(torch.ones(256, 1, 1))

    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (3, 4, 0)])
    def test_no_pixels(self, shape: tuple[int, ...]) -> None:
        batch = shape[0] if len(shape) == 4 else 1
        label_map = LabelMap.from_mask(torch.zeros(shape))
        assert (label_map.batch, label_map.num_labels) == (batch, 3)
        assert label_map.labels.shape[1:] == shape[-2:]

    @pytest.mark.parametrize(
        ("mask", "error", "message"),
        [
            (torch.zeros(4, 4), ValueError, "mask: expected shape (B, s, H, W) or (s, H, W), got (4, 4)"),
            (torch.zeros(1, 1, 1, 4, 4), ValueError, "mask: expected shape (B, s, H, W) or (s, H, W), got (1, 1, 1,"),
            (torch.zeros(1, 0, 4, 4), ValueError, "expected at least one label, got 0"),
            (numpy.zeros((1, 2, 4, 4)), TypeError, "mask: "),
        ],
    )
    def test_errors(self, mask: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=re.escape(message)):
            LabelMap.from_mask(mask)


class TestFromPng:
    """Files are written with Pillow, as label maps of data sets are."""

    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[..., Path]:
        image_module = pytest.importorskip("PIL.Image")

        def write(values: list[list[Any]], mode: str = "L", name: str = "labels.png", **options: Any) -> Path:
            array = numpy.array(values)
            image = image_module.new(mode, (array.shape[1], array.shape[0]))
            image.putdata([tuple(v) if isinstance(v, list) else v for row in values for v in row])
            if mode == "P":
                image.putpalette([channel for index in range(256) for channel in (255 - index, 7, index)])
            image.save(tmp_path / name, **options)
            return tmp_path / name

        return write

    @pytest.mark.parametrize(
        ("mode", "values", "num_labels"),
        [
            ("L", [[0, 1, 254], [3, 4, 0]], 255),
            ("P", [[0, 1, 254], [3, 4, 0]], 255),
            ("I;16", [[0, 1, 40000], [256, 4, 0]], 40001),
            ("1", [[0, 1, 1], [1, 0, 0]], 2),
        ],
    )
    def test_modes(self, write: Callable[..., Path], mode: str, values: list[list[int]], num_labels: int) -> None:
        # Images of mode "1" are given and stored as 0 and 255, and mean 0 and 1.
        given = [[value * 255 for value in row] for row in values] if mode == "1" else values
        path = write(given, mode)
        label_map = LabelMap.from_png(path, num_labels)
        assert label_map.labels.tolist() == [values]
        assert label_map.num_labels == num_labels
        assert LabelMap.from_png(str(path), num_labels).labels.tolist() == [values]

    @pytest.mark.parametrize("bits", [1, 2, 4])
    @pytest.mark.parametrize("mode", ["P", "L"])
    def test_few_bits_per_pixel(self, write: Callable[..., Path], mode: str, bits: int, tmp_path: Path) -> None:
        values = [[0, 1, 0], [2**bits - 1, 0, 1]]
        path = write(values, "P", bits=bits)
        if mode == "L":
            # The same file without its palette, and declared to be grey, which Pillow does not write.
            path.write_bytes(as_grey_png(path.read_bytes()))
        assert LabelMap.from_png(path, 16).labels.tolist() == [values]

    def test_255_is_ignored_unless_told_otherwise(self, write: Callable[..., Path]) -> None:
        path = write([[0, 255, 1]])
        assert LabelMap.from_png(path, 2).labels.tolist() == [[[0, -1, 1]]]
        assert LabelMap.from_png(path, 256, ignore_index=None).labels.tolist() == [[[0, 255, 1]]]
        assert LabelMap.from_png(path, 256, ignore_index=0).labels.tolist() == [[[-1, 255, 1]]]

    def test_files_become_a_batch(self, write: Callable[..., Path]) -> None:
        first, second = write([[0, 1]], name="first.png"), write([[1, 255]], name="second.png")
        label_map = LabelMap.from_png([first, str(second)], 2)
        assert label_map.labels.tolist() == [[[0, 1]], [[1, -1]]]

    @pytest.mark.parametrize(("mode", "value"), [("RGB", [1, 2, 3]), ("RGBA", [1, 2, 3, 4]), ("LA", [1, 2])])
    def test_colours(self, write: Callable[..., Path], mode: str, value: list[int]) -> None:
        path = write([[value, value]], mode)
        message = f"path: expected an image of label values (grey or palette), got mode {mode} in {path}"
        with pytest.raises(ValueError, match=re.escape(message)):
            LabelMap.from_png([path], 3)

    def test_value_out_of_range_names_the_file(self, write: Callable[..., Path]) -> None:
        good, bad = write([[0, 1]], name="good.png"), write([[1, 7]], name="bad.png")
        message = f"labels: expected values in [0, 3) or -1 or ignore_index=255, got values in [1, 7] in {bad}"
        with pytest.raises(ValueError, match=re.escape(message)):
            LabelMap.from_png([good, bad], 3)

    def test_sizes_differ(self, write: Callable[..., Path]) -> None:
        paths = [write([[0, 1]], name="wide.png"), write([[0], [1]], name="high.png")]
        with pytest.raises(ValueError, match="expected label maps of one size"):
            LabelMap.from_png(paths, 3)

    def test_no_files(self) -> None:
        pytest.importorskip("PIL")
        with pytest.raises(ValueError, match="path: "):
            LabelMap.from_png([], 3)

    def test_missing_file(self, tmp_path: Path) -> None:
        pytest.importorskip("PIL")
        with pytest.raises(FileNotFoundError, match=r"absent\.png"):
            LabelMap.from_png(tmp_path / "absent.png", 3)

    def test_without_pillow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match=r"LabelMap\.from_png needs Pillow: pip install pillow"):
            LabelMap.from_png("labels.png", 3)


def as_grey_png(palette_png: bytes) -> bytes:
    """A palette PNG with the same values as a grey one of as many bits."""
    signature, position, out = palette_png[:8], 8, palette_png[:8]
    assert signature == b"\x89PNG\r\n\x1a\n"
    while position < len(palette_png):
        (length,) = struct.unpack_from(">I", palette_png, position)
        kind = palette_png[position + 4 : position + 8]
        data = bytearray(palette_png[position + 8 : position + 8 + length])
        position += 12 + length
        if kind in (b"PLTE", b"tRNS"):
            continue
        if kind == b"IHDR":
            data[9] = 0  # colour type: grey
        out += struct.pack(">I", length) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


def numbered(height: int, width: int) -> LabelMap:
    """A map in which every pixel's label is its own number."""
    return LabelMap.from_labels(torch.arange(height * width, dtype=torch.int32).view(1, height, width), height * width)


def interpolated(label_map: LabelMap, height: int, width: int) -> Tensor:
    labels = label_map.labels.unsqueeze(1).float()  # float64 would be rounded otherwise
    return F.interpolate(labels, size=(height, width), mode="nearest").squeeze(1).int()


class TestAt:
    @pytest.mark.parametrize("source", range(1, 71))
    def test_equals_interpolate_for_all_sizes_up_to_70(self, source: int) -> None:
        # Rows and columns together see every pair of sizes twice.
        label_map = numbered(source, 71 - source)
        for target in range(1, 71):
            size = target, 71 - target
            assert torch.equal(label_map.at(*size).labels, interpolated(label_map, *size)), size

    @pytest.mark.parametrize(
        ("source", "target"),
        [
            ((96, 64), (256, 170)),
            ((256, 170), (3, 2)),
            ((256, 170), (96, 64)),
            ((512, 341), (37, 1024)),
            ((1, 1), (256, 256)),
            ((127, 3), (1021, 1)),
            ((4096, 1), (1365, 2)),
            ((1, 10007), (3, 9973)),
        ],
    )
    def test_equals_interpolate(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        label_map = numbered(*source)
        resized = label_map.at(*target)
        assert torch.equal(resized.labels, interpolated(label_map, *target))
        assert (resized.height, resized.width, resized.num_labels) == (*target, label_map.num_labels)

    def test_equals_interpolate_beyond_the_integers_of_float32(self) -> None:
        width = 2**24 + 4
        values = (torch.arange(width) % 3).to(torch.uint8).view(1, 1, width)
        label_map = LabelMap.from_labels(values, 3)
        expected = F.interpolate(values.unsqueeze(1), size=(1, width + 100), mode="nearest").squeeze(1)
        assert torch.equal(label_map.at(1, width + 100).labels, expected.int())

    def test_every_image_of_a_batch_is_resized_and_planned(self) -> None:
        label_map = LabelMap.from_labels(torch.randint(-1, 5, (3, 9, 14)), 5)
        resized = label_map.at(20, 11)
        assert torch.equal(resized.labels, interpolated(label_map, 20, 11))
        assert_planned(resized)

    def test_remembered(self) -> None:
        label_map = numbered(6, 4)
        assert label_map.at(3, 2) is label_map.at(3, 2)
        assert label_map.at(6, 4) is label_map.at(6, 4)
        assert label_map.at(2, 3) is not label_map.at(3, 2)
        assert label_map.plan is None

    def test_own_size_shares_the_labels_and_has_a_plan(self) -> None:
        label_map = numbered(6, 4)
        planned = label_map.at(6, 4)
        assert planned.labels.data_ptr() == label_map.labels.data_ptr()
        assert_planned(planned)
        assert planned.at(6, 4) is planned
        assert label_map.planned() is planned
        assert planned.planned() is planned

    @pytest.mark.parametrize(
        ("source", "target"),
        [
            ((0, 0), (0, 0)),
            ((0, 3), (0, 3)),
            ((4, 3), (0, 5)),
            ((4, 3), (5, 0)),
            ((4, 3), (0, 0)),
            ((0, 3), (0, 7)),
            ((0, 3), (5, 0)),
            ((3, 0), (0, 5)),
            ((0, 0), (5, 0)),
        ],
    )
    def test_no_pixels(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        label_map = LabelMap.from_labels(torch.zeros(2, *source, dtype=torch.int32), 3)
        resized = label_map.at(*target)
        assert resized.labels.shape == (2, *target)
        assert resized.plan is not None
        assert resized.plan.offsets.tolist() == [[0, 0, 0, 0]] * 2

    def test_no_images(self) -> None:
        resized = LabelMap.from_labels(torch.zeros(0, 4, 3, dtype=torch.int32), 3).at(8, 9)
        assert resized.labels.shape == (0, 8, 9)
        assert resized.plan is not None
        assert resized.plan.offsets.shape == (0, 4)

    @pytest.mark.parametrize(
        ("source", "target", "message"),
        [
            ((4, 3), (-1, 3), "height, width: expected sizes of at least zero, got (-1, 3)"),
            ((4, 3), (4, -3), "height, width: expected sizes of at least zero, got (4, -3)"),
            ((4, 3), (-65536, -65536), "height, width: expected sizes of at least zero, got (-65536, -65536)"),
            ((0, 3), (1, 1), "height, width: a map without pixels cannot be resized to (1, 1)"),
            ((3, 0), (3, 3), "height, width: a map without pixels cannot be resized to (3, 3)"),
            ((1, 1), (2**31, 1), "height, width: expected at most 2^31 - 1 pixels, got 2147483648 x 1"),
            ((1, 1), (65536, 32768), "height, width: expected at most 2^31 - 1 pixels, got 65536 x 32768"),
            ((1, 1), (2**40, 2**40), "height, width: expected at most 2^31 - 1 pixels"),
        ],
    )
    def test_errors(self, source: tuple[int, int], target: tuple[int, int], message: str) -> None:
        # Without memory, so that a missing check does not take all there is.
        label_map = LabelMap.from_labels(torch.zeros(1, *source, dtype=torch.int32, device="meta"), 3)
        with pytest.raises(ValueError, match=re.escape(message)):
            label_map.at(*target)

    def test_a_map_of_too_many_pixels_has_no_plan_at_its_own_size_either(self) -> None:
        label_map = LabelMap.from_labels(torch.empty(1, 65536, 32768, dtype=torch.int32, device="meta"), 3)
        with pytest.raises(ValueError, match=r"expected at most 2\^31 - 1 pixels, got 65536 x 32768"):
            label_map.at(65536, 32768)

    def test_as_many_pixels_as_a_plan_can_name(self) -> None:
        label_map = LabelMap.from_labels(torch.empty(1, 1, 1, dtype=torch.int32, device="meta"), 3)
        resized = label_map.at(2**31 - 1, 1)
        assert resized.plan is not None
        assert resized.plan.order.shape == (1, 2**31 - 1)

    @pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"])
    def test_a_plan_made_without_gradients_serves_training(self, context: Callable[[], Any]) -> None:
        label_map = numbered(3, 4)
        with context():
            label_map.at(3, 4)
            label_map.at(6, 8)
        for size in ((3, 4), (6, 8)):
            plan = label_map.at(*size).plan
            assert plan is not None
            assert not any(part.is_inference() for part in plan)


def saved_and_loaded(label_map: LabelMap) -> LabelMap:
    """Through a file as ``torch.load`` reads it unless told otherwise, that is with ``weights_only``."""
    file = io.BytesIO()
    torch.save(label_map, file)
    file.seek(0)
    return torch.load(file)


def test_to_moves_labels_and_plan() -> None:
    label_map = numbered(6, 4)
    label_map.at(3, 2)
    for device in ("meta", torch.device("meta")):
        moved, planned = label_map.to(device), label_map.at(3, 2).to(device)
        assert (moved.device.type, moved.num_labels, moved.plan) == ("meta", 24, None)
        assert moved.at(3, 2).device.type == "meta"  # not what was remembered on the CPU
        assert planned.plan is not None
        assert {part.device.type for part in planned.plan} == {"meta"}
        assert planned.at(3, 2) is planned
    assert label_map.device == CPU
    stayed = label_map.at(6, 4).to("cpu", non_blocking=True)
    assert stayed.at(6, 4) is stayed
    assert_planned(stayed)


def test_pin_memory_pins_labels_and_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without an accelerator nothing can be pinned, so this only follows the calls.
    pinned: list[Tensor] = []

    def pin_memory(self: Tensor, device: Any = None) -> Tensor:
        pinned.append(self.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    planned = numbered(6, 4).at(6, 4)
    copied = planned.pin_memory()
    assert isinstance(copied, LabelMap)
    assert copied.plan is not None
    assert {id(part) for part in pinned} == {id(part) for part in (copied.labels, *copied.plan)}
    assert torch.equal(copied.labels, planned.labels)
    assert_planned(copied.at(6, 4))

    # What a DataLoader with pin_memory=True does with a collated batch.
    pinned.clear()
    batch = torch.utils.data._utils.pin_memory.pin_memory(default_collate([(torch.zeros(2), numbered(2, 3))] * 2))
    assert isinstance(batch[1], LabelMap)
    assert [id(part) for part in pinned] == [id(batch[0]), id(batch[1].labels)]


def test_representation() -> None:
    label_map = LabelMap.from_labels(torch.zeros(2, 3, 4, dtype=torch.int32), 5)
    text = "LabelMap(batch=2, height=3, width=4, num_labels=5, device=cpu)"
    assert repr(label_map) == repr(label_map.at(3, 4)) == text
    assert "device=meta" in repr(label_map.to("meta"))


@pytest.mark.parametrize("name", ["labels", "num_labels", "plan"])
def test_immutable(name: str) -> None:
    label_map = numbered(2, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(label_map, name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(label_map, name)


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(lambda label_map: pickle.loads(pickle.dumps(label_map)), id="pickle"),
        pytest.param(lambda label_map: saved_and_loaded(label_map), id="torch.save"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(copy.copy, id="copy"),
    ],
)
@pytest.mark.parametrize("planned", [False, True], ids=["unplanned", "planned"])
def test_copies_keep_the_plan_and_forget_the_memo(copied: Callable[[LabelMap], LabelMap], planned: bool) -> None:
    original = numbered(6, 4)
    if planned:
        original = original.at(6, 4)
    size = len(pickle.dumps(original))
    remembered = original.at(3, 2)
    assert len(pickle.dumps(original)) == size

    other = copied(original)
    assert torch.equal(other.labels, original.labels)
    assert other.num_labels == original.num_labels
    assert (other.plan is not None) == planned
    if planned:
        assert_planned(other)
        assert other.at(6, 4) is other
    resized = other.at(3, 2)
    assert resized is not remembered
    assert torch.equal(resized.labels, remembered.labels)
    with pytest.raises(dataclasses.FrozenInstanceError):
        other.num_labels = 1  # type: ignore[misc]


def test_freed_by_reference_counting_alone() -> None:
    gc.collect()
    gc.disable()
    try:
        label_map = numbered(6, 4)
        maps = [label_map, label_map.at(6, 4), label_map.at(3, 2), label_map.at(6, 4).at(5, 5)]
        references = [weakref.ref(one) for one in maps]
        del label_map, maps
        assert [reference() for reference in references] == [None] * 4
    finally:
        gc.enable()


class TestLatentLayout:
    @pytest.mark.parametrize(
        ("latents", "cu_latents", "count", "most", "labels"),
        [
            ((8, 4, 0), (0, 8, 12, 12), 12, 8, [0] * 8 + [1] * 4),
            ((1,), (0, 1), 1, 1, [0]),
            ((0, 0), (0, 0, 0), 0, 0, []),
            ((0, 2, 0, 1, 0), (0, 0, 2, 2, 3, 3), 3, 2, [1, 1, 3]),
        ],
    )
    def test_numbers(
        self, latents: tuple[int, ...], cu_latents: tuple[int, ...], count: int, most: int, labels: list[int]
    ) -> None:
        layout = LatentLayout(latents)
        assert layout.num_labels == len(latents)
        assert layout.cu_latents == cu_latents
        assert layout.count == count
        assert layout.max_per_label == most
        assert layout.offsets(CPU).dtype == torch.int64
        assert layout.offsets(CPU).tolist() == list(cu_latents)
        assert layout.labels(CPU).dtype == torch.int32
        assert layout.labels(CPU).tolist() == labels

    def test_uniform(self) -> None:
        assert LatentLayout.uniform(3, 5) == LatentLayout((5, 5, 5))
        assert LatentLayout.uniform(num_labels=2, latents=0) == LatentLayout((0, 0))

    @pytest.mark.parametrize(
        "latents",
        [[3, 1], numpy.array([3, 1]), (numpy.int64(3), numpy.uint8(1)), torch.tensor([3, 1]), (n for n in (3, 1))],
    )
    def test_any_sequence_becomes_a_tuple_of_integers(self, latents: Any) -> None:
        layout = LatentLayout(latents)
        assert layout.latents_per_label == (3, 1)
        assert [type(number) for number in layout.latents_per_label] == [int, int]
        assert layout == LatentLayout((3, 1))

    def test_equality_and_hash(self) -> None:
        layout, same, other = LatentLayout((3, 1)), LatentLayout([3, 1]), LatentLayout((1, 3))
        assert layout == same
        assert hash(layout) == hash(same)
        assert layout != other
        assert len({layout, same, other}) == 2

    def test_immutable_and_copied_by_value(self) -> None:
        layout = LatentLayout((3, 1))
        with pytest.raises(dataclasses.FrozenInstanceError):
            layout.latents_per_label = (1,)  # type: ignore[misc]
        size = len(pickle.dumps(layout))
        layout.offsets(CPU)
        assert len(pickle.dumps(layout)) == size
        for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
            assert other == layout
            assert (other.count, other.max_per_label, other.cu_latents) == (4, 3, (0, 3, 4))
        assert repr(layout) == "LatentLayout(latents_per_label=(3, 1))"

    @pytest.mark.parametrize(
        ("latents", "error", "message"),
        [
            ((), ValueError, "latents_per_label: expected a number of latents for at least one label, got none"),
            ((3, -1), ValueError, "latents_per_label: expected numbers of at least zero, got (3, -1)"),
            ((2.5, 1), TypeError, "latents_per_label: "),
            (3, TypeError, "latents_per_label: "),
            ("31", TypeError, "latents_per_label: "),
        ],
    )
    def test_errors(self, latents: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=re.escape(message)):
            LatentLayout(latents)

    @pytest.mark.parametrize("num_labels", [0, -1])
    def test_uniform_without_labels(self, num_labels: int) -> None:
        with pytest.raises(ValueError, match="expected a number of latents for at least one label"):
            LatentLayout.uniform(num_labels, 8)

    @pytest.mark.parametrize("name", ["offsets", "labels"])
    def test_tensors_are_made_once_per_device(self, name: str) -> None:
        layout = LatentLayout((2, 0, 7))
        constant = getattr(layout, name)(CPU)
        on_meta = getattr(layout, name)(torch.device("meta"))
        assert on_meta.device.type == "meta"
        assert on_meta.shape == constant.shape
        assert getattr(layout, name)(CPU) is constant

    @pytest.mark.parametrize("name", ["offsets", "labels"])
    @pytest.mark.parametrize("known", [False, True], ids=["first", "after a real one"])
    def test_fake_tensors_are_not_remembered(self, name: str, known: bool) -> None:
        layout = LatentLayout((3, 0, 11, int(known)))
        make = getattr(layout, name)
        if known:
            make(CPU)
        with FakeTensorMode():
            assert isinstance(make(CPU), FakeTensor)
        assert type(make(CPU)) is Tensor

    @pytest.mark.parametrize("name", ["offsets", "labels"])
    def test_tensors_made_in_inference_mode_serve_training(self, name: str) -> None:
        layout = LatentLayout((4, 0, 13))
        with torch.inference_mode():
            getattr(layout, name)(CPU)
        assert not getattr(layout, name)(CPU).is_inference()


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, 1e-30, math.nan, math.inf])
def test_a_mask_that_is_almost_one_hot(value):
    labels = torch.randint(-1, 5, (2, 7, 9))
    mask = (labels.unsqueeze(1) == torch.arange(5)[:, None, None]).double()
    found = labels_of_one_hot(mask)
    assert torch.equal(found, labels.int()) and is_one_hot(mask, found)
    for plane in range(5):
        changed = mask.clone()
        changed[1, plane, 3, 4] = value
        found = labels_of_one_hot(changed)
        assert not is_one_hot(changed, found) and found.min() >= -1 and found.max() < 5
