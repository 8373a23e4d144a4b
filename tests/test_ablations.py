"""What is left out, and the table of what it is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightning")

import torch
from commands import run_command
from training_runs import NUM_LABELS, small_configuration, write_data

from sca_kernels import LabelMap
from scam_models import InputError, LossWeights, Scam
from scam_models.data import LabelledImages
from scam_models.encoder import EncoderBlock
from scam_models.evaluation import evaluate
from scam_models.training import ABLATIONS, TrainingConfiguration, training_preset, without
from scam_models.training.ablation_table import ablate, variants
from scam_models.training.configuration import with_latents

pytestmark = pytest.mark.usefixtures("native")

ALL_LOSSES = LossWeights(feature_matching=10.0, r1=1.0)


def has_no_convolutions(model: Scam) -> bool:
    return len(model.encoder.convolutions) == 0


def has_no_self_attention(model: Scam) -> bool:
    return all(isinstance(block, EncoderBlock) and block.self_attention is None for block in model.encoder.blocks)


def makes_no_noise(model: Scam) -> bool:
    return not any(name.endswith("noise_strength") for name, _ in model.named_parameters())


@torch.no_grad()
def updates_no_latents(model: Scam) -> bool:
    """Whether every block is given the same latents, whatever the features are."""
    seen: list[torch.Tensor] = []
    for block in model.generator.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    latents = torch.randn(1, *model.generator.configuration.latents_shape)
    model.generate(LabelMap.from_labels(torch.zeros(32, 32, dtype=torch.int), NUM_LABELS), latents)
    return all(torch.equal(of_block, latents) for of_block in seen)


NETWORKS: dict[str, Callable[[Scam], bool]] = {
    "encoder-convolutions": has_no_convolutions,
    "self-attention": has_no_self_attention,
    "latent-update": updates_no_latents,
    "noise": makes_no_noise,
}


@pytest.mark.parametrize("part", NETWORKS)
def test_networks_without_a_part(part: str) -> None:
    whole = small_configuration()
    is_without = NETWORKS[part]
    assert not is_without(Scam.from_configuration(whole.model))
    changed = without(whole, [part])
    assert is_without(Scam.from_configuration(changed.model))
    # And the others are still there.
    assert not any(others(Scam.from_configuration(changed.model)) for name, others in NETWORKS.items() if name != part)


@pytest.mark.parametrize("part", sorted(ABLATIONS.keys() - NETWORKS.keys()))
def test_training_without_a_loss(part: str) -> None:
    whole = small_configuration(losses=ALL_LOSSES)
    name = part.replace("-", "_")
    assert getattr(whole.losses, name) > 0
    assert without(whole, [part]) == replace(whole, losses=replace(ALL_LOSSES, **{name: 0.0}))


def test_several_parts_and_unknown_ones() -> None:
    whole = small_configuration(losses=ALL_LOSSES)
    both = without(whole, ["l1", "latent-update"])
    assert both.losses.l1 == 0 and not both.model.generator.duplex
    with pytest.raises(InputError, match="without 'x': expected one of encoder-convolutions, self-attention"):
        without(whole, ["x"])
    with pytest.raises(InputError, match="losses: expected a loss"):
        without(whole, ["l1", "adversarial", "perceptual", "feature-matching"])


@pytest.mark.parametrize("latents", [4, 8, 16, 32])
def test_numbers_of_latents(latents: int) -> None:
    changed = with_latents(training_preset("tiny"), latents)
    assert changed.model.encoder.layout.latents_per_label == (latents,) * 6
    assert changed == training_preset("tiny", latents=latents)


def test_variants_of_the_preset() -> None:
    names = list(variants(training_preset("tiny")))
    parts = ("encoder-convolutions", "self-attention", "latent-update", "noise", "adversarial", "perceptual", "l1")
    assert names == ["whole", *(f"without {part}" for part in parts), "4 latents", "16 latents", "32 latents"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path / "data", count=4)
    return write_data(tmp_path / "data", count=3, split="test")


def small_variants() -> dict[str, TrainingConfiguration]:
    configuration = small_configuration(steps=1)
    return {"whole": configuration, "without l1": without(configuration, ["l1"])}


def test_table(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = ablate(data, small_variants(), out, seeds=(0, 5), accelerator="cpu", workers=0, report=lambda line: None)
    assert [(result.variant, result.seed) for result in results] == [
        ("whole", 0),
        ("whole", 5),
        ("without l1", 0),
        ("without l1", 5),
    ]
    images = LabelledImages(data, "test", small_configuration().data)
    for result in results:
        model = Scam.from_checkpoint(out / f"{result.variant.replace(' ', '-')}-seed-{result.seed}" / "last.ckpt")
        found = evaluate(model, images)
        assert (result.psnr, result.s_fid, result.features) == (found.psnr, found.s_fid, found.fid_features)
        assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len({result.psnr for result in results}) == 4
    saved = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["psnr"] for line in saved] == [result.psnr for result in results]
    rows = (out / "table.md").read_text().splitlines()
    whole, other = ((results[at].psnr + results[at + 1].psnr) / 2 for at in (0, 2))
    assert results[0].features in rows[0] and "random" in rows[0]
    assert f"| {whole:.2f} ± " in rows[2] and rows[2].startswith("| whole |")
    assert rows[3].startswith("| without l1 |") and f"| {other - whole:+.2f} |" in rows[3]


def test_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--labels", "3", "--size", "32", "--steps", "1", "--batch-size", "2", "--accelerator", "cpu"]
    arguments = ["ablate", str(data), "--out", str(tmp_path / "out"), *small, "--workers", "0"]
    assert run_command(*arguments, "--only", "4 latents") == 0
    output = capsys.readouterr().out
    assert "perceptual loss: OFF in all" in output
    assert "| 4 latents |" in output and "| whole |" in output and "without" not in output
    assert run_command(*arguments, "--only", "5 latents") == 1
    assert "--only '5 latents': expected one of whole, without encoder-convolutions" in capsys.readouterr().err
