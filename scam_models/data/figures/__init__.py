"""Procedural pictures of clothed people before textured backgrounds, with exact label maps and identities."""

from .appearance import Appearance, Background, Pose
from .drawing import Drawing, draw

__all__ = ["Appearance", "Background", "Drawing", "Pose", "draw"]
