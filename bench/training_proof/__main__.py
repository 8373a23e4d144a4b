"""Trains SCAM with 8 latents for each label and with 1, from several seeds, and writes ``docs/training-proof.md``.

Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from scam_models import Scam

from .. import report
from ..run import current_allocator
from .page import write_page
from .pictures import write_pictures
from .results import Outcome, Result, TestPictures, apply, measure, measure_flat
from .trainings import LATENTS, Extent, data_folder, train_once

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        "python -m bench.training_proof", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=Extent().steps, help="of each training")
    parser.add_argument("--seeds", type=int, default=Extent().seeds, help="trainings with each number of latents")
    parser.add_argument("--identities", type=int, default=Extent().identities, help="people to train on")
    parser.add_argument("--test-identities", type=int, default=Extent().test_identities, help="other people to test on")
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "training-proof", help="folder for the trainings")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for the page and its pictures")
    options = parser.parse_args(arguments)
    extent = replace(
        Extent(),
        steps=options.steps,
        seeds=options.seeds,
        identities=options.identities,
        test_identities=options.test_identities,
    )
    prove(extent, options.runs, options.docs)


def prove(extent: Extent, runs: Path, docs: Path) -> list[Result]:
    """Trains, measures, and writes the page with its pictures.

    Args:
        extent: how much is done.
        runs: folder for the data set and the trainings.
        docs: folder for ``training-proof.md`` and ``training-proof/``.

    Returns:
        by seed, and for each with the number of latents.
    """
    # First, since the pictures of the page make the commit one with changes.
    machine = report.describe_machine(current_allocator()) | {"threads": torch.get_num_threads()}
    data = data_folder(runs, extent)
    pictures = TestPictures.read(data)
    results: list[Result] = []
    models: dict[int, Scam] = {}
    outcomes: dict[int, Outcome] = {}
    for seed in range(extent.seeds):
        for latents in LATENTS:
            print(f"k={latents}, seed {seed}: training", flush=True)
            trained = train_once(data, runs, latents, seed, extent, report=print)
            model = Scam.from_checkpoint(trained.checkpoint)
            outcome = apply(model, pictures)
            results.append(measure(model, pictures, outcome, latents=latents, seed=seed, seconds=trained.seconds))
            print(f"k={latents}, seed {seed}: {results[-1].psnr:.2f} dB, {trained.seconds:.0f} s", flush=True)
            if seed == 0:
                models[latents], outcomes[latents] = model, outcome
    write_pictures(docs / "training-proof", pictures, models, outcomes)
    flat = measure_flat(pictures)
    summary = {"machine": machine, "extent": asdict(extent), "flat": asdict(flat)}
    lines = [summary, *map(asdict, results)]
    (runs / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page(docs / "training-proof.md", results, extent, machine, flat)
    print(docs / "training-proof.md")
    return results


if __name__ == "__main__":
    main()
