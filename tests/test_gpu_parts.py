"""What runs on a machine with a GPU, without one: parts that fail, crash, hang or lose the device."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import types
from pathlib import Path

import pytest
from stage import findings

from bench.gpu import parts, progress, results, validation
from bench.gpu.device import Device, find_device

DEVICE = Device("A GPU", (9, 0))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts, "LOGS", tmp_path / "logs")


def python(program: str, **options: object) -> parts.Part:
    return parts.Part("a part", [sys.executable, "-c", program], 60.0, **options)


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("print('done')", "ok"),
        ("raise SystemExit(1)", "failed"),
        ("import os; os.abort()", "failed"),
        ("import time; time.sleep(60)", "out of time"),
    ],
)
def test_what_became_of_a_part(program: str, result: str) -> None:
    part = dataclasses.replace(python(program), seconds=2.0 if result == "out of time" else 60.0)
    assert parts.run(part).result == result
    assert part.log.exists()


@pytest.mark.subprocess
@pytest.mark.parametrize("nested", [False, True])
def test_what_hangs_is_ended_with_all_it_started(tmp_path: Path, nested: bool) -> None:
    """Its child is in the same session, or group, or, as a nested one, in another group of the same session."""
    written = tmp_path / "written"
    child = f"import os, time; {nested} or os.setpgrp(); time.sleep(6); open({str(written)!r}, 'w')"
    hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    with (tmp_path / "output").open("w") as output:
        command = [sys.executable, "-c", hangs]
        assert parts.run_process(command, 2.0, output.fileno(), {}, nested=nested) is None
    assert time.monotonic() - begin < 30
    time.sleep(6)
    assert not written.exists()


@pytest.mark.subprocess
def test_a_part_goes_on_as_long_as_that_helps(tmp_path: Path) -> None:
    counted = tmp_path / "counted"
    program = f"""
import os, sys, pathlib
path = pathlib.Path({str(counted)!r})
before = path.read_text() if path.exists() else ""
if len(before) < 3:
    path.write_text(before + ("b" if "--again" in sys.argv else "a"))
    os.abort()
sys.exit(len(sys.argv) == 1)
"""
    assert parts.run(python(program, progress=counted, again=["--again"])).result == "ok"
    assert counted.read_text() == "abb"
    # Nothing is written any more: it would go on forever.
    assert parts.run(python("import os; os.abort()", progress=counted)).result == "failed"


TESTS = """
import os, time
import pytest
from bench.gpu import progress

def test_passes(): pass
def test_fails(): assert False
def test_crashes(): os.abort()
def test_after_the_crash(): pass
def test_hangs(): time.sleep(100)
def test_is_skipped(): pytest.skip("a reason")
def test_loses_the_device(monkeypatch):
    progress.device_is_lost = lambda: True
def test_after_the_loss(): pass
@pytest.fixture
def broken():
    yield
    raise RuntimeError
def test_fails_behind(broken): pass
"""


@pytest.mark.subprocess
def test_each_test_is_run_whatever_the_others_do(tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text(TESTS)
    path = tmp_path / "progress.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu.progress", "-c", os.devnull, f"--rootdir={tmp_path}"]
    part = parts.Part(
        "made up", [*command, str(tmp_path / "test_made_up.py")], 200.0,
        {"SCA_TEST_PROGRESS": str(path), "SCA_TEST_SECONDS": "2"}, progress=path, final=(progress.FINISHED,),
    )  # fmt: skip
    outcome, found = parts.run(part), progress.outcomes(path)
    assert {name.partition("::")[2]: result for name, result in found.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_crashes": "began",
        "test_after_the_crash": "passed",
        "test_hangs": "began",
        "test_is_skipped": "skipped",
        "test_loses_the_device": "passed",
        "test_after_the_loss": "passed",
        "test_fails_behind": "failed",
    }
    assert "in test_hangs" in part.log.read_text()
    summary = parts.summary(part, outcome, found)
    assert summary.result == "failed" and summary.note.startswith("4 passed, 4 failed, 1 skipped; ")
    assert "::test_crashes; " in summary.note and summary.note.endswith("; ...")


def test_why_no_test_ran_is_in_the_table(tmp_path: Path) -> None:
    part = python("", progress=tmp_path / "progress")
    part.log.parent.mkdir()
    part.log.write_text("ss\nSKIPPED [2] tests/test_x.py:7: there is no GPU\n2 skipped in 1.00s\n")
    summary = parts.summary(part, parts.Outcome("a part", "ok", 1.0), {"one": "skipped", "two": "skipped"})
    assert summary.result == "skipped"
    assert summary.note == "2 skipped; SKIPPED [2] tests/test_x.py:7: there is no GPU"
    part.log.write_text("ERROR: file or directory not found\n")
    assert parts.run(python("raise SystemExit('no such file')")).note == "no such file"


def test_shares_are_everything_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = types.SimpleNamespace(hook=types.SimpleNamespace(pytest_deselected=lambda items: None))
    found: list[str] = []
    for share in (1, 2, 3):
        monkeypatch.setenv("SCA_TEST_SHARE", f"{share}/3")
        items = [types.SimpleNamespace(nodeid=str(number)) for number in range(8)]
        progress.Progress(tmp_path / "none").pytest_collection_modifyitems(config, items)
        found += [item.nodeid for item in items]
    assert sorted(found) == [str(number) for number in range(8)]


def test_every_file_of_tests_on_a_gpu_is_in_a_part() -> None:
    in_parts = parts.testing_parts()
    files = {
        f"tests/{path.name}"
        for pattern in ("test_cuda_*.py", "test_triton_*.py", "test_gpu.py")
        for path in (parts.ROOT / "tests").glob(pattern)
        if not path.stem.endswith("_compiled")
    }
    assert {word for part in in_parts for word in part.command if word.startswith("tests/")} == files
    assert len({part.log for part in in_parts}) == len({part.progress for part in in_parts}) == len(in_parts)


def test_results_are_counted_by_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "A-GPU.json"
    monkeypatch.setattr(results, "path_of", lambda name: path)
    monkeypatch.setenv("SCA_COMMIT", "abc")
    tests = {
        "tests/test_cuda_semantic_pool.py::test_variants[a]": "passed",
        "tests/test_cuda_semantic_pool.py::test_variants[b]": "began",
        "tests/test_gpu.py::test_bits_repeat[triton-semantic_modulate-64]": "passed",
        "tests/test_gpu.py::test_a_plan[triton-label_plan]": "failed",
        "tests/test_triton_instance_modulate.py::test_edges": "skipped",
    }
    parts.record(tests, DEVICE)
    assert json.loads(path.read_text())["tests"] == {
        "semantic_pool, cuda": {"commit": "abc", "passed": 1, "failed": 1, "skipped": 0},
        "semantic_modulate, triton": {"commit": "abc", "passed": 1, "failed": 0, "skipped": 0},
        "label_plan, triton": {"commit": "abc", "passed": 0, "failed": 1, "skipped": 0},
    }
    page = validation.page(tmp_path)
    assert "| `semantic_pool` | `cuda` | A GPU | abc | 1 | 1 | 0 |" in page
    # Skipped where it cannot run, so it has not run.
    assert "| `instance_modulate` | `triton` | never run on a GPU |  |  |  |  |" in page


def test_a_step_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(device: Device) -> list[parts.Outcome]:
        raise RuntimeError("a mistake")

    fine = parts.Outcome("fine", "ok", 1.0)
    monkeypatch.setattr(parts, "find_device", lambda: DEVICE)
    monkeypatch.setattr(parts, "STEPS", {"build": [broken], "test": [lambda device: [fine]]})
    monkeypatch.setattr(sys, "argv", ["parts"])
    with pytest.raises(SystemExit) as raised:
        parts.main()
    assert raised.value.code == 1
    table = capsys.readouterr().out.rstrip().splitlines()[-2:]
    assert table[0].split()[:2] == ["broken", "failed"] and "a mistake" in table[0]
    assert table[1].split()[:2] == ["fine", "ok"]


@pytest.mark.parametrize(
    ("capability", "architecture"), [((8, 0), "80"), ((9, 0), "90a"), ((10, 0), "100"), ((12, 0), "120")]
)
def test_what_nvcc_compiles_for(capability: tuple[int, int], architecture: str) -> None:
    assert Device("A GPU", capability).architecture == architecture


@pytest.mark.subprocess
def test_a_driver_that_does_not_answer_stops_nobody() -> None:
    assert find_device(seconds=0.01) is None


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 12 errors\n", 12),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n", 3),
        ("========= Error: Device not supported\n", None),
    ],
)
def test_what_compute_sanitizer_found(output: str, expected: int | None) -> None:
    assert findings(output) == expected
