"""``scam check`` and what training does with its findings: every kind of bad file, each named with what to do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run_command
from image_folders import write_data, write_image
from PIL import Image

from scam_models.data import PRESETS, check, open_checked
from scam_models.errors import InputError

TINY = PRESETS["tiny"]
IMAGES, LABELS = Path("train/images"), Path("train/labels")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage(path: Path) -> None:
    """Changes bytes in the middle, as a bad disk does."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8] = bytes(8)
    path.write_bytes(data)


def zeros(path: Path, height: int = 64, width: int = 64, value: int = 0) -> None:
    write_image(path, torch.full((height, width), value, dtype=torch.uint8))


# How to spoil a data set, the file that is then named, and what is said of it.
SPOILT: dict[str, tuple[Callable[[Path], object], Path, str]] = {
    "truncated image": (lambda folder: truncate(folder / IMAGES / "1.png"), IMAGES / "1.png", "not a readable image"),
    "empty image": (lambda folder: (folder / IMAGES / "1.png").write_bytes(b""), IMAGES / "1.png", "not a readable"),
    "text": (lambda folder: (folder / IMAGES / "1.png").write_text("text"), IMAGES / "1.png", "not a readable image"),
    "damaged labels": (lambda folder: damage(folder / LABELS / "1.png"), LABELS / "1.png", "not a readable image"),
    "truncated labels": (lambda folder: truncate(folder / LABELS / "1.png"), LABELS / "1.png", "not a readable image"),
    "colours for labels": (
        lambda folder: shutil.copy(folder / IMAGES / "1.png", folder / LABELS / "1.png"),
        LABELS / "1.png",
        r"expected an image of label values \(grey or palette\), got mode RGB",
    ),
    "labels out of range": (
        lambda folder: zeros(folder / LABELS / "1.png", value=6),
        LABELS / "1.png",
        r"4096 pixels with values 6, expected 0 to 5 or 255 \(no label\)",
    ),
    "no label at all": (
        lambda folder: zeros(folder / LABELS / "1.png", value=255),
        LABELS / "1.png",
        "no pixel has a label",
    ),
    "other proportions": (
        lambda folder: zeros(folder / LABELS / "1.png", 64, 48),
        LABELS / "1.png",
        "48 x 64 pixels, its image has 64 x 64",
    ),
    "sixteen bits": (
        lambda folder: Image.new("I;16", (64, 64)).save(folder / IMAGES / "1.png"),
        IMAGES / "1.png",
        r"more than 8 bits a channel \(mode I;16\)",
    ),
    "no label map": (
        lambda folder: (folder / LABELS / "1.png").unlink(),
        IMAGES / "1.png",
        r"no label map train/labels/1\.png",
    ),
    "no image": (
        lambda folder: (folder / IMAGES / "1.png").unlink(),
        LABELS / "1.png",
        r"no image train/images/1\.png",
    ),
    "two images": (
        lambda folder: shutil.copy(folder / IMAGES / "1.png", folder / IMAGES / "1.jpg"),
        IMAGES / "1.png",
        r"1\.jpg has the same name; keep one of them",
    ),
    "another file": (
        lambda folder: (folder / LABELS / "notes.txt").write_text("notes"),
        LABELS / "notes.txt",
        "neither an image nor a label map; remove it",
    ),
    "no folder of labels": (
        lambda folder: shutil.rmtree(folder / LABELS),
        LABELS,
        "no such folder; a data set has train/images and train/labels",
    ),
    "no images": (
        lambda folder: [path.unlink() for path in (folder / "train").glob("*/*")],
        IMAGES,
        "no images; put PNG or JPEG files there",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_each_problem_is_found(kind: str, tmp_path: Path) -> None:
    spoil, path, reason = SPOILT[kind]
    spoil(write_data(tmp_path))
    (problem,) = check(tmp_path, TINY)
    assert problem.path == tmp_path / path and problem.split == "train"
    assert re.search(reason, problem.reason) and "\n" not in str(problem)
    assert problem.name == ("1" if path.stem == "1" else "")


def test_a_good_data_set_has_no_problems(tmp_path: Path) -> None:
    write_data(tmp_path)
    # Another resolution, a palette and hidden files are none.
    labels = Image.open(tmp_path / LABELS / "0.png").resize((32, 32), Image.Resampling.NEAREST).convert("P")
    labels.putdata([1] * 32 * 32)
    labels.save(tmp_path / LABELS / "0.png")
    (tmp_path / IMAGES / ".DS_Store").write_text("")
    assert check(tmp_path, TINY) == []


def test_all_problems_are_found_and_in_order(tmp_path: Path) -> None:
    write_data(tmp_path, count=4)
    truncate(tmp_path / "test" / "images" / "3.png")
    truncate(tmp_path / LABELS / "2.png")
    truncate(tmp_path / IMAGES / "2.png")
    zeros(tmp_path / LABELS / "0.png", value=9)
    problems = check(tmp_path, TINY)
    assert [(problem.split, problem.path.parent.name, problem.name) for problem in problems] == [
        ("train", "labels", "0"),
        ("train", "images", "2"),
        ("train", "labels", "2"),
        ("test", "images", "3"),
    ]
    assert check(tmp_path, TINY, splits=["test"]) == problems[3:]


def test_values_count_as_the_preset_says(tmp_path: Path) -> None:
    write_data(tmp_path, num_labels=20)
    assert len(check(tmp_path, TINY)) == 6
    assert check(tmp_path, PRESETS["idesigner"]) == []


def test_training_refuses_or_skips(tmp_path: Path) -> None:
    write_data(tmp_path, count=8)
    assert len(open_checked(tmp_path, "train", TINY)) == 8
    for name in "12345":
        truncate(tmp_path / IMAGES / f"{name}.png")
    message = r"^5 problems in .*train: .*1\.png: not a readable .*3\.png.*; and 2 more\. 'scam check' lists them all"
    with pytest.raises(InputError, match=message):
        open_checked(tmp_path, "train", TINY)
    told: list[str] = []
    data = open_checked(tmp_path, "train", TINY, skip_problems=True, report=told.append, flip=True)
    assert data.names == ["0", "6", "7"] and data.flip and len(list(data[i] for i in range(3))) == 3
    assert len(told) == 5 and told[0].startswith(f"skipped {tmp_path / IMAGES / '1.png'}: not a readable image")
    assert len(open_checked(tmp_path, "test", TINY)) == 8
    for name in "067":
        truncate(tmp_path / IMAGES / f"{name}.png")
    with pytest.raises(InputError, match="no images that may be used"):
        open_checked(tmp_path, "train", TINY, skip_problems=True, report=told.append)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_data(tmp_path / "some [bold]data")
    assert run_command("check", str(folder)) == 0
    assert "no problems in train and test" in capsys.readouterr().out
    truncate(folder / IMAGES / "1.png")
    zeros(folder / LABELS / "2.png", value=6)
    assert run_command("check", str(folder)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "problem"]
    assert re.fullmatch(
        rf"{re.escape(str(folder / IMAGES))}/1\.png +not a readable image \(.*\); .*", lines[1].rstrip()
    )
    assert re.fullmatch(r".*labels/2\.png +4096 pixels with values 6, .*", lines[2].rstrip())
    assert lines[3].endswith("data, read as tiny: 6 labels")
    assert run_command("check", str(folder), "--split", "test") == 0
    (folder / IMAGES / "1.png").unlink()
    (folder / LABELS / "1.png").unlink()
    assert run_command("check", str(folder), "--labels", "7") == 0


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("check", "absent"), 1, r"error: absent: no such folder; .*\n"),
        (("check", ".", "--preset", "small"), 1, r"error: preset 'small': expected one of idesigner, .*\n"),
        (("check",), 2, r"(?s)Usage: scam .*Missing argument 'DATA'.*"),
        (("check", ".", "--labels", "0"), 2, r"(?s)Usage: scam .*Invalid value for '--labels'.*"),
        (("chekc",), 2, r"(?s)Usage: scam .*No such command 'chekc'.*"),
    ],
)
def test_command_with_bad_arguments(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(*arguments) == code
    captured = capsys.readouterr()
    assert re.fullmatch(message, captured.err) and not captured.out
