"""The plan of a label map: the compiled counting sort against the reference, and both against the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import sca_kernels.cpu.label_plan as native_plan
from sca_kernels import LabelMap
from sca_kernels.labels import LabelPlan, tile_size
from sca_kernels.reference.label_plan import label_plan as reference_label_plan
from sca_kernels.triton.label_plan import label_plan as gpu_label_plan

INT32 = torch.iinfo(torch.int32)


def random_labels(shape: tuple[int, ...], num_labels: int) -> Tensor:
    return torch.randint(-1, num_labels, shape, dtype=torch.int32)


def regions(shape: tuple[int, ...], num_labels: int) -> Tensor:
    """Blocks of 5 x 7 pixels, whose borders cross those of the tiles."""
    _, height, width = shape
    blocks = random_labels((shape[0], height // 5 + 1, width // 7 + 1), num_labels)
    return blocks.repeat_interleave(5, 1).repeat_interleave(7, 2)[:, :height, :width].contiguous()


def any_values(shape: tuple[int, ...], num_labels: int) -> Tensor:
    """Everything that 32 bits can hold, the values at the borders of what is valid in particular."""
    labels = torch.randint(INT32.min, INT32.max, shape, dtype=torch.int32)
    borders = torch.tensor(
        [INT32.min, INT32.min + 1, -2, -1, 0, num_labels - 1, num_labels, num_labels + 1, INT32.max],
        dtype=torch.int32,
    )
    chosen = borders[torch.randint(len(borders), shape)]
    return torch.where(torch.rand(shape) < 0.7, chosen, labels)


def ignored(shape: tuple[int, ...], num_labels: int) -> Tensor:
    return torch.full(shape, -1, dtype=torch.int32)


def last_label(shape: tuple[int, ...], num_labels: int) -> Tensor:
    return torch.full(shape, num_labels - 1, dtype=torch.int32)


def own_label(shape: tuple[int, ...], num_labels: int) -> Tensor:
    """Every pixel its own label, in an order that has nothing to do with its position."""
    batch, height, width = shape
    assert num_labels >= height * width
    images = [torch.randperm(num_labels)[: height * width].view(height, width) for _ in range(batch)]
    return torch.stack(images).to(torch.int32)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int]
    num_labels: int
    make: Callable[[tuple[int, ...], int], Tensor] = random_labels
    tile: tuple[int, int] | None = None

    def arguments(self) -> tuple[Tensor, int, int, int]:
        return self.make(self.shape, self.num_labels), self.num_labels, *(self.tile or tile_size(*self.shape[1:]))

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        tile = "" if self.tile is None else f"-tile{self.tile[0]}x{self.tile[1]}"
        return f"{self.make.__name__}-{size}-s{self.num_labels}{tile}"


CASES = [
    Case((0, 4, 5), 3),
    Case((1, 0, 0), 3),
    Case((2, 0, 5), 3),
    Case((2, 5, 0), 1),
    Case((1, 1, 1), 1),
    Case((1, 1, 1), 1000, last_label),
    Case((1, 1, 1), 3, ignored),
    Case((2, 1, 37), 3),
    Case((2, 37, 1), 3),
    Case((3, 8, 8), 3),
    Case((3, 9, 7), 3, any_values),
    Case((1, 16, 16), 255),  # as many places as pixels in a tile, give or take one
    Case((1, 16, 16), 62, tile=(8, 8)),
    Case((1, 16, 16), 63, tile=(8, 8)),
    Case((1, 16, 16), 64, tile=(8, 8)),
    Case((2, 7, 11), 5, tile=(3, 4)),
    Case((2, 7, 11), 5, tile=(1, 1)),
    Case((2, 7, 11), 5, tile=(16, 16)),
    Case((2, 33, 47), 151, regions),
    Case((1, 64, 64), 64 * 64, own_label),
    Case((2, 31, 29), 1000, own_label),
    Case((5, 65, 40), 151, any_values),
    Case((1, 170, 256), 1, any_values),
    Case((1, 170, 256), 3, regions),
    Case((2, 170, 256), 151),
    Case((1, 170, 256), 1000, any_values),
    Case((1, 256, 170), 19, ignored),
    Case((1, 256, 170), 19, last_label),
    Case((1, 256, 171), 1000, regions),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def compared_parts(plan: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plan with its unused segments, whose content is arbitrary, set to zero."""
    order, offsets, tile_counts, tile_segments = plan
    used = torch.arange(tile_segments.shape[2]) < tile_counts.unsqueeze(-1)
    return order, offsets, tile_counts, torch.where(used.unsqueeze(-1), tile_segments, 0)


def assert_same_plan(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    parts = zip(LabelPlan._fields, compared_parts(actual), compared_parts(expected), strict=True)
    for name, one, other in parts:
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def assert_follows_definition(
    plan: tuple[Tensor, ...], labels: Tensor, num_labels: int, tile_height: int, tile_width: int
) -> None:
    """Checks a plan against the docstring of LabelPlan, with nothing in common with the implementations."""
    batch, height, width = labels.shape
    across = -(-width // tile_width)
    tiles = -(-height // tile_height) * across
    order, offsets, tile_counts, tile_segments = (part.tolist() for part in plan)
    assert len(order) == len(offsets) == len(tile_counts) == len(tile_segments) == batch
    for image in range(batch):
        # "No label" takes the place after the last label.
        place = [label if 0 <= label < num_labels else num_labels for label in labels[image].flatten().tolist()]
        tile = [row // tile_height * across + column // tile_width for row in range(height) for column in range(width)]
        pixels = range(height * width)
        assert order[image] == sorted(pixels, key=lambda pixel: (place[pixel], tile[pixel], pixel))
        assert offsets[image] == [sum(p < label for p in place) for label in range(num_labels + 1)]

        expected: list[dict[int, list[int]]] = [{} for _ in range(tiles)]
        for pixel in pixels:
            expected[tile[pixel]].setdefault(place[pixel], []).append(pixel)
        assert tile_counts[image] == [len(found) for found in expected]
        for index, found in enumerate(expected):
            used = tile_segments[image][index][: len(found)]
            names = [label if label < num_labels else -1 for label in sorted(found)]
            assert [label for label, _, _ in used] == names
            for (_, begin, count), label in zip(used, sorted(found), strict=True):
                assert order[image][begin : begin + count] == found[label]


@pytest.mark.usefixtures("capability")
@cases
def test_native_equals_reference(case: Case) -> None:
    arguments = case.arguments()
    assert_same_plan(native_plan.label_plan(*arguments), reference_label_plan(*arguments))


@cases
def test_plan_for_gpus_equals_reference(case: Case) -> None:
    """It is made of PyTorch's operators, which run here as well."""
    arguments = case.arguments()
    actual, expected = gpu_label_plan(*arguments), reference_label_plan(*arguments)
    assert_same_plan(actual, expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.is_contiguous()


def test_plan_for_gpus_reads_nothing_back() -> None:
    """A tensor without values cannot be asked for one."""
    with FakeTensorMode() as mode:
        plan = gpu_label_plan(mode.from_tensor(random_labels((2, 33, 47), 9)), 9, 8, 16)
    assert all(isinstance(part, FakeTensor) for part in plan)


@pytest.mark.parametrize("case", [case for case in CASES if case.shape[1] * case.shape[2] <= 5000], ids=str)
def test_reference_follows_the_definition(case: Case) -> None:
    arguments = case.arguments()
    assert_follows_definition(reference_label_plan(*arguments), *arguments)


@pytest.mark.usefixtures("native")
@cases
def test_threads_do_not_change_the_plan(case: Case, use_threads: Callable[[int], None]) -> None:
    arguments = case.arguments()
    expected = reference_label_plan(*arguments)
    for threads in (1, 2, 3):
        use_threads(threads)
        assert_same_plan(native_plan.label_plan(*arguments), expected)


@cases
def test_fake_plan_has_the_layout_of_a_real_one(case: Case) -> None:
    labels, *settings = case.arguments()
    real = torch.ops.sca.label_plan(labels, *settings)
    reference = reference_label_plan(labels, *settings)
    with FakeTensorMode() as mode:
        fake = torch.ops.sca.label_plan(mode.from_tensor(labels), *settings)

    def layouts(plan: tuple[Tensor, ...]) -> list[tuple[object, ...]]:
        return [(part.dtype, tuple(part.shape), part.is_contiguous(), part.device.type) for part in plan]

    assert layouts(fake) == layouts(real) == layouts(reference)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda labels: labels.transpose(1, 2), id="transposed"),
        pytest.param(lambda labels: labels[:, 1::2, 3:-2:3], id="strided"),
        pytest.param(lambda labels: labels[:, :, 5:6].expand(-1, -1, 9), id="expanded pixels"),
        pytest.param(lambda labels: labels[1:2].expand(4, -1, -1), id="expanded batch"),
        pytest.param(lambda labels: labels.flip(2)[1:], id="offset"),
    ],
)
def test_plan_of_any_strides(view: Callable[[Tensor], Tensor]) -> None:
    labels = view(random_labels((2, 45, 38), 7))
    assert_same_plan(torch.ops.sca.label_plan(labels, 7, 8, 16), reference_label_plan(labels.clone(), 7, 8, 16))
    planned = LabelMap(labels, 7).at(*labels.shape[1:])
    assert planned.plan is not None
    assert_same_plan(planned.plan, reference_label_plan(labels.clone(), 7, *tile_size(*labels.shape[1:])))


def test_images_of_a_batch_are_planned_alone() -> None:
    labels = any_values((4, 20, 35), 6)
    together = compared_parts(torch.ops.sca.label_plan(labels, 6, 8, 16))
    for image in range(len(labels)):
        alone = torch.ops.sca.label_plan(labels[image : image + 1], 6, 8, 16)
        assert_same_plan(alone, tuple(part[image : image + 1] for part in together))


@pytest.mark.parametrize(
    ("size", "tile"),
    [
        ((1, 1), (8, 8)),
        ((31, 31), (8, 8)),
        ((32, 1), (8, 16)),
        ((1, 63), (8, 16)),
        ((64, 1), (8, 32)),
        ((2, 64), (8, 32)),
        ((1024, 1024), (8, 32)),
    ],
)
def test_tile_size(size: tuple[int, int], tile: tuple[int, int]) -> None:
    assert tile_size(*size) == tile


@pytest.mark.compiled
def test_operator_registration() -> None:
    # Every pixel its own label in full tiles leaves no segment unused, so every element is defined and compared.
    labels = own_label((2, 16, 24), 16 * 24)
    torch.library.opcheck(torch.ops.sca.label_plan.default, (labels, 16 * 24, 8, 8))
