"""Inception v3 as FID uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Layer(NamedTuple):
    """A convolution: its name, channels and kernel. Those that keep the size are padded."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# The layers of a branch follow each other; several in one place all see the same, and their results are concatenated.
_Branch = Sequence[tuple[_Layer, ...]]


class _Convolution(nn.Module):
    def __init__(self, channels: int, layer: _Layer, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, layer.channels, layer.kernel, layer.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(layer.channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches beside each other, the last of which pools.

    Args:
        channels: in front.
        branches: all but the last.
        pool: channels of the last one, or None where it only halves the size, as the others do.
        maximum: whether it takes the largest value instead of the mean.
    """

    def __init__(self, channels: int, branches: Sequence[_Branch], pool: int | None, *, maximum: bool = False) -> None:
        super().__init__()
        self._branches, self._maximum = branches, maximum
        for branch in branches:
            before = channels
            for beside in branch:
                for layer in beside:
                    padding = (0, 0) if layer.stride == 2 else (layer.kernel[0] // 2, layer.kernel[1] // 2)
                    self.add_module(layer.name, _Convolution(before, layer, padding))
                before = sum(layer.channels for layer in beside)
        self.branch_pool = None if pool is None else _Convolution(channels, _Layer("", pool), (0, 0))

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for branch in self._branches:
            y = x
            for beside in branch:
                y = torch.cat([self.get_submodule(layer.name)(y) for layer in beside], 1)
            results.append(y)
        if self.branch_pool is None:
            results.append(F.max_pool2d(x, 3, stride=2))
        elif self._maximum:
            results.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            results.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        return torch.cat(results, 1)


def _chain(*layers: _Layer) -> _Branch:
    return [(layer,) for layer in layers]


def _mixed_5(channels: int, pool: int) -> _Mixed:
    branches = (
        _chain(_Layer("branch1x1", 64)),
        _chain(_Layer("branch5x5_1", 48), _Layer("branch5x5_2", 64, (5, 5))),
        _chain(
            _Layer("branch3x3dbl_1", 64), _Layer("branch3x3dbl_2", 96, (3, 3)), _Layer("branch3x3dbl_3", 96, (3, 3))
        ),
    )
    return _Mixed(channels, branches, pool)


def _mixed_6a() -> _Mixed:
    double = (_Layer("branch3x3dbl_1", 64), _Layer("branch3x3dbl_2", 96, (3, 3)))
    branches = (
        _chain(_Layer("branch3x3", 384, (3, 3), 2)),
        _chain(*double, _Layer("branch3x3dbl_3", 96, (3, 3), 2)),
    )
    return _Mixed(288, branches, None)


def _mixed_6(width: int) -> _Mixed:
    across, down = (1, 7), (7, 1)
    branches = (
        _chain(_Layer("branch1x1", 192)),
        _chain(_Layer("branch7x7_1", width), _Layer("branch7x7_2", width, across), _Layer("branch7x7_3", 192, down)),
        _chain(
            _Layer("branch7x7dbl_1", width),
            _Layer("branch7x7dbl_2", width, down),
            _Layer("branch7x7dbl_3", width, across),
            _Layer("branch7x7dbl_4", width, down),
            _Layer("branch7x7dbl_5", 192, across),
        ),
    )
    return _Mixed(768, branches, 192)


def _mixed_7a() -> _Mixed:
    branches = (
        _chain(_Layer("branch3x3_1", 192), _Layer("branch3x3_2", 320, (3, 3), 2)),
        _chain(
            _Layer("branch7x7x3_1", 192),
            _Layer("branch7x7x3_2", 192, (1, 7)),
            _Layer("branch7x7x3_3", 192, (7, 1)),
            _Layer("branch7x7x3_4", 192, (3, 3), 2),
        ),
    )
    return _Mixed(768, branches, None)


def _mixed_7(channels: int, *, maximum: bool) -> _Mixed:
    def both(name: str) -> tuple[_Layer, ...]:
        return _Layer(f"{name}a", 384, (1, 3)), _Layer(f"{name}b", 384, (3, 1))

    branches: tuple[_Branch, ...] = (
        _chain(_Layer("branch1x1", 320)),
        [(_Layer("branch3x3_1", 384),), both("branch3x3_2")],
        [(_Layer("branch3x3dbl_1", 448),), (_Layer("branch3x3dbl_2", 384, (3, 3)),), both("branch3x3dbl_3")],
    )
    return _Mixed(channels, branches, 192, maximum=maximum)


class InceptionV3(nn.Module):
    """Inception v3 up to its last pooling, with the names of torchvision's.

    It differs from torchvision's as the network does that FID is defined with: averages leave out the padding, and the
    last block takes maxima.

    Source: Szegedy et al., Rethinking the Inception architecture for computer vision, 2016.

    Example:
        >>> InceptionV3().eval()(torch.zeros(1, 3, 75, 75)).shape
        torch.Size([1, 2048])
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, _Layer("", 32, (3, 3), 2), (0, 0))
        self.Conv2d_2a_3x3 = _Convolution(32, _Layer("", 32, (3, 3)), (0, 0))
        self.Conv2d_2b_3x3 = _Convolution(32, _Layer("", 64, (3, 3)), (1, 1))
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = _Convolution(64, _Layer("", 80), (0, 0))
        self.Conv2d_4a_3x3 = _Convolution(80, _Layer("", 192, (3, 3)), (0, 0))
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        self.Mixed_6a = _mixed_6a()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_mixed_6(width) for width in (128, 160, 160, 192))
        self.Mixed_7a = _mixed_7a()
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, maximum=False), _mixed_7(2048, maximum=True)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width), from -1 to 1, published with 299 x 299, to (B, 2048)."""
        for layer in self.children():  # in the order in which they were made
            images = layer(images)
        return images.mean((2, 3))
