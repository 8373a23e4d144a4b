"""Trains a small SCAM to reconstruct two portraits, and puts each subject before the other's background.

Every other step reconstructs the photographs from their own latents. In between the latents of the backgrounds are
exchanged, and each region is compared with the photograph that its latents come from. What a background's own subject
hides there is filled in from around it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from comparison import Comparison, compare_steps
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sca_kernels import LabelMap, LatentLayout
from scam_models import (
    EncoderConfiguration,
    GeneratorConfiguration,
    Scam,
    ScamConfiguration,
    StrongestLatents,
    take_latents,
)
from scam_models.pictures import label_picture, strongest_picture

HERE = Path(__file__).resolve().parent
NAMES = ("astronaut", "grace_hopper")
LABELS = ("background", "face", "body")
BACKGROUND = LABELS.index("background")
LATENTS_PER_LABEL = 16
LEARNING_RATE = 2e-3
SCALES = 4  # of the loss, each half as large as the one before


@dataclass(frozen=True)
class Portraits:
    """Photographs (2, 3, size, size) from -1 to 1, and their label maps."""

    photographs: Tensor
    labels: LabelMap

    @property
    def is_background(self) -> Tensor:
        """(2, 1, size, size)."""
        return self.labels.labels.unsqueeze(1) == BACKGROUND

    def exchanged(self) -> Portraits:
        """The same in the other order."""
        return Portraits(self.photographs.flip(0), LabelMap.from_labels(self.labels.labels.flip(0), len(LABELS)))


@dataclass(frozen=True)
class Results:
    """What the trained model makes of both portraits.

    Attributes:
        reconstructions: like the photographs.
        transfers: each subject before the other's background.
        strongest: the latent that each pixel attends to most.
        psnr: of each reconstruction, in dB.
        transfer_psnr: of each transfer, where the photographs show what is to be seen.
    """

    reconstructions: Tensor
    transfers: Tensor
    strongest: StrongestLatents
    psnr: Sequence[float]
    transfer_psnr: Sequence[float]


def load_portraits(size: int) -> Portraits:
    hopper = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").crop((0, 0, 512, 512))
    photographs, labels = [], []
    for name, photograph in zip(NAMES, (Image.fromarray(skimage.data.astronaut()), hopper), strict=True):
        small = np.array(photograph.convert("RGB").resize((size, size), Image.Resampling.BOX))
        photographs.append(torch.from_numpy(small).permute(2, 0, 1) / 127.5 - 1)
        label_map = LabelMap.from_png(HERE / "labels" / f"{name}.png", num_labels=len(LABELS))
        labels.append(label_map.at(size, size).labels)
    return Portraits(torch.stack(photographs), LabelMap.from_labels(torch.cat(labels), len(LABELS)))


def make_model(size: int) -> Scam:
    """SCAM as published, with fewer and narrower layers; without noise, as only these two images are wanted."""
    layout = LatentLayout.uniform(len(LABELS), LATENTS_PER_LABEL)
    return Scam.from_configuration(
        ScamConfiguration(
            EncoderConfiguration(
                layout=layout, latent_dim=64, attention_dim=64, num_blocks=5, encoding_channels=16, first_channels=16
            ),
            GeneratorConfiguration(
                layout=layout,
                height=size,
                width=size,
                latent_dim=64,
                attention_dim=64,
                num_blocks=5,
                last_channels=16,
                noise=False,
            ),
        )
    )


def expected_transfers(portraits: Portraits) -> tuple[Tensor, Tensor]:
    """Each subject before the other's background, and where the photographs show it.

    What a background's own subject hides is filled in from around it. A margin counts as hidden too, since hair and
    soft edges reach over the outlines.
    """
    subjects = (~portraits.is_background).float()
    margin = portraits.photographs.shape[-1] // 64
    is_shown = F.max_pool2d(subjects, 2 * margin + 1, stride=1, padding=margin) == 0
    backgrounds = fill(portraits.photographs, is_shown)
    target = torch.where(portraits.is_background, backgrounds.flip(0), portraits.photographs)
    return target, ~portraits.is_background | is_shown.flip(0)


def fill(images: Tensor, is_known: Tensor) -> Tensor:
    """Continues images smoothly where they are not known: from coarse to fine, each resolution starting the next."""
    if is_known.all():
        return images
    share = F.avg_pool2d(is_known.float(), 2)
    coarse = F.avg_pool2d(images * is_known, 2) / share.clamp(min=0.25)
    fine = F.interpolate(fill(coarse, share > 0), size=images.shape[2:], mode="bilinear")
    filled = torch.where(is_known, images, fine)
    for _ in range(16):
        blurred = F.avg_pool2d(F.pad(filled, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        filled = torch.where(is_known, images, blurred)
    return filled


def reconstruction_loss(images: Tensor, targets: Tensor) -> Tensor:
    """Differences of pixels, and of their steps to their neighbours, in several resolutions."""
    difference = images - targets
    loss = difference.new_zeros(())
    for _ in range(SCALES):
        steps = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        loss = loss + difference.abs().mean() + steps
        difference = F.avg_pool2d(difference, 2)
    return loss


def train(model: Scam, portraits: Portraits, steps: int) -> None:
    layout, labels = model.encoder.configuration.layout, portraits.labels
    transfers, _ = expected_transfers(portraits)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="training", unit="step")
    for step in progress:
        latents, targets = model.encode(portraits.photographs, labels), portraits.photographs
        if step % 2 == 1:
            latents, targets = take_latents(layout, latents, {BACKGROUND: latents.flip(0)}), transfers
        loss = reconstruction_loss(model.generate(labels, latents), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            progress.set_postfix(loss=f"{loss.item():.4f}")


@torch.inference_mode()
def apply(model: Scam, portraits: Portraits) -> Results:
    photographs, labels, other = portraits.photographs, portraits.labels, portraits.exchanged()
    latents = model.encode(photographs, labels)
    reconstructions = model.generate(labels, latents)
    transfers = model.transfer_subject(photographs, labels, other.photographs, other.labels, background=BACKGROUND)
    target, is_shown = expected_transfers(portraits)
    return Results(
        reconstructions,
        transfers,
        model.strongest_latents(labels, latents),
        psnr(reconstructions, photographs, torch.ones_like(is_shown)),
        psnr(transfers, target, is_shown),
    )


def psnr(images: Tensor, targets: Tensor, where: Tensor) -> list[float]:
    """Of each image in dB, over the pixels where ``where`` (2, 1, size, size) is true."""
    errors = (images - targets).square().mean(1, keepdim=True) / 4
    return [-10 * math.log10(error[mask].mean().item()) for error, mask in zip(errors, where, strict=True)]


def draw(portraits: Portraits, results: Results, path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def shown(image: Tensor) -> np.ndarray:
        return ((image + 1) / 2).permute(1, 2, 0).numpy()

    layout = LatentLayout.uniform(len(LABELS), LATENTS_PER_LABEL)
    label_maps, strongest = (
        label_picture(portraits.labels.labels, len(LABELS)),
        strongest_picture(results.strongest, layout),
    )
    rows = len(NAMES)
    figure, axes = plt.subplots(rows, 5, figsize=(12, 2.6 * rows), layout="constrained")
    for index, row in enumerate(axes):
        panels = {
            "photograph": shown(portraits.photographs[index]),
            "label map": shown(label_maps[index]),
            f"reconstruction, {results.psnr[index]:.1f} dB": shown(results.reconstructions[index]),
            "before the other's background": shown(results.transfers[index]),
            "strongest latent of each pixel": shown(strongest[index]),
        }
        for axis, (title, panel) in zip(row, panels.items(), strict=True):
            axis.imshow(panel)
            axis.set_title(title, fontsize=10)
            axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def report(results: Results, comparison: Comparison) -> str:
    lines = [
        f"{name}: reconstruction {own:.1f} dB PSNR, before the other's background {transfer:.1f} dB where it is known"
        for name, own, transfer in zip(NAMES, results.psnr, results.transfer_psnr, strict=True)
    ]
    lines.append(
        f"a training step on {torch.get_num_threads()} threads "
        f"(images agree to {comparison.image_error:.0e}, losses to {comparison.loss_error:.0e}):"
    )
    ours, *_ = comparison.costs.values()
    for name, cost in comparison.costs.items():
        slower, larger = cost.seconds / ours.seconds, cost.peak_bytes / ours.peak_bytes
        lines.append(
            f"  {name:<20} {cost.seconds * 1e3:7.0f} ms {slower:5.1f}x   "
            f"peak {cost.peak_bytes / 2**20:6.0f} MiB {larger:5.1f}x"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    parser.add_argument("--size", type=int, default=256, help="height and width of the images, at least 64")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "reconstruction.png", help="picture to write")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    portraits = load_portraits(options.size)
    model = make_model(options.size)
    train(model, portraits, options.steps)
    results = apply(model, portraits)
    draw(portraits, results, options.output)

    def loss(images: Tensor) -> Tensor:
        return reconstruction_loss(images, portraits.photographs)

    print(report(results, compare_steps(model, portraits.photographs, portraits.labels, loss)))
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
