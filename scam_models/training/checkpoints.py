"""When checkpoints are written, and how: whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import CheckpointIO

from ..files import write_whole
from .module import ScamTraining

LAST, BEST = "last.ckpt", "best.ckpt"


class WholeFiles(CheckpointIO):
    """Checkpoints are written under a temporary name and renamed; they hold nothing but tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint, or leaves the old one as it was."""
        write_whole(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint into the memory of the processor."""
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Deletes a checkpoint."""
        Path(path).unlink(missing_ok=True)


class Checkpoints(lightning.Callback):
    """Writes ``last.ckpt`` every so many steps and at the end, and ``best.ckpt`` where validation was best.

    Args:
        folder: of the files.
        last_step: number of steps of the whole training.
        validates: whether there are validations.
    """

    def __init__(self, folder: Path, last_step: int, *, validates: bool) -> None:
        self.folder, self.last_step, self.validates = folder, last_step, validates

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Saves if it is time, unless a validation follows."""
        module = _as_training(pl_module)
        configuration, is_end = module.configuration, module.step == self.last_step
        is_due = is_end or module.step % configuration.checkpoint_every == 0
        validation_follows = self.validates and (is_end or module.step % configuration.validate_every == 0)
        if is_due:
            module.latest_losses()  # raises rather than let numbers that are not finite replace good weights
        if is_due and not validation_follows:
            trainer.save_checkpoint(self.folder / LAST)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Saves; the best one first, so that a run that goes on from the last one knows what was best."""
        module = _as_training(pl_module)
        if module.psnr > module.best_psnr:
            module.best_psnr = module.psnr
            trainer.save_checkpoint(self.folder / BEST)
        trainer.save_checkpoint(self.folder / LAST)


def _as_training(module: lightning.LightningModule) -> ScamTraining:
    assert isinstance(module, ScamTraining)
    return module
