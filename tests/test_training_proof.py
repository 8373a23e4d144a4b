"""The proof on real training: its measures on what is known by hand, and the whole of it, small."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.training_proof.__main__ import prove
from bench.training_proof.measures import (
    colour_statistics,
    normalised_mutual_information,
    psnr_within,
    purity,
)
from bench.training_proof.page import write_page
from bench.training_proof.results import (
    BACKGROUND,
    TOP,
    Closeness,
    Division,
    Flat,
    Result,
    TestPictures,
    divided,
    measure_flat,
)
from bench.training_proof.trainings import Extent, data_folder
from scam_models.psnr import psnr

MACHINE = {"date": "2026-01-01", "commit": "a", "device": "a", "torch": "2.13", "threads": 1, "load_average": 0.5}
SMALL = Extent(steps=2, batch_size=2, seeds=1, identities=1, test_identities=3, pictures=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> TestPictures:
    return TestPictures.read(data_folder(tmp_path_factory.mktemp("proof"), replace(SMALL, test_identities=6)))


def test_psnr_within() -> None:
    images, targets = torch.rand(2, 2, 3, 4, 5) * 2 - 1
    everywhere = torch.ones(2, 4, 5, dtype=torch.bool)
    torch.testing.assert_close(psnr_within(images, targets, everywhere), psnr(images, targets))
    left = everywhere.clone()
    left[:, :, 2:] = False
    left[1] = False
    found = psnr_within(images, targets, left)
    torch.testing.assert_close(found[:1], psnr(images[:1, :, :, :2], targets[:1, :, :, :2]))
    assert math.isnan(found[1])


def test_colour_statistics() -> None:
    images, labels = torch.rand(2, 3, 8, 9) * 2 - 1, torch.randint(0, 2, (2, 8, 9))
    labels[0] = 0
    mean, deviation = colour_statistics(images, labels, num_labels=3)
    for picture, label in ((0, 0), (1, 0), (1, 1)):
        colours = ((images[picture, :, labels[picture] == label] + 1) * 127.5).double()
        torch.testing.assert_close(mean[picture, label], colours.mean(1))
        torch.testing.assert_close(deviation[picture, label], colours.std(1, correction=0))
    assert mean[0, 1:].isnan().all() and mean[1, 2].isnan().all()


@pytest.mark.parametrize(
    "parts, truth, pure, information",
    [
        ([0, 0, 1, 1], [5, 5, 7, 7], 1, 1),
        ([0, 1, 2, 3], [5, 5, 7, 7], 1, 2 / 3),
        ([0, 0, 0, 0], [5, 5, 5, 7], 3 / 4, 0),
        ([0, 1, 0, 1], [5, 5, 7, 7], 1 / 2, 0),
        ([3, 3, 3], [5, 5, 5], 1, 0),
    ],
)
def test_divisions(parts: list[int], truth: list[int], pure: float, information: float) -> None:
    assert purity(torch.tensor(parts), torch.tensor(truth)) == pytest.approx(pure)
    found = normalised_mutual_information(torch.tensor(parts), torch.tensor(truth))
    assert found == pytest.approx(information, abs=1e-12)
    assert found == pytest.approx(normalised_mutual_information(torch.tensor(truth), torch.tensor(parts)), abs=1e-12)


def test_truths(pictures: TestPictures) -> None:
    """What the pictures are compared with is what the label maps say, and differs where it should."""
    identities = [seeds.identity for seeds in pictures.seeds]
    assert all(identities[other] != own for own, other in zip(identities, pictures.others, strict=True))
    inner = pictures.labels != BACKGROUND
    for axis in (1, 2):  # without outlines, where colours are mixed with what is behind
        inner &= inner.roll(1, axis) & inner.roll(-1, axis)
    same = (pictures.truth - pictures.images).abs().amax(1) < 1.1 / 127.5
    assert same[inner].double().mean() > 0.97 and same[pictures.labels == BACKGROUND].double().mean() < 0.1
    two_kinds = divided(pictures.labels == TOP, pictures.cloths)
    assert two_kinds.any() and not two_kinds.all()
    changed = (pictures.turned - pictures.images).abs().amax(1) > 0.02
    assert changed[pictures.labels == BACKGROUND].double().mean() < 0.01  # on the outline
    assert ((pictures.turned_cloths > 0) == (pictures.labels == TOP)).all()
    for index in two_kinds.nonzero().flatten():
        assert (changed[index] & (pictures.labels[index] == TOP)).any()
    whole = pictures.floors[:, :, 0].sum(1)
    assert ((whole > 0.1 * 64) & (whole < 0.4 * 64)).all()
    flat = measure_flat(pictures)
    assert 10 < flat.psnr < 30
    assert flat.transfer.subject_colour == pytest.approx(0, abs=1e-5) and flat.transfer.subject_deviation > 10


def test_the_whole_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = prove(SMALL, tmp_path / "runs", tmp_path / "docs")
    assert [(result.latents, result.seed) for result in results] == [(8, 0), (1, 0)]
    for result in results:
        assert 3 < result.psnr < 15 and result.seconds > 0 and result.surfaces.pictures > 0
        # Where nothing is exchanged the subject is as in the transfer, up to what convolutions mix.
        assert abs(result.own_background.subject - result.transfer.subject) < 1
        if result.latents == 1:
            assert result.surfaces.information == 0 and result.surfaces.purity == result.surfaces.largest
    page = (tmp_path / "docs" / "training-proof.md").read_text()
    for name in re.findall(r"\((training-proof/.*?\.png)\)", page):
        assert (tmp_path / "docs" / name).stat().st_size < 300_000
    capsys.readouterr()
    again = prove(SMALL, tmp_path / "runs", tmp_path / "docs")
    assert "has its 2 steps already" in capsys.readouterr().out
    assert [replace(result, seconds=0) for result in again] == [replace(result, seconds=0) for result in results]
    lines = [json.loads(line) for line in (tmp_path / "runs" / "results.jsonl").read_text().splitlines()]
    assert lines[0]["extent"]["steps"] == 2 and [line["psnr"] for line in lines[1:]] == [r.psnr for r in again]


def test_the_page_says_what_the_figures_say(tmp_path: Path) -> None:
    close, division = Closeness(20, 15, 21, 16, 3, 8, 7, 16), Division(12, 0.7, 0.9, 0.6, 0.71, 0.01, 0.3)
    results = [
        Result(latents, seed, 200, 10**6, base + gain * seed, close, close, close, division, division)
        for seed in (0, 1)
        for latents, base, gain in ((1, 20.0, 1.0), (8, 20.5, -1.0))
    ]
    write_page(tmp_path / "page.md", results, replace(SMALL, seeds=2), MACHINE, Flat(19.0, close))
    page = (tmp_path / "page.md").read_text()
    assert "better from 1 of 2 seeds, by -1.50 to 0.50 dB" in page
    assert "| 8 latents for each label | 1.00 M | 20.00 | 20.50 | 19.50 |" in page
    assert "- wall and floor: latents divide it, and the division follows the picture (information 0.60" in page
    assert "| wall and floor | 1 | 12 | 0.70 | 0.90 | 0.71 | 0.60 | 0.01 | 0.30 |" in page


@pytest.mark.parametrize(
    "information, misplaced, found",
    [(0.02, 0.0, "do not divide it"), (0.6, 0.6, "by position"), (0.3, 0.6, "by position"), (0.6, 0.2, "follows the")],
)
def test_divisions_are_claimed_only_where_they_follow_the_picture(
    tmp_path: Path, information: float, misplaced: float, found: str
) -> None:
    close, division = Closeness(20, 15, 21, 16, 3, 8, 7, 16), Division(12, 0.7, 0.9, information, 0.71, 0.01, misplaced)
    results = [Result(latents, 0, 200, 10**6, 20, close, close, close, division, division) for latents in (8, 1)]
    write_page(tmp_path / "page.md", results, SMALL, MACHINE, Flat(19.0, close))
    (line,) = (line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("- two kinds"))
    assert found in line
