"""Between label maps and the dense masks that the published modules take."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_of_latents(pixel_labels: Tensor, latent_labels: Tensor) -> Tensor:
    """What the modulation takes: (B, H, W) and (m) labels to (B, m, H, W), one where a pixel has a latent's label.

    With labels 0, 1, 2, ... for ``latent_labels`` it is the one-hot map that the encoder and the generator take. Pixels
    with a label below zero have none.
    """
    return (pixel_labels.unsqueeze(1) == latent_labels[:, None, None]).float()


def planes_of_latents(segmentation_map: Tensor, latents_of_background: int, latents_per_label: int) -> Tensor:
    """A one-hot map (B, labels, H, W) with the plane of each label repeated for each of its latents."""
    background, labels = segmentation_map[:, :1], segmentation_map[:, 1:]
    return torch.cat(
        [background.repeat_interleave(latents_of_background, 1), labels.repeat_interleave(latents_per_label, 1)], 1
    )
