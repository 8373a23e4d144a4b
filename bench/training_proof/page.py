"""The page that says what was found. What it claims follows from the figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scam_models.files import write_whole

from .pictures import LEVELS
from .results import Division, Flat, Result
from .trainings import Extent

_PAGE = """# Proof on real training

`make training-proof` made this page: it draws the procedural data set (`scam make-data`), trains the preset `tiny`
with 8 latents for each label and with 1, which is one style for each label as in SEAN, from {seeds} seed{plural}
each, and measures them on {test_identities} people that no training has seen. Everything but the number of latents is
the same: {steps} steps of {batch_size} images of 64 x 64 pixels, from {identities} people in {pictures} pictures
each, with L1 as the only loss, which PSNR likes best and which makes nothing sharp.

{machine}. A training took {seconds}.

## More latents reconstruct better

{verdict}

{reconstruction}

A picture with every label in its true mean colour, which one perfect flat style for each label would give, has
{flat:.2f} dB: what is above it are shades, parts and textures within labels.

![pictures, and their reconstructions with 8 latents and with 1](training-proof/reconstructions.png)

*From above: pictures, reconstructions with 8 latents for each label, and with 1. Seed 0; the first picture of each of
the first eight test people, nobody picked them.*

## Transfers keep pose, subject and background

The subject of each picture before the background of somebody else's, compared with the true picture of it, which the
procedural data set can draw: `FigureSeeds(person, pose, background).draw(64, 64)`. Beside it stands what the same
model makes of the same label map when nothing is exchanged, and when the subject's latents come from the other
picture too: a transfer should be as good as the first at the subject and as the second at the background. Differences
of colours are between means, and between standard deviations, over each region, in 255ths.

{transfers}

PSNR in the other's pose is against the same person and the same background, but standing as the other does. All
figures are means over seeds.

![subjects, backgrounds, true transfers, transfers with 8 latents and with 1](training-proof/transfers.png)

*From above: subjects, whose backgrounds come from the second row; true pictures of the transfers; transfers with 8
latents, and with 1.*

## What attention divides

The label `background` holds a wall and a floor, and in half of the people the label `top` holds two kinds of cloth.
Nothing tells the model.

{summary}

In the *generator* pixels attend to latents, and each pixel is taken for the latent of its label that it attends to
most in the last modulation. What a pixel knows there comes from its place, the label map and the latents, which all
pixels share. In the *encoder* latents attend to pixels of the picture, level by level: 0 is the picture itself, and
each next level has half the height and width. Each pixel is taken for the latent of its label from which it gets most
of the attention that it gets (`Scam.encoder_attention`), and a level is enlarged to the picture; pixels whose place on
the level has another label are a part of their own.

Each division of a region is compared with the true one: purity, the share of pixels that are right if each latent
stands for what most of its pixels are, and normalised mutual information, 1 for the same division and 0 for unrelated
ones. *Shuffled* is what comes out when the pixels of the region have changed places. *Misplaced* compares with a truth
that position alone would find just as likely: the horizon of another picture, and for cloth the other seam, across the
chest where it is along the body. Cloth is measured in every picture with either seam, so what goes by position alone
has exactly as much of both. What exceeds *misplaced* follows the picture; what does not is where such things usually
are. The true division itself has an information of 1, and, misplaced, of
{perfect}.

{divisions}

All figures are means over pictures and seeds, but for the last column, which has information and information,
misplaced, of each seed. The division is said to follow the picture where the first exceeds the second by
{least_difference} from every seed. Latents that share one kind of cloth, or divide its pattern, lower the information.

{divided}

![people in two kinds of cloth, the true division, strongest latents; then the other seam](training-proof/attention.png)

*From above: people in two kinds of cloth; which pixels show which; each pixel of their tops in the colour of its latent
in the generator; and in the encoder at levels {levels}. Then the same people in the same poses with the other seam.
Seed 0; the first of the test people who wear two kinds, in their first pictures.*
"""


def write_page(
    path: Path, results: Sequence[Result], extent: Extent, machine: Mapping[str, str | float], flat: Flat
) -> None:
    """Writes the page.

    Args:
        path: of the page.
        results: of all trainings.
        extent: how much was done.
        machine: see :func:`bench.report.describe_machine`, and "threads".
        flat: pictures with every region in its mean colour.
    """
    most, least = _by_latents(results)
    text = _PAGE.format(
        seeds=extent.seeds,
        plural="s" if extent.seeds > 1 else "",
        test_identities=extent.test_identities,
        steps=extent.steps,
        batch_size=extent.batch_size,
        identities=extent.identities,
        pictures=extent.pictures,
        machine=_describe(machine),
        seconds=f"{_mean(most, _seconds):.0f} s of the processor with {most[0].latents} latents for each label and "
        f"{_mean(least, _seconds):.0f} s with {least[0].latents}",
        verdict=_verdict(most, least),
        reconstruction=_reconstruction_table(most, least),
        flat=flat.psnr,
        transfers=_transfer_table(most, least, flat),
        summary=_division_summary(most),
        perfect=" and ".join(
            f"{_average(most, name, 'generator', 'perfect_misplaced_information'):.2f} for {name}" for name in _REGIONS
        ),
        divisions=_division_table(most),
        least_difference=_LEAST_DIFFERENCE,
        divided="\n".join(
            f"- {region}, {attention}: {_division_verdict(most, region, attention)}"
            for region in _REGIONS
            for attention in _attentions(most)
        ),
        levels=" and ".join(map(str, LEVELS)),
    )
    write_whole(path, lambda file: file.write(text.encode()))


def _by_latents(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    counts = sorted({result.latents for result in results}, reverse=True)
    most, least = ([result for result in results if result.latents == latents] for latents in counts)
    return most, least


def _describe(machine: Mapping[str, str | float]) -> str:
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] != 1 else "")
    return (
        f"{machine['date']}, commit {machine['commit']}, {machine['device']}, {threads}, PyTorch {machine['torch']}, "
        f"load average {machine['load_average']}"
    )


def _verdict(most: Sequence[Result], least: Sequence[Result]) -> str:
    differences = [one.psnr - other.psnr for one, other in zip(most, least, strict=True)]
    better = sum(difference > 0 for difference in differences)
    return (
        f"With {most[0].latents} latents the reconstructions of test pictures are better from {better} of "
        f"{len(differences)} seeds, by {min(differences):.2f} to {max(differences):.2f} dB."
    )


def _reconstruction_table(most: Sequence[Result], least: Sequence[Result]) -> str:
    rows = [
        ["PSNR of reconstructions, dB", "parameters", "mean", *(f"seed {result.seed}" for result in most)],
        *(
            [
                f"{group[0].latents} latents for each label" if group[0].latents > 1 else "1 latent for each label",
                f"{group[0].parameters / 1e6:.2f} M",
                f"{_mean(group, _psnr):.2f}",
                *(f"{result.psnr:.2f}" for result in group),
            ]
            for group in (most, least)
        ),
        [
            "difference",
            "",
            f"{_mean(most, _psnr) - _mean(least, _psnr):+.2f}",
            *(f"{one.psnr - other.psnr:+.2f}" for one, other in zip(most, least, strict=True)),
        ],
    ]
    return _table(rows)


_MEASURES: Mapping[str, tuple[str, int]] = {
    "PSNR, dB": ("whole", 2),
    "PSNR in the other's pose, dB": ("other_pose", 2),
    "PSNR of the background, dB": ("background", 2),
    "PSNR of the subject, dB": ("subject", 2),
    "mean colour of the background": ("background_colour", 1),
    "mean colours of the subject": ("subject_colour", 1),
    "deviation of the background's colours": ("background_deviation", 1),
    "deviation of the subject's colours": ("subject_deviation", 1),
}
_WAYS = {"own_background": "nothing exchanged", "transfer": "transfer", "other_subject": "all from the other"}


def _transfer_table(most: Sequence[Result], least: Sequence[Result], flat: Flat) -> str:
    groups = (most, least)
    header = ["against the true picture"]
    header += [f"{way}, {group[0].latents}" for group in groups for way in _WAYS.values()]
    header.append("flat")
    rows = [header]
    for name, (field, digits) in _MEASURES.items():
        cells = [
            f"{statistics.fmean(getattr(getattr(result, way), field) for result in group):.{digits}f}"
            for group in groups
            for way in _WAYS
        ]
        rows.append([name, *cells, f"{getattr(flat.transfer, field):.{digits}f}"])
    return _table(rows)


_REGIONS = {"wall and floor": "surfaces", "two kinds of cloth": "cloths"}
_LEAST_DIFFERENCE = 0.05  # of information, for a claim


def _attentions(most: Sequence[Result]) -> list[str]:
    return ["generator", *(f"encoder at level {level}" for level in range(len(most[0].encoder_surfaces)))]


def _divisions(most: Sequence[Result], region: str, attention: str) -> list[Division]:
    """Those of all seeds."""
    field = _REGIONS[region]
    if attention == "generator":
        return [getattr(result, field) for result in most]
    level = _attentions(most).index(attention) - 1
    return [getattr(result, f"encoder_{field}")[level] for result in most]


def _average(most: Sequence[Result], region: str, attention: str, name: str) -> float:
    return statistics.fmean(getattr(division, name) for division in _divisions(most, region, attention))


def _following(divisions: Sequence[Division]) -> int:
    """From how many seeds the division follows the picture."""
    return sum(
        division.information - max(division.misplaced_information, division.shuffled_information) >= _LEAST_DIFFERENCE
        for division in divisions
    )


def _division_summary(most: Sequence[Result]) -> str:
    found = []
    for region in _REGIONS:
        following = [
            attention for attention in _attentions(most) if _following(_divisions(most, region, attention)) == len(most)
        ]
        found.append(f"{region}: {', '.join(following) or 'none'}")
    return f"Where the division follows the picture from every seed: {'; '.join(found)}."


def _division_verdict(most: Sequence[Result], region: str, attention: str) -> str:
    own, misplaced, shuffled = (
        _average(most, region, attention, name)
        for name in ("information", "misplaced_information", "shuffled_information")
    )
    following = _following(_divisions(most, region, attention))
    if own - shuffled < _LEAST_DIFFERENCE:
        found = "latents do not divide it"
    elif following == len(most):
        found = "latents divide it, and the division follows the picture"
    elif following:
        found = f"latents divide it, and the division follows the picture from {following} of {len(most)} seeds only"
    else:
        found = "latents divide it by position, and the division does not follow the picture"
    return f"{found} (information {own:.2f}, misplaced {misplaced:.2f}, shuffled {shuffled:.2f})"


def _division_table(most: Sequence[Result]) -> str:
    columns = {
        "larger part": "largest",
        "purity": "purity",
        "purity, shuffled": "shuffled_purity",
        "information": "information",
        "information, shuffled": "shuffled_information",
        "information, misplaced": "misplaced_information",
    }
    rows = [["region", "attention", "pictures", *columns, "by seed"]]
    for region in _REGIONS:
        for attention in _attentions(most):
            divisions = _divisions(most, region, attention)
            cells = [f"{_average(most, region, attention, name):.2f}" for name in columns.values()]
            by_seed = ", ".join(
                f"{division.information:.2f} / {division.misplaced_information:.2f}" for division in divisions
            )
            rows.append([region, attention, str(divisions[0].pictures), *cells, by_seed])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *others = rows
    lines = [header, ["---"] * len(header), *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(results: Sequence[Result], field: Callable[[Result], float]) -> float:
    return statistics.fmean(map(field, results))


def _psnr(result: Result) -> float:
    return result.psnr


def _seconds(result: Result) -> float:
    return result.seconds
