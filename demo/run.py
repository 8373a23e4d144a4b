"""Reconstructs two photographs from a few latents per label, learned through the operator and its gradients.

Every pixel asks with features of its position; the latents of its label (background, face, body) answer. As a pixel
never sees the latents of another label, no colour can cross a border of the label map, however hard training pulls.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sca_kernels import LabelMap, LatentLayout, semantic_cross_attention

HERE = Path(__file__).resolve().parent
LABELS = ("background", "face", "body")
SIZE = 256
HEADS, WIDTH, VALUE_WIDTH = 4, 64, 16
LATENTS_PER_LABEL = 32
HIGHEST_FREQUENCY = 30.0  # of the position features, in half periods across the image
LEARNING_RATE = 0.03

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Portrait:
    """A photograph, its label map, and what was learned about it."""

    name: str
    pixels: Tensor  # (SIZE * SIZE, 3) in [0, 1]
    label_map: LabelMap
    reconstruction: Tensor = field(default_factory=lambda: torch.empty(0))
    strongest: Tensor = field(default_factory=lambda: torch.empty(0))  # index of each pixel's strongest latent

    @property
    def psnr(self) -> float:
        return -10 * math.log10(F.mse_loss(self.reconstruction, self.pixels).item())


class Reconstruction(nn.Module):
    """Colour of a pixel = sigmoid(linear(attention(position features, latents of the pixel's label)))."""

    def __init__(self, layout: LatentLayout) -> None:
        super().__init__()
        self.key = nn.Parameter(0.3 * torch.randn(1, HEADS, layout.count, WIDTH))
        self.value = nn.Parameter(0.3 * torch.randn(1, HEADS, layout.count, VALUE_WIDTH))
        self.to_colour = nn.Linear(HEADS * VALUE_WIDTH, 3)
        self.register_buffer("query", position_features())

    def forward(self, attention: Attention) -> Tensor:
        attended = attention(self.query, self.key, self.value)
        return torch.sigmoid(self.to_colour(attended.transpose(1, 2).flatten(2)))[0]


def position_features() -> Tensor:
    """Sines and cosines of the position along random directions, (1, HEADS, SIZE * SIZE, WIDTH)."""
    axis = torch.linspace(-1, 1, SIZE)
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
    waves = HEADS * WIDTH // 2
    frequency = torch.randn(2, waves) * torch.logspace(math.log10(0.5), math.log10(HIGHEST_FREQUENCY), waves)
    phase = (math.pi * position @ frequency).view(-1, HEADS, WIDTH // 2)
    return torch.cat((phase.sin(), phase.cos()), -1).transpose(0, 1).unsqueeze(0).contiguous()


def load_portraits() -> list[Portrait]:
    hopper = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").crop((0, 0, 512, 512))
    portraits = []
    for name, photograph in (("astronaut", Image.fromarray(skimage.data.astronaut())), ("grace_hopper", hopper)):
        small = np.asarray(photograph.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
        pixels = torch.from_numpy(small.copy()).view(-1, 3) / 255
        label_map = LabelMap.from_png(HERE / "labels" / f"{name}.png", num_labels=len(LABELS))
        portraits.append(Portrait(name, pixels, label_map.at(SIZE, SIZE)))
    return portraits


def kernel_attention(label_map: LabelMap, layout: LatentLayout) -> Attention:
    return lambda query, key, value: semantic_cross_attention(query, key, value, label_map, layout, scale=1.0)


def dense_attention(mask: Tensor) -> Attention:
    """The formulation with a matrix of all pixels by all latents."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = (query @ key.transpose(-2, -1)).masked_fill(~mask, -1e4)
        return logits.softmax(-1) @ value

    return attention


def masked_sdpa(mask: Tensor) -> Attention:
    """PyTorch's fused attention with the same mask; it wants values as wide as keys, so they are padded."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        padded = F.pad(value, (0, WIDTH - VALUE_WIDTH))
        return F.scaled_dot_product_attention(query, key, padded, attn_mask=mask, scale=1.0)[..., :VALUE_WIDTH]

    return attention


def label_mask(label_map: LabelMap, layout: LatentLayout) -> Tensor:
    """Which pixel may see which latent, (1, 1, SIZE * SIZE, latents)."""
    latent_labels = layout.labels(label_map.device)
    return (label_map.labels.view(1, 1, -1, 1) == latent_labels).contiguous()


def train(portrait: Portrait, layout: LatentLayout, steps: int) -> Reconstruction:
    model = Reconstruction(layout)
    attention = kernel_attention(portrait.label_map, layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(steps), desc=f"{portrait.name:<12}", unit="step")
    for step in progress:
        loss = F.mse_loss(model(attention), portrait.pixels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            progress.set_postfix(loss=f"{loss.item():.5f}")
    with torch.no_grad():
        portrait.reconstruction = model(attention)
        # Values that name the latents turn the output into the attention weights.
        names = torch.eye(layout.count).expand(1, HEADS, -1, -1)
        portrait.strongest = attention(model.query, model.key, names).mean(1)[0].argmax(-1)
    return model


def time_steps(model: Reconstruction, portrait: Portrait, contenders: dict[str, Attention]) -> dict[str, float]:
    """Median seconds of forward and backward with each attention, taken in turns; they must agree first."""
    results = {name: model(attention) for name, attention in contenders.items()}
    expected = next(iter(results.values()))
    for name, result in results.items():
        torch.testing.assert_close(
            result, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(6):
        for name, attention in contenders.items():
            start = time.perf_counter()
            F.mse_loss(model(attention), portrait.pixels).backward()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def latent_colours(layout: LatentLayout) -> np.ndarray:
    """A colour for each latent: the hue of its label, a shade of its own."""
    hues = ("Blues", "Oranges", "Greens")
    shades = np.linspace(0.25, 1.0, LATENTS_PER_LABEL)[np.random.default_rng(0).permutation(LATENTS_PER_LABEL)]
    return np.concatenate([matplotlib.colormaps[hue](shades)[:, :3] for hue in hues[: layout.num_labels]])


def draw(portraits: Sequence[Portrait], layout: LatentLayout, path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    label_colours = np.array([[0.42, 0.55, 0.70], [0.95, 0.60, 0.25], [0.35, 0.62, 0.38]])
    figure, axes = plt.subplots(len(portraits), 4, figsize=(13, 3.45 * len(portraits)), layout="constrained")
    for row, portrait in zip(axes, portraits, strict=True):
        panels = {
            "photograph": portrait.pixels.numpy(),
            "label map": label_colours[portrait.label_map.labels.flatten().numpy()],
            f"reconstruction, {portrait.psnr:.1f} dB": portrait.reconstruction.numpy(),
            "strongest latent of each pixel": latent_colours(layout)[portrait.strongest.numpy()],
        }
        for axis, (title, panel) in zip(row, panels.items(), strict=True):
            axis.imshow(panel.reshape(SIZE, SIZE, 3), interpolation="nearest")
            axis.set_title(title, fontsize=11)
            axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=700, help="training steps for each photograph")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "reconstruction.png", help="picture to write")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    layout = LatentLayout.uniform(num_labels=len(LABELS), latents=LATENTS_PER_LABEL)
    portraits = load_portraits()
    for portrait in portraits:
        model = train(portrait, layout, arguments.steps)
    draw(portraits, layout, arguments.output)

    mask = label_mask(portrait.label_map, layout)
    seconds = time_steps(
        model,
        portrait,
        {
            "sca-kernels": kernel_attention(portrait.label_map, layout),
            "dense mask": dense_attention(mask),
            "scaled_dot_product_attention with mask": masked_sdpa(mask),
        },
    )
    print()
    for portrait in portraits:
        print(f"{portrait.name}: reconstructed at {portrait.psnr:.1f} dB PSNR")
    print(
        f"one step, forward and backward, {SIZE * SIZE} pixels, {len(LABELS)} labels x {LATENTS_PER_LABEL} latents, "
        f"{HEADS} heads, {torch.get_num_threads()} threads:"
    )
    fastest = seconds["sca-kernels"]
    for name, value in seconds.items():
        print(f"  {name:<40} {value * 1e3:7.1f} ms  {value / fastest:5.1f}x")
    print(f"picture: {arguments.output}")


if __name__ == "__main__":
    main()
