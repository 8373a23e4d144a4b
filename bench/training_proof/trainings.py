"""The trainings that are compared. Only the number of latents differs: images, steps and losses are the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from scam_models.data import make_data
from scam_models.files import write_whole
from scam_models.training import TrainingConfiguration, train, training_preset, without

LATENTS = (8, 1)
_SECONDS = "seconds.json"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is done.

    Attributes:
        steps: of each training.
        batch_size: images of a step.
        seeds: number of trainings with each number of latents.
        identities, test_identities, pictures: of the data set, see :func:`scam_models.data.make_data`.
    """

    steps: int = 1500
    batch_size: int = 8
    seeds: int = 3
    identities: int = 64
    test_identities: int = 16
    pictures: int = 8


@dataclass(frozen=True)
class Trained:
    """A training that is done.

    Attributes:
        checkpoint: its last one.
        seconds: of the processor, of all threads together.
    """

    checkpoint: Path
    seconds: float


def configuration(latents: int, seed: int, extent: Extent) -> TrainingConfiguration:
    """The preset "tiny" with L1 as its only loss: what reconstructs best by PSNR, and the same for both.

    Example:
        >>> configuration(8, 0, Extent()).losses.needs_discriminator
        False
    """
    whole = replace(
        training_preset("tiny", latents=latents),
        steps=extent.steps,
        batch_size=extent.batch_size,
        seed=seed,
        validation_share=0.0,
        validate_every=extent.steps,
        checkpoint_every=250,
    )
    return without(whole, ["adversarial", "perceptual"])


def data_folder(out: Path, extent: Extent) -> Path:
    """The data set, drawn if it is not there yet."""
    folder = out / f"data-{extent.identities}-{extent.test_identities}-{extent.pictures}"
    if not folder.exists():
        make_data(
            folder,
            identities=extent.identities,
            test_identities=extent.test_identities,
            pictures=extent.pictures,
        )
    return folder


def train_once(
    data: Path, out: Path, latents: int, seed: int, extent: Extent, report: Callable[[str], None]
) -> Trained:
    """Trains, goes on with a training that was interrupted, or finds one that is done."""
    folder = out / f"{latents}-latents-seed-{seed}"
    record = folder / _SECONDS
    before = json.loads(record.read_text()) if record.exists() else 0.0
    begin = time.process_time()
    # In this process, so that its time includes reading the images.
    checkpoint = train(
        data,
        configuration(latents, seed, extent),
        folder,
        resume=True,
        devices=1,
        accelerator="cpu",
        workers=0,
        report=report,
    )
    seconds = before + time.process_time() - begin
    write_whole(record, lambda file: file.write(json.dumps(seconds).encode()))
    return Trained(checkpoint, seconds)
