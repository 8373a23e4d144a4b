"""What is said of the kernels for GPUs without one: the page of what is known, and the count of bytes."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import flex
from bench.gpu import validation
from bench.gpu.calls import Call, all_calls, leaves_of
from sca_kernels import instance_modulate, triton
from sca_kernels.backends import BACKENDS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(triton.INTERPRETED, reason="with TRITON_INTERPRET=1 nothing is recorded"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def test_the_page_says_what_the_results_do() -> None:
    assert validation.PAGE.read_text(encoding="utf-8") == validation.page()


def test_the_page_names_every_operator(tmp_path: Path) -> None:
    page = validation.page(tmp_path)
    for operator in BACKENDS["triton"].operators or ():
        assert f"| `{operator}` | never run on a GPU |" in page


HEADLINES = [call for call in all_calls([torch.float32], shrink=16) if call.headline]
headline = pytest.mark.parametrize("call", HEADLINES, ids=map(str, HEADLINES))


@headline
def test_figures_reach_the_page_and_a_plot(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with other kernels and made-up times: what is done with the figures of a GPU."""
    from bench.gpu import run

    times = itertools.count(1)

    def milliseconds(timed: Callable[[], object]) -> float:
        timed()
        return float(next(times))

    monkeypatch.setattr(run, "milliseconds", milliseconds)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    figure = run.measure(call, 1e-3, device="cpu", backend="cpu")
    assert 0 < figure["error"] < 1e-5 and 0 < figure["gradient_error"] < 1e-5
    assert not [rival for rival in figure["rivals"].values() if "problem" in rival]
    least = max(leaf.nbytes for leaf in leaves_of(call.prepare()))
    assert figure["forward_and_backward_bytes"] > figure["forward_bytes"] > least
    assert figure["forward_share_of_copy_bandwidth"] == pytest.approx(figure["forward_bytes"] / 1e3)
    assert figure["share_of_copy_bandwidth"] == pytest.approx(figure["forward_and_backward_bytes"] / 2e3)

    report = {"device": "A GPU", "commit": "0123456789abcdef", "figures": [figure]}
    (tmp_path / "A-GPU.json").write_text(json.dumps(report), encoding="utf-8")
    (row,) = [line for line in validation.page(tmp_path).splitlines() if line.startswith(f"| `{call.operator}` ")]
    assert f"| A GPU | 0123456789ab | {call.name}, float32 | {figure['error']:.1e} |" in row
    assert "| 3.0 (dense) |" in row
    if importlib.util.find_spec("matplotlib") is not None:
        run.plot(report, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 1000


@headline
def test_rivals_compute_the_same(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu.rivals import rivals

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    run = call.prepare()
    expected = run()
    first = expected if isinstance(expected, torch.Tensor) else expected[0]
    for name, rival in rivals(call, run).items():
        found = rival()
        result = found if isinstance(found, torch.Tensor) else found[0]
        wanted = first
        if name == "Flex":
            wanted = first.index_select(2, flex.sort_pixels(run.args[3].labels.flatten())[1])
        if name not in ("copy", "instance_norm"):
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


def test_tuning_goes_downhill_and_stops(tmp_path: Path) -> None:
    """A valley whose lowest point is two steps away, and a slope too flat to follow."""
    from bench.gpu.tune import improve, write
    from sca_kernels.triton.launch import Configuration

    def time(config: Configuration) -> float:
        return 1.0 + abs(config["BLOCK_ROWS"] - 128) / 128 + 0.001 * config.num_stages

    assert improve(Configuration({"BLOCK_ROWS": 32}), time) == Configuration({"BLOCK_ROWS": 128})
    path = tmp_path / "configurations.json"
    path.write_text('{"default": {}}', encoding="utf-8")
    write({("kernel", "any", "A GPU", "float32"): Configuration({"BLOCK_ROWS": 128})}, path)
    row = {"BLOCK_ROWS": 128, "num_warps": 4, "num_stages": 2}
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "default": {}, "A GPU": {"kernel": {"float32": {"any": row}}},
    }  # fmt: skip


def test_bytes_are_those_of_the_tensors() -> None:
    from bench.gpu import traffic
    from bench.gpu.launches import launches_of

    x = torch.zeros(2, 8, 32, 48, dtype=torch.bfloat16)
    noise = torch.zeros(1, 1, 32, 48).expand(2, 1, 32, 48)
    moments, merge, forward = launches_of(lambda: lambda: instance_modulate(x, noise=noise))
    elements, channels = x.numel(), 2 * 8
    stats = 2 * 8 * channels
    partial = moments.arguments["partial"].numel() * 8
    assert traffic.bytes_of(moments) == 2 * elements + partial
    assert traffic.bytes_of(merge) == partial + stats
    ones = 4  # the strength, expanded from one number
    assert traffic.bytes_of(forward) == 2 * 2 * elements + stats + 4 * 32 * 48 + ones
