"""What is said of the kernels for GPUs without one: the page of what is known, and the count of bytes."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.gpu.calls import Call, all_calls, leaves_of
from sca_kernels import instance_modulate, triton
from sca_kernels.backends import BACKENDS

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from bench.gpu import results, run, validation
from bench.gpu.rivals import expectation, rivals

pytestmark = [
    pytest.mark.skipif(triton.INTERPRETED, reason="with TRITON_INTERPRET=1 nothing is recorded"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


NAME = "A GPU"


def test_the_page_says_what_the_results_do() -> None:
    assert validation.PAGE.read_text(encoding="utf-8") == validation.page()


def test_the_page_names_every_kernel(tmp_path: Path) -> None:
    page = validation.page(tmp_path)
    for backend in ("triton", "cuda"):
        for operator in BACKENDS[backend].operators or ():
            assert f"| `{operator}` | `{backend}` | never run on a GPU |" in page


HEADLINES = [call for call in all_calls([torch.float32], shrink=16, batch=2) if call.headline]
headline = pytest.mark.parametrize("call", HEADLINES, ids=map(str, HEADLINES))


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda_kernels: None) -> run.Session:
    """On the CPU, with made-up times and nothing compiled. What is asked for last takes longest."""
    times = itertools.count(1)

    def milliseconds(timed: Callable[[], object]) -> float:
        timed()
        return float(next(times))

    monkeypatch.setattr(run, "milliseconds", milliseconds)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return run.Session(tmp_path / "A-GPU.json", NAME, "cpu", bandwidth=1e-3, deadline=math.inf)


@headline
def test_figures_reach_the_page_and_a_plot(call: Call, session: run.Session) -> None:
    session.kernels("cuda", [call], goes_on=False)
    session.rivals([call])
    report = results.read(session.path, NAME)
    (figure,) = report["figures"]
    entry = figure["kernels"]["cuda"]
    assert 0 < entry["error"] < 1e-5 and 0 < entry["gradient_error"] < 1e-5
    assert not [rival for rival in figure["rivals"].values() if "problem" in rival]
    least = max(leaf.nbytes for leaf in leaves_of(call.prepare()))
    assert entry["forward_and_backward_bytes"] > entry["forward_bytes"] > least
    assert entry["forward_share_of_copy_bandwidth"] == pytest.approx(entry["forward_bytes"] / 1e3)
    assert entry["share_of_copy_bandwidth"] == pytest.approx(entry["forward_and_backward_bytes"] / 2e3)

    # The other backend would be ten times as fast forward, and as fast with backward.
    figure["kernels"]["triton"] = {**entry, "forward_ms": 0.1}
    report["tests"][f"{call.operator}, cuda"] = {"commit": "abc", "passed": 7, "failed": 1, "skipped": 0}
    results.write(session.path, report)
    page = validation.page(session.path.parent)
    assert f"| `{call.operator}` | `cuda` | {NAME} | abc | 7 | 1 | 0 |" in page
    row = f"| `{call.operator}` | `cuda` | {NAME} | {entry['commit']} | {call.name}, float32 | {entry['error']:.1e} |"
    (line,) = [line for line in page.splitlines() if line.startswith(row)]
    assert line.endswith("| 0.10 and 1.00 | 0.1 (triton) |")
    assert f"| {NAME} | `{call.operator}` | float32 | 0.10 | 1.00 |" in page
    if importlib.util.find_spec("matplotlib") is not None:
        run.plot(report, session.path.with_suffix(".png"))
        assert session.path.with_suffix(".png").stat().st_size > 1000


def test_what_is_wrong_gets_no_time(session: run.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.TOLERANCE, torch.float32, 1e-12)
    session.kernels("cuda", HEADLINES[:1], goes_on=False)
    (figure,) = results.read(session.path, NAME)["figures"]
    assert "expected at most 1e-12" in figure["kernels"]["cuda"]["problem"]
    assert "forward_ms" not in figure["kernels"]["cuda"]
    assert "expected at most 1e-12" in validation.page(session.path.parent)


def test_one_call_that_fails_costs_no_other_figure(session: run.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Call] = []

    def measure(call: Call, *rest: object) -> dict[str, object]:
        measured.append(call)
        if call is HEADLINES[0]:
            raise RuntimeError("an illegal memory access was encountered")
        if call is HEADLINES[1]:
            raise SystemExit("the process ends")
        return {"error": 0.0}

    monkeypatch.setattr(run, "measure", measure)
    with pytest.raises(SystemExit):
        session.kernels("cuda", HEADLINES, goes_on=False)
    session.kernels("cuda", HEADLINES, goes_on=True)
    assert measured == HEADLINES
    problems = [f["kernels"]["cuda"].get("problem", "") for f in results.read(session.path, NAME)["figures"]]
    assert problems[:2] == ["RuntimeError: an illegal memory access was encountered", "it ended the process"]
    assert not any(problems[2:]) and len(problems) == len(HEADLINES)


def test_nothing_is_begun_when_the_time_is_over(session: run.Session) -> None:
    over = dataclasses.replace(session, deadline=0.0)
    over.kernels("cuda", HEADLINES, goes_on=False)
    over.rivals(HEADLINES)
    assert not session.path.exists()


def test_headlines_are_new_each_time_and_of_every_type() -> None:
    names = [str(call) for call in run.headlines()]
    assert len(set(names)) == len(names)
    assert {call.dtype for call in run.headlines()} == {torch.float32, torch.bfloat16, torch.float16}


@headline
def test_rivals_compute_the_same(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    ours = call.prepare()
    expected = ours()
    first = expected if isinstance(expected, torch.Tensor) else expected[0]
    for name, rival in rivals(call, ours).items():
        found, wanted = rival(), expectation(name, ours, first)
        if wanted is not None:
            result = found if isinstance(found, torch.Tensor) else found[0]
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
