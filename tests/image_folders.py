"""Small data sets in folders, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def write_image(path: Path, pixels: Tensor) -> Path:
    """Writes (H, W, 3) or (H, W) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pixels.shape[:2]
    Image.frombytes("RGB" if pixels.dim() == 3 else "L", (width, height), bytes(pixels.flatten().tolist())).save(path)
    return path


def write_sample(folder: Path, split: str, name: str, labels: Tensor, pixels: Tensor | None = None) -> None:
    """Writes a label map (H, W) and its image, by default in a colour for each label, see :func:`colours`."""
    write_image(folder / split / "labels" / f"{name}.png", labels.to(torch.uint8))
    write_image(folder / split / "images" / f"{name}.png", colours(labels) if pixels is None else pixels)


def colours(labels: Tensor) -> Tensor:
    """(H, W) to (H, W, 3) uint8: a colour for each label."""
    label = labels.long()
    return torch.stack([label * 40 % 256, 255 - label * 20, label * label % 256], -1).to(torch.uint8)


def write_data(folder: Path, *, num_labels: int = 6, count: int = 3, height: int = 64, width: int = 64) -> Path:
    """Writes a data set of random pixels: names ``0`` ... in both splits."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for index in range(count):
            labels = torch.randint(0, num_labels, (height, width), generator=generator)
            pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
            write_sample(folder, split, str(index), labels, pixels)
    return folder
