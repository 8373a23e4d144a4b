"""What commands that use a trained model have in common: reading it, images with their label maps, writing pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from PIL import Image
from torch import Tensor

from sca_kernels import LabelMap

from ..checkpoints import read_model
from ..configurations import ScamConfiguration
from ..data import DataConfiguration, LabelledImages
from ..data.folders import list_split
from ..errors import InputError
from ..files import write_whole
from ..model import Scam
from ..serialisation import from_values

Checkpoint = Annotated[
    Path, typer.Argument(help="last.ckpt or best.ckpt of scam train, or a file of scam export.", show_default=False)
]
ImageFile = Annotated[Path, typer.Argument(metavar="IMAGE", help="File in DATA/SPLIT/images.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Of the noise.")]


class TrainedModel(NamedTuple):
    """A model and the data set it is for."""

    model: Scam
    data: DataConfiguration


class LabelledImage(NamedTuple):
    """An image (1, 3, height, width), its label map and its name."""

    image: Tensor
    labels: LabelMap
    name: str


def load_model(path: Path) -> TrainedModel:
    """The averaged weights in a file, on a GPU if there is one.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if it is something else, or does not say what data it is for.
    """
    configuration = read_model(path).configuration
    if "data" not in configuration:
        raise InputError(f"{path}: does not name the labels of its data; give a checkpoint, or a file of scam export")
    data = from_values(DataConfiguration, configuration["data"], str(path))
    model = Scam.from_checkpoint(path, from_values(ScamConfiguration, configuration["model"], str(path)))
    return TrainedModel(model.to("cuda" if torch.cuda.is_available() else "cpu"), data)


def read_image(path: Path, trained: TrainedModel) -> LabelledImage:
    """An image of a data set, ``.../images/NAME``, with its label map, ``.../labels/NAME.png``.

    Raises:
        InputError: if one of them is not there or cannot be used.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.parent.name != "images":
        raise InputError(f"{path}: expected an image in a folder images, beside a folder labels with its label map")
    folder, split = path.absolute().parents[2], path.absolute().parents[1].name
    others = [name for name in list_split(folder, split).images if name != path.stem]
    sample = LabelledImages(folder, split, trained.data, skip=others)[0]
    device = next(trained.model.parameters()).device
    labels = LabelMap.from_labels(sample.labels.to(device), trained.data.num_labels)
    return LabelledImage(sample.image.unsqueeze(0).to(device), labels, sample.name)


def write_picture(path: Path, image: Tensor) -> None:
    """Writes (3, height, width), from -1 to 1, as PNG or what the name ends with.

    Raises:
        InputError: if it cannot be written.
    """
    pixels = ((image.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    height, width = pixels.shape[1:]
    content = io.BytesIO()
    suffix = path.suffix.lower()
    kind = Image.registered_extensions().get(suffix)
    if kind not in Image.SAVE:
        raise InputError(f"{path}: expected a name that ends with .png or .jpg")
    Image.frombytes("RGB", (width, height), bytes(pixels.permute(1, 2, 0).flatten().tolist())).save(content, kind)
    write_whole(path, lambda file: file.write(content.getvalue()))
