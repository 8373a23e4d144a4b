"""Procedural textures: colours as functions of a place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Colour = tuple[float, float, float]  # red, green, blue from 0 to 1

_SIDE = 16  # of the table of random numbers that clouds are made of, which repeats


def _stripes(u: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return (u % 1 < 0.5).float()


def _checks(u: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return ((u.floor() + v.floor()) % 2 == 0).float()


def _dots(u: Tensor, v: Tensor, table: Tensor) -> Tensor:
    across = u + 0.5 * (v.floor() % 2)
    return (((across % 1) - 0.5) ** 2 + ((v % 1) - 0.5) ** 2 < 0.09).float()


def _zigzag(u: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return ((v + (u % 1 - 0.5).abs()) % 1 < 0.5).float()


def _plaid(u: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return 0.5 * (u % 1 < 0.4).float() + 0.5 * (v % 1 < 0.4).float()


def _bricks(u: Tensor, v: Tensor, table: Tensor) -> Tensor:
    row = (2 * v).floor()
    across = u + 0.5 * (row % 2)
    shade = 0.5 * table[(row % _SIDE).long(), (across.floor() % _SIDE).long()]
    is_mortar = ((2 * v) % 1 < 0.16) | (across % 1 < 0.08)
    return torch.where(is_mortar, 1.0, shade)


def _planks(u: Tensor, v: Tensor, table: Tensor) -> Tensor:
    plank = u.floor()
    grain = 0.5 + 0.5 * torch.sin(14 * (u + 0.15 * torch.sin(2 * v + 3 * plank)))
    shade = 0.45 * table[(plank % _SIDE).long(), 0] + 0.25 * grain
    return torch.where(u % 1 < 0.06, 1.0, shade)


def _waves(u: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return 0.5 + 0.5 * torch.sin(2 * math.pi * (v + 0.2 * torch.sin(2 * math.pi * 0.5 * u)))


def _clouds(u: Tensor, v: Tensor, table: Tensor) -> Tensor:
    total = torch.zeros_like(u)
    for octave in range(3):
        x, y = u * 2**octave, v * 2**octave
        left, top = x.floor(), y.floor()
        across, down = (3 * t**2 - 2 * t**3 for t in (x - left, y - top))
        rows = [(top.long() + step) % _SIDE for step in (0, 1)]
        columns = [(left.long() + step) % _SIDE for step in (0, 1)]
        upper, lower = (torch.lerp(table[row, columns[0]], table[row, columns[1]], across) for row in rows)
        total += torch.lerp(upper, lower, down) / 2 ** (octave + 1)
    return (1.6 * total - 0.2).clamp(0, 1)


_PATTERNS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda u, v, table: torch.zeros_like(u),
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "zigzag": _zigzag,
    "plaid": _plaid,
    "bricks": _bricks,
    "planks": _planks,
    "waves": _waves,
    "clouds": _clouds,
}


@dataclass(frozen=True)
class Texture:
    """A pattern in two colours.

    Attributes:
        pattern: its name.
        first, second: the colours.
        period: after which it repeats, in heights of the image.
        angle: by which it is turned, in radians.
        seed: of its random numbers.

    Example:
        >>> stripes = Texture("stripes", (0, 0, 0), (1, 1, 1), period=0.5, angle=0.0, seed=0)
        >>> u = torch.tensor([[0.1, 0.3, 0.6]])
        >>> stripes.colours(u, torch.zeros_like(u))[0, :, 0].tolist()
        [1.0, 0.0, 1.0]
    """

    pattern: str
    first: Colour
    second: Colour
    period: float
    angle: float
    seed: int

    def colours(self, u: Tensor, v: Tensor) -> Tensor:
        """The colours at the places (u, v), in heights of the image: (H, W) twice to (H, W, 3)."""
        cosine, sine = math.cos(self.angle) / self.period, math.sin(self.angle) / self.period
        first, second = torch.tensor([self.first, self.second], dtype=torch.float32)
        weight = _PATTERNS[self.pattern](cosine * u + sine * v, cosine * v - sine * u, self._table)
        return first + (second - first) * weight.unsqueeze(-1)

    @cached_property
    def _table(self) -> Tensor:
        return torch.rand(_SIDE, _SIDE, generator=torch.Generator().manual_seed(self.seed))
