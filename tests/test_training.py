"""Training: what a step does, the order of images, going on from checkpoints, errors."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

import torch
from commands import run_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from training_runs import NUM_LABELS, SIZE, assert_same_bits, read, small_configuration, write_data

from sca_kernels import LabelMap
from scam_models import (
    InputError,
    LossWeights,
    PerceptualLoss,
    discriminator_hinge_loss,
    feature_matching_loss,
    generator_hinge_loss,
    r1_penalty,
)
from scam_models.training import ScamTraining, TrainingConfiguration, train, training_preset
from scam_models.training.module import Batch
from scam_models.training.order import StepSampler, mixed_seed, split
from scam_models.vgg import Vgg19

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def run(data: Path, out: Path, configuration: TrainingConfiguration, **options: Any) -> Path:
    settings: dict[str, Any] = {"accelerator": "cpu", "workers": 0, "report_every": 1, "report": lambda line: None}
    return train(data, configuration, out, **settings | options)


def scalars(out: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def reference_step(
    training: ScamTraining, images: Tensor, labels: LabelMap, losses: LossWeights
) -> tuple[ScamTraining, Tensor, Tensor]:
    """A step written out with plain PyTorch, on a copy: the copy, and the losses of generator and discriminator."""
    twin = copy.deepcopy(training)
    model, judge = twin.model, twin.discriminator
    assert judge is not None
    configuration = twin.configuration
    options: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.01}
    of_generator = torch.optim.AdamW(model.parameters(), lr=configuration.generator_rate, **options)
    of_judge = torch.optim.AdamW(judge.parameters(), lr=configuration.discriminator_rate, **options)

    torch.manual_seed(mixed_seed(configuration.seed, 0, 0))
    made = model(images, labels)
    real, fake = judge(images, labels), judge(made, labels)
    (perceptual,) = twin._perceptual
    assert perceptual is not None
    loss = losses.l1 * (made - images).abs().mean() + losses.adversarial * generator_hinge_loss(fake)
    loss = loss + losses.perceptual * perceptual(made, images)
    loss = loss + losses.feature_matching * feature_matching_loss(real, fake)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    of_generator.step()

    real_images = images.clone().requires_grad_()
    real, fake = judge(real_images, labels), judge(made.detach(), labels)
    judge_loss = discriminator_hinge_loss(real, fake) + losses.r1 * r1_penalty(real, real_images)
    gradients = torch.autograd.grad(judge_loss, list(judge.parameters()))
    for parameter, gradient in zip(judge.parameters(), gradients, strict=True):
        parameter.grad = gradient
    of_judge.step()
    return twin, loss.detach(), judge_loss.detach()


class OneStep:
    """What a module asks of its trainer in a training step."""

    def __init__(self, training: ScamTraining) -> None:
        self.optimizers = training.configure_optimizers()

    def run(self, training: ScamTraining, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(training, "optimizers", lambda: self.optimizers)
        monkeypatch.setattr(training, "manual_backward", lambda loss: loss.backward())
        monkeypatch.setattr(type(training), "trainer", self, raising=False)
        monkeypatch.setattr(type(training), "global_rank", 0, raising=False)
        training.training_step(batch, 0)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, SIZE, SIZE, generator=generator) * 2 - 1
    return Batch(images, torch.randint(NUM_LABELS, (2, SIZE, SIZE), generator=generator).int(), ["a", "b"])


def test_step_is_that_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = LossWeights(adversarial=2.0, perceptual=3.0, l1=7.0, feature_matching=4.0, r1=0.5)
    configuration = small_configuration(losses=losses)
    torch.manual_seed(0)
    training = ScamTraining(configuration, perceptual=PerceptualLoss(Vgg19()))
    before = copy.deepcopy(training.average)
    batch = make_batch()
    labels = LabelMap.from_labels(batch.labels, NUM_LABELS)
    expected, loss, judge_loss = reference_step(training, batch.image, labels, losses)
    OneStep(training).run(training, batch, monkeypatch)

    values = {name: value.item() for name, value in training._latest.items()}
    names = ("l1", "adversarial", "perceptual", "feature_matching")
    assert sum(getattr(losses, name) * values[name] for name in names) == pytest.approx(float(loss), rel=1e-5)
    assert values["discriminator"] + losses.r1 * values["r1"] == pytest.approx(float(judge_loss), rel=1e-5)
    rates = {"model": configuration.generator_rate, "discriminator": configuration.discriminator_rate}
    for network, rate in rates.items():
        for got, want in zip(
            getattr(training, network).parameters(), getattr(expected, network).parameters(), strict=True
        ):
            if want.grad is not None:
                assert got.grad is not None
                assert (got.grad - want.grad).norm() <= 1e-4 * want.grad.norm() + 1e-7
            # AdamW moves each weight by about the rate, and those without a gradient to speak of in any direction.
            assert (got - want).abs().mean() < 0.01 * rate
    # In the first step a tenth of the old weights stays.
    for name, average in training.average.named_parameters():
        mixed = 0.1 * before.get_parameter(name) + 0.9 * training.model.get_parameter(name)
        torch.testing.assert_close(average.data, mixed.data)


def test_weights_come_from_the_seed_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one, same = (ScamTraining(small_configuration(seed=3)).model.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    other = ScamTraining(small_configuration(seed=4)).model.state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def batches(begin: int, end: int, **options: Any) -> list[list[tuple[int, int]]]:
    settings: dict[str, Any] = {"batch_size": 4, "seed": 1, "begin": begin, "end": end}
    return list(StepSampler([10, 11, 12, 13, 14, 15, 16], **settings | options))


def test_order_of_images() -> None:
    row = [image for batch in batches(0, 7) for image, _ in batch]
    epochs = [row[begin : begin + 7] for begin in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(10, 17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({seed for batch in batches(0, 7) for _, seed in batch}) == 28
    assert batches(0, 7)[3:5] == batches(3, 5)
    assert batches(0, 7) != batches(0, 7, seed=2)


def test_processes_share_the_batches() -> None:
    halves = [batches(2, 5, process=process, processes=2) for process in range(2)]
    assert [one + other for one, other in zip(*halves, strict=True)] == batches(2, 5)


@pytest.mark.parametrize("count, share, kept", [(100, 0.1, 10), (9, 0.01, 1), (1, 0.5, 0), (10, 0.0, 0)])
def test_split(count: int, share: float, kept: int) -> None:
    learned, validated = split(count, share, seed=0)
    assert len(validated) == kept and sorted(learned + validated) == list(range(count))


def test_interrupted_training_ends_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of an epoch, where a validation lies, and where neither is."""
    configuration = small_configuration()
    whole = run(data, tmp_path / "whole", configuration)
    assert read(whole)["scam"]["step"] == 7
    for steps in (2, 4, 5):
        run(data, tmp_path / "parts", replace(configuration, steps=steps), resume=True)
    torch.manual_seed(1234)  # what was drawn elsewhere does not matter
    last = run(data, tmp_path / "parts", configuration, resume=True)
    # The validations at the ends of the parts may have found another best one.
    for path in (whole, last):
        checkpoint = read(path)
        checkpoint["scam"] |= {"best_psnr": 0, "configuration": checkpoint["scam"]["configuration"] | {"steps": 7}}
        torch.save(checkpoint, path)
    assert_same_bits(whole, last)
    losses = [scalars(tmp_path / name, "losses/discriminator") for name in ("whole", "parts")]
    assert losses[0] == losses[1] and list(losses[0]) == list(range(1, 8))


def test_result_does_not_depend_on_the_workers(data: Path, tmp_path: Path) -> None:
    configuration = small_configuration(steps=3, validate_every=2)
    one = run(data, tmp_path / "one", configuration)
    assert_same_bits(one, run(data, tmp_path / "two", configuration, workers=2))


def test_best_checkpoint_and_what_is_shown(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, small_configuration(steps=12, validate_every=3, generator_rate=3e-3))
    psnr = scalars(tmp_path, "validation/psnr")
    assert list(psnr) == [3, 6, 9, 12]
    best = read(tmp_path / "best.ckpt")["scam"]
    assert best["best_psnr"] == pytest.approx(max(psnr.values()), rel=1e-6)
    assert psnr[best["step"]] == max(psnr.values())
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert len(events.Images("validation/images_reconstructions_transfers")) == 4
    assert {"losses/l1", "losses/adversarial", "speed/images_per_second", "speed/peak_memory_gib"} <= set(
        events.Tags()["scalars"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt", "tensorboard"]


def test_losses_fall(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, small_configuration(steps=30, generator_rate=3e-3, checkpoint_every=30, validate_every=30))
    l1 = list(scalars(tmp_path, "losses/l1").values())
    assert sum(l1[-5:]) < 0.7 * sum(l1[:5])


OPTIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"precision": "bf16"},
    "no discriminator": {"losses": LossWeights(adversarial=0.0, perceptual=0.0)},
    "matching only": {"losses": LossWeights(adversarial=0.0, perceptual=0.0, l1=0.0, feature_matching=10.0)},
    "R1": {"losses": LossWeights(perceptual=0.0, r1=1.0), "r1_every": 2},
    "clipping": {"gradient_clip": 0.1},
    "no validation": {"validation_share": 0.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(data: Path, tmp_path: Path, name: str) -> None:
    configuration = small_configuration(steps=3, **OPTIONS[name])
    last = run(data, tmp_path, configuration)
    checkpoint = read(last)
    assert checkpoint["scam"]["step"] == 3
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    assert (tmp_path / "best.ckpt").exists() is (name != "no validation")
    has_discriminator = any(key.startswith("discriminator.") for key in checkpoint["state_dict"])
    assert has_discriminator is (name != "no discriminator")
    assert len(checkpoint["optimizer_states"]) == 1 + has_discriminator


def test_gradient_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped gradients of norm 0.1, of both networks."""
    training = ScamTraining(small_configuration(gradient_clip=0.1))
    OneStep(training).run(training, make_batch(), monkeypatch)
    for network in (training.model, training.discriminator):
        assert network is not None
        gradients = [parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]
        assert float(torch.cat(gradients).norm()) == pytest.approx(0.1, rel=1e-3)


def test_perceptual_loss_without_its_file_is_off_and_said_to_be(data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    configuration = small_configuration(steps=1, losses=LossWeights())
    last = run(data, tmp_path, configuration, report=lines.append)
    assert [line for line in lines if "perceptual loss: OFF" in line and "--vgg" in line]
    assert read(last)["scam"]["configuration"]["losses"]["perceptual"] == 0
    with pytest.raises(InputError, match="perceptual: expected a PerceptualLoss"):
        ScamTraining(configuration)


def test_perceptual_loss_with_its_file(data: Path, tmp_path: Path) -> None:
    torch.save(Vgg19().state_dict(), tmp_path / "vgg19.pth")
    last = run(data, tmp_path / "out", small_configuration(steps=1, losses=LossWeights()), vgg=tmp_path / "vgg19.pth")
    assert scalars(tmp_path / "out", "losses/perceptual")[1] > 0
    assert not [name for name in read(last)["state_dict"] if "features" in name]


def test_other_runs_are_refused(data: Path, tmp_path: Path) -> None:
    configuration = small_configuration(steps=1)
    run(data, tmp_path / "out", configuration)
    cases: list[tuple[Path, TrainingConfiguration, bool, str]] = [
        (data, configuration, False, "holds a run at step 1; --resume"),
        (data, replace(configuration, batch_size=4), True, "the run's batch_size is 2, not 4"),
        (data, small_configuration(noise=False), True, "model.generator.noise is True, not False"),
        (write_data(tmp_path / "other", count=8), replace(configuration, steps=2), True, "made from other images"),
    ]
    for folder, other, resume, message in cases:
        with pytest.raises(InputError, match=message):
            run(folder, tmp_path / "out", other, resume=resume)
    lines: list[str] = []
    run(data, tmp_path / "out", configuration, resume=True, report=lines.append)
    assert "has its 1 steps already" in lines[-1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"devices": 0}, "devices: expected a positive number, got 0"),
        ({"devices": 3}, "batch_size: expected a multiple of the 3 processes, got 2"),
        ({"accelerator": "tpu"}, "accelerator: expected cpu, gpu or auto, got tpu"),
        ({"accelerator": "gpu", "devices": 99}, "devices: 99 GPUs were asked for"),
    ],
)
def test_devices_that_cannot_be_used(data: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(data, tmp_path, small_configuration(), **options)


def test_numbers_that_are_not_finite_stop_the_training(data: Path, tmp_path: Path) -> None:
    configuration = small_configuration(steps=7, generator_rate=1e30, validation_share=0.0)
    with pytest.raises(InputError, match=r"step \d: .* is (nan|inf|-inf); start again in another --out"):
        run(data, tmp_path, configuration, report_every=100)
    if (tmp_path / "last.ckpt").exists():
        assert read(tmp_path / "last.ckpt")["scam"]["step"] < 3


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 0}, "steps: expected a positive number, got 0"),
    "precision": ({"precision": "16"}, "precision: expected '32' or 'bf16', got '16'"),
    "share": ({"validation_share": 0.9}, "validation_share: expected a number from 0 to 0.5, got 0.9"),
    "rate": ({"generator_rate": -1.0}, "generator_rate: expected a number of at least 0, got -1.0"),
    "no loss": ({"losses": LossWeights(adversarial=0, l1=0, perceptual=0, r1=1)}, "losses: expected a loss"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    options, message = ERRORS[name]
    with pytest.raises(InputError, match=message):
        small_configuration(**options)


@pytest.mark.parametrize("name", ["idesigner", "celebamask-hq", "ade20k"])
def test_presets_are_those_of_the_paper(name: str) -> None:
    preset = training_preset(name)
    assert (preset.generator_rate, preset.discriminator_rate) == (1e-4, 4e-4)
    assert (preset.betas, preset.weight_decay) == ((0.9, 0.999), 0.01)
    assert (preset.batch_size, preset.steps) == (32, 50_000)
    assert preset.losses == LossWeights(adversarial=1, perceptual=10, l1=10)
    assert preset.discriminator.first_channels == 64 and preset.discriminator.gradient_normalised
    assert preset.model.generator.layout.max_per_label == 8
    assert training_preset(name, latents=4).model.encoder.layout.max_per_label == 4


def test_errors_of_the_command(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    own = ("--labels", "3", "--size", "32", "--accelerator", "cpu")
    cases = [
        ((str(tmp_path), *own), "no such folder"),
        ((str(data), "--preset", "x"), "preset 'x': expected one of idesigner"),
        ((str(data), *own, "--no", "x"), "without 'x': expected one of encoder-"),
        ((str(data), *own, "--batch-size", "0"), "batch_size: expected a positive"),
        ((str(data), *own, "--vgg", str(tmp_path / "x")), "No such file"),
    ]
    for arguments, message in cases:
        assert run_command("train", *arguments, "--out", str(out)) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
        assert not out.exists()
