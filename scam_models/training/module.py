"""What a step of training does, as a Lightning module."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from sca_kernels import LabelMap

from ..checkpoints import STATE
from ..discriminator import Discriminator
from ..errors import InputError
from ..losses import (
    PerceptualLoss,
    discriminator_hinge_loss,
    feature_matching_loss,
    generator_hinge_loss,
    r1_penalty,
)
from ..model import Scam
from ..pictures import grid
from ..psnr import psnr
from ..serialisation import to_values
from .configuration import TrainingConfiguration
from .order import mixed_seed

SHOWN_IMAGES = 4


class Batch(NamedTuple):
    """What a data loader makes of samples: images (B, 3, height, width), labels (B, height, width), and names."""

    image: Tensor
    labels: Tensor
    name: list[str]


class ScamTraining(lightning.LightningModule):
    """Trains an encoder and a generator together against a discriminator.

    In each step encoder and generator reconstruct the images and learn from the weighted losses; then the discriminator
    learns to tell these reconstructions from the images. ``average`` follows the weights of ``model`` slowly; it is
    validated and used.

    Random numbers of a step depend on the seed, the number of the step and the process, and on nothing that happened
    before, so that they need not be saved. The number of the next step is ``step``; Lightning's counters start anew in
    each run.

    Args:
        configuration: see :class:`TrainingConfiguration`.
        perceptual: needed if ``configuration.losses`` gives it a weight.
        data_digest: identifies the images; is written into checkpoints and must be the same when training goes on.

    Raises:
        InputError: if ``perceptual`` is needed and not there.
    """

    def __init__(
        self, configuration: TrainingConfiguration, *, perceptual: PerceptualLoss | None = None, data_digest: str = ""
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.configuration = configuration
        losses = configuration.losses
        if losses.perceptual > 0 and perceptual is None:
            raise InputError("perceptual: expected a PerceptualLoss, since its weight is not 0")
        # The weights come from the seed, and the caller's random numbers go on as if nothing had been drawn.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(configuration.seed)
            self.model = Scam.from_configuration(configuration.model)
            self.discriminator = Discriminator(configuration.discriminator) if losses.needs_discriminator else None
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        # Not a submodule: its weights are in their own file, and belong neither into checkpoints nor to DDP.
        self._perceptual = (perceptual,)
        self.data_digest = data_digest
        self.step = 0
        self.psnr = 0.0
        self.best_psnr = float("-inf")
        self.counts_in_validation = True
        self._latest: dict[str, Tensor] = {}
        self._psnr_of_images: list[Tensor] = []

    def configure_optimizers(self) -> list[Optimizer]:
        """AdamW for encoder and generator, and for the discriminator if there is one."""
        configuration = self.configuration
        settings: dict[str, Any] = {"betas": configuration.betas, "weight_decay": configuration.weight_decay}
        optimizers: list[Optimizer] = [AdamW(self.model.parameters(), lr=configuration.generator_rate, **settings)]
        if self.discriminator is not None:
            parameters = self.discriminator.parameters()
            optimizers.append(AdamW(parameters, lr=configuration.discriminator_rate, **settings))
        return optimizers

    def on_fit_start(self) -> None:
        """Brings what is no submodule to the device."""
        for loss in self._perceptual:
            if loss is not None:
                loss.to(self.device)

    def training_step(self, batch: Batch, batch_index: int) -> None:
        """Encoder and generator learn, then the discriminator, and the average follows."""
        torch.manual_seed(mixed_seed(self.configuration.seed, self.step, self.global_rank))
        optimizers = self.optimizers()
        of_generator, *of_discriminator = optimizers if isinstance(optimizers, list) else [optimizers]
        labels = self._label_map(batch)

        self.toggle_optimizer(of_generator)
        reconstructions = self.model(batch.image, labels)
        losses = self._generator_losses(batch.image, reconstructions, labels)
        self._learn(of_generator, losses, self.model)
        self.untoggle_optimizer(of_generator)

        if self.discriminator is not None:
            (optimizer,) = of_discriminator
            self.toggle_optimizer(optimizer)
            of_judge = self._discriminator_losses(self.discriminator, batch.image, reconstructions.detach(), labels)
            self._learn(optimizer, of_judge, self.discriminator)
            self.untoggle_optimizer(optimizer)
            losses |= of_judge

        self._follow()
        self.step += 1
        self._latest = {name: loss.detach() for name, loss in losses.items()}

    def latest_losses(self) -> dict[str, float]:
        """The losses of the last step, without their weights, as the mean over processes. All processes must ask.

        Raises:
            InputError: if one is not a finite number.
        """
        values = torch.stack([loss.float() for loss in self._latest.values()])
        reduced = self.trainer.strategy.reduce(values, reduce_op="mean")
        losses = dict(zip(self._latest, reduced.tolist(), strict=True))
        for name, value in losses.items():
            if not abs(value) < float("inf"):
                raise InputError(
                    f"step {self.step}: {name} is {value}; start again in another --out with --gradient-clip 1, "
                    "smaller rates or --precision 32"
                )
        return losses

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Reconstructs with the averaged weights."""
        # Always the same noise, and the random numbers of the training are left alone.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.configuration.seed)
            labels = self._label_map(batch)
            reconstructions = self.average(batch.image, labels)
            self._psnr_of_images.append(psnr(reconstructions, batch.image))
            if batch_index == 0 and self.global_rank == 0:
                self._show(batch, labels, reconstructions)

    def on_validation_epoch_end(self) -> None:
        """Takes the mean PSNR over all images of all processes."""
        of_images = torch.cat(self._psnr_of_images)
        self._psnr_of_images.clear()
        sums = torch.stack([of_images.sum(), torch.ones_like(of_images).sum()]) * self.counts_in_validation
        total, count = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self.psnr = total / count
        self.write_scalars({"validation/psnr": self.psnr})

    def write_scalars(self, values: dict[str, float]) -> None:
        """Writes values of this step to TensorBoard, in the first process."""
        if isinstance(self.logger, TensorBoardLogger):
            self.logger.log_metrics(values, step=self.step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration and the position."""
        # Lightning would count its batches from there, while the sampler of a new run begins at the right one.
        checkpoint.pop("loops", None)
        checkpoint[STATE] = {
            "configuration": to_values(self.configuration),
            "step": self.step,
            "best_psnr": self.best_psnr,
            "data_digest": self.data_digest,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the position."""
        self.step = checkpoint[STATE]["step"]
        self.best_psnr = checkpoint[STATE]["best_psnr"]

    def _label_map(self, batch: Batch) -> LabelMap:
        return LabelMap.from_labels(batch.labels, self.configuration.data.num_labels, validate=False)

    def _generator_losses(self, images: Tensor, reconstructions: Tensor, labels: LabelMap) -> dict[str, Tensor]:
        weights, losses = self.configuration.losses, dict[str, Tensor]()
        if weights.l1 > 0:
            losses["l1"] = F.l1_loss(reconstructions.float(), images)
        for loss in self._perceptual:
            if weights.perceptual > 0 and loss is not None:
                losses["perceptual"] = loss(reconstructions, images)
        if self.discriminator is not None:
            fake = self.discriminator(reconstructions, labels)
            if weights.adversarial > 0:
                losses["adversarial"] = generator_hinge_loss(fake)
            if weights.feature_matching > 0:
                losses["feature_matching"] = feature_matching_loss(self.discriminator(images, labels), fake)
        return losses

    def _discriminator_losses(
        self, discriminator: Discriminator, images: Tensor, reconstructions: Tensor, labels: LabelMap
    ) -> dict[str, Tensor]:
        with_r1 = self.configuration.losses.r1 > 0 and self.step % self.configuration.r1_every == 0
        images = images.detach().requires_grad_(with_r1)
        real, fake = discriminator(images, labels), discriminator(reconstructions, labels)
        losses = {"discriminator": discriminator_hinge_loss(real, fake)}
        if with_r1:
            losses["r1"] = r1_penalty(real, images)
        return losses

    def _learn(self, optimizer: Any, losses: dict[str, Tensor], network: nn.Module) -> None:
        # The discriminator's own loss has no weight: AdamW would take it out again.
        weights = {"discriminator": 1.0} | to_values(self.configuration.losses)
        weighted = [weights[name] * loss for name, loss in losses.items()]
        optimizer.zero_grad()
        self.manual_backward(torch.stack(weighted).sum())
        if self.configuration.gradient_clip > 0:
            nn.utils.clip_grad_norm_(network.parameters(), self.configuration.gradient_clip)
        optimizer.step()

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.configuration.average_decay, (1 + self.step) / (10 + self.step))
        for average, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(current, 1 - decay)
        for buffer, current_buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            buffer.copy_(current_buffer)

    def _show(self, batch: Batch, labels: LabelMap, reconstructions: Tensor) -> None:
        """Images, their reconstructions, and each subject before the background of the image to its left."""
        if not isinstance(self.logger, TensorBoardLogger):
            return
        transfers = self.average.transfer_subject(
            batch.image,
            labels,
            batch.image.roll(1, 0),
            LabelMap(labels.labels.roll(1, 0), labels.num_labels),
            background=self.configuration.data.background,
        )
        rows = (batch.image, reconstructions, transfers)
        picture = grid([images[:SHOWN_IMAGES].unbind() for images in rows])
        self.logger.experiment.add_image(
            "validation/images_reconstructions_transfers", (picture / 2 + 0.5).clamp(0, 1), self.step
        )
