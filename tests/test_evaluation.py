"""The metrics: distances with known values, models that do the perfect or the wrong thing, features from files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchmetrics")

import torch
from commands import run_command
from image_folders import write_data
from torch import Tensor, nn

from sca_kernels import LabelMap, LatentLayout
from scam_models import Scam, tiny
from scam_models.checkpoints import SavedModel, write_weights
from scam_models.data import PRESETS, LabelledImages, make_data
from scam_models.errors import InputError
from scam_models.evaluation import (
    Evaluation,
    FeatureExtractor,
    InceptionFeatures,
    RandomFeatures,
    ReidentificationFeatures,
    evaluate,
    frechet_distance,
    subject_pairs,
)
from scam_models.evaluation.inception import InceptionV3
from scam_models.evaluation.resnet import ResNet50
from scam_models.serialisation import to_values

DATA = replace(PRESETS["tiny"], height=32, width=32)


def small_model() -> Scam:
    torch.manual_seed(0)
    return Scam.from_configuration(tiny(LatentLayout.uniform(6, 2), 32, 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), height=32, width=32, count=7)


@pytest.fixture
def data(folder: Path) -> LabelledImages:
    return LabelledImages(folder, "test", DATA)


def square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def test_frechet_distance() -> None:
    torch.manual_seed(0)
    one = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 1000
    other = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 1001
    root = square_root(one.T.cov())
    between = square_root(root @ other.T.cov() @ root)
    trace = one.T.cov().trace() + other.T.cov().trace() - 2 * between.trace()
    expected = (one.mean(0) - other.mean(0)).square().sum() + trace
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(one.float(), other.float()) == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(
    "groups", [None, list("aabbccdd"), list("aaaabbcd"), list("abababab"), list("aaaaabcd"), list("aaaaaaaa")]
)
def test_subject_pairs(groups: list[str] | None) -> None:
    found = set()
    for seed in range(6):
        others = subject_pairs(8, groups, seed=seed)
        assert others == subject_pairs(8, groups, seed=seed)
        assert sorted(others) == list(range(8)) and all(index != other for index, other in enumerate(others))
        if groups is not None and max(map(groups.count, groups)) <= 4:
            assert all(groups[index] != groups[other] for index, other in enumerate(others))
        found.add(tuple(others))
    assert len(found) > 1


def test_random_features() -> None:
    images = torch.rand(4, 3, 32, 24) * 2 - 1
    features = RandomFeatures()(images)
    assert torch.equal(features, RandomFeatures()(images)) and not torch.equal(features, RandomFeatures(1)(images))
    assert "random features, seed 1: not comparable with published figures" in RandomFeatures(1).name
    assert (features[:, :3] - images.mean((2, 3))).abs().max() < 1e-6 and features.std(0).min() > 0


# What a model makes of subjects and backgrounds, what it reconstructs, and what is then found.
Transfer = Callable[[Tensor, LabelMap, Tensor, LabelMap], Tensor]
MODELS: dict[str, tuple[Callable[[Tensor], Tensor], Transfer, dict[str, Any]]] = {
    "perfect": (lambda images: images, lambda a, _, b, __: a, {"psnr": 100, "similarity": 1, "accuracy": 1}),
    "background": (lambda images: images * 3, lambda a, _, b, __: b, {"accuracy": 0}),
    "noisy": (
        lambda images: images + 0.1 * torch.where(images > 0, -1.0, 1.0),
        lambda a, _, b, __: a + 0.01 * torch.randn_like(a),
        {"psnr": 26.0206, "accuracy": 1},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_evaluate(kind: str, data: LabelledImages, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reconstruct, transfer, expected = MODELS[kind]
    model, training = small_model(), LabelledImages(folder, "train", DATA)
    asked: list[tuple[Tensor, Tensor]] = []

    def transfer_subject(
        image: Tensor, labels: LabelMap, other: Tensor, other_labels: LabelMap, *, background: tuple[int, ...]
    ) -> Tensor:
        assert background == (0,) and not model.training
        asked.append((image, other))
        return transfer(image, labels, other, other_labels)

    monkeypatch.setattr(model, "reconstruct", lambda image, labels: reconstruct(image))
    monkeypatch.setattr(model, "transfer_subject", transfer_subject)
    before = torch.get_rng_state()
    result = evaluate(model, data, training, batch_size=3, seed=2)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    images = torch.stack([data[index].image for index in range(7)])
    others = subject_pairs(7, seed=2)
    assert torch.equal(torch.cat([subject for subject, _ in asked]), images)
    assert torch.equal(torch.cat([background for _, background in asked]), images[others])

    features = RandomFeatures()
    shown = features(reconstruct(images).clamp(-1, 1))
    trained_on = features(torch.stack([training[index].image for index in range(7)]))
    assert result.r_fid == pytest.approx(frechet_distance(shown, trained_on), rel=1e-3)
    if kind != "noisy":
        assert result.s_fid == pytest.approx(0, abs=1e-3)
        to_subject = features(transfer(images, data, images[others], data)), features(images)  # type: ignore[arg-type]
        similarity = torch.cosine_similarity(*to_subject).mean().item()
        assert result.reid_similarity == pytest.approx(similarity, rel=1e-5)
    found = {"psnr": result.psnr, "similarity": result.reid_similarity, "accuracy": result.reid_accuracy}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert result.images == 7 and "random features" in result.fid_features and "random features" in result.reid_features


@pytest.mark.usefixtures("native")
def test_evaluate_a_model(data: LabelledImages) -> None:
    model = small_model().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.3)
    result = evaluate(model, data)
    assert result == evaluate(model, data, progress=lambda batches, count: list(batches))
    assert result.psnr != evaluate(model, data, seed=1).psnr
    assert result.r_fid is None and 0 < result.psnr < 30 and result.s_fid > 0.01
    assert not model.training


def test_own_features(data: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    class Means(FeatureExtractor):
        name = "means"

        def forward(self, images: Tensor) -> Tensor:
            assert not self.training
            return images.mean((2, 3)) + 5

    model = small_model()
    monkeypatch.setattr(model, "reconstruct", lambda image, labels: image)
    monkeypatch.setattr(model, "transfer_subject", lambda a, la, b, lb, background: (a + 1) / 2)
    result = evaluate(model, data, fid_features=Means())
    assert result.fid_features == "means" and "random" in result.reid_features
    features = Means().eval()(torch.stack([data[index].image for index in range(7)]))
    assert result.s_fid == pytest.approx(frechet_distance((features - 4) / 2 + 5, features), rel=1e-3)
    rows = result.rows()
    assert [row[0] for row in rows] == ["PSNR", "R-FID", "S-FID", "REID similarity", "REID accuracy"]
    assert rows[1][1] == "no training images" and rows[2][2] == "means" and "random features" in rows[3][2]


def test_bad_input(data: LabelledImages, folder: Path) -> None:
    one = LabelledImages(folder, "test", DATA, skip=tuple("123456"))
    with pytest.raises(InputError, match="at least two images of each split"):
        evaluate(small_model(), one)
    with pytest.raises(InputError, match="at least two images of each split"):
        evaluate(small_model(), data, one)
    larger = LabelledImages(folder, "test", PRESETS["tiny"])
    with pytest.raises(InputError, match="is for 32 x 32 pixels with 6 labels, the data set has 64 x 64 with 6"):
        evaluate(small_model(), larger)
    with pytest.raises(InputError, match="groups: expected one for each of 7 images, got 2"):
        evaluate(small_model(), data, groups=["a", "b"])
    with pytest.raises(InputError, match="at least two images, got 1"):
        subject_pairs(1)


def randomised(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize(
    "network, parameters, shapes",
    [
        # Numbers of torchvision's networks without their last layer of 1000 classes, and without auxiliary ones.
        (
            InceptionV3,
            27_161_264 - 3_326_696 - 2_049_000,
            {
                "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
                "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
                "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
                "Mixed_6b.branch7x7dbl_4.conv.weight": (128, 128, 7, 1),
                "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
                "Mixed_7c.branch3x3dbl_3b.bn.running_var": (384,),
                "Mixed_7c.branch1x1.conv.weight": (320, 2048, 1, 1),
            },
        ),
        (
            ResNet50,
            25_557_032 - 2_049_000,
            {
                "conv1.weight": (64, 3, 7, 7),
                "layer1.0.downsample.0.weight": (256, 64, 1, 1),
                "layer3.5.bn3.running_mean": (1024,),
                "layer4.0.conv2.weight": (512, 512, 3, 3),
            },
        ),
    ],
)
def test_networks_are_those_that_files_are_for(
    network: type[nn.Module], parameters: int, shapes: dict[str, tuple[int, ...]]
) -> None:
    made = network()
    assert sum(parameter.numel() for parameter in made.parameters()) == parameters
    state_dict = made.state_dict()
    assert {name: tuple(state_dict[name].shape) for name in shapes} == shapes


def test_inception_pools_as_fid_wants_it() -> None:
    network = InceptionV3().eval()
    x = torch.rand(1, 2048, 5, 5)
    seen: list[Tensor] = []
    for name in ("Mixed_7b", "Mixed_7c", "Mixed_6b"):
        pool = network.get_submodule(name).branch_pool
        assert isinstance(pool, nn.Module)
        pool.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            network.get_submodule(name)(x[:, : {"Mixed_7b": 1280, "Mixed_7c": 2048, "Mixed_6b": 768}[name]])
    for average in (seen[0], seen[2]):
        corner = x[:, : average.shape[1], :2, :2].mean((2, 3))
        torch.testing.assert_close(average[:, :, 0, 0], corner)
    torch.testing.assert_close(seen[1][:, :, 0, 0], x[:, :, :2, :2].amax((2, 3)))


@pytest.mark.parametrize(
    "extractor, network, size", [(InceptionFeatures, InceptionV3, 299), (ReidentificationFeatures, ResNet50, None)]
)
def test_features_from_files(
    extractor: Callable[[Path], FeatureExtractor], network: type[nn.Module], size: int | None, tmp_path: Path
) -> None:
    made = randomised(network())
    state_dict = {name: tensor for name, tensor in made.state_dict().items() if not name.endswith("_tracked")}
    torch.save(state_dict | {"fc.weight": torch.zeros(2, 2048)}, tmp_path / "plain.pth")
    wrapped = {f"module.{name}": tensor for name, tensor in state_dict.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "wrapped.pth")
    images = torch.randint(0, 256, (1, 3, 64, 48)) / 127.5 - 1
    features = extractor(tmp_path / "plain.pth")
    assert features.name.endswith("of plain.pth")
    found = features(images)
    assert found.shape == (1, 2048)
    for one, other in zip(features.parameters(), extractor(tmp_path / "wrapped.pth").parameters(), strict=True):
        assert torch.equal(one, other)
    if size is not None:
        resized = torch.nn.functional.interpolate((images + 1) / 2, size=(size, size), mode="bilinear") * 2 - 1
    else:
        resized = torch.nn.functional.interpolate((images + 1) / 2, size=(256, 128), mode="bilinear", antialias=True)
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        resized = (resized - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(found, made(resized), rtol=1e-3, atol=1e-3)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth: expected a state dict of .*, but conv.* is missing|Conv2d_1a"):
        extractor(tmp_path / "other.pth")


@pytest.mark.usefixtures("native")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data(tmp_path / "data", height=32, width=32, identities=2, test_identities=2, pictures=2)
    model = small_model()
    configuration = {"model": to_values(model.configuration), "data": to_values(DATA)}
    write_weights(tmp_path / "model.safetensors", SavedModel(configuration, model.state_dict()))
    arguments = ("evaluate", str(tmp_path / "model.safetensors"), str(tmp_path / "data"))
    assert run_command(*arguments, "--output", str(tmp_path / "figures.json"), "--batch-size", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["metric", "value", "computed", "with"]
    assert re.match(r"PSNR +\d+\.\d\d dB +4 images", lines[1])
    for line, name in zip(lines[2:], ("R-FID", "S-FID", "REID similarity", "REID accuracy"), strict=True):
        assert re.match(rf"{name} +-?[\d.]+( %)? +random features, seed 0: not comparable with published figures", line)
    figures = Evaluation(**json.loads((tmp_path / "figures.json").read_text()))
    groups = ["one", "one", "other", "other"]
    splits = [LabelledImages(tmp_path / "data", split, DATA) for split in ("test", "train")]
    expected = evaluate(model, *splits, groups=groups, batch_size=3)
    assert figures.reid_features == expected.reid_features
    assert figures.psnr == pytest.approx(expected.psnr, rel=1e-4)
    assert figures.s_fid == pytest.approx(expected.s_fid, rel=1e-2)

    assert run_command(*arguments, "--fid-weights", str(tmp_path / "figures.json")) == 1
    message = r"error: .*figures\.json: expected a state dict of pytorch-fid's Inception v3, and cannot read it.*\n"
    assert re.fullmatch(message, capsys.readouterr().err)
    assert run_command(*arguments, "--reid-weights", str(tmp_path / "absent.pth")) == 1
    assert re.fullmatch(r"error: .*absent\.pth'?\n", capsys.readouterr().err)
