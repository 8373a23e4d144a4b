"""Training as a user runs it: the command line, killed in the middle, in two processes, with a full disk."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

from commands import run_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import assert_same_bits, read, write_data

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.subprocess]

ROOT = Path(__file__).resolve().parents[1]
# Of the size of the tests' images, which have three labels.
SMALL = ("--labels", 3, "--size", 32, "--latents", 2, "--accelerator", "cpu", "--workers", 0)


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "scam_models.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def scam(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(), **options)


def train(data: Path, out: Path, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return scam("train", data, "--out", out, *SMALL, *arguments, **options)


def train_here(data: Path, out: Path, *arguments: Any) -> int:
    """Where a process of its own shows nothing more: to start one takes as long as dozens of steps."""
    return run_command("train", *map(str, (data, "--out", out, *SMALL, *arguments)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def step_of(checkpoint: Path) -> int:
    return int(read(checkpoint)["scam"]["step"]) if checkpoint.exists() else 0


def kill_after(arguments: Sequence[str], last: Path, steps: int) -> None:
    """Starts a training and kills it once so many steps are saved, wherever it is then."""
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while step_of(last) < steps:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_training_goes_on_with_the_same_bits(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", 24, "--batch-size", 2, "--checkpoint-every", 3, "--validate-every", 9)
    assert train_here(data, tmp_path / "whole", *options) == 0
    printed = capsys.readouterr()
    assert "perceptual loss: OFF" in printed.out
    assert re.search(r"images/s=\d", printed.err) and "memory=" in printed.err

    out = tmp_path / "killed"
    again = ("train", data, "--out", out, *SMALL, *options, "--resume")
    for steps in (3, 12):
        kill_after(command(*again), out / "last.ckpt", steps)
        assert steps <= step_of(out / "last.ckpt") < 24
    assert train_here(data, out, *options, "--resume") == 0
    for name in ("last.ckpt", "best.ckpt"):
        assert_same_bits(tmp_path / "whole" / name, out / name)


def losses_of(out: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(("losses/", "validation/"))]
    return {name: [event.value for event in events.Scalars(name)] for name in names}


def test_two_processes_have_the_losses_of_one_with_the_doubled_batch(data: Path, tmp_path: Path) -> None:
    """Three images are kept for validation, so that the processes do not have as many."""
    options = ("--steps", 4, "--batch-size", 4, "--validate-every", 2, "--report-every", 1, "--no", "noise")
    options += ("--validation-share", 0.35)
    assert train_here(data, tmp_path / "one", *options, "--devices", 1) == 0
    two = train(data, tmp_path / "two", *options, "--devices", 2)
    assert two.returncode == 0, two.stderr
    alone, together = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert alone.keys() == together.keys() and len(alone["losses/l1"]) == 4
    for name, values in alone.items():
        # AdamW turns the rounding of small gradients into steps of full size; scores lie between -1 and 1.
        assert together[name] == pytest.approx(values, rel=2e-3, abs=2e-3), name
    assert two.stdout.count("perceptual loss: OFF") == 1


def test_full_disk(data: Path, tmp_path: Path) -> None:
    """The checkpoint before it is still good, and the training goes on from it when there is room again."""
    options = ("--steps", 4, "--batch-size", 2, "--checkpoint-every", 2)
    assert train_here(data, tmp_path, *options[:1], 2, *options[2:]) == 0
    before = (tmp_path / "last.ckpt").read_bytes()

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    failed = train(data, tmp_path, *options, "--resume", preexec_fn=no_room)
    assert failed.returncode == 1
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and ".ckpt: cannot be written" in errors[0] and "make room" in errors[0]
    assert "Traceback" not in failed.stderr
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert train_here(data, tmp_path, *options, "--resume") == 0
    assert step_of(tmp_path / "last.ckpt") == 4
