"""Using what was trained: checkpoints and exported weights, reconstruction, transfer and mixing, also as commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("safetensors")

import torch
from commands import run_command
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from training_runs import DATA, NUM_LABELS, read, small_configuration, write_data

from sca_kernels import LabelMap
from scam_models import InputError, Scam, take_latents, tiny
from scam_models.data import LabelledImages
from scam_models.training import train

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("background", "skin", "hair")
    configuration = small_configuration(steps=3, noise=False)
    configuration = replace(configuration, data=replace(DATA, label_names=names), average_decay=0.5)
    out = tmp_path_factory.mktemp("run")
    return train(data, configuration, out, accelerator="cpu", workers=0, report=lambda line: None)


def sample(data: Path, index: int) -> tuple[Tensor, LabelMap]:
    image, labels, _ = LabelledImages(data, "train", DATA)[index]
    return image.unsqueeze(0), LabelMap.from_labels(labels, NUM_LABELS)


def image_path(data: Path, index: int) -> Path:
    return data / "train" / "images" / f"image{index}.png"


def pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return flat.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize("averaged", [True, False])
def test_checkpoint_holds_both_weights(checkpoint: Path, averaged: bool) -> None:
    model = Scam.from_checkpoint(checkpoint, averaged=averaged)
    assert not model.training
    saved, prefix = read(checkpoint)["state_dict"], "average." if averaged else "model."
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[prefix + name])
    other = Scam.from_checkpoint(checkpoint, averaged=not averaged)
    assert any(not torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_export_and_back(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    model = Scam.from_checkpoint(checkpoint)
    model.export(tmp_path / "own.safetensors")
    assert run_command("export", str(checkpoint), str(tmp_path / "command.safetensors")) == 0
    for name in ("own", "command"):
        again = Scam.from_checkpoint(tmp_path / f"{name}.safetensors", model.configuration)
        assert torch.equal(again(*sample(data, 0)), model(*sample(data, 0)))
    with safe_open(tmp_path / "command.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["scam"])["data"]["label_names"][2] == "hair"
    assert run_command("export", str(checkpoint), str(tmp_path / "last.safetensors"), "--last") == 0
    last = Scam.from_checkpoint(tmp_path / "last.safetensors")
    assert torch.equal(last(*sample(data, 0)), Scam.from_checkpoint(checkpoint, averaged=False)(*sample(data, 0)))


def test_transfer_takes_the_latents_of_labels(checkpoint: Path, data: Path) -> None:
    model = Scam.from_checkpoint(checkpoint)
    (image, labels), *others = (sample(data, index) for index in range(3))
    mixed = take_latents(
        model.encoder.configuration.layout,
        model.encode(image, labels),
        {0: model.encode(*others[0]), 2: model.encode(*others[1])},
    )
    expected = model.generate(labels, mixed)
    assert torch.equal(model.transfer(image, labels, {0: others[0], 2: others[1]}), expected)
    assert torch.equal(model.transfer(image, labels, {}), model.reconstruct(image, labels))
    subject = model.transfer_subject(image, labels, *others[0], background=[0, 1])
    assert torch.equal(subject, model.transfer(image, labels, {0: others[0], 1: others[0]}))


def test_images_are_encoded_once(checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scam.from_checkpoint(checkpoint)
    calls: list[Tensor] = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda image, labels: calls.append(image) or encode(image, labels))
    other = sample(data, 1)
    model.transfer(*sample(data, 0), {0: other, 1: other})
    assert len(calls) == 2


def test_reconstruct_command(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(image_path(data, index)) for index in (1, 2)]
    assert run_command("reconstruct", str(checkpoint), *paths, "--out", str(tmp_path)) == 0
    model = Scam.from_checkpoint(checkpoint)
    lines = capsys.readouterr().out.splitlines()
    for index, line in zip((1, 2), lines, strict=True):
        image, labels = sample(data, index)
        expected = model.reconstruct(image, labels)
        assert (pixels(tmp_path / f"image{index}.png") - expected[0]).abs().max() <= 1 / 255 + 1e-6
        psnr = -10 * torch.log10(((expected - image) / 2).square().mean())
        assert line == f"{tmp_path / f'image{index}.png'}: {psnr.item():.2f} dB"


def test_transfer_command(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixed.png"
    subject, background, hair = (str(image_path(data, index)) for index in range(3))
    options = ["--subject", subject, "--background", background, "--take", f"hair={hair}", "--out", str(out)]
    assert run_command("transfer", str(checkpoint), *options) == 0
    model = Scam.from_checkpoint(checkpoint)
    expected = model.transfer(*sample(data, 0), {0: sample(data, 1), 2: sample(data, 2)})
    assert (pixels(out) - expected[0]).abs().max() <= 1 / 255 + 1e-6
    plain = model.reconstruct(*sample(data, 0))
    assert (expected - plain).abs().max() > 3 / 255


def test_files_that_are_not_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    cases = {
        "text.ckpt": "cannot be read as a checkpoint; give last.ckpt",
        "cut.ckpt": "cannot be read as a checkpoint",
        "other.ckpt": "is a checkpoint of something else",
        "text.safetensors": "cannot be read as safetensors",
        "other.safetensors": "says nothing of its configuration",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as raised:
            Scam.from_checkpoint(tmp_path / name)
        assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError):
        Scam.from_checkpoint(tmp_path / "nowhere.ckpt")


def test_checkpoint_of_another_configuration(checkpoint: Path, data: Path) -> None:
    message = r"last.ckpt: encoder.layout is \[2, 2, 2\], not \[4, 4, 4\], what was asked for; leave configuration out"
    with pytest.raises(InputError, match=message):
        Scam.from_checkpoint(checkpoint, tiny())
    with pytest.raises(InputError, match="layout is"):
        train(data, small_configuration(steps=3, latents=4), checkpoint.parent, resume=True, report=lambda line: None)


def test_errors_of_commands(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = str(image_path(data, 0)), str(tmp_path / "out.png")
    loose = tmp_path / "loose.png"
    loose.write_bytes(image_path(data, 0).read_bytes())
    transfer = ["transfer", str(checkpoint), "--subject", image, "--out", out]
    Scam.from_checkpoint(checkpoint).export(tmp_path / "unnamed.safetensors")
    cases = [
        (transfer, "nothing to transfer: give --background"),
        ([*transfer, "--take", "hair"], "--take hair: expected LABEL=IMAGE"),
        ([*transfer, "--take", f"shoes={image}"], "label 'shoes': expected a number from 0 to 2 or one of background"),
        ([*transfer, "--background", str(tmp_path / "x.png")], "x.png: no such file"),
        ([*transfer, "--background", str(loose)], "loose.png: expected an image in a folder images"),
        (
            ["transfer", image, *transfer[2:], "--background", image],
            "cannot be read as a checkpoint",
        ),
        ([*transfer[:-1], str(tmp_path / "out.txt"), "--background", image], "expected a name that ends with .png"),
        (["reconstruct", str(tmp_path / "unnamed.safetensors"), image, "--out", out], "does not name the labels"),
        (["export", str(checkpoint), str(tmp_path / "weights.pt")], "expected a name that ends with .safetensors"),
    ]
    for arguments, message in cases:
        assert run_command(*arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
