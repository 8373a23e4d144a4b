"""How kernels are launched, and with which configuration."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch

DEFAULT = "default"
ANY = "any"


@dataclass(frozen=True)
class Configuration:
    """The shape of a kernel's tiles, and what Triton is told about them.

    Attributes:
        blocks: sizes of tiles by the names of the kernel's parameters; powers of two.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def __getitem__(self, block: str) -> int:
        return self.blocks[block]

    @property
    def options(self) -> dict[str, int]:
        """All of it as keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


def configuration(kernel: str, size_class: str, device: torch.device, dtype: torch.dtype) -> Configuration:
    """The configuration of a kernel from the table that is shipped, ``configurations.json``.

    The first of these rows that is there: of the device or of any, within either of the type or of any, and within
    these of the size class or of any.

    Args:
        kernel: its name in the table.
        size_class: a name for sizes, or memory orders, that want the same configuration; each kernel has its own.
        device: where it runs; the table knows devices by the names that PyTorch gives them.
        dtype: of the feature map or of the tokens.
    """
    return _lookup(kernel, size_class, _device_name(device), str(dtype).removeprefix("torch."))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches a kernel; nothing if the grid is empty.

    Args:
        kernel: a function decorated with ``triton.jit``.
        grid: number of programs along each axis.
        arguments: tensors, numbers, or None for a tensor that is not there, which the kernel can tell when compiled.
        options: constants by the names of the kernel's ``tl.constexpr`` parameters, ``num_warps`` and ``num_stages``.
    """
    if all(grid):
        _run(kernel, grid, arguments, options)


def _run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **options)


@functools.cache
def table() -> dict[str, Any]:
    """The table of configurations: device, kernel, type, size class."""
    text = files(__package__).joinpath("configurations.json").read_text(encoding="utf-8")
    rows: dict[str, Any] = json.loads(text)
    return rows


@functools.cache
def _lookup(kernel: str, size_class: str, device: str, dtype: str) -> Configuration:
    for of_device, of_type, of_size in itertools.product((device, DEFAULT), (dtype, ANY), (size_class, ANY)):
        row = table().get(of_device, {}).get(kernel, {}).get(of_type, {}).get(of_size)
        if row is not None:
            blocks = {name: size for name, size in row.items() if name.isupper()}
            return Configuration(blocks, row["num_warps"], row["num_stages"])
    raise LookupError(f"configurations.json: no row for {kernel}, {dtype}, {size_class!r}")


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else DEFAULT
