"""How well a model reconstructs, and how well it puts subjects before other backgrounds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchmetrics.image.fid import FrechetInceptionDistance

from sca_kernels import LabelMap

from ..data import LabelledImages, Sample
from ..errors import InputError
from ..model import Scam
from ..psnr import psnr
from .features import FeatureExtractor, RandomFeatures

Progress = Callable[[Iterable[list[int]], int], Iterable[list[int]]]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` finds.

    Attributes:
        images: number of images that were reconstructed, and of transfers.
        psnr: mean over the reconstructions, in dB.
        r_fid: of the reconstructions, against the training images; None if there were none.
        s_fid: of the transfers, against the images themselves.
        reid_similarity: mean cosine between transfers and the images of their subjects.
        reid_accuracy: share of the transfers that are more like the image of their subject than that of their
            background.
        fid_features, reid_features: what the distances and cosines were computed with.
    """

    images: int
    psnr: float
    r_fid: float | None
    s_fid: float
    reid_similarity: float
    reid_accuracy: float
    fid_features: str
    reid_features: str

    def rows(self) -> list[tuple[str, str, str]]:
        """Of each figure its name, value and what it was computed with."""
        r_fid = "no training images" if self.r_fid is None else f"{self.r_fid:.2f}"
        return [
            ("PSNR", f"{self.psnr:.2f} dB", f"{self.images} images"),
            ("R-FID", r_fid, self.fid_features),
            ("S-FID", f"{self.s_fid:.2f}", self.fid_features),
            ("REID similarity", f"{self.reid_similarity:.4f}", self.reid_features),
            ("REID accuracy", f"{100 * self.reid_accuracy:.1f} %", self.reid_features),
        ]


class _Batch(NamedTuple):
    images: Tensor
    labels: LabelMap


@torch.no_grad()
def evaluate(
    model: Scam,
    dataset: LabelledImages,
    training: LabelledImages | None = None,
    *,
    fid_features: FeatureExtractor | None = None,
    reid_features: FeatureExtractor | None = None,
    groups: Sequence[Hashable] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress = lambda batches, count: batches,
) -> Evaluation:
    """Reconstructs every image, and puts the subject of each before the background of another one.

        PSNR             mean over images of 10 log10(2^2 / mean squared error), images from -1 to 1
        R-FID            Frechet distance of the features of reconstructions and of training images
        S-FID            Frechet distance of the features of transfers and of the images in ``dataset``
        REID similarity  mean cosine of the features of a transfer and of its subject's image
        REID accuracy    share of transfers whose cosine with the subject's image exceeds that with the background's

    where the Frechet distance of two sets of features with means m, n and covariances A, B is
    |m - n|^2 + trace(A + B - 2 (A B)^(1/2)). The paper computes all of them on the test split, with 256 x 256 pixels,
    Inception v3 for FID and a network for the re-identification of people for REID; it does not say how subjects and
    backgrounds are paired. Here see :func:`subject_pairs`.

    Args:
        model: is put into evaluation mode for as long as it takes.
        dataset: at least two images.
        training: what reconstructions are compared with for R-FID. Default: R-FID is not computed.
        fid_features, reid_features: what images are compared by. Default: :class:`RandomFeatures`, which says so in
            the result.
        groups: who is seen in each image, so that subject and background are not the same person. Default: someone
            else in each.
        batch_size: number of images at a time.
        seed: of the pairs and the noise.
        progress: wraps the batches, given their number; called two or three times.

    Raises:
        InputError: if there are fewer than two images, or their size or labels are not those of the model.

    Source: Dufour et al., SCAM!, ECCV 2022, section 4.
    """
    if len(dataset) < 2 or (training is not None and len(training) < 2):
        raise InputError("evaluation needs at least two images of each split")
    for given in (dataset, training) if training is not None else (dataset,):
        _check_fits(model, given)
    fid_features = RandomFeatures() if fid_features is None else fid_features
    reid_features = RandomFeatures() if reid_features is None else reid_features
    others = subject_pairs(len(dataset), groups, seed=seed)
    device = next(model.parameters()).device
    extractors = [extractor.to(device).eval() for extractor in (fid_features, reid_features)]
    fid, reid = extractors
    was_training = model.training
    model.eval()

    def batches(count: int) -> Iterable[list[int]]:
        indices = [list(range(begin, min(begin + batch_size, count))) for begin in range(0, count, batch_size)]
        return progress(indices, len(indices))

    ratios, similarities, advantages = [], [], []
    reconstructed, transferred, real = (_Features() for _ in range(3))
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for indices in batches(len(dataset)):
                subjects, backgrounds = (
                    _load(dataset, which, device) for which in (indices, [others[index] for index in indices])
                )
                reconstructions = model.reconstruct(*subjects).clamp(-1, 1)
                ratios.append(psnr(reconstructions, subjects.images))
                transfers = model.transfer_subject(
                    *subjects, *backgrounds, background=dataset.configuration.background
                ).clamp(-1, 1)
                real.add(fid(subjects.images))
                reconstructed.add(fid(reconstructions))
                transferred.add(fid(transfers))
                seen = reid(transfers)
                to_subject = F.cosine_similarity(seen, reid(subjects.images))
                similarities.append(to_subject)
                advantages.append(to_subject - F.cosine_similarity(seen, reid(backgrounds.images)))
            r_fid = None
            if training is not None:
                trained_on = _Features()
                for indices in batches(len(training)):
                    trained_on.add(fid(_load(training, indices, device).images))
                r_fid = frechet_distance(reconstructed.rows, trained_on.rows)
    finally:
        model.train(was_training)
    return Evaluation(
        images=len(dataset),
        psnr=torch.cat(ratios).mean().item(),
        r_fid=r_fid,
        s_fid=frechet_distance(transferred.rows, real.rows),
        reid_similarity=torch.cat(similarities).mean().item(),
        reid_accuracy=(torch.cat(advantages) > 0).double().mean().item(),
        fid_features=fid_features.name,
        reid_features=reid_features.name,
    )


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """The Frechet distance of normal distributions with the means and covariances of two sets of features.

    Args:
        features, others: (N, F) and (M, F); N and M are at least 2.

    Example:
        >>> rows = torch.randn(100, 4, dtype=torch.float64)
        >>> round(frechet_distance(rows, rows + 1), 6)  # the same covariance, and means that differ by 1 in each of 4
        4.0
    """
    metric = FrechetInceptionDistance(_Given(features.shape[1])).to(features.device)
    # Sums of squares lose digits where means are large; the distance does not depend on the origin.
    origin = others.double().mean(0)
    metric.update(features.double() - origin, real=False)
    metric.update(others.double() - origin, real=True)
    return float(metric.compute())


def subject_pairs(count: int, groups: Sequence[Hashable] | None = None, *, seed: int = 0) -> list[int]:
    """For each of ``count`` images another one, whose background it gets. Each image is used once.

    Args:
        count: at least 2.
        groups: who is seen in each image. If nobody is in more than half of the images, both are of different people.
        seed: of the choice.

    Raises:
        InputError: if there are fewer than two images or the number of groups is another.

    Example:
        >>> subject_pairs(4, ["anna", "anna", "bert", "bert"], seed=1)
        [2, 3, 0, 1]
    """
    if count < 2:
        raise InputError(f"pairs of subjects and backgrounds need at least two images, got {count}")
    groups = range(count) if groups is None else groups
    if len(groups) != count:
        raise InputError(f"groups: expected one for each of {count} images, got {len(groups)}")
    members: dict[Hashable, list[int]] = {}
    for index in torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist():
        members.setdefault(groups[index], []).append(index)
    order = [index for group in members.values() for index in group]
    # Behind the largest group's size every image is one of another group.
    step = max(map(len, members.values())) % count or 1
    others = [0] * count
    for place, index in enumerate(order):
        others[index] = order[(place + step) % count]
    return others


class _Given(nn.Identity):
    """Tells the metric how wide features are, which it gets in place of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class _Features:
    """Rows of features, collected on the CPU."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        self._parts.append(features.cpu())

    @property
    def rows(self) -> Tensor:
        return torch.cat(self._parts)


def _load(dataset: LabelledImages, indices: list[int], device: torch.device) -> _Batch:
    batch: Sample = default_collate([dataset[index] for index in indices])
    labels = LabelMap.from_labels(batch.labels, dataset.configuration.num_labels)
    return _Batch(batch.image.to(device), labels.to(device))


def _check_fits(model: Scam, dataset: LabelledImages) -> None:
    data, generator = dataset.configuration, model.generator.configuration
    expected = (generator.height, generator.width, generator.layout.num_labels)
    given = (data.height, data.width, data.num_labels)
    if given != expected:
        raise InputError(
            "the model is for {} x {} pixels with {} labels, the data set has {} x {} with {}; "
            "read it with the model's configuration".format(*expected, *given)
        )
