"""What only a GPU can show: no synchronisation, capture in graphs, bits that repeat, offsets beyond 32 bits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench.gpu.calls import ROOT, Call, all_calls, step_of
from sca_kernels import LabelMap, LatentLayout, backend, instance_modulate, semantic_cross_attention, triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(triton.INTERPRETED, reason="with TRITON_INTERPRET=1 nothing runs on a GPU"),
]

CALLS = {str(call): call for call in all_calls([torch.bfloat16])}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device("cuda"), backend("triton"):
        yield


@calls
def test_nothing_waits_for_the_gpu(call: Call) -> None:
    step = step_of(call.prepare())
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@calls
def test_bits_repeat(call: Call) -> None:
    step = step_of(call.prepare())
    first = step()
    for _ in range(3):
        for one, other in zip(first, step(), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


PROGRAM = """
import torch, sca_kernels
from bench.gpu.calls import all_calls, step_of

with torch.device("cuda"), sca_kernels.backend("triton"):
    for call in all_calls([torch.float32, torch.bfloat16], shrink=8):
        step_of(call.prepare())()
torch.cuda.synchronize()
print("all calls are done")
"""
FOUND_SOMETHING = 86


@pytest.mark.subprocess
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="there is no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_under_compute_sanitizer(tool: str) -> None:
    command = ["compute-sanitizer", f"--tool={tool}", f"--error-exitcode={FOUND_SOMETHING}", sys.executable, "-c"]
    # Every tensor in memory of its own, so that what is beside it is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([*command, PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != FOUND_SOMETHING, done.stdout[-3000:]
    if "all calls are done" not in done.stdout:
        pytest.skip(f"it does not run here: {(done.stdout + done.stderr)[-300:]}")


def test_a_plan_waits_for_nothing_and_is_captured() -> None:
    labels = torch.randint(0, 19, (2, 96, 80), dtype=torch.int32)
    LabelMap(labels, 19).at(48, 40)
    torch.cuda.set_sync_debug_mode("error")
    try:
        LabelMap(labels, 19).at(48, 40)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("query", ["pixels", "latents"])
def test_labels_change_between_replays_of_a_graph(query: str) -> None:
    """The plan is made inside the graph."""
    layout = LatentLayout.uniform(5, 3)
    labels = torch.randint(0, 5, (1, 24, 40), dtype=torch.int32)
    pixels = torch.randn(1, 2, 24 * 40, 16, requires_grad=True)
    latents = torch.randn(1, 2, layout.count, 16, requires_grad=True)

    def attend() -> list[Tensor]:
        label_map = LabelMap(labels, 5).at(24, 40)
        if query == "pixels":
            out = semantic_cross_attention(pixels, latents, latents, label_map, layout)
        else:
            out = semantic_cross_attention(latents, pixels, pixels, layout, label_map)
        return [out, *torch.autograd.grad(out.square().sum(), (pixels, latents))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for _ in range(3):
        labels.copy_(torch.randint(-1, 5, labels.shape, dtype=torch.int32))
        graph.replay()
        for one, other in zip(captured, attend(), strict=True):
            assert torch.equal(one, other)


def test_noise_is_drawn_anew_by_each_replay() -> None:
    x = torch.randn(1, 4, 16, 16)
    instance_modulate(x, noise="per_element")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = instance_modulate(x, noise="per_element")
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements; the last image is what it is alone."""
    x = torch.empty(3, 16, 6912, 6912, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x.normal_()
    together = instance_modulate(x)[-1:].clone()
    assert torch.equal(together, instance_modulate(x[-1:].clone()))
