"""ResNet-50."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_EXPANSION = 4


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        behind = width * _EXPANSION
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, behind, 1, bias=False), nn.BatchNorm2d(behind)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != behind:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, behind, 1, stride=stride, bias=False), nn.BatchNorm2d(behind)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 up to its last pooling, with the names of torchvision's.

    Source: He et al., Deep residual learning for image recognition, 2016.

    Example:
        >>> import torch
        >>> ResNet50().eval()(torch.zeros(1, 3, 64, 32)).shape
        torch.Size([1, 2048])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        channels = 64
        for index, (blocks, width, stride) in enumerate(((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)), 1):
            layers = []
            for block in range(blocks):
                layers.append(_Bottleneck(channels, width, stride if block == 0 else 1))
                channels = width * _EXPANSION
            self.add_module(f"layer{index}", nn.Sequential(*layers))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width), normalised as in training, to (B, 2048)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        for index in range(1, 5):
            x = self.get_submodule(f"layer{index}")(x)
        return x.mean((2, 3))
