"""Draws a person before a background: the image, the exact label of every pixel, and which cloth it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..configurations import PRESETS
from .appearance import Appearance, Background, Pose
from .textures import Colour

BACKGROUND, SKIN, HAIR, TOP, BOTTOM, SHOES = range(PRESETS["tiny"].num_labels)
_SAMPLES = 3  # across and down a pixel; odd, so that one lies in its middle and gives its label
# Half widths and lengths of a person, in its height.
_HEAD, _SHOULDERS, _WAIST, _HIPS = 0.088, 0.108, 0.078, 0.09
_UPPER_ARM, _LOWER_ARM, _UPPER_LEG, _LOWER_LEG = 0.165, 0.15, 0.21, 0.215
_TORSO, _NECK = 0.29, 0.035

Point = tuple[float, float]


class Drawing(NamedTuple):
    """A picture of a person.

    Attributes:
        image: (3, height, width) float32, from 0 to 1.
        labels: (height, width) int32, as in the preset "tiny".
        cloth: (height, width) uint8: 1 and 2 where the upper clothes show their first and their second texture, else 0.
    """

    image: Tensor
    labels: Tensor
    cloth: Tensor


def draw(appearance: Appearance, pose: Pose, background: Background, height: int, width: int) -> Drawing:
    """A picture of a person.

    Labels are exact: that of a pixel is what lies in its middle. Its colour is the mean of 3 x 3 places.

    Args:
        appearance, pose, background: what is drawn.
        height, width: of the picture.

    Example:
        >>> drawing = draw(Appearance.from_seed(0), Pose.from_seed(0), Background.from_seed(0), 64, 64)
        >>> drawing.labels.unique().tolist()
        [0, 1, 2, 3, 4, 5]
    """
    canvas = _Canvas(background, height, width)
    _Person(appearance, pose, canvas).draw()
    image = F.avg_pool2d(canvas.colours.permute(2, 0, 1), _SAMPLES)
    middle = slice(_SAMPLES // 2, None, _SAMPLES)
    return Drawing(image, canvas.labels[middle, middle].contiguous(), canvas.cloth[middle, middle].contiguous())


class _Shape(NamedTuple):
    """A part of the canvas around a shape: how far each place is outside, in heights of the image, negative inside; and
    where it is in the shape's own directions."""

    distance: Tensor
    u: Tensor
    v: Tensor
    window: tuple[slice, slice]


class _Canvas:
    """What has been drawn so far."""

    def __init__(self, background: Background, height: int, width: int) -> None:
        rows, columns = height * _SAMPLES, width * _SAMPLES
        self.half_width = width / height / 2
        y = ((torch.arange(rows) + 0.5) / rows).unsqueeze(1).expand(rows, columns)
        x = ((torch.arange(columns) + 0.5) / rows - self.half_width).expand(rows, columns)
        self.x, self.y = x, y
        # The floor comes closer towards the lower border.
        depth = 0.35 / (y - background.horizon + 0.12).clamp(min=0.05)
        floor = background.floor.colours(x * depth, -depth)
        self.colours = torch.where((y < background.horizon).unsqueeze(-1), background.wall.colours(x, y), floor)
        self.labels = torch.full((rows, columns), BACKGROUND, dtype=torch.int32)
        self.cloth = torch.zeros(rows, columns, dtype=torch.uint8)

    def paint(self, shape: _Shape, label: int, colours: Tensor, cloth: Tensor | int = 0, rim: float = 0.02) -> None:
        """Covers what is inside a shape, darker towards its rim, so that it looks round."""
        inside, window = shape.distance < 0, shape.window
        shade = 0.72 + 0.28 * (-shape.distance / rim).clamp(0, 1).unsqueeze(-1)
        self.colours[window] = torch.where(inside.unsqueeze(-1), colours * shade, self.colours[window])
        self.labels[window] = torch.where(inside, label, self.labels[window])
        self.cloth[window] = torch.where(inside, torch.as_tensor(cloth, dtype=torch.uint8), self.cloth[window])

    def limb(self, begin: Point, end: Point, begin_radius: float, end_radius: float) -> _Shape:
        """A line with round ends, whose radius changes along it."""
        window, x, y = self._around((begin, end), max(begin_radius, end_radius))
        across, down = end[0] - begin[0], end[1] - begin[1]
        length = max(math.hypot(across, down), 1e-6)
        x, y = x - begin[0], y - begin[1]
        v, u = (x * across + y * down) / length, (x * down - y * across) / length
        share = (v / length).clamp(0, 1)
        distance = torch.hypot(u, v - share * length) - (begin_radius + (end_radius - begin_radius) * share)
        return _Shape(distance, u, v, window)

    def ellipse(self, centre: Point, half_width: float, half_height: float, angle: float = 0.0) -> _Shape:
        window, x, y = self._around((centre,), max(half_width, half_height))
        x, y = x - centre[0], y - centre[1]
        u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        distance = (torch.hypot(u / half_width, v / half_height) - 1) * min(half_width, half_height)
        return _Shape(distance, u, v, window)

    def polygon(self, corners: Sequence[Point], rounding: float, axis: tuple[Point, Point]) -> _Shape:
        """A convex polygon, clockwise in the picture, with round corners; u and v are across and along ``axis``."""
        window, x, y = self._around(corners, rounding)
        distance = torch.full_like(x, -math.inf)
        for (x_1, y_1), (x_2, y_2) in zip(corners, (*corners[1:], corners[0]), strict=True):
            length = math.hypot(x_2 - x_1, y_2 - y_1)
            outwards = ((y_2 - y_1) * (x - x_1) - (x_2 - x_1) * (y - y_1)) / length
            distance = torch.maximum(distance, outwards)
        (x_1, y_1), (x_2, y_2) = axis
        length = math.hypot(x_2 - x_1, y_2 - y_1)
        across, down = (x_2 - x_1) / length, (y_2 - y_1) / length
        x, y = x - x_1, y - y_1
        return _Shape(distance - rounding, x * down - y * across, x * across + y * down, window)

    def _around(self, points: Sequence[Point], margin: float) -> tuple[tuple[slice, slice], Tensor, Tensor]:
        """The part of the canvas that holds all points and a margin, and the places in it."""
        rows, columns = self.x.shape
        across, down = zip(*points, strict=True)
        window = (
            _span(min(down) - margin, max(down) + margin, rows, rows),
            _span(min(across) - margin + self.half_width, max(across) + margin + self.half_width, rows, columns),
        )
        return window, self.x[window], self.y[window]


@dataclass(frozen=True)
class _Person:
    """Where the joints of a person are, and how its parts are drawn, from the back to the front."""

    appearance: Appearance
    pose: Pose
    canvas: _Canvas

    def draw(self) -> None:
        pose, canvas, appearance = self.pose, self.canvas, self.appearance
        size = pose.height
        knees, ankles = zip(*(self._leg(side) for side in (0, 1)), strict=True)
        # The lower foot stands on the floor.
        drop = max(ankle[1] for ankle in ankles)
        room = max(canvas.half_width - 0.3 * size, 0.0)
        hips = (pose.x * room, pose.feet - 0.03 * size - drop)

        def moved(point: Point) -> Point:
            return hips[0] + point[0], hips[1] + point[1]

        up = (math.sin(pose.lean), -math.cos(pose.lean))
        chest = (hips[0] + _TORSO * size * up[0], hips[1] + _TORSO * size * up[1])
        head_up = (math.sin(pose.lean + pose.head), -math.cos(pose.lean + pose.head))
        reach = (_NECK + _HEAD) * size
        head = (chest[0] + reach * head_up[0], chest[1] + reach * head_up[1])

        self._back_hair(head, head_up)
        for side in (0, 1):
            hip = (hips[0] + (2 * side - 1) * 0.045 * size * appearance.build, hips[1])
            self._draw_leg(hip, moved(knees[side]), moved(ankles[side]), side)
        canvas.paint(canvas.limb(head, chest, 0.03 * size, 0.034 * size), SKIN, torch.tensor(appearance.skin))
        if appearance.bottom_kind == "skirt":
            self._draw_skirt(hips, up)
        self._draw_torso(hips, chest, up)
        for side in (0, 1):
            self._draw_arm(chest, up, side)
        self._draw_head(head, head_up)

    def _leg(self, side: int) -> tuple[Point, Point]:
        """Knee and ankle, as seen from the hips."""
        pose, sign = self.pose, 2 * side - 1
        upper, lower = _UPPER_LEG * pose.height, _LOWER_LEG * pose.height
        knee_x = sign * (0.045 * pose.height + upper * math.sin(pose.upper_legs[side]))
        knee_y = upper * math.cos(pose.upper_legs[side])
        angle = pose.lower_legs[side]
        return (knee_x, knee_y), (knee_x + sign * lower * math.sin(angle), knee_y + lower * math.cos(angle))

    def _draw_leg(self, hip: Point, knee: Point, ankle: Point, side: int) -> None:
        canvas, appearance, size = self.canvas, self.appearance, self.pose.height
        thick = size * appearance.build
        skin = torch.tensor(appearance.skin)
        upper = canvas.limb(hip, knee, 0.052 * thick, 0.042 * thick)
        lower = canvas.limb(knee, ankle, 0.04 * thick, 0.03 * thick)
        toe = (ankle[0] + (2 * side - 1) * 0.035 * size, ankle[1] + 0.008 * size)
        shoe = canvas.limb(ankle, toe, 0.034 * size, 0.026 * size)
        covered = {"trousers": (True, True), "shorts": (True, False), "skirt": (False, False)}[appearance.bottom_kind]
        for limb, is_covered in ((lower, covered[1]), (upper, covered[0])):
            if is_covered:
                canvas.paint(limb, BOTTOM, appearance.bottom.colours(limb.u, limb.v))
            else:
                canvas.paint(limb, SKIN, skin)
        canvas.paint(shoe, SHOES, torch.tensor(appearance.shoes))

    def _draw_skirt(self, hips: Point, up: Point) -> None:
        size, build = self.pose.height, self.appearance.build
        waist = (hips[0] + 0.05 * size * up[0], hips[1] + 0.05 * size * up[1])
        hem = (hips[0], hips[1] + 0.21 * size)
        corners = (
            (waist[0] - _WAIST * size * build, waist[1]),
            (waist[0] + _WAIST * size * build, waist[1]),
            (hem[0] + 0.165 * size * build, hem[1]),
            (hem[0] - 0.165 * size * build, hem[1]),
        )
        shape = self.canvas.polygon(corners, 0.0, (waist, hem))
        self.canvas.paint(shape, BOTTOM, self.appearance.bottom.colours(shape.u, shape.v))

    def _draw_torso(self, hips: Point, chest: Point, up: Point) -> None:
        size, build = self.pose.height, self.appearance.build
        right = (-up[1], up[0])

        def corner(along: float, across: float) -> Point:
            down = along * size
            return chest[0] - down * up[0] + across * right[0] * size, chest[1] - down * up[1] + across * right[
                1
            ] * size

        shoulders, belly = (_SHOULDERS - 0.02) * build, (_HIPS - 0.02) * build
        corners = (corner(0.02, -shoulders), corner(0.02, shoulders), corner(0.27, belly), corner(0.27, -belly))
        shape = self.canvas.polygon(corners, 0.02 * size, (chest, hips))
        seam = shape.u if self.appearance.seam == "along" else shape.v - 0.16 * size
        self._paint_top(shape, seam, rim=0.03)

    def _draw_arm(self, chest: Point, up: Point, side: int) -> None:
        canvas, appearance, pose, size = self.canvas, self.appearance, self.pose, self.pose.height
        sign = 2 * side - 1
        right = (-up[1], up[0])
        reach = sign * (_SHOULDERS - 0.012) * appearance.build * size
        shoulder = (
            chest[0] + reach * right[0] - 0.035 * size * up[0],
            chest[1] + reach * right[1] - 0.035 * size * up[1],
        )
        elbow = self._joint(shoulder, sign, pose.upper_arms[side], _UPPER_ARM)
        wrist = self._joint(elbow, sign, pose.lower_arms[side], _LOWER_ARM)
        hand = self._joint(wrist, sign, pose.lower_arms[side], 0.02)
        thick = size * appearance.build
        upper = canvas.limb(shoulder, elbow, 0.036 * thick, 0.03 * thick)
        lower = canvas.limb(elbow, wrist, 0.03 * thick, 0.023 * thick)
        # Sleeves are of the cloth at their shoulder.
        seam = torch.tensor(sign if appearance.seam == "along" else -1)
        canvas.paint(canvas.ellipse(hand, 0.03 * size, 0.03 * size), SKIN, torch.tensor(appearance.skin))
        if appearance.long_sleeves:
            self._paint_top(lower, seam)
        else:
            canvas.paint(lower, SKIN, torch.tensor(appearance.skin))
        self._paint_top(upper, seam)

    def _joint(self, begin: Point, sign: int, angle: float, length: float) -> Point:
        reach = length * self.pose.height
        return begin[0] + sign * reach * math.sin(angle), begin[1] + reach * math.cos(angle)

    def _paint_top(self, shape: _Shape, seam: Tensor, rim: float = 0.02) -> None:
        """Upper clothes: the first texture where ``seam`` is negative, the last one elsewhere."""
        textures = self.appearance.top
        first, last = textures[0].colours(shape.u, shape.v), textures[-1].colours(shape.u, shape.v)
        is_last = seam >= 0 if len(textures) > 1 else torch.zeros_like(seam, dtype=torch.bool)
        colours = torch.where(is_last.unsqueeze(-1), last, first)
        self.canvas.paint(shape, TOP, colours, cloth=is_last.to(torch.uint8) + 1, rim=rim)

    def _back_hair(self, head: Point, up: Point) -> None:
        size, style, canvas = self.pose.height, self.appearance.hair_style, self.canvas
        colours = torch.tensor(self.appearance.hair)

        def beside(along: float) -> Point:
            return head[0] + along * size * up[0], head[1] + along * size * up[1]

        if style == "long":
            canvas.paint(canvas.limb(beside(0.01), beside(-0.15), 0.098 * size, 0.085 * size), HAIR, colours)
        elif style == "bun":
            canvas.paint(canvas.ellipse(beside(0.105), 0.045 * size, 0.045 * size), HAIR, colours)
        elif style == "curly":
            for step in range(9):
                angle = math.atan2(up[1], up[0]) + math.radians(30 * (step - 4))
                curl = (head[0] + 0.085 * size * math.cos(angle), head[1] + 0.085 * size * math.sin(angle))
                canvas.paint(canvas.ellipse(curl, 0.042 * size, 0.042 * size), HAIR, colours)

    def _draw_head(self, head: Point, up: Point) -> None:
        canvas, appearance, size = self.canvas, self.appearance, self.pose.height
        tilt = self.pose.lean + self.pose.head
        face = canvas.ellipse(head, 0.074 * size, _HEAD * size, tilt)
        canvas.paint(face, SKIN, torch.tensor(appearance.skin))
        look = 0.018 * self.pose.look * size
        features: list[tuple[float, float, float, float, Colour]] = [
            (look - 0.028 * size, 0.008 * size, 0.0125, 0.016, (0.08, 0.07, 0.09)),
            (look + 0.028 * size, 0.008 * size, 0.0125, 0.016, (0.08, 0.07, 0.09)),
            (1.2 * look, 0.048 * size, 0.022, 0.008, (0.62, 0.18, 0.2)),
        ]
        for across, down, half_width, half_height, colour in features:
            place = (
                head[0] + across * math.cos(tilt) - down * math.sin(tilt),
                head[1] + across * math.sin(tilt) + down * math.cos(tilt),
            )
            canvas.paint(canvas.ellipse(place, half_width * size, half_height * size, tilt), SKIN, torch.tensor(colour))
        # The hair is what lies of a slightly larger head above a line that rises towards where the face points.
        cap = canvas.ellipse(head, 0.082 * size, 0.097 * size, tilt)
        line = cap.v + 0.028 * size + 0.25 * self.pose.look * cap.u - 2.2 / size * cap.u**2
        if appearance.hair_style in ("long", "curly"):
            line = line - 3.5 / size * cap.u**2
        canvas.paint(cap._replace(distance=torch.maximum(cap.distance, line)), HAIR, torch.tensor(appearance.hair))


def _span(begin: float, end: float, scale: int, count: int) -> slice:
    """The rows or columns between two places."""
    return slice(min(max(math.floor(begin * scale), 0), count), min(max(math.ceil(end * scale), 0), count))
