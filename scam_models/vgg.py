"""The features of VGG19, with weights from a file in torchvision's format."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from .weights import load_weights

# Channels of the convolutions between one pooling and the next.
_STAGES = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class Vgg19(nn.Module):
    """VGG19 up to relu5_1: the features behind the first convolution of each of its five stages.

    The layers are numbered as torchvision numbers them, so that its state dict fits. Weights do not get gradients.

    Source: Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition, 2015.

    Example:
        >>> import torch
        >>> [tuple(features.shape[1:]) for features in Vgg19()(torch.rand(1, 3, 32, 32))]
        [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        self._kept: list[int] = []
        for stage in _STAGES:
            for index, width in enumerate(stage):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
                if index == 0:
                    self._kept.append(len(layers))
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[: self._kept[-1]])
        self.requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | Path) -> Vgg19:
        """The network with the weights of a file.

        Args:
            path: a state dict of ``torchvision.models.vgg19``, as ``torch.save`` writes it. Tensors of the layers
                behind relu5_1 may be there or not.

        Raises:
            FileNotFoundError: if there is no such file.
            InputError: if it holds something else.
        """
        network = cls()
        load_weights(network, path, "torchvision's vgg19")
        return network

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, height, width), at least 16 x 16, to the five features."""
        features = []
        for begin, end in pairwise((0, *self._kept)):
            images = self.features[begin:end](images)
            features.append(images)
        return features
