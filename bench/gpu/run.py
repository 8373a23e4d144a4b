"""Times the kernels on a GPU and adds to ``bench/results/<device>.json``, with a plot if there is matplotlib.

    python -m bench.gpu.run triton|cuda|rivals|compile [--continue] [--seconds 300] [--share 1/1]

For each call of the published shapes: the errors of results and gradients against the reference in float64; where they
are small, its time, forward and with backward; and what share of the bandwidth of a copy the bytes of
:mod:`bench.gpu.traffic` stand for. ``rivals`` times :mod:`bench.gpu.rivals`. The file is written after each call, so
that what ends the process costs no other figure; with ``--continue`` nothing is measured again that has been.
``compile`` calls everything once, so that Triton's compiler, which takes most of the time, can run in several
processes.

Times are of the device alone: calls are enqueued behind one that keeps it busy, and each finds its second-level cache
full of other things. Never run on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import sca_kernels
from sca_kernels.backends import BACKENDS

from ..timing import relative_error
from . import results
from .calls import BACKENDS as KERNELS
from .calls import Call, Results, all_calls, leaves_of, step_of
from .device import device_is_lost
from .rivals import expectation, rivals
from .traffic import bytes_of_call

LOST = 3  # the exit code where the device answers no more: whoever starts this again begins with the next call

# Largest relative error of a result or a gradient that is timed.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}

_COPY_BYTES = 1 << 29
_FLUSHED_BYTES = 1 << 28  # several times the second-level cache
_HEAD_START = 20_000_000  # cycles of the device, about 10 ms, in which calls are enqueued
_KINK = 1e-4
_RIVAL_TOLERANCE = 3  # times ours: some round logits and weights to 16 bits


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """The median time of a call, between events on the device."""
    for _ in range(3):
        run()
    other = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda._sleep(_HEAD_START)
    for begin, end in pairs:
        other.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def copy_bandwidth() -> float:
    """GB/s of copying on the device, reading and writing counted."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / milliseconds(lambda: target.copy_(source)) / 1e6


def headlines() -> Iterator[Call]:
    """What is measured, the most telling first: eight images in each type, then one."""
    for dtype, batch in (
        (torch.bfloat16, 8), (torch.float32, 8), (torch.float16, 8), (torch.bfloat16, 1), (torch.float32, 1),
    ):  # fmt: skip
        for call in all_calls([dtype], batch=batch):
            if call.headline:
                yield replace(call, name=f"{call.name}, batch {batch}")


def measure(call: Call, backend: str, bandwidth: float, device: str = "cuda") -> dict[str, Any]:
    """What is said of a call by a backend; no times if its results are wrong.

    Args:
        bandwidth: of a copy, in GB/s.
    """
    with torch.device(device):
        torch.manual_seed(0)
        run = call.prepare()
        with sca_kernels.backend(backend):
            found = errors(run)
            worst = max((error for error in found.values() if isinstance(error, float)), default=0.0)
            if not worst <= TOLERANCE[call.dtype]:
                return {**found, "problem": f"relative error {worst:.1e}, expected at most {TOLERANCE[call.dtype]:.0e}"}
            times = _times(run)
        forward, everything = (
            sum(bytes_of_call(lambda: run, backward=backward).values()) for backward in (False, True)
        )
    return {
        **found,
        **times,
        "forward_bytes": forward,
        "forward_and_backward_bytes": everything,
        "forward_share_of_copy_bandwidth": forward / times["forward_ms"] / 1e6 / bandwidth,
        "share_of_copy_bandwidth": everything / times["forward_and_backward_ms"] / 1e6 / bandwidth,
    }


def measure_rivals(call: Call, compiled: bool, device: str = "cuda") -> dict[str, Any]:
    """The times of those that are compiled, or of the others, as far as they compute the same."""
    with torch.device(device):
        torch.manual_seed(0)
        run = call.prepare()
        with sca_kernels.backend("reference"), torch.no_grad():
            result = _tensors(run())[0]
        others = rivals(call, run)
        chosen = [name for name in others if ("compiled" in name or name == "Flex") == compiled]
        found = {name: _checked(others[name], expectation(name, run, result), call.dtype) for name in chosen}
    torch.compiler.reset()
    return found


def _checked(rival: Any, expected: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """A rival's times and error, or the reason why there are none: it must not cost the others' figures."""
    try:
        if expected is None:
            return _times(rival)
        with torch.no_grad():
            error = relative_error(_tensors(rival())[0].double(), expected.double())
        limit = _RIVAL_TOLERANCE * TOLERANCE[dtype]
        if not error <= limit:
            return {"problem": f"relative error {error:.1e}, expected at most {limit:.0e}"}
        return {"error": error, **_times(rival)}
    except Exception as raised:
        return {"problem": _reason(raised)}


def errors(run: Any) -> dict[str, Any]:
    """The largest relative errors of results and of gradients against the reference in float64.

    No gradient flows in where rounding could decide on which side of leaky ReLU's kink a result is.
    """
    exact = _in_float64(run)
    gradients = [torch.randn_like(result) for result in _tensors(run()) if result.requires_grad]
    try:
        with sca_kernels.backend("reference"):
            if run.func in (sca_kernels.instance_modulate, sca_kernels.semantic_modulate):
                gradients[0].masked_fill_(exact().detach().abs() < _KINK, 0)
            expected = step_of(exact, [gradient.double() for gradient in gradients])()
    except torch.OutOfMemoryError:
        return {"error": "the reference needs more memory than there is"}
    actual = step_of(run, gradients)()
    found = [relative_error(finite(one.double()), finite(other)) for one, other in zip(actual, expected, strict=True)]
    count = len(found) - len(leaves_of(run))
    return {"error": max(found[:count]), "gradient_error": max(found[count:])}


def _tensors(outputs: Results) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def finite(tensor: Tensor) -> Tensor:
    """Zero for the infinities that a log-sum-exp over nothing is; what is not a number stays."""
    return torch.where(tensor.isinf(), 0.0, tensor)


def _in_float64(run: Any) -> Any:
    def convert(value: Tensor) -> Tensor:
        return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value

    arguments, named = pytree.tree_map_only(Tensor, convert, (run.args, run.keywords))
    return functools.partial(run.func, *arguments, **named)


def _times(run: Any) -> dict[str, float]:
    with torch.no_grad():
        times = {"forward_ms": milliseconds(run)}
    if leaves_of(run):
        times["forward_and_backward_ms"] = milliseconds(step_of(run))
    return times


def _reason(raised: Exception) -> str:
    return f"{type(raised).__name__}: {raised}".splitlines()[0][:200]


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars: the times of each call and its rivals as multiples of a copy of the largest tensor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = [figure for figure in report["figures"] if "forward_ms" in figure["rivals"].get("copy", {})]
    if not figures:
        return
    drawing, axes = plt.subplots(len(figures), 1, figsize=(8, 1.8 * len(figures) + 1), squeeze=False)
    for axis, figure in zip(axes[:, 0], figures, strict=True):
        everyone = {**figure["kernels"], **figure["rivals"]}
        times = {name: entry["forward_ms"] for name, entry in everyone.items() if "forward_ms" in entry}
        bars = axis.barh(list(times), [time / times["copy"] for time in times.values()], height=0.7)
        axis.bar_label(bars, fmt="%.2f")
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_title(f"{figure['operator']}: {figure['call']}, {figure['dtype']}", fontsize=9)
    axes[-1, 0].set_xlabel(f"forward, multiples of a copy, on {report['device']}")
    drawing.tight_layout()
    drawing.savefig(path, dpi=80)
    plt.close(drawing)


@dataclass
class Session:
    """Adds to the results of a device, call after call, until there is no time left.

    Attributes:
        path: the file.
        name: of the device.
        device: where tensors are made.
        bandwidth: of a copy on it, in GB/s.
        deadline: of ``time.monotonic``.
    """

    path: Path
    name: str
    device: str
    bandwidth: float
    deadline: float

    def kernels(self, backend: str, calls: Iterable[Call], goes_on: bool) -> None:
        """Measures a backend. ``goes_on``: only what has not been measured at this commit."""
        commit = results.commit()
        for call in calls:
            report = results.read(self.path, self.name)
            figure = results.figure_of(report, call)
            if goes_on and figure["kernels"].get(backend, {}).get("commit") == commit:
                continue
            if time.monotonic() > self.deadline:
                print(f"no time left for {backend}, from {call} on")
                return
            # What ends the process is not tried again.
            figure["kernels"][backend] = {"commit": commit, "problem": "it ended the process"}
            results.write(self.path, report)
            try:
                found = measure(call, backend, self.bandwidth, self.device)
            except Exception as raised:
                traceback.print_exc()
                found = {"problem": _reason(raised)}
            figure["kernels"][backend] = {"commit": commit, **found}
            self._save(report, f"{backend}, {call}: {found}")

    def rivals(self, calls: Sequence[Call]) -> None:
        """Times everybody else; those that must be compiled come last."""
        for compiled in (False, True):
            for call in calls:
                if time.monotonic() > self.deadline:
                    print(f"no time left for rivals, from {call} on")
                    return
                try:
                    found = measure_rivals(call, compiled, self.device)
                except Exception:
                    traceback.print_exc()
                    continue
                report = results.read(self.path, self.name)
                results.figure_of(report, call)["rivals"].update(found)
                self._save(report, f"rivals, {call}: {found}")

    def _save(self, report: dict[str, Any], line: str) -> None:
        results.write(self.path, {**report, "copy_bandwidth_gb_per_s": self.bandwidth})
        print(line, flush=True)
        if device_is_lost():
            sys.exit(LOST)


def compile_all(calls: Iterable[Call], device: str = "cuda") -> None:
    """Leaves everything that the calls compile in Triton's cache."""
    for call in calls:
        with torch.device(device), sca_kernels.backend("triton"):
            step_of(call.prepare())()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*KERNELS, "rivals", "compile"])
    parser.add_argument("--continue", dest="goes_on", action="store_true", help="measure only what has not been")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which nothing new is begun")
    parser.add_argument("--share", default="1/1", help="2/3: every third call, from the second on")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    share, shares = map(int, options.share.split("/"))
    calls = list(headlines())[share - 1 :: shares]
    if options.what in KERNELS or options.what == "compile":
        backend = "triton" if options.what == "compile" else options.what
        calls = [call for call in calls if backend in call.backends]
        reason = BACKENDS[backend].why_not()
        if reason is not None:
            sys.exit(f"{backend}: {reason}")
    if options.what == "compile":
        compile_all(calls)
        return
    name = torch.cuda.get_device_name()
    session = Session(results.path_of(name), name, "cuda", copy_bandwidth(), deadline)
    if options.what == "rivals":
        session.rivals(calls)
    else:
        session.kernels(options.what, calls, options.goes_on)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: there is no matplotlib")
    else:
        plot(results.read(session.path, name), session.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
