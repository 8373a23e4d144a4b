"""Label maps in image files: grey values or palette indices are the labels."""

from __future__ import annotations

from os import PathLike

import torch
from torch import Tensor


def read_label_values(path: str | PathLike[str]) -> Tensor:
    """The values of a label image: 8 or 16 bit grey values or palette indices. Needs Pillow.

    Args:
        path: of the file.

    Returns:
        (H, W) uint8 or int32.

    Raises:
        ValueError: if it has colours instead of labels.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise ValueError(f"expected an image of label values (grey or palette), got mode {image.mode}")
        width, height = image.size
        # Pillow stretches grey values of 2 and 4 bits to the range of 8.
        stretch = {"L;2": 85, "L;4": 17}.get(image.tile[0][3], 1)
        if image.mode in ("L", "P"):
            values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) // stretch
        else:
            values = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
            if image.mode == "1":
                values = values.clamp(max=1)
    return values.view(height, width)
