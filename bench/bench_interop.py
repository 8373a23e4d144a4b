"""A published encoder and generator, as they are and with our kernels swapped in: what a user gets from ``swap_in``.

* ``original``: :mod:`bench.published` with one-hot masks that are made beforehand. It takes equally long for any mask.
* ``swapped``: the same after :func:`sca_kernels.swap_in`, with a mask tensor that is new in every call, so that it is
  checked, made a label map and planned each time; the label map is that of :mod:`bench.bench_scam_models`.
  ``all labels``: with one in which all labels occur.

Passes, tolerances and what they mean are those of :mod:`bench.bench_scam_models`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from . import memory
from .run import Run
from .timing import Contender, Pace
from .whole_models import CONFIGURATIONS, PASSES, TOLERANCE, make_problems


@pytest.fixture(autouse=True)
def noise_in_the_type_of_the_models(run: Run) -> Iterator[None]:
    """The published code, and so what is swapped, draws noise in PyTorch's default type, and small models are in
    float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(run.choose(torch.float64, before))
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_time(run: Run, name: str, backward: bool) -> None:
    dtype, row, entries = _entries(run, name, backward)
    run.compare(
        entries,
        table=f"Published encoder + generator, swapped, {PASSES[backward]}: k = 8, batch 1, float32",
        row=row,
        dtype=dtype,
        # The published networks take half a minute for a step with 151 labels.
        pace=Pace(seconds=15.0, turn_seconds=0.5, fewest_rounds=1),
        tolerance=TOLERANCE[dtype][backward],
    )


@pytest.mark.parametrize("backward", PASSES, ids=PASSES.get)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_peak_memory(run: Run, name: str, backward: bool) -> None:
    """Parameters and inputs were there before and are not counted, gradients are."""
    assert memory.counts_correctly(), "the profiler does not report allocations as expected"
    _, row, entries = _entries(run, name, backward)
    run.record(
        [memory.peak_of(entry) for entry in entries],
        table=f"Published encoder + generator, swapped, peak memory of {PASSES[backward]}: k = 8, batch 1, float32",
        row=row,
        unit="MiB",
    )


def _entries(run: Run, name: str, backward: bool) -> tuple[torch.dtype, str, list[Contender]]:
    problem, all_labels = make_problems(run, CONFIGURATIONS[name])
    entries = [problem.swapped("swapped", backward=backward)]
    if all_labels is not None:
        entries.append(all_labels.swapped("all labels", backward=backward))
    entries.append(problem.as_published("original", backward=backward))
    return problem.sizes.dtype, f"{name}, {problem.sizes.num_labels} labels", entries
