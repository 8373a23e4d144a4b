"""Everything that a machine with a GPU is for, in parts that cost each other nothing: what ``make gpu`` runs.

    python -m bench.gpu.parts [build] [test] [bench] [--only cuda]

builds the kernels for the GPU that is there, runs the tests in several processes, then the benchmarks, and writes
``docs/gpu-validation.md``. Each part has a limit of its own, whatever fails or hangs the next one runs, and a table
comes last. What each part printed is in ``build/gpu``. With ``--only``, the tests are those of the parts with that word
in their names, and are not counted in the results.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sca_kernels.backends import BACKENDS

from . import results, validation
from .calls import BACKENDS as KERNELS
from .calls import ROOT
from .device import Device, find_device
from .progress import FINISHED, outcomes

LOGS = ROOT / "build" / "gpu"

# Building and testing, and building and timing, are done inside ten minutes.
BUILD_SECONDS = 90.0
TEST_SECONDS = 470.0
COMPILE_SECONDS, KERNEL_SECONDS, RIVAL_SECONDS = 120.0, 70.0, 120.0
GRACE = 25.0  # for the call that a benchmark is in when its time is over

_FEWEST_PROCESSES, _MOST_PROCESSES = 4, 16
_SHOWN = 3  # failed tests in the table
_WIDEST = 160  # of a line that is repeated there


@dataclass(frozen=True)
class Part:
    """A process, or several, each of which goes on where the one before ended too early.

    Attributes:
        name: in the table, and of the file with what it prints.
        command: its words.
        seconds: after which it is ended.
        environment: what is added to this process's.
        progress: a file that shows by being written to that going on helps; None if nothing goes on.
        again: words that are added to the command then.
        good: exit codes of success.
        final: further exit codes after which nothing goes on.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    progress: Path | None = None
    again: Sequence[str] = ()
    good: Sequence[int] = (0,)
    final: Sequence[int] = ()

    @property
    def log(self) -> Path:
        return LOGS / f"{re.sub('[^a-z0-9_.]+', '-', self.name)}.log"


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        result: "ok", "skipped", "failed", or "out of time".
        note: what else there is to say.
    """

    name: str
    result: str
    seconds: float
    note: str = ""


def run(part: Part) -> Outcome:
    """Runs a part to its end, or until its time is over."""
    begin = time.monotonic()
    part.log.parent.mkdir(parents=True, exist_ok=True)
    command, written = list(part.command), _written(part.progress)
    with part.log.open("w", encoding="utf-8") as log:
        while True:
            left = begin + part.seconds - time.monotonic()
            code = run_process(command, max(left, 0), log.fileno(), part.environment)
            before, written = written, _written(part.progress)
            if code is None or code in (*part.good, *part.final) or written == before:
                break
            command = [*part.command, *part.again]
    result = "out of time" if code is None else "ok" if code in part.good else "failed"
    return Outcome(part.name, result, time.monotonic() - begin, "" if result == "ok" else last_line(part.log))


def last_line(log: Path, containing: str = "") -> str:
    """Of what a part printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:_WIDEST] for line in reversed(lines) if line.strip() and containing in line), "")


def _written(path: Path | None) -> int | None:
    return None if path is None or not path.exists() else path.stat().st_mtime_ns


def run_process(
    command: Sequence[str], seconds: float, output: int, environment: Mapping[str, str], *, nested: bool = False
) -> int | None:
    """Its exit code, or None if it had to be ended, with all that it had started.

    Args:
        nested: whether whoever ends this process ends that one too.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=not nested,
        preexec_fn=os.setpgrp if nested else None,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        _end(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):  # where the driver does not let go of it nobody waits
            process.wait(10)
        return None


def _end(leader: int) -> None:
    """Ends the processes of a session, or of a group."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if leader in (os.getsid(int(entry)), os.getpgid(int(entry))):
                    os.kill(int(entry), signal.SIGKILL)


def build(device: Device) -> list[Outcome]:
    """The kernels in CUDA C++, for this GPU alone; those for CPUs are not needed here."""
    architectures = os.environ.get("SCA_CUDA_ARCHS", device.architecture)
    environment = {"SCA_CUDA_ARCHS": architectures, "SCA_CUDA": "", "SCA_CPU": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return [run(Part("build", command, BUILD_SECONDS, environment))]


def testing_parts() -> list[Part]:
    """What is tested beside one another, the most telling first. Most of the time goes to Triton's compiler."""
    own, offsets, sanitized = "not sanitizer and not 32_bits", "32_bits", "sanitizer"
    found = [
        *_shares("own, cuda", 1, "test_gpu.py", "cuda", own),
        *_shares("own, triton", 6, "test_gpu.py", "triton", own),
        *_shares("32 bits", 1, "test_gpu.py", "gpu", offsets),
    ]
    for operator in sorted(BACKENDS["cuda"].operators or ()):
        found += _shares(f"{operator}, cuda", 1, f"test_cuda_{operator}.py", "cuda")
    for operator in sorted(BACKENDS["cuda"].operators or ()):
        found += _shares(f"{operator}, triton", 3, f"test_triton_{operator}.py", "triton")
    return [*found, *_shares("sanitizer", 4, "test_gpu.py", "gpu", sanitized)]


def _shares(name: str, shares: int, file: str, marker: str, words: str = "") -> list[Part]:
    command = [
        sys.executable, "-m", "pytest", "-p", "bench.gpu.progress", "-p", "no:cacheprovider", "-q", f"tests/{file}",
        "-m", marker, "-k", words,
    ]  # fmt: skip
    made = []
    for share in range(1, shares + 1):
        part = Part(f"{name}, {share} of {shares}" if shares > 1 else name, command, 0)
        progress = part.log.with_suffix(".jsonl")
        environment = {
            "SCA_TEST_PROGRESS": str(progress),
            "SCA_TEST_SHARE": f"{share}/{shares}",
            # Nothing is run by the host or interpreted that is counted as run by the GPU.
            "SCA_CUDA_EMULATION_PATH": "none",
            "TRITON_INTERPRET": "0",
        }
        none = pytest.ExitCode.NO_TESTS_COLLECTED
        made.append(replace(part, environment=environment, progress=progress, good=(0, none), final=(FINISHED,)))
    return made


def test(device: Device, only: str = "") -> list[Outcome]:
    """Several parts at a time. With ``only``, those with that in their names, whose results are not recorded."""
    deadline = time.monotonic() + TEST_SECONDS
    parts = [part for part in testing_parts() if only in part.name]

    def run_until_deadline(part: Part) -> Outcome:
        assert part.progress is not None
        part.progress.unlink(missing_ok=True)
        return run(replace(part, seconds=max(deadline - time.monotonic(), 0)))

    LOGS.mkdir(parents=True, exist_ok=True)
    processes = min(max(os.cpu_count() or 1, _FEWEST_PROCESSES), _MOST_PROCESSES)
    with ThreadPoolExecutor(processes) as pool:
        ended = list(pool.map(run_until_deadline, parts))
    known = [outcomes(part.progress) for part in parts if part.progress is not None]
    if not only:
        record({test: outcome for found in known for test, outcome in found.items()}, device)
    return [summary(*ending) for ending in zip(parts, ended, known, strict=True)]


def summary(part: Part, outcome: Outcome, found: Mapping[str, str]) -> Outcome:
    """With how many tests passed, and which did not, or why none ran."""
    totals = counts(found)
    counted = ", ".join(f"{count} {name}" for name, count in totals.items() if count) or "no tests"
    bad = [test for test, result in found.items() if result in ("failed", "began")]
    notes = [counted, *bad[:_SHOWN], *["..."] * (len(bad) > _SHOWN)]
    result = outcome.result
    if result == "ok" and bad:
        result = "failed"
    elif result == "ok" and not totals["passed"]:
        result = "skipped"
        notes.append(last_line(part.log, "SKIPPED"))
    elif result != "ok" and not found:
        notes.append(outcome.note)
    return replace(outcome, result=result, note="; ".join(filter(None, notes)))


def counts(found: Mapping[str, str]) -> dict[str, int]:
    """One that began and did not end failed."""
    totals = {"passed": 0, "failed": 0, "skipped": 0}
    for outcome in found.values():
        totals[outcome if outcome in totals else "failed"] += 1
    return totals


def record(found: Mapping[str, str], device: Device) -> None:
    """Adds to the device's results how the tests of each operator ended with each backend."""
    path = results.path_of(device.name)
    report = results.read(path, device.name)
    for operator, backend in validation.kernels():
        of_kernel = {test: outcome for test, outcome in found.items() if operator in test and backend in test}
        if set(of_kernel.values()) - {"skipped"}:
            report["tests"][f"{operator}, {backend}"] = {"commit": results.commit(), **counts(of_kernel)}
    results.write(path, report)


def bench(device: Device) -> list[Outcome]:
    """Triton's compiler first, in several processes; then one measurement after the other."""
    module = [sys.executable, "-m", "bench.gpu.run"]
    shares = min(max(os.cpu_count() or 1, 1), 12)
    compilers = [
        Part(f"compile, {share} of {shares}", [*module, "compile", "--share", f"{share}/{shares}"], COMPILE_SECONDS)
        for share in range(1, shares + 1)
    ]
    with ThreadPoolExecutor(shares) as pool:
        ended = list(pool.map(run, compilers))
    progress = results.path_of(device.name)
    for name, seconds in [*((name, KERNEL_SECONDS) for name in KERNELS), ("rivals", RIVAL_SECONDS)]:
        part = Part(f"time {name}", [*module, name, "--seconds", str(seconds)], seconds + GRACE, final=(1,))
        ended.append(run(replace(part, progress=progress, again=["--continue"]) if name in KERNELS else part))
    return ended


def write_page(device: Device) -> list[Outcome]:
    return [run(Part("page", [sys.executable, "-m", "bench.gpu.validation"], 60))]


STEPS = {"build": [build], "test": [test], "bench": [bench, write_page]}


def table(ended: Sequence[Outcome]) -> str:
    width = max((len(outcome.name) for outcome in ended), default=0)
    return "\n".join(
        f"{outcome.name:{width}}  {outcome.result:11}  {outcome.seconds:5.0f} s  {outcome.note}".rstrip()
        for outcome in ended
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="|".join(STEPS), help="default: all")
    parser.add_argument("--only", default="", help="a word in the names of the parts to be tested")
    options = parser.parse_args()
    steps = options.steps or list(STEPS)
    if unknown := set(steps) - set(STEPS):
        parser.error(f"expected some of {', '.join(STEPS)}, got {', '.join(unknown)}")
    device = find_device()
    if device is None:
        sys.exit("there is no GPU that answers")
    print(f"{device.name}: {', '.join(steps)}; what they print goes to {LOGS}", flush=True)
    ended: list[Outcome] = []
    for step in (step for name in steps for step in STEPS[name]):
        try:
            ended += test(device, options.only) if step is test else step(device)
        except Exception as raised:
            ended.append(Outcome(step.__name__, "failed", 0, f"{type(raised).__name__}: {raised}"))
        print(table(ended), end="\n\n", flush=True)
    sys.exit(any(outcome.result not in ("ok", "skipped") for outcome in ended))


if __name__ == "__main__":
    main()
