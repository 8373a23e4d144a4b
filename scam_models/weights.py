"""Weights of pretrained networks from files."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from .errors import InputError


def load_weights(network: nn.Module, path: str | Path, kind: str) -> None:
    """Gives a network the weights of a file, of which nothing is executed.

    Args:
        network: gets the weights.
        path: a state dict, as ``torch.save`` writes it, or a dictionary that holds one as "state_dict". Its names may
            have something in front, the same for all, and other tensors may be there too.
        kind: whose state dict is expected, for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if it holds something else.
    """
    wanted = f"{path}: expected a state dict of {kind}"
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{wanted}, and cannot read it ({str(error).splitlines()[0]})") from error
    if isinstance(state_dict, Mapping) and isinstance(state_dict.get("state_dict"), Mapping):
        state_dict = state_dict["state_dict"]
    if not isinstance(state_dict, Mapping):
        raise InputError(f"{wanted}, got a {type(state_dict).__name__}")
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    first = next(iter(own))
    prefix = next((name.removesuffix(first) for name in state_dict if f".{name}".endswith(f".{first}")), "")
    missing = [name for name in own if prefix + name not in state_dict]
    if missing:
        raise InputError(f"{wanted}, but {missing[0]} is missing")
    for name, tensor in own.items():
        given = state_dict[prefix + name].shape
        if given != tensor.shape:
            raise InputError(f"{wanted}, but {name} has shape {tuple(given)} instead of {tuple(tensor.shape)}")
    network.load_state_dict({name: state_dict[prefix + name] for name in own}, strict=False)
