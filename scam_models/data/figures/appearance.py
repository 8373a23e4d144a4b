"""What is drawn: a person, how it stands, and what is behind it, each drawn at random from a seed of its own."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from .textures import Colour, Texture

CLOTHES = ("plain", "stripes", "checks", "dots", "zigzag", "plaid")
WALLS = ("bricks", "planks", "waves", "clouds", "checks", "stripes", "dots", "zigzag")
FLOORS = ("planks", "checks", "clouds", "waves")
_SKINS = ((0.98, 0.84, 0.73), (0.90, 0.70, 0.55), (0.76, 0.55, 0.40), (0.55, 0.37, 0.26), (0.38, 0.25, 0.18))
_HAIRS = (
    (0.10, 0.08, 0.07),
    (0.30, 0.18, 0.10),
    (0.55, 0.33, 0.14),
    (0.87, 0.70, 0.36),
    (0.62, 0.20, 0.10),
    (0.72,) * 3,
)


@dataclass(frozen=True)
class Appearance:
    """An identity: what stays the same in all pictures of a person.

    Attributes:
        skin, hair, shoes: colours.
        hair_style: "short", "long", "bun" or "curly".
        top: the textures of the upper clothes; two where they are made of two kinds of cloth.
        seam: where these meet: "across" the chest or "along" the middle of the body.
        long_sleeves: whether sleeves reach to the hands.
        bottom: the texture of the lower clothes.
        bottom_kind: "trousers", "shorts" or "skirt".
        build: width over that of the average person.
    """

    skin: Colour
    hair: Colour
    shoes: Colour
    hair_style: Literal["short", "long", "bun", "curly"]
    top: tuple[Texture, ...]
    seam: Literal["across", "along"]
    long_sleeves: bool
    bottom: Texture
    bottom_kind: Literal["trousers", "shorts", "skirt"]
    build: float

    @classmethod
    def from_seed(cls, seed: int) -> Appearance:
        """An identity; equal seeds give equal identities.

        Example:
            >>> Appearance.from_seed(3) == Appearance.from_seed(3)
            True
        """
        random = Random(f"appearance {seed}")
        hues = [random.random()]
        hues += [(hues[0] + offset) % 1 for offset in (random.uniform(0.25, 0.45), random.uniform(0.55, 0.75))]
        top = [_cloth(random, CLOTHES, hues[0])]
        if random.random() < 0.5:
            others = [pattern for pattern in CLOTHES if pattern != top[0].pattern]
            top.append(_cloth(random, others, hues[1]))
        return cls(
            skin=random.choice(_SKINS),
            hair=random.choice(_HAIRS),
            shoes=_colour(random.random(), 0.6, random.uniform(0.15, 0.5)),
            hair_style=random.choice(("short", "long", "bun", "curly")),
            top=tuple(top),
            seam=random.choice(("across", "along")),
            long_sleeves=random.random() < 0.5,
            bottom=_cloth(random, CLOTHES, hues[2], bright=0.75),
            bottom_kind=random.choice(("trousers", "trousers", "shorts", "skirt")),
            build=random.uniform(0.88, 1.15),
        )


@dataclass(frozen=True)
class Pose:
    """How a person stands. Angles are in radians from straight down, outwards; right means right in the picture.

    Attributes:
        x: of the hips, from -1 at the left end of their room to 1.
        feet: how far down the feet are, in heights of the image.
        height: of the person, in heights of the image.
        lean: of the body, to the right.
        head: tilt of the head, to the right.
        look: where the face points, from -1, left, to 1.
        upper_arms, lower_arms, upper_legs, lower_legs: left and right.
    """

    x: float
    feet: float
    height: float
    lean: float
    head: float
    look: float
    upper_arms: tuple[float, float]
    lower_arms: tuple[float, float]
    upper_legs: tuple[float, float]
    lower_legs: tuple[float, float]

    @classmethod
    def from_seed(cls, seed: int) -> Pose:
        """A pose; equal seeds give equal poses.

        Example:
            >>> 0.7 < Pose.from_seed(0).height < 0.95
            True
        """
        random = Random(f"pose {seed}")
        upper_arms = (_arm(random), _arm(random))
        upper_legs = (random.uniform(0.03, 0.38), random.uniform(0.03, 0.38))
        return cls(
            x=random.uniform(-1, 1),
            feet=random.uniform(0.93, 0.97),
            height=random.uniform(0.78, 0.9),
            lean=random.uniform(-0.12, 0.12),
            head=random.uniform(-0.2, 0.2),
            look=random.uniform(-1, 1),
            upper_arms=upper_arms,
            lower_arms=(upper_arms[0] + random.uniform(-0.5, 1.1), upper_arms[1] + random.uniform(-0.5, 1.1)),
            upper_legs=upper_legs,
            lower_legs=(upper_legs[0] - random.uniform(0, 0.25), upper_legs[1] - random.uniform(0, 0.25)),
        )


@dataclass(frozen=True)
class Background:
    """What is behind a person.

    Attributes:
        wall, floor: textures.
        horizon: where they meet, in heights of the image.
    """

    wall: Texture
    floor: Texture
    horizon: float

    @classmethod
    def from_seed(cls, seed: int) -> Background:
        """A background; equal seeds give equal backgrounds.

        Example:
            >>> 0.6 < Background.from_seed(0).horizon < 0.9
            True
        """
        random = Random(f"background {seed}")
        wall, floor = _surface(random, WALLS), _surface(random, FLOORS)
        return cls(wall, floor, random.uniform(0.66, 0.84))


def _arm(random: Random) -> float:
    return random.choice((random.uniform(0.12, 0.6), random.uniform(0.5, 1.6), random.uniform(1.4, 2.5)))


def _colour(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(hue, saturation, value)


def _cloth(random: Random, patterns: Sequence[str], hue: float, bright: float = 1.0) -> Texture:
    first = _colour(hue, random.uniform(0.6, 0.9), bright * random.uniform(0.55, 0.95))
    second = random.choice(
        ((0.95, 0.95, 0.92), (0.12, 0.12, 0.16), _colour(hue + random.uniform(0.1, 0.2), 0.8, bright * 0.95))
    )
    return Texture(
        random.choice(patterns),
        first,
        second,
        period=random.uniform(0.055, 0.085),
        angle=random.choice((0.0, math.pi / 2, math.pi / 4)),
        seed=random.getrandbits(32),
    )


def _surface(random: Random, patterns: Sequence[str]) -> Texture:
    """Paler than clothes and with larger patterns."""
    hue, value = random.random(), random.uniform(0.55, 0.85)
    first = _colour(hue, random.uniform(0.15, 0.45), value)
    second = _colour(hue + random.uniform(-0.1, 0.1), random.uniform(0.1, 0.4), value + random.choice((-0.22, 0.15)))
    pattern = random.choice(patterns)
    return Texture(
        pattern,
        first,
        second,
        period=random.uniform(0.14, 0.26),
        angle=0.0 if pattern in ("bricks", "waves") else random.choice((0.0, math.pi / 2, math.pi / 4)),
        seed=random.getrandbits(32),
    )
