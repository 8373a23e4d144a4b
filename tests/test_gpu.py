"""What only a GPU can show, for each backend: published shapes, no waiting, graphs, bits that repeat, large offsets.

Without a GPU the same functions are rehearsed on the CPU, in small: see stage.py.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stage import DEVICE, ON_A_GPU, capture, findings, free_bytes, nothing_waits
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.gpu import run
from bench.gpu.calls import (
    BACKENDS,
    DTYPES,
    Call,
    all_calls,
    call_once,
    prepare_attention,
    prepare_folded,
    prepare_instance_modulate,
    step_of,
)
from bench.gpu.parts import run_process
from bench.timing import relative_error
from sca_kernels import LabelMap, backend, instance_modulate, semantic_modulate
from sca_kernels.backends import implementation

pytestmark = pytest.mark.gpu


def of(name: str, *values: Any, label: str = "") -> Any:
    """A parameter of a backend, which a test gets as the fixture ``kernels``."""
    return pytest.param(name, *values, id=f"{name}-{label}" if label else name, marks=getattr(pytest.mark, name))


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces a backend, or skips the test where it cannot run."""
    name = str(request.param)
    request.getfixturevalue(f"{name}_kernels")
    torch.use_deterministic_algorithms(False)  # as users run it; some of PyTorch's others wait for the GPU
    torch.manual_seed(0)
    with torch.device(DEVICE), backend(name):
        yield name


def calls(*dtypes: torch.dtype) -> Any:
    """Every call of every backend, but for what would take Triton's compiler, or its interpreter, minutes."""

    def is_quick(call: Call) -> bool:
        return call.headline or call.dtype == torch.bfloat16 if ON_A_GPU else call.name == "by channel, channels last"

    shrink = {"triton": 32, "cuda": 16}
    found = [
        of(name, call, label=str(call))
        for name in BACKENDS
        for call in all_calls(dtypes, shrink=1 if ON_A_GPU else shrink[name])
        if name in call.backends and (name == "cuda" or is_quick(call))
    ]
    return pytest.mark.parametrize(("kernels", "call"), found, indirect=["kernels"])


@calls(*DTYPES)
def test_matches_the_reference(kernels: str, call: Call) -> None:
    found = run.errors(call.prepare())
    assert max(found.values()) <= run.TOLERANCE[call.dtype], found


@calls(torch.bfloat16)
def test_nothing_waits_for_the_gpu(kernels: str, call: Call) -> None:
    step = step_of(call.prepare())
    step()
    with nothing_waits():
        step()


@calls(torch.bfloat16)
def test_bits_repeat(kernels: str, call: Call) -> None:
    step = step_of(call.prepare())
    first = step()
    for _ in range(3):
        for one, other in zip(first, step(), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


SIDE = 24 if ON_A_GPU else 3
SMALL: dict[str, Callable[[LabelMap], Any]] = {
    "instance_modulate": lambda labels: prepare_instance_modulate(torch.float32, channels=4, size=SIDE),
    **{
        f"semantic_cross_attention, {query} to {key}": lambda labels, query=query, key=key: prepare_attention(
            torch.float32, query, key, size=SIDE, latents=2, width=16, labels=labels
        )
        for query, key in (("pixels", "latents"), ("latents", "pixels"))
    },
    **{
        operator: lambda labels, operator=operator: prepare_folded(
            operator, torch.float32, channels=4, size=SIDE, latents=2, labels=labels
        )
        for operator in ("semantic_pool", "semantic_modulate")
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kernels", "prepare"),
    [of(name, prepare, label=call) for name in BACKENDS for call, prepare in SMALL.items()],
    indirect=["kernels"],
)
def test_labels_change_between_replays_of_a_graph(kernels: str, prepare: Callable[[LabelMap], Any]) -> None:
    """The plan is made inside the graph. Labels out of range are none."""
    labels = torch.randint(0, 3, (1, SIDE, SIDE), dtype=torch.int32)
    call = prepare(LabelMap(labels, 3))
    step = step_of(call)
    results, replay = capture(step)
    for lowest, highest in ((-1, 3), (0, 1), (-1, 0), (-7, 9)):
        labels.copy_(torch.randint(lowest, highest, labels.shape, dtype=torch.int32))
        with torch.no_grad():
            for leaf in (*call.args, *call.keywords.values()):
                if isinstance(leaf, Tensor):
                    leaf.normal_()
        replay()
        for one, other in zip(results, step(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kernels", "operator"),
    [of(name, call, label=call.__name__) for name in BACKENDS for call in (instance_modulate, semantic_modulate)],
    indirect=["kernels"],
)
def test_noise_is_drawn_anew_by_each_replay(kernels: str, operator: Callable[..., Tensor]) -> None:
    call = SMALL[operator.__name__](LabelMap(torch.zeros(1, SIDE, SIDE, dtype=torch.int32), 1))
    call = partial(call.func, *call.args, **{**call.keywords, "noise": "per_element"})
    results, replay = capture(step_of(call))
    replay()
    first = results[0].clone()
    replay()
    assert not torch.equal(first, results[0])


@pytest.mark.parametrize("kernels", [of("triton", label="label_plan")], indirect=True)
def test_a_plan_is_that_of_the_reference_and_waits_for_nothing(kernels: str) -> None:
    labels = torch.randint(-3, 22, (2, 96, 80), dtype=torch.int32)
    plan = partial(implementation("label_plan", kernels), labels, 19, 8, 32)
    results, replay = capture(plan)
    with nothing_waits():
        plan()
    labels.copy_(torch.randint(-3, 22, labels.shape, dtype=torch.int32))
    replay()
    order, offsets, counts, segments = results
    expected_order, expected_offsets, expected_counts, expected_segments = implementation("label_plan", "reference")(
        labels, 19, 8, 32
    )
    assert torch.equal(order, expected_order) and torch.equal(offsets, expected_offsets)
    assert torch.equal(counts, expected_counts)
    used = torch.arange(segments.shape[2]) < counts.unsqueeze(-1)
    assert torch.equal(segments[used], expected_segments[used])


# Three images of 16 channels, together more than 2^31 numbers.
LARGE_SIDE = 6912 if ON_A_GPU else 3
LARGE: dict[str, Callable[[], Any]] = {
    "instance_modulate": lambda: partial(
        instance_modulate, torch.randn(3, 16, LARGE_SIDE, LARGE_SIDE, dtype=torch.bfloat16, requires_grad=True)
    ),
    **{
        f"semantic_cross_attention, {query} to {key}": partial(
            prepare_attention, torch.bfloat16, query, key, batch=3, size=LARGE_SIDE, latents=2, width=16
        )
        for query, key in (("pixels", "latents"), ("latents", "pixels"))
    },
    **{
        operator: partial(
            prepare_folded, operator, torch.bfloat16, batch=3, channels=16, size=LARGE_SIDE, latents=2
        )
        for operator in ("semantic_pool", "semantic_modulate")
    },
}  # fmt: skip
LARGE_BYTES = 30 << 30


@pytest.mark.parametrize(
    ("kernels", "prepare"),
    [of(name, prepare, label=call) for name in BACKENDS for call, prepare in LARGE.items()],
    indirect=["kernels"],
)
def test_offsets_beyond_32_bits(kernels: str, prepare: Callable[[], Any]) -> None:
    """The last image is what it is alone."""
    if ON_A_GPU:
        torch.cuda.empty_cache()
        if free_bytes() < LARGE_BYTES:
            pytest.skip(f"it needs {LARGE_BYTES >> 30} GiB of the GPU's memory, and {free_bytes() >> 30} are free")
    elif kernels == "triton":
        pytest.skip("it would take Triton's interpreter minutes")
    together = prepare()
    everything = (*together.args, *together.keywords.values())
    largest = max(value.numel() for value in everything if isinstance(value, Tensor))
    assert largest > 2**31 or not ON_A_GPU

    def last(value: Tensor) -> Tensor:
        return value.detach()[-1:].clone().requires_grad_(value.requires_grad) if value.shape[:1] == (3,) else value

    arguments, named = pytree.tree_map_only(Tensor, last, (together.args, together.keywords))
    alone = partial(together.func, *arguments, **named)
    gradients: list[Tensor] = []
    results = step_of(together, gradients)()
    expected = step_of(alone, [last(gradient) for gradient in gradients])()
    for one, other in zip(results, expected, strict=True):
        if one.shape[:1] == (3,):
            assert relative_error(run.finite(one[-1:].float()), run.finite(other.float())) <= 1e-3


SANITIZER = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
SANITIZED_SECONDS = 200.0
OPERATORS = ("instance_modulate", "semantic_cross_attention", "semantic_pool", "semantic_modulate")
TOOLS = {"memcheck": ["--report-api-errors=no"], "racecheck": [], "synccheck": []}


@pytest.mark.skipif(ON_A_GPU, reason="compute-sanitizer looks at it")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernels", [of("cuda")], indirect=True)
def test_what_is_looked_at_runs(kernels: str, operator: str) -> None:
    call_once(kernels, operator, DEVICE, shrink=32)


@pytest.mark.subprocess
@pytest.mark.skipif(SANITIZER is None or not ON_A_GPU, reason="there is no compute-sanitizer, or no GPU")
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernels", [of(name) for name in BACKENDS], indirect=True)
def test_under_compute_sanitizer(kernels: str, operator: str, tool: str, tmp_path: Path) -> None:
    """A finding is a failure; that the tool does not run here, or for too long, is none."""
    program = f"from bench.gpu.calls import call_once; call_once({kernels!r}, {operator!r})"
    command = [str(SANITIZER), f"--tool={tool}", *TOOLS[tool], sys.executable, "-c", program]
    # Every tensor in memory of its own, so that what is beside it is nobody's.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with (tmp_path / "output").open("w+") as file:
        code = run_process(command, SANITIZED_SECONDS, file.fileno(), environment, nested=True)
        file.seek(0)
        output = file.read()
    found = findings(output)
    assert not found, output[-3000:]
    if code is None:
        pytest.skip(f"it takes more than {SANITIZED_SECONDS:.0f} seconds")
    if found is None or code != 0:
        pytest.skip(f"it does not run here: {output[-300:]}")
