"""Trainings that differ in one thing each, and a table of what they came to."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data import open_checked
from ..evaluation import FeatureExtractor, evaluate
from ..files import write_whole
from ..model import Scam
from .ablations import ABLATIONS, without
from .configuration import TrainingConfiguration, with_latents
from .run import train

LATENTS = (4, 8, 16, 32)


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Attributes:
        variant: what differs, "whole" if nothing does.
        seed: of the training.
        parameters: of encoder and generator.
        psnr, s_fid: of the averaged weights on the images of "test", see :func:`scam_models.evaluation.evaluate`.
        features: what S-FID was computed with.
    """

    variant: str
    seed: int
    parameters: int
    psnr: float
    s_fid: float
    features: str


def variants(configuration: TrainingConfiguration) -> dict[str, TrainingConfiguration]:
    """The configuration, without each part that it has, and with other numbers of latents.

    Example:
        >>> from scam_models.training import training_preset
        >>> list(variants(training_preset("tiny")))[:3]
        ['whole', 'without encoder-convolutions', 'without self-attention']
    """
    found = {"whole": configuration}
    for part in ABLATIONS:
        changed = without(configuration, [part])
        if changed != configuration:
            found[f"without {part}"] = changed
    for latents in LATENTS:
        changed = with_latents(configuration, latents)
        if changed != configuration:
            found[f"{latents} latents"] = changed
    return found


def ablate(
    data: str | Path,
    configurations: Mapping[str, TrainingConfiguration],
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    fid_features: FeatureExtractor | None = None,
    report: Callable[[str], None] = print,
    **options: Any,
) -> list[Result]:
    """Trains every variant with every seed, and writes ``results.jsonl`` and ``table.md``.

    Trainings that are there already are not repeated, and those that were interrupted go on.

    Args:
        data: a folder with "train" and "test".
        configurations: by the name of the variant, see :func:`variants`.
        out: the folder that is written, with a folder for each training.
        seeds: of the trainings.
        fid_features: what S-FID is computed with. Default: random features, which the table then says.
        report: is called with lines of text.
        options: of :func:`scam_models.training.train`.

    Returns:
        in the order of the variants and seeds.

    Raises:
        InputError: as :func:`scam_models.training.train`.
    """
    out, results = Path(out), list[Result]()
    for name, configuration in configurations.items():
        images = open_checked(data, "test", configuration.data, report=report)
        for seed in seeds:
            folder = out / f"{name.replace(' ', '-')}-seed-{seed}"
            last = train(data, replace(configuration, seed=seed), folder, resume=True, report=report, **options)
            model = Scam.from_checkpoint(last).to("cuda" if torch.cuda.is_available() else "cpu")
            found = evaluate(model, images, fid_features=fid_features)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            results.append(Result(name, seed, parameters, found.psnr, found.s_fid, found.fid_features))
            report(f"{name}, seed {seed}: {found.psnr:.2f} dB")
            lines = "".join(json.dumps(asdict(result)) + "\n" for result in results)
            _write(out / "results.jsonl", lines)
            _write(out / "table.md", table(results))
    return results


def table(results: Sequence[Result]) -> str:
    """Means over seeds, with the standard deviation of the PSNR, in Markdown.

    Example:
        >>> print(table([Result("whole", seed, 1234567, 20.0 + seed, 3.0, "random features") for seed in (0, 1)]))
        | variant | parameters | PSNR (dB) | against whole | S-FID (random features) |
        |---|---|---|---|---|
        | whole | 1.23 M | 20.50 ± 0.71 | | 3.00 |
        <BLANKLINE>
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.variant, []).append(result)
    means = {name: statistics.fmean(result.psnr for result in group) for name, group in groups.items()}
    rows = [
        f"| variant | parameters | PSNR (dB) | against whole | S-FID ({results[0].features}) |",
        "|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        spread = f" ± {statistics.stdev(result.psnr for result in group):.2f}" if len(group) > 1 else ""
        against = f" {means[name] - means['whole']:+.2f}" if name != "whole" and "whole" in means else ""
        s_fid = statistics.fmean(result.s_fid for result in group)
        parameters = f"{group[0].parameters / 1e6:.2f} M"
        rows.append(f"| {name} | {parameters} | {means[name]:.2f}{spread} |{against} | {s_fid:.2f} |")
    return "\n".join(rows) + "\n"


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))
