"""Grids, label maps, attention pictures, interpolation; and the commands that write them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

import torch
from commands import run_command
from image_folders import write_sample
from PIL import Image
from torch import Tensor

from sca_kernels import LabelMap, LatentLayout
from scam_models import LatentAttention, LatentDistribution, Scam, tiny
from scam_models.checkpoints import SavedModel, write_weights
from scam_models.cli.models import load_model, read_image
from scam_models.data import PRESETS
from scam_models.latents import between
from scam_models.pictures import grid, heat_picture, label_colours, label_picture, latent_colours, strongest_picture
from scam_models.serialisation import to_values

LAYOUT = LatentLayout((2, 0, 4, 1))
DATA = replace(PRESETS["tiny"], height=32, width=32)


def test_grid() -> None:
    pictures = [torch.full((3, 4, 5), value) for value in (-1.0, 0.0, 0.5)]
    found = grid([pictures[:2], pictures[2:]], margin=1)
    assert found.shape == (3, 9, 11)
    for picture, place in zip(pictures, ((0, 0), (0, 6), (5, 0)), strict=True):
        top, left = place
        assert torch.equal(found[:, top : top + 4, left : left + 5], picture)
    assert (found == 1).sum() == found.numel() - 3 * picture.numel()
    with pytest.raises(ValueError, match=r"pictures of one size, got \[\(3, 4, 4\), \(3, 4, 5\)\]"):
        grid([[torch.zeros(3, 4, 5), torch.zeros(3, 4, 4)]])
    with pytest.raises(ValueError, match=r"pictures of one size, got \[\]"):
        grid([])


@pytest.mark.parametrize("colours", [label_colours(151), latent_colours(LatentLayout.uniform(19, 8))])
def test_colours_differ(colours: Tensor) -> None:
    assert colours.min() >= -1 and colours.max() <= 1
    assert torch.pdist(colours).min() > 0.005


def test_colours_of_few_labels_and_latents_differ_plainly() -> None:
    assert torch.pdist(label_colours(6)).min() > 0.3
    layout = LatentLayout.uniform(3, 8)
    colours = latent_colours(layout)
    for label in range(3):
        own = colours[8 * label : 8 * label + 8]
        assert torch.pdist(own).min() > 0.15 and (own[1:] - own[:-1]).norm(dim=1).min() > 0.2
        # The hue is that of the label: its colour lies closest.
        assert torch.cdist(own, label_colours(3)).mean(0).argmin() == label


def attention_of(labels: Tensor) -> LatentAttention:
    """Random weights, zero for latents that a label does not have."""
    counts = torch.tensor(LAYOUT.latents_per_label)[labels.clamp(min=0)]
    logits = torch.rand(1, 4, *labels.shape[1:])
    weights = torch.where(torch.arange(4).view(4, 1, 1) < counts.where(labels >= 0, 0).unsqueeze(1), logits, 0)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    return LatentAttention(torch.tensor(LAYOUT.cu_latents)[labels.clamp(min=0)], weights)


def test_attention_pictures() -> None:
    torch.manual_seed(0)
    labels = torch.randint(-1, 4, (1, 8, 8))
    attention, image = attention_of(labels), torch.rand(1, 3, 8, 8)
    strongest = attention.strongest()
    picture = strongest_picture(strongest, LAYOUT)
    owners = [0, 0, 2, 2, 2, 2, 3]
    total = torch.zeros(1, 8, 8)
    for row in range(8):
        for column in range(8):
            label, latent = int(labels[0, row, column]), int(strongest.latent[0, row, column])
            if label in (-1, 1):
                assert latent == -1 and picture[0, :, row, column].unique().numel() == 1
                continue
            assert owners[latent] == label
            assert torch.equal(picture[0, :, row, column], latent_colours(LAYOUT)[latent])
    for latent, owner in enumerate(owners):
        weight, heat = attention.of_latent(latent), heat_picture(attention, LAYOUT, latent, image)
        total += weight
        own = labels == owner
        assert torch.equal(weight[~own], torch.zeros_like(weight[~own])) and (weight[own] > 0).all()
        brightness = heat.mean(1)
        torch.testing.assert_close((brightness[own] + 1) / 2, weight[own])
        others = heat.permute(0, 2, 3, 1)[~own]
        assert (others == others[:, :1]).all() and others.max() < 0
    torch.testing.assert_close(total, ((labels >= 0) & (labels != 1)).float())


def test_label_picture() -> None:
    labels = torch.tensor([[[0, 2], [-1, 1]]])
    picture = label_picture(labels, 3)
    assert torch.equal(picture[0, :, 0, 1], label_colours(3)[2]) and picture[0, :, 1, 0].unique().numel() == 1


def small_model() -> Scam:
    torch.manual_seed(0)
    model = Scam.from_configuration(tiny(LatentLayout.uniform(6, 2), 32, 32)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.3)
    return model


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("only", [None, (2, 3)])
@torch.no_grad()
def test_interpolate(only: tuple[int, ...] | None) -> None:
    model = small_model()
    one, other = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    labels, other_labels = (LabelMap.from_labels(torch.randint(0, 6, (32, 32)), 6) for _ in range(2))
    torch.manual_seed(1)
    strip = model.interpolate(one, labels, other, other_labels, steps=5, only=only)
    torch.manual_seed(1)
    torch.testing.assert_close(strip[:1], model.reconstruct(one, labels))
    torch.manual_seed(1)
    sources = {label: (other, other_labels) for label in range(6) if only is None or label in only}
    torch.testing.assert_close(strip[-1:], model.transfer(one, labels, sources))
    steps = (strip[1:] - strip[:-1]).flatten(1).norm(dim=1)
    # Every step is on the way: none is longer than the whole, as steps with noises of their own would be.
    assert steps.min() > 0 and steps.sum() < 1.5 * (strip[-1] - strip[0]).norm()
    with pytest.raises(ValueError, match="steps: expected at least 2, got 1"):
        model.interpolate(one, labels, other, other_labels, steps=1)


def test_between_distributions() -> None:
    begin, end = (
        LatentDistribution(torch.full((1, 2, 3), value), torch.full((1, 2, 3), -value)) for value in (0.0, 2.0)
    )
    found = between(begin, end, 0.25)
    assert isinstance(found, LatentDistribution) and (found.mean == 0.5).all() and (found.log_variance == -0.5).all()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two images."""
    folder = tmp_path_factory.mktemp("trained")
    model = small_model()
    configuration = {"model": to_values(model.configuration), "data": to_values(DATA)}
    write_weights(folder / "model.safetensors", SavedModel(configuration, model.state_dict()))
    torch.manual_seed(0)
    for name in ("one", "other"):
        write_sample(folder, "test", name, torch.randint(0, 4, (32, 32)))  # neither bottom nor shoes
    return folder


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def read_picture(path: Path) -> Tensor:
    """(3, height, width), from -1 to 1."""
    with Image.open(path) as image:
        width, height = image.size
        pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32)
    return pixels.view(height, width, 3).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.usefixtures("native")
def test_attention_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("attention", str(trained / "model.safetensors"), str(trained / "test/images/one.png"))
    assert run_command(*arguments, "--out", str(tmp_path / "all")) == 0
    written = [f"one{part}.png" for part in ("", "-background", "-skin", "-hair", "-top")]
    assert capsys.readouterr().out.split() == [str(tmp_path / "all" / name) for name in written]
    assert [size(tmp_path / "all" / name) for name in written] == [(4 * 34 - 2, 32), *[(2 * 34 - 2, 32)] * 4]
    assert run_command(*arguments, "--out", str(tmp_path / "hair"), "--label", "hair") == 0
    assert sorted(path.name for path in (tmp_path / "hair").iterdir()) == ["one-hair.png", "one.png"]
    capsys.readouterr()
    assert run_command(*arguments, "--out", str(tmp_path / "shoes"), "--label", "shoes") == 1
    assert re.fullmatch(r"error: .*one\.png: no pixel has label shoes\n", capsys.readouterr().err)


@pytest.mark.usefixtures("native")
def test_attention_command_of_the_encoder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, image = trained / "model.safetensors", trained / "test/images/one.png"
    arguments = ("attention", str(checkpoint), str(image), "--label", "hair")
    model, pictures = load_model(checkpoint), {}
    layout = model.model.encoder.configuration.layout
    for name, options in {
        "generator": (),
        "image": ("--of", "encoder"),
        "level 1": ("--of", "encoder", "--level", "1"),
    }.items():
        assert run_command(*arguments, "--out", str(tmp_path / name), *options) == 0
        pictures[name] = read_picture(tmp_path / name / "one.png")
    for name, level in {"image": 0, "level 1": 1}.items():
        shown, labels, _ = read_image(image, model)
        found = model.model.encoder_attention(shown, labels, level=level).at(32, 32)
        expected = strongest_picture(found.strongest(), layout)[0]
        torch.testing.assert_close(pictures[name][..., -32:], expected, rtol=0, atol=1 / 127)
        heat = [heat_picture(found, layout, latent, shown)[0] for latent in (4, 5)]
        torch.testing.assert_close(read_picture(tmp_path / name / "one-hair.png"), grid([heat]), rtol=0, atol=1 / 127)
        assert torch.equal(pictures[name][..., :-34], pictures["generator"][..., :-34])
        assert not torch.equal(pictures[name], pictures["generator"])
    capsys.readouterr()
    for options, message in {
        ("--level", "1"): "error: --level: the generator has none; give --of encoder with it\n",
        ("--of", "encoder", "--level", "9"): "error: --level 9: expected one from 0 to 3\n",
    }.items():
        assert run_command(*arguments, "--out", str(tmp_path / "none"), *options) == 1
        assert capsys.readouterr().err == message


@pytest.mark.usefixtures("native")
def test_interpolate_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = (str(trained / "test/images/one.png"), str(trained / "test/images/other.png"))
    arguments = ("interpolate", str(trained / "model.safetensors"), *images)
    for name, options in {"all": (), "hair": ("--label", "hair"), "four": ("--steps", "4")}.items():
        assert run_command(*arguments, "--out", str(tmp_path / f"{name}.png"), *options) == 0
    assert size(tmp_path / "all.png") == (9 * 34 - 2, 32) and size(tmp_path / "four.png") == (6 * 34 - 2, 32)
    assert (tmp_path / "all.png").read_bytes() != (tmp_path / "hair.png").read_bytes()
    assert run_command(*arguments, "--out", str(tmp_path / "x.png"), "--label", "nose") == 1
    assert "error: label 'nose': expected a number from 0 to 5 or one of background" in capsys.readouterr().err
    assert run_command(*arguments, "--out", str(tmp_path / "x.png"), "--steps", "1") == 2
