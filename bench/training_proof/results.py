"""What trained models are measured by, on people that no training has seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sca_kernels import LabelMap
from scam_models import Latents, Scam
from scam_models.data import FigureSeeds, LabelledImages, preset, read_identities
from scam_models.data.figures import Appearance, Background, Drawing, Pose, draw
from scam_models.evaluation import subject_pairs
from scam_models.psnr import psnr

from .measures import colour_statistics, normalised_mutual_information, psnr_within, purity

DATA = preset("tiny")
BACKGROUND, TOP = DATA.label("background"), DATA.label("top")
_LEAST_SHARE = 0.1  # of a region that each of its two textures has, for its division to be measured
_BATCH_SIZE = 16


@dataclass(frozen=True)
class TestPictures:
    """The pictures of "test", and what the procedural data set knows of them.

    Attributes:
        seeds: of each picture.
        images, labels: (N, 3, height, width) from -1 to 1 and (N, height, width).
        others: for each picture the one whose background it gets, of somebody else.
        truth: the true pictures of these transfers.
        in_other_pose: the same, but in the poses of the others.
        floors: (N, height, width), true where the floor is, or would be if nobody stood before it.
        cloths: (N, height, width): 1 and 2 where upper clothes show their first and their second texture, else 0.
        turned: the pictures with the other seam: where the two textures met across the chest they meet along the body,
            and the other way around. The label maps are the same.
        turned_cloths: like ``cloths``.
    """

    __test__ = False  # no test of pytest's

    seeds: Sequence[FigureSeeds]
    images: Tensor
    labels: Tensor
    others: Sequence[int]
    truth: Tensor
    in_other_pose: Tensor
    floors: Tensor
    cloths: Tensor
    turned: Tensor
    turned_cloths: Tensor

    @classmethod
    def read(cls, folder: Path) -> TestPictures:
        """Reads and draws them."""
        dataset, by_name = LabelledImages(folder, "test", DATA), read_identities(folder, "test")
        seeds = [by_name[name] for name in dataset.names]
        samples = [dataset[index] for index in range(len(dataset))]
        others = subject_pairs(len(seeds), [own.identity for own in seeds])
        pairs = [(own, seeds[other]) for own, other in zip(seeds, others, strict=True)]
        height, width = DATA.height, DATA.width
        turned = [_draw_turned(own) for own in seeds]
        rows = (torch.arange(height) + 0.5) / height
        horizons = torch.tensor([Background.from_seed(own.background).horizon for own in seeds])
        return cls(
            seeds=seeds,
            images=torch.stack([sample.image for sample in samples]),
            labels=torch.stack([sample.labels for sample in samples]),
            others=others,
            truth=_images(
                FigureSeeds(own.identity, own.pose, other.background).draw(height, width) for own, other in pairs
            ),
            in_other_pose=_images(
                FigureSeeds(own.identity, other.pose, other.background).draw(height, width) for own, other in pairs
            ),
            floors=(rows >= horizons[:, None]).unsqueeze(-1).expand(-1, -1, width),
            cloths=torch.stack([own.draw(height, width).cloth for own in seeds]),
            turned=_images(turned),
            turned_cloths=torch.stack([drawing.cloth for drawing in turned]),
        )


@dataclass(frozen=True)
class Closeness:
    """How close pictures come to true transfers: the subject of one before the background of another.

    Attributes:
        whole: mean PSNR.
        other_pose: mean PSNR against the same person and background in another pose.
        background, subject: mean PSNR over the region of the background and over all others.
        background_colour, subject_colour: mean difference of the mean colour of the background's region, and of the
            regions of the subject's labels, in 255ths.
        background_deviation, subject_deviation: mean difference of the colours' standard deviations there.
    """

    whole: float
    other_pose: float
    background: float
    subject: float
    background_colour: float
    subject_colour: float
    background_deviation: float
    subject_deviation: float


@dataclass(frozen=True)
class Division:
    """How well the strongest latents of a label divide its region as two textures do; means over pictures.

    Attributes:
        pictures: number of those in which both textures have a tenth of the region.
        largest: the larger texture's share of the region, what the purity is without any division.
        purity, information: of the strongest latents, and their normalised mutual information with the truth.
        shuffled_purity, shuffled_information: the same where the pixels of the region have changed places.
        misplaced_information: the same with a truth that is as likely by position alone, and wrong.
        perfect_misplaced_information: of the truth itself with that one, what the true division would have there.
    """

    pictures: int
    largest: float
    purity: float
    information: float
    shuffled_purity: float
    shuffled_information: float
    misplaced_information: float
    perfect_misplaced_information: float


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Attributes:
        latents: of each label.
        seed: of the training.
        seconds: of the processor, that it took.
        parameters: of encoder and generator.
        psnr: mean over reconstructions.
        transfer: the subject's latents before the other's background, as transfers are.
        own_background: for comparison, with the subject's background: its reconstruction.
        other_subject: for comparison, with all latents of the other.
        surfaces: of wall and floor, both of the label "background", by the generator's attention; misplaced is the
            horizon of another picture.
        cloths: of two textures of the label "top", by the generator's attention, in the pictures and in those with the
            other seam; misplaced is the seam of the other one, so that position alone says as much of both.
        encoder_surfaces, encoder_cloths: the same by the encoder's attention, from level 0 to the last.
    """

    latents: int
    seed: int
    seconds: float
    parameters: int
    psnr: float
    transfer: Closeness
    own_background: Closeness
    other_subject: Closeness
    surfaces: Division
    cloths: Division
    encoder_surfaces: tuple[Division, ...]
    encoder_cloths: tuple[Division, ...]


@dataclass(frozen=True)
class Flat:
    """What pictures come to that have every region in its true mean colour: one perfect flat style for each label.

    Attributes:
        psnr: mean over the test pictures.
        transfer: of true transfers.
    """

    psnr: float
    transfer: Closeness


@dataclass(frozen=True)
class Outcome:
    """What a model makes of all test pictures, like these.

    Attributes:
        reconstructions, transfers, other_subject: images.
        strongest: (N, 1 + levels, height, width): the latent that each pixel attends to most in the generator's last
            modulation, then the latents from which it gets most in the encoder, from level 0 to the last; -1 where the
            nearest pixel of a level has another label.
        turned_strongest: the same of the pictures with the other seam.
    """

    reconstructions: Tensor
    transfers: Tensor
    other_subject: Tensor
    strongest: Tensor
    turned_strongest: Tensor


@torch.inference_mode()
def apply(model: Scam, pictures: TestPictures) -> Outcome:
    """Reconstructs every picture, puts its subject before the background of the other one, and so on."""
    torch.manual_seed(0)  # of the noise
    parts = []
    for indices in torch.arange(len(pictures.images)).split(_BATCH_SIZE):
        others = torch.tensor(pictures.others)[indices]
        image, labels = pictures.images[indices], _label_map(pictures.labels[indices])
        other_image, other_labels = pictures.images[others], _label_map(pictures.labels[others])
        latents, turned = model.encode(image, labels), pictures.turned[indices]
        parts.append(
            Outcome(
                reconstructions=model.generate(labels, latents),
                transfers=model.transfer_subject(image, labels, other_image, other_labels, background=BACKGROUND),
                other_subject=model.generate(labels, model.encode(other_image, other_labels)),
                strongest=_strongest(model, image, labels, latents),
                turned_strongest=_strongest(model, turned, labels, model.encode(turned, labels)),
            )
        )
    names = ("reconstructions", "transfers", "other_subject", "strongest", "turned_strongest")
    return Outcome(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def measure(
    model: Scam, pictures: TestPictures, outcome: Outcome, *, latents: int, seed: int, seconds: float
) -> Result:
    """What was made of the pictures, in figures."""
    surfaces, *encoder_surfaces = (
        _divisions(
            strongest,
            pictures.floors.long() + 1,
            pictures.floors[torch.tensor(pictures.others)].long() + 1,
            pictures.labels == BACKGROUND,
        )
        for strongest in outcome.strongest.unbind(1)
    )
    cloths, *encoder_cloths = (
        _divisions(
            strongest,
            torch.cat([pictures.cloths, pictures.turned_cloths]),
            torch.cat([pictures.turned_cloths, pictures.cloths]),
            torch.cat([pictures.labels == TOP] * 2),
        )
        for strongest in torch.cat([outcome.strongest, outcome.turned_strongest]).unbind(1)
    )
    return Result(
        latents=latents,
        seed=seed,
        seconds=seconds,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        psnr=psnr(outcome.reconstructions, pictures.images).mean().item(),
        transfer=_closeness(outcome.transfers, pictures),
        own_background=_closeness(outcome.reconstructions, pictures),
        other_subject=_closeness(outcome.other_subject, pictures),
        surfaces=surfaces,
        cloths=cloths,
        encoder_surfaces=tuple(encoder_surfaces),
        encoder_cloths=tuple(encoder_cloths),
    )


def measure_flat(pictures: TestPictures) -> Flat:
    """Every region in its true mean colour, in figures."""
    return Flat(
        psnr=psnr(_flat(pictures.images, pictures.labels), pictures.images).mean().item(),
        transfer=_closeness(_flat(pictures.truth, pictures.labels), pictures),
    )


def divided(regions: Tensor, truth: Tensor) -> Tensor:
    """(N,): whether both textures, 1 and 2 in ``truth``, have a tenth of a region."""
    size = regions.sum((1, 2))
    shares = torch.stack([((truth == texture) & regions).sum((1, 2)) / size.clamp(min=1) for texture in (1, 2)])
    return shares.amin(0) >= _LEAST_SHARE


def _strongest(model: Scam, image: Tensor, labels: LabelMap, latents: Latents) -> Tensor:
    layout = model.encoder.configuration.layout
    planes = [model.strongest_latents(labels, latents).latent]
    for level in range(model.encoder.configuration.num_blocks):
        attention = model.encoder_attention(image, labels, level=level).at(labels.height, labels.width)
        latent = attention.strongest().latent
        is_own = layout.labels(latent.device)[latent.clamp(min=0)] == labels.labels
        planes.append(torch.where(is_own, latent, -1))
    return torch.stack(planes, 1)


def _flat(images: Tensor, labels: Tensor) -> Tensor:
    mean, _ = colour_statistics(images, labels, DATA.num_labels)
    index = labels.long().flatten(1).unsqueeze(-1).expand(-1, -1, 3)
    flat = mean.gather(1, index).transpose(1, 2).view_as(images) / 127.5 - 1
    # Regions too small for a mean are left as they are, which is in the flat picture's favour.
    return flat.where(flat.isfinite(), images.double())


def _closeness(images: Tensor, pictures: TestPictures) -> Closeness:
    is_background = pictures.labels == BACKGROUND
    mean, deviation = colour_statistics(images, pictures.labels, DATA.num_labels)
    true_mean, true_deviation = colour_statistics(pictures.truth, pictures.labels, DATA.num_labels)
    of_mean, of_deviation = (mean - true_mean).abs(), (deviation - true_deviation).abs()
    subject = [label for label in range(DATA.num_labels) if label != BACKGROUND]
    return Closeness(
        whole=psnr(images, pictures.truth).mean().item(),
        other_pose=psnr(images, pictures.in_other_pose).mean().item(),
        background=psnr_within(images, pictures.truth, is_background).nanmean().item(),
        subject=psnr_within(images, pictures.truth, ~is_background).nanmean().item(),
        background_colour=of_mean[:, BACKGROUND].nanmean().item(),
        subject_colour=of_mean[:, subject].nanmean().item(),
        background_deviation=of_deviation[:, BACKGROUND].nanmean().item(),
        subject_deviation=of_deviation[:, subject].nanmean().item(),
    )


def _divisions(strongest: Tensor, truth: Tensor, misplaced: Tensor, regions: Tensor) -> Division:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in (divided(regions, truth) & divided(regions, misplaced)).nonzero().flatten().tolist():
        where = regions[index]
        parts, own, wrong = (numbers[index][where] for numbers in (strongest, truth, misplaced))
        shuffled = parts[torch.randperm(len(parts), generator=generator)]
        rows.append(
            (
                purity(torch.zeros_like(parts), own),
                purity(parts, own),
                normalised_mutual_information(parts, own),
                purity(shuffled, own),
                normalised_mutual_information(shuffled, own),
                normalised_mutual_information(parts, wrong),
                normalised_mutual_information(own, wrong),
            )
        )
    means = torch.tensor(rows, dtype=torch.float64).view(-1, 7).mean(0).tolist()
    return Division(len(rows), *means)


def _draw_turned(seeds: FigureSeeds) -> Drawing:
    appearance = Appearance.from_seed(seeds.identity)
    turned = replace(appearance, seam="along" if appearance.seam == "across" else "across")
    background = Background.from_seed(seeds.background)
    return draw(turned, Pose.from_seed(seeds.pose), background, DATA.height, DATA.width)


def _images(drawings: Iterable[Drawing]) -> Tensor:
    return torch.stack([drawing.image * 2 - 1 for drawing in drawings])


def _label_map(labels: Tensor) -> LabelMap:
    return LabelMap.from_labels(labels, DATA.num_labels)
