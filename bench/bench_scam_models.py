"""Encoder and generator as wholes beside the published ones: label plans, folding and the latents are all counted.

* ``ours``: :class:`scam_models.Scam` with a label map that is new in every call, as if it came with a new image; it is
  :func:`bench.label_maps.parts`, twenty parts of a photograph, or the photograph's own three areas. ``all labels``:
  with :func:`bench.label_maps.regions`, in which all labels occur. ``ours, compiled``: under ``torch.compile``. All in
  the memory order that is faster for the convolutions, :data:`MEMORY_ORDER`; ``ours, NCHW``: inference in the other.
* ``published``: :mod:`bench.published` with the first map, and one-hot masks that are made beforehand. It takes equally
  long for any map. ``compiled``: that under ``torch.compile``.
* ``convolutions``: ours without attention and modulation (:class:`bench.whole_models.Convolutions`), the same layers
  in the same memory order: what is left are convolutions, nearest upsampling, and one leaky ReLU where there are two in
  a row. ``convolutions of PyTorch``: the same of the published networks, ``torch.nn.Conv2d`` on NCHW memory.

Inference records no gradients, and ours may remember products of weights. A training step is forward and backward,
without the optimizer; its results are the gradients of all weights.

What is compared with what the published networks, in float32, return: at small sizes everything is in float64. With
the gradient of a random loss some units of the many leaky ReLUs are on the other side of the kink after rounding. In
float32 nine of ten gradients agree within 3e-3, and a few only to 5e-2; measured against float64 those of the published
networks are as far off. In float64 the tests of ``scam_models`` find 1e-9.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from . import goals, memory, timing
from .run import Run
from .timing import Pace
from .whole_models import CONFIGURATIONS, PASSES, TOLERANCE, make_problems

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

# On the CPU, for inference and for training: channels-last convolutions are quicker forwards, NCHW ones backwards.
MEMORY_ORDER = {False: torch.channels_last, True: torch.contiguous_format}
# Compiling the published networks takes minutes: only where a goal needs it.
COMPILED = {("CelebAMask-HQ", False), ("ADE20K", False)}


# Four images of 151 labels would take the published networks a minute and 20 GB.
BATCHES = {"CelebAMask-HQ": (1, 4), "ADE20K": (1,), "iDesigner": (1, 4)}
ROWS = [(name, batch) for name, batches in BATCHES.items() for batch in batches]


@pytest.fixture(autouse=True)
def noise_as_without_compiling(run: Run) -> Iterator[None]:
    """Compiled code would draw other random numbers."""
    if not run.full:
        yield
        return
    from torch._inductor import config

    with config.patch(fallback_random=True):
        yield


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name, batch", ROWS)
def test_models(run: Run, name: str, batch: int, dtype: torch.dtype, backward: bool) -> None:
    if run.full and dtype == torch.bfloat16 and not timing.has_bfloat16():
        pytest.skip("without AVX-512 oneDNN has no convolution in bfloat16, and PyTorch's own takes minutes")
    problem, all_labels = make_problems(run, replace(CONFIGURATIONS[name], batch=batch, dtype=dtype))
    is_headline = batch == 1 and dtype == torch.float32
    settings = {"backward": backward, "memory_format": MEMORY_ORDER[backward]}
    entries = [problem.ours("ours", **settings)]
    if all_labels is not None:
        entries.append(all_labels.ours("all labels", **settings))
    if is_headline and not backward:
        entries.append(problem.ours("ours, NCHW", backward=False))
    entries += [
        problem.convolutions("convolutions", ours=True, **settings),
        problem.convolutions("convolutions of PyTorch", backward=backward, ours=False),
        problem.as_published("published", backward=backward),
    ]
    if is_headline and run.full and (name, backward) in COMPILED:
        entries += [
            problem.ours("ours, compiled", compiled_by=run.compile, **settings),
            problem.as_published("compiled", backward=backward, compiled_by=run.compile),
        ]
    present = sorted({str(entry.shape["labels_present"]) for entry in entries[:2]}, key=int)
    run.compare(
        entries,
        table=f"Encoder + generator, {PASSES[backward]}: k = 8, "
        + ("float32" if dtype == torch.float32 else "bfloat16 autocast"),
        row=f"{name}, batch {batch}, {problem.sizes.num_labels} labels ({', '.join(present)} present)",
        dtype=problem.sizes.dtype,
        goals=goals.model(name, backward) if is_headline else (),
        # The published networks take half a minute for a step with 151 labels.
        pace=Pace(seconds=15.0, turn_seconds=0.5, fewest_rounds=1),
        tolerance=TOLERANCE[problem.sizes.dtype][backward],
    )


def test_peak_memory(run: Run) -> None:
    """Of a training step. Parameters and inputs were there before and are not counted, gradients are."""
    assert memory.counts_correctly(), "the profiler does not report allocations as expected"
    problem, all_labels = make_problems(run, CONFIGURATIONS["ADE20K"])
    assert all_labels is not None
    contenders = (
        problem.ours("ours", backward=True),
        all_labels.ours("all labels", backward=True),
        problem.convolutions("convolutions", backward=True, ours=True),
        problem.as_published("published", backward=True),
    )
    run.record(
        [memory.peak_of(contender) for contender in contenders],
        table="Encoder + generator, peak memory of a training step: k = 8, float32, gradients counted",
        row="ADE20K, batch 1, 151 labels",
        unit="MiB",
        goals=goals.MODEL_MEMORY,
    )
