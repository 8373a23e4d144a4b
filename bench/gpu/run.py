"""Times the kernels on a GPU and writes ``bench/results/<device>.json``, and a plot if there is matplotlib.

    python -m bench.gpu.run

For each call of the published shapes: its time, forward and with backward, that of :mod:`bench.gpu.rivals`, the errors
of results and gradients against the reference in float64, and what share of the bandwidth of a copy the bytes of
:mod:`bench.gpu.traffic` stand for. Never run on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils import _pytree as pytree

import sca_kernels

from ..timing import relative_error
from .calls import RESULTS, ROOT, Call, all_calls, leaves_of, step_of
from .rivals import rivals
from .traffic import bytes_of_call

_COPY_BYTES = 1 << 29


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """The median time of a call, between events on the device."""
    for _ in range(3):
        run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
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


def measure(call: Call, bandwidth: float, *, device: str = "cuda", backend: str = "triton") -> dict[str, Any]:
    """Everything that the results say of a call."""
    forward_bytes, all_bytes = (sum(bytes_of_call(call, backward=backward).values()) for backward in (False, True))
    with torch.device(device):
        torch.manual_seed(0)
        run = call.prepare()
        with sca_kernels.backend(backend):
            times = _times(run)
            found = errors(run)
        others = {name: _times_or_reason(rival) for name, rival in rivals(call, run).items()}
    torch.compiler.reset()
    return {
        "operator": call.operator,
        "call": call.name,
        "dtype": str(call.dtype).removeprefix("torch."),
        **times,
        "forward_bytes": forward_bytes,
        "forward_and_backward_bytes": all_bytes,
        "forward_share_of_copy_bandwidth": forward_bytes / times["forward_ms"] / 1e6 / bandwidth,
        "share_of_copy_bandwidth": all_bytes / times["forward_and_backward_ms"] / 1e6 / bandwidth,
        **found,
        "rivals": others,
    }


def errors(run: Any) -> dict[str, Any]:
    """The largest relative errors of results and of gradients against the reference in float64."""
    gradients: list[Tensor] = []
    actual = step_of(run, gradients)()
    with sca_kernels.backend("reference"):
        try:
            expected = step_of(_in_float64(run), [gradient.double() for gradient in gradients])()
        except torch.OutOfMemoryError:
            return {"error": "the reference needs more memory than there is"}
    found = [relative_error(_finite(one.double()), _finite(other)) for one, other in zip(actual, expected, strict=True)]
    results = len(found) - len(leaves_of(run))
    return {"error": max(found[:results]), "gradient_error": max(found[results:])}


def _finite(tensor: Tensor) -> Tensor:
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
    if any(leaf.requires_grad for leaf in leaves_of(run)):
        times["forward_and_backward_ms"] = milliseconds(step_of(run))
    return times


def _times_or_reason(rival: Any) -> dict[str, Any]:
    try:
        return _times(rival)
    except Exception as raised:  # one that does not run here must not cost the others' figures
        return {"problem": f"{type(raised).__name__}: {raised}".splitlines()[0][:200]}


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars: the times of each call and its rivals as multiples of a copy of the largest tensor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = [figure for figure in report["figures"] if "forward_ms" in figure["rivals"]["copy"]]
    figure, axes = plt.subplots(len(figures), 1, figsize=(8, 1.6 * len(figures) + 1), squeeze=False)
    for axis, entry in zip(axes[:, 0], figures, strict=True):
        times = {"ours": entry, **{name: rival for name, rival in entry["rivals"].items() if "problem" not in rival}}
        multiples = [time["forward_ms"] / times["copy"]["forward_ms"] for time in times.values()]
        bars = axis.barh(list(times), multiples, height=0.7)
        axis.bar_label(bars, fmt="%.2f")
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_title(f"{entry['operator']}: {entry['call']}, {entry['dtype']}", fontsize=9)
    axes[-1, 0].set_xlabel(f"forward, multiples of a copy, on {report['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    bandwidth = copy_bandwidth()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name()
    report = {
        "device": device,
        "commit": commit,
        "versions": {
            "sca_kernels": sca_kernels.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "copy_bandwidth_gb_per_s": bandwidth,
        "figures": [measure(call, bandwidth) for call in all_calls() if call.headline],
    }
    path = RESULTS / f"{device.replace(' ', '-')}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: there is no matplotlib")
    else:
        plot(report, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
