"""LabelMap and LatentLayout inside PyTorch's machinery: compile, export, pytrees and data loaders."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, default_collate

from sca_kernels import LabelMap, LatentLayout, semantic_cross_attention
from sca_kernels.labels import LabelPlan, tile_size
from sca_kernels.reference.label_plan import label_plan

LAYOUT = LatentLayout((3, 0, 2))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def random_map(batch: int = 2, height: int = 5, width: int = 6, *, seed: int = 0) -> LabelMap:
    generator = torch.Generator().manual_seed(seed)
    return LabelMap.from_labels(torch.randint(-1, 3, (batch, height, width), generator=generator), 3)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    # Dynamo, fake tensors and functionalisation, without generated code that would take seconds to build.
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]


def assert_same(actual: Any, expected: Any) -> None:
    """The same structure and values, and real tensors only. Plans are compared where their content is defined."""
    assert_real(actual)
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for one, other in zip(defined_parts(actual), defined_parts(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def defined_parts(result: Any) -> list[Tensor]:
    parts: list[Tensor] = []
    for leaf in pytree.tree_leaves(result, is_leaf=lambda node: isinstance(node, LabelPlan)):
        if isinstance(leaf, LabelPlan):
            used = torch.arange(leaf.tile_segments.shape[2]) < leaf.tile_counts.unsqueeze(-1)
            parts += [*leaf[:3], torch.where(used.unsqueeze(-1), leaf.tile_segments, 0)]
        elif leaf is not None:
            parts.append(leaf)
    return parts


def assert_real(result: Any) -> None:
    # A stand-in has the address zero: a kernel that is given one ends the process.
    for tensor in tensors(result):
        assert type(tensor) is Tensor
        assert tensor.numel() == 0 or tensor.data_ptr() != 0


def assert_planned(label_map: LabelMap) -> None:
    assert label_map.plan is not None
    expected = label_plan(label_map.labels, label_map.num_labels, *tile_size(label_map.height, label_map.width))
    assert_same(label_map.plan, LabelPlan(*expected))


def attend(query: Tensor, key: Tensor, label_map: LabelMap) -> Tensor:
    return semantic_cross_attention(query, key, key, label_map, LAYOUT)


def attention_arguments(label_map: LabelMap) -> tuple[Tensor, Tensor, LabelMap]:
    generator = torch.Generator().manual_seed(1)
    pixels = label_map.height * label_map.width
    query = torch.randn(label_map.batch, 2, pixels, 4, generator=generator)
    key = torch.randn(label_map.batch, 2, LAYOUT.count, 4, generator=generator)
    return query, key, label_map


@pytest.mark.compiled
@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    @pytest.mark.parametrize("planned", [False, True], ids=["unplanned", "planned"])
    @pytest.mark.parametrize("size", [(5, 6), (9, 4)], ids=["own size", "resized"])
    def test_argument_and_result(self, planned: bool, size: tuple[int, int]) -> None:
        label_map = random_map().at(5, 6) if planned else random_map()
        result = compiled(lambda label_map: label_map.at(*size))(label_map)
        assert isinstance(result, LabelMap)
        assert result.num_labels == 3
        assert_same(result, random_map().at(*size))
        assert_planned(result)

    @pytest.mark.parametrize(
        ("make", "arguments"),
        [
            pytest.param(
                lambda labels: LabelMap.from_labels(labels, 3, ignore_index=255).at(7, 8),
                (torch.tensor([[[0, 255, 1], [2, 1, 0]]]),),
                id="from_labels int64 with ignore_index",
            ),
            pytest.param(
                lambda labels: LabelMap.from_labels(labels, 3).at(2, 3),
                (torch.tensor([[0, -1, 1], [2, 1, 0]], dtype=torch.int32),),
                id="from_labels int32 of one image",
            ),
            pytest.param(
                lambda mask: LabelMap.from_mask(mask).at(4, 5),
                (torch.tensor([[[[0.5, 0.0, 0.0]], [[0.0, 0.0, 1.0]]]]),),
                id="from_mask",
            ),
            pytest.param(
                lambda labels: LabelMap.from_labels(labels, 3), (torch.zeros(1, 2, 2).long(),), id="unplanned"
            ),
        ],
    )
    def test_made_inside(self, make: Callable[[Tensor], LabelMap], arguments: tuple[Tensor]) -> None:
        assert_same(compiled(make)(*arguments), make(*arguments))

    def test_made_inside_in_inference_mode(self) -> None:
        labels = torch.tensor([[0, -1, 1], [2, 1, 0]], dtype=torch.int32)
        with torch.inference_mode():
            result = compiled(lambda labels: LabelMap.from_labels(labels.clone(), 3).at(4, 6))(labels)
        assert_same(result, LabelMap.from_labels(labels, 3).at(4, 6))

    def test_values_are_not_checked_while_compiling_and_count_as_ignored(self) -> None:
        labels = torch.tensor([[[0, 7, 2**32 + 1, 1]]])
        result = compiled(lambda labels: LabelMap.from_labels(labels, 3).at(1, 4))(labels)
        assert result.plan.offsets.tolist() == [[0, 1, 2, 2]]

    def test_memo_is_neither_used_nor_filled(self) -> None:
        label_map = random_map()
        resize = compiled(lambda label_map: (label_map.at(5, 6), label_map.at(9, 4)))
        inside = resize(label_map)
        outside = label_map.at(9, 4)
        assert outside is not inside[1]
        assert_real(outside)
        assert_planned(outside)
        assert_same(resize(label_map), inside)
        assert label_map.at(9, 4) is outside

    def test_plan_is_part_of_the_graph(self) -> None:
        # Otherwise a second call would see the plan of the first labels.
        recorder = EagerAndRecordGraphs()
        resize = torch.compile(lambda label_map: label_map.at(9, 4), fullgraph=True, backend=recorder)
        for seed in (0, 1):
            assert_same(resize(random_map(seed=seed)), random_map(seed=seed).at(9, 4))
        assert len(recorder.graphs) == 1
        assert "label_plan" in recorder.graphs[0].code

    def test_writes_to_the_labels_count(self) -> None:
        buffer = torch.zeros(1, 4, 6, dtype=torch.int32)
        label_map = LabelMap.from_labels(buffer, 3)
        resize = compiled(lambda label_map: (label_map.at(4, 6), label_map.at(2, 2)))
        resize(label_map)
        buffer[0, 1:3] = 2
        for result in resize(label_map):
            assert_planned(result)
            assert 2 in result.labels

    def test_one_graph_serves_all_sizes_of_a_kind(self) -> None:
        resize = compiled(lambda label_map, height, width: label_map.at(height, width), dynamic=True)
        resize(random_map(2, 5, 6), 65, 70)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch, source, target in ((2, (7, 8), (80, 90)), (3, (20, 30), (100, 71))):
                label_map = random_map(batch, *source)
                assert_same(resize(label_map, *target), label_map.at(*target))

    @pytest.mark.parametrize("size", [(3, 70), (33, 2), (1, 1), (0, 4)])
    def test_any_size_compiles(self, size: tuple[int, int]) -> None:
        resize = compiled(lambda label_map, height, width: label_map.at(height, width), dynamic=True)
        label_map = random_map(2, 20, 40)
        assert_same(resize(label_map, 65, 70), label_map.at(65, 70))
        assert_same(resize(label_map, *size), label_map.at(*size))

    def test_generated_code(self) -> None:
        mask = torch.nn.functional.one_hot(torch.randint(0, 3, (2, 5, 6)), 3).movedim(3, 1)

        def make(mask: Tensor) -> LabelMap:
            return LabelMap.from_mask(mask).at(9, 8)

        assert_same(torch.compile(make, fullgraph=True)(mask), make(mask))

    def test_layout_as_argument(self) -> None:
        function = compiled(lambda layout: (layout.offsets(torch.device("cpu")), layout.labels(torch.device("cpu"))))
        for layout in (LatentLayout((4, 0, 9)), LatentLayout((1, 2, 3)), LatentLayout((4, 0, 9))):
            offsets, labels = function(layout)
            assert offsets.tolist() == list(layout.cu_latents)
            assert labels.tolist() == [label for label, n in enumerate(layout.latents_per_label) for _ in range(n)]

    def test_layout_is_not_remembered_while_compiling(self) -> None:
        layout = LatentLayout((5, 0, 8))
        inside = compiled(lambda: layout.offsets(torch.device("cpu")))()
        outside = layout.offsets(torch.device("cpu"))
        assert outside is not inside
        assert_real([inside, outside])
        assert outside.tolist() == [0, 5, 5, 13]

    def test_attention_with_a_map_and_a_layout(self) -> None:
        arguments = attention_arguments(random_map())
        expected = attend(*arguments)
        torch.testing.assert_close(compiled(attend)(*arguments), expected)
        torch.testing.assert_close(attend(*arguments), expected)


class Resize(torch.nn.Module):
    def forward(self, label_map: LabelMap) -> tuple[Tensor, LabelPlan | None, LabelMap]:
        resized = label_map.at(9, 4)
        return resized.labels, resized.plan, label_map.at(label_map.height, label_map.width)


class Attend(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, label_map: LabelMap) -> Tensor:
        return attend(query, key, label_map)


class AttendWithLayout(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, label_map: LabelMap, layout: LatentLayout) -> Tensor:
        return semantic_cross_attention(query, key, key, label_map, layout)


@pytest.mark.compiled
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
class TestExport:
    @pytest.mark.parametrize("planned", [False, True], ids=["unplanned", "planned"])
    def test_export_then_eager_with_the_same_map(self, strict: bool, planned: bool) -> None:
        label_map = random_map().at(5, 6) if planned else random_map()
        program = torch.export.export(Resize(), (label_map,), strict=strict)
        eager = Resize()(label_map)
        assert_same(eager, Resize()(random_map()))
        assert_same(program.module()(label_map), eager)
        assert_same(
            program.module()(random_map(seed=1).at(5, 6) if planned else random_map(seed=1)),
            Resize()(random_map(seed=1)),
        )

    def test_attention_exported_then_eager_with_the_same_map_and_layout(self, strict: bool) -> None:
        arguments = attention_arguments(random_map())
        program = torch.export.export(Attend(), arguments, strict=strict)
        # The eager call comes first: a plan or a layout of stand-ins would end the process here.
        expected = attend(*arguments)
        torch.testing.assert_close(program.module()(*arguments), expected)
        torch.testing.assert_close(expected, attend(*attention_arguments(random_map())))

    def test_layout_as_argument(self, strict: bool) -> None:
        arguments = (*attention_arguments(random_map()), LAYOUT)
        program = torch.export.export(AttendWithLayout(), arguments, strict=strict)
        torch.testing.assert_close(program.module()(*arguments), attend(*arguments[:3]))

    def test_any_batch(self, strict: bool) -> None:
        batch = torch.export.Dim("batch", min=1, max=64)
        shapes = {"query": {0: batch}, "key": {0: batch}, "label_map": [{0: batch}, None]}
        program = torch.export.export(Attend(), attention_arguments(random_map()), strict=strict, dynamic_shapes=shapes)
        more = attention_arguments(random_map(5))
        torch.testing.assert_close(program.module()(*more), attend(*more))

    def test_any_size_of_a_kind(self, strict: bool) -> None:
        class Plan(torch.nn.Module):
            def forward(self, label_map: LabelMap) -> LabelPlan | None:
                return label_map.at(label_map.height, label_map.width).plan

        sizes = {1: torch.export.Dim("height", min=64, max=512), 2: torch.export.Dim("width", min=64, max=512)}
        program = torch.export.export(
            Plan(), (random_map(2, 80, 90),), strict=strict, dynamic_shapes={"label_map": [sizes, None]}
        )
        other = random_map(2, 71, 100)
        assert_same(program.module()(other), Plan()(other))

    def test_saved_and_loaded(self, strict: bool) -> None:
        arguments = attention_arguments(random_map())
        file = io.BytesIO()
        torch.export.save(torch.export.export(Attend(), arguments, strict=strict), file)
        file.seek(0)
        torch.testing.assert_close(torch.export.load(file).module()(*arguments), attend(*arguments))


class TestFakeTensors:
    def test_at_makes_fake_plans_that_a_real_map_does_not_see(self) -> None:
        label_map = random_map()
        with FakeTensorMode() as mode:
            fake = pytree.tree_map_only(Tensor, mode.from_tensor, label_map)
            for size in ((5, 6), (9, 4)):
                assert all(isinstance(part, FakeTensor) for part in tensors(fake.at(*size)))
        assert_planned(label_map.at(5, 6))
        assert_planned(label_map.at(9, 4))

    def test_made_under_fake_tensors(self) -> None:
        with FakeTensorMode():
            label_map = LabelMap.from_labels(torch.zeros(2, 5, 6, dtype=torch.int64), 3)
            assert label_map.at(9, 4).labels.shape == (2, 9, 4)

    def test_layout_known_before_serves_fake_tensors(self) -> None:
        arguments = attention_arguments(random_map())
        attend(*arguments)
        with FakeTensorMode() as mode:
            out = attend(*pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
        assert out.shape == arguments[0].shape


class TestPytree:
    def test_tree_map_and_back(self) -> None:
        for label_map in (random_map(), random_map().at(5, 6)):
            leaves, structure = pytree.tree_flatten({"map": label_map, "layout": LAYOUT})
            assert_same(pytree.tree_unflatten(leaves, structure)["map"], label_map)
            assert pytree.tree_unflatten(leaves, structure)["layout"] is LAYOUT
            cloned = pytree.tree_map_only(Tensor, torch.clone, label_map)
            assert isinstance(cloned, LabelMap)
            assert cloned.labels.data_ptr() != label_map.labels.data_ptr()
            assert_same(cloned, label_map)

    def test_leaves_are_named(self) -> None:
        names = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(random_map().at(5, 6))]
        assert names[0] == ".labels"
        assert all(name.startswith(".plan") for name in names[1:])
        assert len(names) == 5

    def test_number_of_labels_belongs_to_the_structure(self) -> None:
        two, three = (LabelMap.from_labels(torch.zeros(1, 2, 2).long(), labels) for labels in (2, 3))
        assert pytree.tree_structure(two) != pytree.tree_structure(three)
        assert pytree.tree_structure(two) == pytree.tree_structure(two.to("cpu"))

    def test_layout_has_no_leaves(self) -> None:
        assert pytree.tree_leaves(LAYOUT) == []

    def test_any_leaves(self) -> None:
        # Specifications for vmap or export have the structure of a map, but no tensors in it.
        specification = pytree.tree_map(lambda leaf: None, random_map().at(5, 6))
        assert pytree.tree_leaves(specification) == [None] * 5


class Samples(Dataset[dict[str, Any]]):
    """Pairs of an image and its label map, of one size unless told otherwise."""

    def __init__(self, sizes: list[tuple[int, int]], *, plan: bool = False) -> None:
        self.sizes = sizes
        self.plan = plan

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        height, width = self.sizes[index]
        labels = LabelMap.from_labels(torch.full((height, width), index % 3, dtype=torch.uint8), 3)
        return {
            "image": torch.full((3, 2, 2), float(index)),
            "labels": labels.at(height, width) if self.plan else labels,
        }


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.subprocess)])
class TestDataLoader:
    @pytest.mark.parametrize("plan", [False, True], ids=["unplanned", "planned"])
    def test_samples_become_batches(self, workers: int, plan: bool) -> None:
        # The parent has planned with its threads before, and the workers are forked: they must not wait for those.
        random_map(1, 256, 256).at(256, 256)
        # With a limit a worker that hangs is an error.
        loader = DataLoader(
            Samples([(200, 256)] * 5, plan=plan), batch_size=2, num_workers=workers, timeout=60 * (workers > 0)
        )
        batches = list(loader)
        assert [batch["labels"].batch for batch in batches] == [2, 2, 1]
        for batch in batches:
            assert isinstance(batch["labels"], LabelMap)
            assert batch["labels"].num_labels == 3
            expected = batch["image"][:, 0, 0, 0].int() % 3
            assert torch.equal(batch["labels"].labels, expected.view(-1, 1, 1).expand(-1, 200, 256))
            assert_planned(batch["labels"].at(200, 256))

    def test_sizes_differ(self, workers: int) -> None:
        loader = DataLoader(Samples([(4, 5), (4, 6)]), batch_size=2, num_workers=workers, timeout=60 * (workers > 0))
        batches = iter(loader)
        with pytest.raises(ValueError, match="expected label maps of one size and number of labels") as error:
            next(batches)
        assert "height=4, width=5" in str(error.value)
        assert "height=4, width=6" in str(error.value)
        # At their end the workers are told to stop; garbage collection would wait five seconds for them.
        assert list(batches) == []


class TestCollate:
    def test_maps_of_several_images(self) -> None:
        first, second = random_map(2), random_map(3, seed=1)
        collated = default_collate([first, second])
        assert torch.equal(collated.labels, torch.cat([first.labels, second.labels]))

    def test_numbers_of_labels_differ(self) -> None:
        maps = [LabelMap.from_labels(torch.zeros(1, 2, 2).long(), labels) for labels in (2, 3)]
        with pytest.raises(ValueError, match=r"num_labels=2.*num_labels=3"):
            default_collate(maps)

    def test_result_shares_nothing(self) -> None:
        label_map = random_map()
        collated = default_collate([label_map])
        collated.labels.zero_()
        assert_same(label_map, random_map())


def test_tokens_first_used_in_inference_mode_serve_training() -> None:
    label_map, layout = random_map(), LatentLayout((3, 1, 6))
    query, key = torch.randn(2, 1, 30, 4), torch.randn(2, 1, 10, 4, requires_grad=True)
    with torch.inference_mode():
        semantic_cross_attention(query, key, key, label_map, layout)
    semantic_cross_attention(query, key, key, label_map, layout).sum().backward()
    assert key.grad is not None
