"""Reading the files that training writes, and files with weights alone."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .files import write_whole

# What the package calls its own part of a checkpoint, and of the metadata of a file with weights.
STATE = "scam"


@dataclass(frozen=True)
class SavedModel:
    """What a file says of a model.

    Attributes:
        configuration: plain values, see :mod:`scam_models.serialisation`: "model" and, unless unknown, "data".
        weights: state dict of a :class:`scam_models.Scam`.
    """

    configuration: Mapping[str, Any]
    weights: Mapping[str, Tensor]


def read_model(path: str | Path, *, averaged: bool = True) -> SavedModel:
    """The configuration and weights in a checkpoint of ``scam train`` or a file of :func:`write_weights`.

    Args:
        path: a file that ends with ".ckpt" or ".safetensors".
        averaged: whether to take the averaged weights of a checkpoint, or those of its last step.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if it is something else.
    """
    if Path(path).suffix == ".safetensors":
        return _read_weights(path)
    checkpoint = read_checkpoint(path)
    prefix = "average." if averaged else "model."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    return SavedModel(checkpoint[STATE]["configuration"], weights)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint of ``scam train`` holds; nothing in the file is executed.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if it is something else.
    """
    advice = "give last.ckpt or best.ckpt of scam train, or a file of scam export"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a checkpoint; {advice}") from error
    if not isinstance(checkpoint, dict) or STATE not in checkpoint:
        raise InputError(f"{path}: is a checkpoint of something else; {advice}")
    return checkpoint


def write_weights(path: str | Path, model: SavedModel) -> None:
    """Writes configuration and weights as safetensors.

    Args:
        path: a file that ends with ".safetensors".
        model: what is written.

    Raises:
        InputError: if the name ends otherwise, safetensors is not installed, or the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise InputError(f"{path}: expected a name that ends with .safetensors")
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise _without_safetensors(path) from error
    metadata = {STATE: json.dumps(dict(model.configuration))}
    content = save({name: tensor.contiguous() for name, tensor in model.weights.items()}, metadata)
    write_whole(path, lambda file: file.write(content))


def _read_weights(path: str | Path) -> SavedModel:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise _without_safetensors(path) from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be read as safetensors; give a file of scam export") from error
    if STATE not in metadata:
        raise InputError(f"{path}: says nothing of its configuration; give a file of scam export")
    return SavedModel(json.loads(metadata[STATE]), weights)


def _without_safetensors(path: str | Path) -> InputError:
    return InputError(f"{path}: needs the package safetensors; pip install 'sca-kernels[scam]'")
