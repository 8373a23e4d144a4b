"""Data sets of images with label maps: what is read, cropped, mirrored and merged, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_folders import colours, write_data, write_image, write_sample
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from sca_kernels import LabelMap
from scam_models.data import PRESETS, DataConfiguration, LabelledImages, merging_table, preset
from scam_models.errors import InputError

SMALL = DataConfiguration(name="small", height=6, width=4, num_labels=6, flip=True)


def values_of(labels: Tensor) -> Tensor:
    """What an image in the colours of the labels holds, as a data set gives it."""
    return colours(labels).permute(2, 0, 1).float() / 127.5 - 1


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_same_size_is_read_as_it_is(tmp_path: Path) -> None:
    data = LabelledImages(write_data(tmp_path, height=6, width=4), "test", SMALL)
    assert data.names == ["0", "1", "2"] and len(data) == 3
    for index, (image, labels, name) in enumerate(data[i] for i in range(3)):
        assert image.dtype == torch.float32 and labels.dtype == torch.int32 and name == str(index)
        with Image.open(tmp_path / "test" / "images" / f"{name}.png") as file:
            pixels = torch.tensor(list(file.tobytes())).view(6, 4, 3)
        with Image.open(tmp_path / "test" / "labels" / f"{name}.png") as file:
            expected = torch.tensor(list(file.tobytes())).view(6, 4)
        assert torch.equal(labels.long(), expected)
        torch.testing.assert_close(image, pixels.permute(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "height, width, rows, columns", [(12, 8, (0, 6), (0, 4)), (12, 20, (0, 6), (3, 7)), (24, 8, (3, 9), (0, 4))]
)
def test_the_middle_is_cut_out_and_resized(
    height: int, width: int, rows: tuple[int, int], columns: tuple[int, int], tmp_path: Path
) -> None:
    small = torch.randint(0, 6, (height // 2, width // 2))
    write_sample(tmp_path, "train", "a", small.repeat_interleave(2, 0).repeat_interleave(2, 1))
    image, labels, _ = LabelledImages(tmp_path, "train", SMALL)[0]
    expected = small[slice(*rows), slice(*columns)]
    assert torch.equal(labels.long(), expected)
    # The filter reaches over the borders of pixels, but mostly shows the pixel itself.
    assert (image - values_of(expected)).abs().mean() < 0.35 * (image - values_of(expected.flip(1))).abs().mean()


def test_labels_are_those_that_pillow_takes_as_nearest(tmp_path: Path) -> None:
    labels = torch.randint(0, 6, (33, 61))
    write_sample(tmp_path, "train", "a", labels)
    configuration = replace(SMALL, height=22, width=30)
    with Image.open(tmp_path / "train" / "labels" / "a.png") as file:
        across = 33 * 30 / 22
        box = ((61 - across) / 2, 0, (61 + across) / 2, 33)
        expected = list(file.resize((30, 22), Image.Resampling.NEAREST, box=box).tobytes())
    assert LabelledImages(tmp_path, "train", configuration)[0].labels.flatten().tolist() == expected


def test_label_map_of_another_resolution(tmp_path: Path) -> None:
    labels = torch.randint(0, 6, (6, 4))
    big = labels.repeat_interleave(8, 0).repeat_interleave(8, 1)
    write_sample(tmp_path, "train", "a", labels, colours(big))
    image, read, _ = LabelledImages(tmp_path, "train", SMALL)[0]
    assert torch.equal(read.long(), labels)
    assert (image - values_of(labels)).abs().mean() < 0.2


def test_mirroring_and_cropping_follow_from_the_seed_alone(tmp_path: Path) -> None:
    labels = torch.randint(0, 6, (6, 9))
    write_sample(tmp_path, "train", "a", labels)
    data = LabelledImages(tmp_path, "train", SMALL, flip=True, random_crop=True)
    seen = set()
    for seed in range(64):
        image, read, _ = data[0, seed]
        again = LabelledImages(tmp_path, "train", SMALL, flip=True, random_crop=True)[0, seed]
        assert torch.equal(image, again.image) and torch.equal(read, again.labels)
        places = [
            (left, mirrored)
            for left in range(6)
            for mirrored in (False, True)
            for part in [labels[:, left : left + 4]]
            if torch.equal(read.long(), part.flip(1) if mirrored else part)
        ]
        assert len(places) == 1
        seen.add(places[0])
        expected = values_of(read)
        # Image and labels are cut out at places that differ by half a pixel at most, and mirrored together.
        assert (image - expected).abs().mean() < 0.8 * (image - expected.flip(2)).abs().mean()
    assert {left for left, _ in seen} == set(range(6)) and {mirrored for _, mirrored in seen} == {False, True}
    assert torch.equal(data[0].labels, data[0].labels) and (data[0].labels == labels[:, 3:7]).all()


def test_without_options_a_seed_changes_nothing(tmp_path: Path) -> None:
    data = LabelledImages(write_data(tmp_path, height=6, width=9), "train", SMALL)
    for seed in range(8):
        assert torch.equal(data[1, seed].image, data[1].image)


def test_merging_and_ignored_values(tmp_path: Path) -> None:
    values = torch.arange(20).view(4, 5)
    values[0, 1] = 255
    write_sample(tmp_path, "train", "a", values, colours(values))
    configuration = replace(PRESETS["idesigner"], height=4, width=5)
    labels = LabelledImages(tmp_path, "train", configuration)[0].labels
    expected = [0, -1, 1, 2, 1, *[2] * 8, 1, *[2] * 6]
    assert labels.flatten().tolist() == expected
    assert configuration.merging is not None
    assert [value for value, label in enumerate(configuration.merging) if label == 1] == [1, 2, 4, 13]
    dropping = replace(configuration, merging=(*configuration.merging[:19], -1))
    assert LabelledImages(tmp_path, "train", dropping)[0].labels[-1, -1] == -1


def test_samples_are_collated(tmp_path: Path) -> None:
    data = LabelledImages(write_data(tmp_path, height=6, width=4), "train", SMALL, skip=("1",))
    (batch,) = DataLoader(data, batch_size=2)
    assert batch.image.shape == (2, 3, 6, 4) and list(batch.name) == ["0", "2"]
    assert LabelMap.from_labels(batch.labels, 6).labels.shape == (2, 6, 4)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    labels = torch.tensor([[0, 0], [5, 5], [0, 0]])
    write_sample(tmp_path, "train", "a", labels)
    (tmp_path / "train" / "images" / "a.png").unlink()
    pixels = torch.zeros(20, 30, 3, dtype=torch.uint8)
    pixels[:, :10] = 255  # turned by 90 degrees, the upper third
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.frombytes("RGB", (30, 20), bytes(pixels.flatten().tolist())) as image:
        image.save(tmp_path / "train" / "images" / "a.jpg", exif=exif, quality=95)
    image = LabelledImages(tmp_path, "train", replace(SMALL, height=30, width=20))[0].image
    assert image[:, :8].mean() > 0.9 and image[:, 12:].mean() < -0.9


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


IMAGE, LABELS = Path("train/images/1.png"), Path("train/labels/1.png")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: truncate(folder / IMAGE), r"images/1\.png: not a readable image \(.*\); replace or remove it"),
        (lambda folder: (folder / IMAGE).write_text("no image"), r"images/1\.png: not a readable image"),
        (lambda folder: (folder / IMAGE).write_bytes(b""), r"images/1\.png: not a readable image"),
        (lambda folder: truncate(folder / LABELS), r"labels/1\.png: not a readable image"),
        (
            lambda folder: write_image(folder / LABELS, torch.zeros(6, 4, 3, dtype=torch.uint8)),
            r"labels/1\.png: expected an image of label values \(grey or palette\), got mode RGB; write the numbers",
        ),
        (
            lambda folder: write_image(folder / LABELS, torch.tensor([[0, 6, 255], [9, 5, 6]], dtype=torch.uint8)),
            r"labels/1\.png: 3 pixels with values 6, 9, expected 0 to 5 or 255 \(no label\)",
        ),
    ],
)
def test_files_that_cannot_be_used(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    spoil(write_data(tmp_path, height=6, width=4))
    data = LabelledImages(tmp_path, "train", SMALL)
    data[0]
    with pytest.raises(InputError, match=message) as raised:
        data[1]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / LABELS).unlink(), r"images/1\.png: no label map train/labels/1\.png"),
        (lambda folder: (folder / "train").rename(folder / "else"), r"train/images: no such folder; a data set has"),
        (
            lambda folder: [path.unlink() for path in (folder / "train" / "images").iterdir()],
            r"train/images: no images; put PNG or JPEG files there",
        ),
    ],
)
def test_folders_that_cannot_be_used(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    spoil(write_data(tmp_path, height=6, width=4))
    with pytest.raises(InputError, match=message):
        LabelledImages(tmp_path, "train", SMALL)


def test_faces_are_not_mirrored(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels of celebamask-hq mean left and right; do not mirror its images"):
        LabelledImages(write_data(tmp_path), "train", preset("celebamask-hq"), flip=True)


def test_presets() -> None:
    sizes = {name: (data.height, data.width, data.num_labels, data.num_values) for name, data in PRESETS.items()}
    assert sizes == {
        "idesigner": (256, 170, 3, 20),
        "celebamask-hq": (256, 256, 19, 19),
        "ade20k": (256, 256, 151, 151),
        "tiny": (64, 64, 6, 6),
    }
    assert preset("tiny").label("hair") == 2 and preset("ade20k").label("150") == 150
    assert len(set(PRESETS["celebamask-hq"].label_names)) == 19


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: preset("small"), "preset 'small': expected one of idesigner, celebamask-hq, ade20k, tiny"),
        (lambda: preset("tiny").label("6"), "label '6': expected a number from 0 to 5 or one of background, skin"),
        (lambda: preset("ade20k").label("sky"), "label 'sky': expected a number from 0 to 150$"),
        (lambda: replace(SMALL, width=0), "width: expected a positive number, got 0"),
        (lambda: replace(SMALL, label_names=("a",)), "label_names: expected 6 names, one for each label, got 1"),
        (lambda: replace(SMALL, background=(6,)), r"background: expected labels from 0 to 5, got \[6\]"),
        (lambda: replace(SMALL, merging=(-2, 0)), r"merging: expected labels from -1 to 5, got \[-2\]"),
        (lambda: merging_table(3, 0, {0: [1], 1: [1]}), "groups: expected each value from 0 to 2 at most once, got 1"),
    ],
)
def test_configurations_that_cannot_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
