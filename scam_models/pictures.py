"""Pictures of what a model does: grids, label maps, and which latents pixels attend to.

Pictures are (3, height, width) or batches of them, from -1 to 1, like images.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
from torch import Tensor

from sca_kernels import LatentLayout

from .attention import LatentAttention, StrongestLatents

_WHITE = 1.0
_GREY = -0.4  # of pixels without a label
_GOLDEN_SECTION = 0.381966  # steps of this size around the circle of hues never come close to where they were


def grid(rows: Sequence[Sequence[Tensor]], *, margin: int = 2) -> Tensor:
    """Pictures beside and below each other.

    Args:
        rows: pictures of one size, (3, height, width) each. Rows may be of different lengths.
        margin: white pixels between them.

    Returns:
        one picture.

    Raises:
        ValueError: if there is no picture or sizes differ.

    Example:
        >>> grid([[torch.zeros(3, 8, 6)] * 3, [torch.zeros(3, 8, 6)]]).shape
        torch.Size([3, 18, 22])
    """
    sizes = {tuple(picture.shape) for row in rows for picture in row}
    if len(sizes) != 1:
        raise ValueError(f"rows: expected pictures of one size, got {sorted(sizes)}")
    ((_, height, width),) = sizes
    columns = max(map(len, rows))
    first = next(picture for row in rows for picture in row)
    result = first.new_full(
        (3, len(rows) * (height + margin) - margin, columns * (width + margin) - margin), _WHITE, dtype=torch.float32
    )
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = row * (height + margin), column * (width + margin)
            result[:, top : top + height, left : left + width] = picture
    return result


def label_colours(num_labels: int) -> Tensor:
    """A colour for each label, (num_labels, 3), from -1 to 1."""
    return _colours([(_hue(label), 0.55, 0.85) for label in range(num_labels)])


def latent_colours(layout: LatentLayout) -> Tensor:
    """A colour for each latent, (m, 3), from -1 to 1: near the hue of its label, a shade of its own.

    Example:
        >>> latent_colours(LatentLayout((8, 4))).unique(dim=0).shape
        torch.Size([12, 3])
    """
    colours = []
    for label, count in enumerate(layout.latents_per_label):
        for place in range(count):
            share = (place + 0.5) / count
            hue = _hue(label) + 0.14 * (share - 0.5)
            value = 0.35 + 0.25 * share if place % 2 else 0.95 - 0.1 * share  # so that neighbours differ
            colours.append((hue % 1, 0.35 + 0.6 * share, value))
    return _colours(colours)


def label_picture(labels: Tensor, num_labels: int) -> Tensor:
    """Each pixel in the colour of its label, see :func:`label_colours`; grey without one.

    Args:
        labels: (..., height, width) integers, -1 for none.
        num_labels: number of labels.

    Returns:
        (..., 3, height, width).

    Example:
        >>> label_picture(torch.zeros(2, 8, 6, dtype=torch.int32), 3).shape
        torch.Size([2, 3, 8, 6])
    """
    return _look_up(labels, label_colours(num_labels))


def strongest_picture(strongest: StrongestLatents, layout: LatentLayout) -> Tensor:
    """Each pixel in the colour of its strongest latent, see :func:`latent_colours`; grey without one.

    Args:
        strongest: of a model, see :meth:`scam_models.Scam.strongest_latents`, or of a :class:`LatentAttention`.
        layout: of its generator, or encoder.

    Returns:
        (B, 3, height, width).

    Example:
        >>> strongest = StrongestLatents(torch.tensor([[[3, -1]]]), torch.tensor([[[0.5, 0.0]]]))
        >>> strongest_picture(strongest, LatentLayout((2, 2))).shape
        torch.Size([1, 3, 1, 2])
    """
    return _look_up(strongest.latent, latent_colours(layout))


def heat_picture(attention: LatentAttention, layout: LatentLayout, latent: int, image: Tensor) -> Tensor:
    """How much pixels attend to one latent: from black, not at all, over red and yellow to white, to nothing else.

    Args:
        attention: of a model, see :meth:`scam_models.Scam.attention` and :meth:`scam_models.Scam.encoder_attention`.
        layout: of its generator, or encoder.
        latent: its number.
        image: (B, 3, height, width), of the attention's size, which is shown dark and grey where pixels attend to
            latents of other labels.

    Returns:
        like ``image``.

    Example:
        >>> attention = LatentAttention(torch.zeros(1, 4, 4, dtype=torch.int64), torch.ones(1, 1, 4, 4))
        >>> heat_picture(attention, LatentLayout((1,)), 0, torch.zeros(1, 3, 4, 4)).unique()
        tensor([1.])
    """
    weight = attention.of_latent(latent)
    heat = torch.stack([3 * weight, 3 * weight - 1, 3 * weight - 2], 1).clamp(0, 1) * 2 - 1
    begin = max(offset for offset in layout.cu_latents if offset <= latent)
    is_own = (attention.first == begin) & (attention.weights.sum(1) > 0)
    dark = 0.2 * (image.mean(1, keepdim=True) + 1) - 0.7
    return torch.where(is_own.unsqueeze(1), heat, dark)


def _hue(label: int) -> float:
    return (0.6 + label * _GOLDEN_SECTION) % 1


def _colours(colours: Sequence[tuple[float, float, float]]) -> Tensor:
    rgb = [colorsys.hsv_to_rgb(*colour) for colour in colours]
    return torch.tensor(rgb, dtype=torch.float32).view(-1, 3) * 2 - 1


def _look_up(numbers: Tensor, colours: Tensor) -> Tensor:
    colours = torch.cat([colours, torch.full((1, 3), _GREY)]).to(numbers.device)
    return colours[numbers.long().where(numbers >= 0, len(colours) - 1)].movedim(-1, -3)
