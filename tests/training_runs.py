"""A small data set, a training that takes seconds, and how its results are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from image_folders import write_sample
from torch import Tensor

from sca_kernels import LatentLayout
from scam_models import DiscriminatorConfiguration, LossWeights, tiny
from scam_models.data import DataConfiguration
from scam_models.training import TrainingConfiguration

SIZE, NUM_LABELS = 32, 3
DATA = DataConfiguration(name="tests", height=SIZE, width=SIZE, num_labels=NUM_LABELS, flip=True)


def write_data(folder: Path, count: int = 9, split: str = "train") -> Path:
    """Images of a random colour for each label, with some noise."""
    generator = torch.Generator().manual_seed(count)
    for number in range(count):
        cells = torch.randint(NUM_LABELS, (4, 4), generator=generator)
        labels = cells.repeat_interleave(SIZE // 4, 0).repeat_interleave(SIZE // 4, 1)
        colours = torch.randint(40, 216, (NUM_LABELS, 3), generator=generator)
        pixels = colours[labels] + torch.randint(-20, 20, (SIZE, SIZE, 3), generator=generator)
        write_sample(folder, split, f"image{number}", labels, pixels.byte())
    return folder


def small_configuration(*, noise: bool = True, latents: int = 2, **options: Any) -> TrainingConfiguration:
    """Seven images in batches of two: steps cross the end of an epoch in the middle of a batch."""
    model = tiny(LatentLayout.uniform(NUM_LABELS, latents), SIZE, SIZE)
    settings: dict[str, Any] = {
        "losses": LossWeights(perceptual=0.0),
        "steps": 7,
        "batch_size": 2,
        "validation_share": 0.2,
        "validate_every": 4,
        "checkpoint_every": 1,
    }
    return TrainingConfiguration(
        model=replace(model, generator=replace(model.generator, noise=noise)),
        data=DATA,
        discriminator=DiscriminatorConfiguration(num_labels=NUM_LABELS, first_channels=4),
        **settings | options,
    )


def read(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dictionaries and lists, with their places."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{name}/{key}")


def assert_same_bits(one: Path, other: Path) -> None:
    """Weights, averages, optimisers and position agree to the last bit."""
    first, second = read(one), read(other)
    assert first["scam"] == second["scam"]
    for key in ("state_dict", "optimizer_states"):
        left, right = dict(tensors(first[key])), dict(tensors(second[key]))
        assert left.keys() == right.keys() and left
        different = [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]
        assert not different, different[:3]
