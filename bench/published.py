"""The modulation of SCAM as it was published: every pixel is projected, and a dense mask covers all pairs.

:class:`PublishedModulation` computes the published formula in the published order, one operation after the other. Its
parameters bear the published names, in which the keys come from ``v_linear`` and the values from ``k_linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import attention, attention_by_label

STYLE_WIDTH = 256  # of a latent
ATTENTION_WIDTH = 256
NEGATIVE_SLOPE = 0.2

# Attention of (B, H, N, D) queries, keys and values.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def position_tables(channels: int, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sinusoidal encoding of rows, (height, channels), and of columns, (width, channels).

    Four quarters of the channels: sine of the column, sine of the row, cosine of the column, cosine of the row, of
    coordinates from -1 to 1 at falling frequencies.
    """
    quarter = channels // 4
    frequencies = 10000 ** (-2 * torch.arange(quarter, dtype=dtype) / (channels // 2))
    tables = []
    for size in (height, width):
        angles = torch.linspace(-1, 1, size, dtype=dtype)[:, None] * frequencies
        tables.append((angles.sin(), angles.cos(), torch.zeros_like(angles)))
    (row_sine, row_cosine, no_row), (column_sine, column_cosine, no_column) = tables
    rows = torch.cat((no_row, row_sine, no_row, row_cosine), 1)
    columns = torch.cat((column_sine, no_column, column_cosine, no_column), 1)
    return rows, columns


def position(channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """The sinusoidal encoding of every pixel, (channels, height, width)."""
    rows, columns = position_tables(channels, height, width, dtype)
    return rows.mT.unsqueeze(2) + columns.mT.unsqueeze(1)


class MaskedAttention(nn.Module):
    """Projections of both sides, attention between them, and a projection of what comes out."""

    def __init__(self, to_width: int, from_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(to_width, ATTENTION_WIDTH)
        self.k_linear = nn.Linear(from_width, ATTENTION_WIDTH)
        self.v_linear = nn.Linear(from_width, ATTENTION_WIDTH)
        self.out = nn.Sequential(nn.Linear(ATTENTION_WIDTH, to_width))

    def forward(self, to: Tensor, source: Tensor, attend: Attention) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_linear(to), self.v_linear(source), self.k_linear(source))
        )
        result: Tensor = self.out(attend(query, key, value).transpose(1, 2).flatten(2))
        return result


class MaskedTransformer(nn.Module):
    """Latents attend to something, and a small network follows; both normalise all latents together."""

    def __init__(self, latents: int, from_width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = MaskedAttention(STYLE_WIDTH, from_width, num_heads)
        self.ln_1 = nn.LayerNorm((latents, STYLE_WIDTH))
        self.fc = nn.Sequential(*_two_linear(), nn.LeakyReLU(NEGATIVE_SLOPE))
        self.ln_2 = nn.LayerNorm((latents, STYLE_WIDTH))

    def forward(self, latents: Tensor, source: Tensor, attend: Attention) -> Tensor:
        attended = self.ln_1(self.attention(latents, source, attend) + latents)
        result: Tensor = self.ln_2(self.fc(attended) + attended)
        return result


class PublishedModulation(nn.Module):
    """Modulates a feature map by the latents of each pixel's label.

    Args:
        channels: of the feature map.
        latents: number of latents m of all labels.
        duplex: whether the latents attend to the pixels first; otherwise two linear layers change them.
        num_heads: of both attentions.
    """

    def __init__(self, channels: int, latents: int, *, duplex: bool, num_heads: int = 1) -> None:
        super().__init__()
        self.latent_to_image = MaskedAttention(channels, STYLE_WIDTH, num_heads)
        self.mlp_lti_gamma = nn.Linear(channels, channels)
        self.mlp_lti_beta = nn.Linear(channels, channels)
        self.noise_var = nn.Parameter(torch.zeros(channels))
        self.duplex = duplex
        if duplex:
            self.image_to_latent = MaskedTransformer(latents, channels, num_heads)
        else:
            self.fc_itl = nn.Sequential(*_two_linear())

    def forward(self, x: Tensor, mask: Tensor, latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The modulated feature map and the new latents.

        Args:
            x: (B, channels, height, width).
            mask: (B, m, H, W), one where a pixel belongs to a latent's label and zero elsewhere.
            latents: (B, m, STYLE_WIDTH).
            noise: (B, 1, height, width).
        """
        resized = F.interpolate(mask, size=x.shape[2:], mode="nearest").flatten(2)
        return self.modulate(
            x, latents, noise, partial(_masked_attention, resized.mT), partial(_masked_attention, resized)
        )

    def by_label(
        self, x: Tensor, pixel_labels: Tensor, latent_labels: Tensor, latents: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same without a mask, for one image: (1, n) and (1, m) labels. A reference that float64 can afford."""
        return self.modulate(
            x,
            latents,
            noise,
            lambda query, key, value: attention_by_label(query, key, value, pixel_labels, latent_labels),
            lambda query, key, value: attention_by_label(query, key, value, latent_labels, pixel_labels),
        )

    def modulate(
        self, x: Tensor, latents: Tensor, noise: Tensor, pixels_attend: Attention, latents_attend: Attention
    ) -> tuple[Tensor, Tensor]:
        """The modulation, given how pixels attend to latents and latents to pixels."""
        channels, height, width = x.shape[1:]
        encoded = (x + position(channels, height, width, x.dtype)).flatten(2).mT
        latents = self.image_to_latent(latents, encoded, latents_attend) if self.duplex else self.fc_itl(latents)
        attended = self.latent_to_image(encoded, latents, pixels_attend)
        gamma, beta = (
            linear(attended).mT.unflatten(2, (height, width)) for linear in (self.mlp_lti_gamma, self.mlp_lti_beta)
        )
        # In this order the result, and so the gradient, has the memory order of x and not that of gamma: for B = 1 on a
        # CPU instance_norm returns a wrong gradient where the incoming one is channels last (PyTorch 2.13).
        out = F.instance_norm(x) * (1 + gamma) + beta
        out = out + self.noise_var[:, None, None] * noise
        return F.leaky_relu(out, NEGATIVE_SLOPE), latents


def mask_of_latents(pixel_labels: Tensor, latent_labels: Tensor) -> Tensor:
    """The mask that :class:`PublishedModulation` takes: (B, H, W) and (m) labels to (B, m, H, W) zeros and ones."""
    return (pixel_labels.unsqueeze(1) == latent_labels[:, None, None]).float()


def noticeable(gradients: Sequence[Tensor]) -> list[int]:
    """Which of the exact gradients are not zero up to rounding.

    That of a key's bias always is, which softmax does not see; and that of queries where every label has one pixel.
    """
    return [index for index, gradient in enumerate(gradients) if gradient.abs().max() > 1e-10]


def _two_linear() -> list[nn.Module]:
    return [
        nn.Linear(STYLE_WIDTH, STYLE_WIDTH),
        nn.LeakyReLU(NEGATIVE_SLOPE),
        nn.Linear(STYLE_WIDTH, STYLE_WIDTH),
    ]


def _masked_attention(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value, mask.unsqueeze(1) == 0)
