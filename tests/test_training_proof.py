"""The proof on real training: its measures on what is known by hand, and the whole of it, small."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
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
    Outcome,
    Result,
    TestPictures,
    divided,
    measure,
    measure_flat,
)
from bench.training_proof.trainings import Extent, data_folder
from scam_models import Scam, tiny
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


def test_divisions_of_regions(pictures: TestPictures) -> None:
    """Rows of the image, whatever it shows, say as much of cloth misplaced as of cloth; the truth says all."""
    by_position = (torch.arange(64) // 8)[:, None].expand(len(pictures.images), 64, 64)
    true, turned = (
        torch.where(cloths > 0, cloths, pictures.floors + 3) for cloths in (pictures.cloths, pictures.turned_cloths)
    )
    outcome = Outcome(
        reconstructions=pictures.images,
        transfers=pictures.truth,
        other_subject=pictures.images,
        strongest=torch.stack([by_position, true, by_position], 1),
        turned_strongest=torch.stack([by_position, turned, by_position], 1),
    )
    result = measure(Scam.from_configuration(tiny()), pictures, outcome, latents=8, seed=0, seconds=0)
    two_kinds = divided(pictures.labels == TOP, pictures.cloths) & divided(
        pictures.labels == TOP, pictures.turned_cloths
    )
    positional, (perfect, again) = result.cloths, result.encoder_cloths
    assert positional.pictures == perfect.pictures == 2 * two_kinds.sum() and again == positional
    assert positional.information == pytest.approx(positional.misplaced_information) and positional.information > 0.1
    assert perfect.information == perfect.purity == pytest.approx(1)
    assert perfect.misplaced_information == perfect.perfect_misplaced_information < 0.1
    floor = result.encoder_surfaces[0]
    assert floor.information == pytest.approx(1) and floor.pictures == len(pictures.images)
    assert floor.misplaced_information == floor.perfect_misplaced_information > 0.3


def test_the_whole_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = prove(SMALL, tmp_path / "runs", tmp_path / "docs")
    assert [(result.latents, result.seed) for result in results] == [(8, 0), (1, 0)]
    for result in results:
        assert 3 < result.psnr < 15 and result.seconds > 0 and result.surfaces.pictures > 0
        # Where nothing is exchanged the subject is as in the transfer, up to what convolutions mix.
        assert abs(result.own_background.subject - result.transfer.subject) < 1
        if result.latents == 1:
            assert result.surfaces.information == 0 and result.surfaces.purity == result.surfaces.largest
            assert result.encoder_cloths[0].information == 0
        else:
            assert min(division.information for division in result.encoder_surfaces) > 0
        assert len(result.encoder_surfaces) == len(result.encoder_cloths) == 4
    page = (tmp_path / "docs" / "training-proof.md").read_text()
    for name in re.findall(r"\((training-proof/.*?\.png)\)", page):
        assert (tmp_path / "docs" / name).stat().st_size < 300_000
    capsys.readouterr()
    again = prove(SMALL, tmp_path / "runs", tmp_path / "docs")
    assert "has its 2 steps already" in capsys.readouterr().out
    assert [replace(result, seconds=0) for result in again] == [replace(result, seconds=0) for result in results]
    lines = [json.loads(line) for line in (tmp_path / "runs" / "results.jsonl").read_text().splitlines()]
    assert lines[0]["extent"]["steps"] == 2 and [line["psnr"] for line in lines[1:]] == [r.psnr for r in again]


CLOSE = Closeness(20, 15, 21, 16, 3, 8, 7, 16)


def result_of(
    latents: int = 8,
    seed: int = 0,
    psnr: float = 20.0,
    *,
    generator: tuple[float, float] = (0.6, 0.6),
    encoder: Sequence[tuple[float, float]] = ((0.6, 0.6),),
) -> Result:
    """A result in which divisions of cloth have this information and this information, misplaced."""

    def division(found: tuple[float, float]) -> Division:
        return Division(12, 0.7, 0.9, found[0], 0.71, 0.01, found[1], 0.25)

    cloths, levels = division(generator), tuple(map(division, encoder))
    surfaces = division((0.6, 0.3))
    plain = (surfaces,) * len(levels)
    return Result(latents, seed, 200, 10**6, psnr, CLOSE, CLOSE, CLOSE, surfaces, cloths, plain, levels)


def written(folder: Path, results: Sequence[Result]) -> str:
    write_page(folder / "page.md", results, replace(SMALL, seeds=len(results) // 2), MACHINE, Flat(19.0, CLOSE))
    return (folder / "page.md").read_text()


def test_the_page_says_what_the_figures_say(tmp_path: Path) -> None:
    page = written(
        tmp_path,
        [
            result_of(latents, seed, base + gain * seed, encoder=((0.5, 0.2 + 0.1 * seed), (0.4, 0.38)))
            for seed in (0, 1)
            for latents, base, gain in ((1, 20.0, 1.0), (8, 20.5, -1.0))
        ],
    )
    assert "better from 1 of 2 seeds, by -1.50 to 0.50 dB" in page
    assert "| 8 latents for each label | 1.00 M | 20.00 | 20.50 | 19.50 |" in page
    assert (
        "- wall and floor, generator: latents divide it, and the division follows the picture (information 0.60" in page
    )
    cells = "12 | 0.70 | 0.90 | 0.71 | 0.50 | 0.01 | 0.25 | 0.50 / 0.20, 0.50 / 0.30 |"
    assert f"| two kinds of cloth | encoder at level 0 | {cells}" in page
    assert "0.25 for wall and floor and 0.25 for two kinds of cloth" in page
    summary = (
        "wall and floor: generator, encoder at level 0, encoder at level 1; two kinds of cloth: encoder at level 0."
    )
    assert summary in page
    assert page.count("level 1: latents divide it by position") == 1


@pytest.mark.parametrize(
    "figures, found",
    [
        ([(0.02, 0.0), (0.03, 0.0)], "do not divide it (information 0.03, misplaced 0.00"),
        ([(0.6, 0.6), (0.6, 0.56)], "by position"),
        ([(0.3, 0.6), (0.3, 0.6)], "by position"),
        ([(0.6, 0.1), (0.6, 0.57)], "from 1 of 2 seeds only"),
        ([(0.6, 0.2), (0.6, 0.5)], "and the division follows the picture (information 0.60, misplaced 0.35"),
    ],
)
@pytest.mark.parametrize("attention", ["generator", "encoder at level 1"])
def test_divisions_are_claimed_only_where_they_follow_the_picture(
    tmp_path: Path, attention: str, figures: list[tuple[float, float]], found: str
) -> None:
    alike = (0.6, 0.6)
    results = [
        result_of(latents, seed, generator=own, encoder=(alike, alike))
        if attention == "generator"
        else result_of(latents, seed, generator=alike, encoder=(alike, own))
        for seed, own in enumerate(figures)
        for latents in (8, 1)
    ]
    page = written(tmp_path, results)
    (line,) = (line for line in page.splitlines() if line.startswith(f"- two kinds of cloth, {attention}: "))
    assert found in line
    follows = f"two kinds of cloth: {attention}." if "the division follows the picture (" in found else "cloth: none."
    assert follows in page
