"""Comparisons that can be trusted: checked before they are timed, and timed side by side.

All contenders of a comparison take turns in one process, round after round, so that a slow minute of
the machine slows all of them. A turn is a few calls in a row on the same data: figures are warm ones.
The time of a contender is the median over all its calls; the spread of a ratio comes from the ratios
of single rounds. A contender whose result is wrong gets no time.

The allocator. A C library gives large blocks (above 32 MB with glibc) back to the system when they
are freed, so every call that returns a new tensor of that size pays for page faults, 20 to 30 ms per
64 MB, which drown every difference. Training programs do not behave like that for long: their
allocator keeps memory. :data:`REUSED_MEMORY` makes glibc keep it too, for all contenders alike. The
page faults of a call are counted and recorded with its time.
"""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

REUSED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}

# Largest |result - expected| / |expected| (norms of whole tensors) of a correct contender. With
# bfloat16 some contenders round logits and attention weights, each to within 2^-9.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}

_MOST_ROUNDS = 25
_MOST_CALLS_PER_TURN = 10
MOST_PREEMPTIONS = 100  # in a second; tens on a quiet machine, 250 when others compute
_SHORTEST_SAMPLE_SECONDS = 1e-3  # quicker calls are timed several at a time


@dataclass(frozen=True)
class Contender:
    """One way to compute a result.

    Attributes:
        name: what the table calls it.
        run: computes the result.
        expected: the result in higher precision, tensor by tensor.
        shape: what is computed, for the record.
        work: times are divided by it, to give the time of a pixel or another unit of time.
        restore: brings each tensor of the result into the order of ``expected``; never timed.
        joint: whether all tensors of the result are compared as one, so that small ones hardly count.
        tolerance: of one that computes in another type than the others it is compared with.
    """

    name: str
    run: Callable[[], tuple[Tensor, ...]]
    expected: tuple[Tensor, ...]
    shape: Mapping[str, int]
    work: float = 1.0
    restore: Callable[[Tensor], Tensor] = lambda tensor: tensor
    joint: bool = False
    tolerance: float | None = None


@dataclass(frozen=True)
class Figure:
    """What is known of one contender after a comparison.

    Attributes:
        name: the contender.
        shape: what was computed.
        problem: why it has no time: "failed: ..." or "skipped: ...", or empty.
        error: largest relative error of its results, if it was checked.
        median, lower, upper: of all samples, with the quartiles; milliseconds unless the comparison
            says otherwise.
        rounds: median of each round, to compare with those of other contenders.
        page_faults: of a call, on average.
        preemptions: how often in a second another process took a core from this one.
    """

    name: str
    shape: Mapping[str, int]
    problem: str = ""
    error: float | None = None
    median: float | None = None
    lower: float | None = None
    upper: float | None = None
    rounds: tuple[float, ...] = ()
    page_faults: float | None = None
    preemptions: float | None = None

    @property
    def failed(self) -> bool:
        return self.problem.startswith("failed")

    @property
    def disturbed(self) -> bool:
        """Whether other processes wanted the cores, which makes threads wait for each other: no time to trust."""
        return self.preemptions is not None and self.preemptions > MOST_PREEMPTIONS


@dataclass(frozen=True)
class Pace:
    """How long a comparison may take.

    Attributes:
        seconds: after which no further round begins.
        turn_seconds: after which a turn ends. It should not be far shorter than the slowest contender's: the others
            would be called too seldom.
        fewest_rounds: that are made whatever they take.
    """

    seconds: float = 4.0
    turn_seconds: float = 0.03
    fewest_rounds: int = 3


def has_bfloat16() -> bool:
    """Whether this processor has instructions for products in bfloat16; without, autocast only makes things slower."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def skipped(name: str, shape: Mapping[str, int], reason: str) -> Figure:
    """Stands for a contender that does not take part."""
    return Figure(name, shape, problem=f"skipped: {reason}")


def ratio(numerator: Figure, denominator: Figure) -> tuple[float, float, float] | None:
    """Ratio of the medians and the quartiles of the rounds' ratios, or None without both times."""
    if numerator.median is None or denominator.median is None:
        return None
    pairs = zip(numerator.rounds, denominator.rounds, strict=True)
    lower, _, upper = _quartiles([top / bottom for top, bottom in pairs])
    return numerator.median / denominator.median, lower, upper


def compare(contenders: Sequence[Contender], tolerance: float, pace: Pace | None) -> list[Figure]:
    """Checks all contenders, then times those that are right at a pace, if any."""
    checked = [_check(contender, tolerance) for contender in contenders]
    if pace is None:
        return checked
    able = [c for c, figure in zip(contenders, checked, strict=True) if not figure.problem]
    times = dict(zip([contender.name for contender in able], _time(able, pace), strict=True))
    return [_with_times(figure, times.get(figure.name)) for figure in checked]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """|result - expected| / |expected|, or |result| where zeros are expected; infinite if shapes differ or something is
    not finite."""
    if result.shape != expected.shape:
        return math.inf
    difference = float(torch.linalg.vector_norm(result.detach() - expected, dtype=torch.float64))
    error = difference / (float(torch.linalg.vector_norm(expected, dtype=torch.float64)) or 1.0)
    return math.inf if math.isnan(error) else error


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs a block with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Samples:
    """Times of one contender, by round, and what else was counted meanwhile."""

    rounds: list[list[float]]
    calls: int = 0
    seconds: float = 0.0
    page_faults: int = 0
    preemptions: int = 0


def _check(contender: Contender, tolerance: float) -> Figure:
    try:
        result = contender.run()
    except Exception as raised:
        traceback.print_exc()
        return Figure(contender.name, contender.shape, problem=f"failed: it raised {type(raised).__name__}")
    if len(result) != len(contender.expected):
        given = f"{len(result)} tensors, expected {len(contender.expected)}"
        return Figure(contender.name, contender.shape, problem=f"failed: {given}")
    pairs = [(contender.restore(tensor), expected) for tensor, expected in zip(result, contender.expected, strict=True)]
    if contender.joint and all(tensor.shape == expected.shape for tensor, expected in pairs):
        pairs = [tuple(torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*pairs, strict=True))]
    error = max(relative_error(*pair) for pair in pairs)
    tolerance = tolerance if contender.tolerance is None else contender.tolerance
    problem = "" if error <= tolerance else f"failed: relative error {error:.1e} > {tolerance:.0e}"
    return Figure(contender.name, contender.shape, problem=problem, error=error)


def _time(contenders: Sequence[Contender], pace: Pace) -> list[_Samples]:
    batches = [_calls_per_sample(contender) for contender in contenders]
    samples = [_Samples([]) for _ in contenders]
    entries = list(zip(contenders, batches, samples, strict=True))
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for round_number in range(_MOST_ROUNDS):
            if round_number >= pace.fewest_rounds and time.perf_counter() - start > pace.seconds:
                break
            # Back and forth, so that nobody always runs after the same neighbour.
            for contender, batch, collected in entries if round_number % 2 == 0 else entries[::-1]:
                _take_turn(contender, batch, collected, pace.turn_seconds)
    finally:
        gc.enable()
    return samples


def _calls_per_sample(contender: Contender) -> int:
    elapsed = math.inf
    for _ in range(3):
        start = time.perf_counter()
        contender.run()
        elapsed = min(elapsed, time.perf_counter() - start)
        if elapsed > _SHORTEST_SAMPLE_SECONDS:
            return 1
    return max(1, round(_SHORTEST_SAMPLE_SECONDS / max(elapsed, 1e-7)))


def _take_turn(contender: Contender, batch: int, collected: _Samples, turn_seconds: float) -> None:
    run, milliseconds = contender.run, 1e3 / contender.work
    taken: list[float] = []
    before = resource.getrusage(resource.RUSAGE_SELF)
    turn_start = time.perf_counter()
    while len(taken) < _MOST_CALLS_PER_TURN:
        start = time.perf_counter()
        for _ in range(batch):
            run()
        end = time.perf_counter()
        taken.append((end - start) * milliseconds / batch)
        if end - turn_start > turn_seconds:
            break
    after = resource.getrusage(resource.RUSAGE_SELF)
    collected.page_faults += after.ru_minflt - before.ru_minflt
    collected.preemptions += after.ru_nivcsw - before.ru_nivcsw
    collected.calls += batch * len(taken)
    collected.seconds += end - turn_start
    collected.rounds.append(taken)


def _with_times(figure: Figure, samples: _Samples | None) -> Figure:
    if samples is None:
        return figure
    lower, median, upper = _quartiles([sample for taken in samples.rounds for sample in taken])
    return replace(
        figure,
        median=median,
        lower=lower,
        upper=upper,
        rounds=tuple(statistics.median(taken) for taken in samples.rounds),
        page_faults=samples.page_faults / samples.calls,
        preemptions=samples.preemptions / samples.seconds,
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper
