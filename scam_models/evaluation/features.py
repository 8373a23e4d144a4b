"""What images are compared by: features of networks with weights from files, or of a random one."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights import load_weights
from .inception import InceptionV3
from .resnet import ResNet50


class FeatureExtractor(nn.Module):
    """Turns images into vectors that are alike for images that are alike. Others than those here derive from it.

    Attributes:
        name: what figures that were computed with it are marked with.
    """

    name: str

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width), from -1 to 1, to (B, F)."""
        raise NotImplementedError


class RandomFeatures(FeatureExtractor):
    """Means and deviations of the channels of a small convolutional network with random weights.

    For tests, and for machines without the files of others: figures made with it can be compared with each other, for
    the same seed, and with no others. It sees colours and textures, and nothing of people.

    Args:
        seed: of the weights.

    Example:
        >>> RandomFeatures()(torch.zeros(2, 3, 64, 48)).shape
        torch.Size([2, 230])
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.name = f"random features, seed {seed}: not comparable with published figures"
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        for before, behind in ((3, 16), (16, 32), (32, 64)):
            # Weights drawn first from PyTorch's own generator would change what others draw from it.
            layer = nn.utils.skip_init(nn.Conv2d, before, behind, 3, stride=2, padding=1)
            with torch.no_grad():
                for parameter, deviation in ((layer.weight, (2 / (9 * before)) ** 0.5), (layer.bias, 0.2)):
                    assert parameter is not None
                    parameter.normal_(std=deviation, generator=generator)
            self.layers.append(layer)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        levels = [images]
        for layer in self.layers:
            levels.append(F.leaky_relu(layer(levels[-1]), 0.2))
        return torch.cat([part for level in levels for part in (level.mean((2, 3)), level.std((2, 3)))], 1)


class InceptionFeatures(FeatureExtractor):
    """The features of the published FID: the last pooled ones of Inception v3 with the weights of 2015.

    Args:
        path: a state dict, as the package pytorch-fid distributes it (pt_inception-2015-12-05).

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if it holds something else.

    Source: Heusel et al., GANs trained by a two time-scale update rule converge to a local Nash equilibrium, 2017.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.name = f"Inception v3 of {Path(path).name}"
        self.network = InceptionV3()
        load_weights(self.network, path, "pytorch-fid's Inception v3")
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        # As there: from 0 to 255 in whole numbers, without antialiasing.
        images = ((images + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
        features: Tensor = self.network(F.interpolate(images, size=(299, 299), mode="bilinear"))
        return features


class ReidentificationFeatures(FeatureExtractor):
    """The last pooled features of a ResNet-50 that was trained to recognise people in images of 256 x 128 pixels.

    Args:
        path: a state dict with torchvision's names.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if it holds something else.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.name = f"ResNet-50 of {Path(path).name}"
        self.network = ResNet50()
        load_weights(self.network, path, "a ResNet-50 with torchvision's names")
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        images = F.interpolate(images, size=(256, 128), mode="bilinear", antialias=True)
        features: Tensor = self.network(((images + 1) / 2 - self.mean) / self.deviation)
        return features
