"""Images and their label maps as a PyTorch data set."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from sca_kernels.label_files import read_label_values

from ..errors import FileError, InputError
from .configurations import DataConfiguration
from .folders import list_split

# Pillow raises SyntaxError for some kinds of broken files.
_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)


class Sample(NamedTuple):
    """An image and its label map; collated, several of them.

    Attributes:
        image: (3, height, width) float32, from -1 to 1.
        labels: (height, width) int32; -1 is no label.
        name: of the file, without folder and ending.

    Example:
        >>> Sample(torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.int32), "grace").name
        'grace'
    """

    image: Tensor
    labels: Tensor
    name: str


@dataclass(frozen=True)
class _Crop:
    """A part of an image in fractions of its sides, and whether it is mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    mirrored: bool


class LabelledImages(Dataset[Sample]):
    """The images and label maps of one split, resized to the configuration's size.

    The largest part with the proportions of that size is cut out and resized: the image smoothly, the labels by nearest
    neighbour, so that no labels are mixed. ``dataset[index]`` takes the middle and is always the same.
    ``dataset[index, seed]`` takes a random part and mirrors half of the images, as the options say, and depends on the
    two numbers alone: with a sampler of such pairs what is read does not depend on the number of workers or processes.

    Args:
        folder: holds ``split/images`` and ``split/labels``, files of equal names.
        split: "train" or "test".
        configuration: sizes and labels.
        flip: whether to mirror.
        random_crop: whether to choose the part at random.
        skip: names of images to leave out.

    Raises:
        InputError: if there are no images, an image has no label map, a file cannot be read, or ``flip`` is asked for
            where labels mean left and right.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from scam_models.data import preset
        >>> with TemporaryDirectory() as folder:
        ...     for kind, mode in (("images", "RGB"), ("labels", "L")):
        ...         (Path(folder) / "train" / kind).mkdir(parents=True)
        ...         Image.new(mode, (80, 96)).save(Path(folder) / "train" / kind / "black.png")
        ...     sample = LabelledImages(folder, "train", preset("tiny"))[0]
        >>> sample.image.shape, sample.labels.shape, sample.name
        (torch.Size([3, 64, 64]), torch.Size([64, 64]), 'black')
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        split: str,
        configuration: DataConfiguration,
        *,
        flip: bool = False,
        random_crop: bool = False,
        skip: Collection[str] = (),
    ) -> None:
        if flip and not configuration.flip:
            raise InputError(f"flip: labels of {configuration.name} mean left and right; do not mirror its images")
        self.configuration, self.split = configuration, split
        self.flip, self.random_crop = flip, random_crop
        listing = list_split(folder, split)
        self._files: list[tuple[Path, Path]] = []
        self.names = [name for name in listing.images if name not in set(skip)]
        for name in self.names:
            if name not in listing.labels:
                raise FileError(listing.images[name][0], f"no label map {split}/labels/{name}.png")
            self._files.append((listing.images[name][0], listing.labels[name][0]))
        if not self.names:
            skipped = " that may be used" if listing.images else ""
            raise InputError(f"{Path(folder) / split / 'images'}: no images{skipped}; put PNG or JPEG files there")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        index, seed = index if isinstance(index, tuple) else (index, None)
        image_path, label_path = self._files[index]
        image, values = read_image(image_path), read_labels(label_path, self.configuration)
        crop = self._crop(image.width, image.height, seed)
        return Sample(self._resize_image(image, crop), self._resize_labels(values, crop), self.names[index])

    def _crop(self, width: int, height: int, seed: int | None) -> _Crop:
        wanted = self.configuration.width / self.configuration.height
        # Fractions, since a label map may have another resolution than its image.
        across, down = min(1.0, wanted * height / width), min(1.0, width / (wanted * height))
        x, y, mirrored = 0.5, 0.5, False
        if seed is not None:
            x_drawn, y_drawn, mirror = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
            if self.random_crop:
                x, y = x_drawn, y_drawn
            mirrored = self.flip and mirror < 0.5
        left, top = x * (1 - across), y * (1 - down)
        return _Crop(left, top, left + across, top + down, mirrored)

    def _resize_image(self, image: Image.Image, crop: _Crop) -> Tensor:
        size = (self.configuration.width, self.configuration.height)
        box = (
            crop.left * image.width,
            crop.top * image.height,
            crop.right * image.width,
            crop.bottom * image.height,
        )
        resized = image.resize(size, Image.Resampling.BICUBIC, box=box)
        pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(size[1], size[0], 3)
        result = pixels.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)
        return result.flip(2) if crop.mirrored else result

    def _resize_labels(self, labels: Tensor, crop: _Crop) -> Tensor:
        rows = _nearest(crop.top, crop.bottom, labels.shape[0], self.configuration.height)
        columns = _nearest(crop.left, crop.right, labels.shape[1], self.configuration.width)
        return labels[rows][:, columns.flip(0) if crop.mirrored else columns].contiguous()


def read_image(path: Path) -> Image.Image:
    """An image in RGB, upright as its EXIF data say.

    Raises:
        FileError: if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise FileError(path, f"has more than 8 bits a channel (mode {image.mode}); save it with 8")
            return ImageOps.exif_transpose(image).convert("RGB")
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def read_labels(path: Path, configuration: DataConfiguration) -> Tensor:
    """The labels of a label file, merged: (H, W) int32, -1 where a pixel has none.

    Raises:
        FileError: if it cannot be read or holds values that are no labels.
    """
    try:
        values = read_label_values(path).long()
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise FileError(path, f"{error}; write the numbers of labels as a PNG of one channel") from error
    is_ignored = torch.zeros_like(values, dtype=torch.bool)
    if configuration.ignore_index is not None:
        is_ignored = values == configuration.ignore_index
    is_wrong = ((values < 0) | (values >= configuration.num_values)) & ~is_ignored
    if is_wrong.any():
        found = values[is_wrong].unique().tolist()
        shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        ignored = "" if configuration.ignore_index is None else f" or {configuration.ignore_index} (no label)"
        raise FileError(
            path,
            f"{int(is_wrong.sum())} pixels with values {shown}, expected 0 to {configuration.num_values - 1}{ignored}",
        )
    values = values.masked_fill(is_ignored, 0)
    if configuration.merging is not None:
        values = torch.tensor(configuration.merging)[values]
    return values.masked_fill(is_ignored, -1).int()


def _nearest(begin: float, end: float, source: int, target: int) -> Tensor:
    """The places between two fractions of a side whose centres are nearest, as Pillow takes them."""
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * ((end - begin) / target) + begin
    return (centres * source).long().clamp(0, source - 1)


def _unreadable(path: Path, error: Exception) -> FileError:
    if not path.exists():
        return FileError(path, "no such file")
    # The kind only: what Pillow says may hold the path again, or where it lies in memory.
    return FileError(path, f"not a readable image ({type(error).__name__}); replace or remove it")
