"""What is seen of a training: a progress bar and TensorBoard's scalars."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning
import torch
from tqdm import tqdm

from .module import ScamTraining


class Progress(lightning.Callback):
    """A progress bar with losses, images per second and memory; the same goes to TensorBoard.

    Args:
        every: steps between updates.
        last_step: number of steps of the whole training.
    """

    def __init__(self, every: int, last_step: int) -> None:
        self.every, self.last_step = every, last_step
        self._bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draws the bar, in the first process."""
        assert isinstance(pl_module, ScamTraining)
        self._since, self._from = time.perf_counter(), pl_module.step
        if trainer.is_global_zero:
            self._bar = tqdm(
                total=self.last_step,
                initial=pl_module.step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                # Not thousands of lines where the stream goes to a file.
                mininterval=0.5 if sys.stderr.isatty() else 60,
            )

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Moves the bar on."""
        assert isinstance(pl_module, ScamTraining)
        if self._bar is not None:
            self._bar.update()
        if pl_module.step % self.every and pl_module.step != self.last_step:
            return
        losses = pl_module.latest_losses()
        now = time.perf_counter()
        steps, seconds = pl_module.step - self._from, now - self._since
        self._since, self._from = now, pl_module.step
        images_per_second = pl_module.configuration.batch_size * steps / max(seconds, 1e-9)
        memory = peak_memory(pl_module.device)
        if self._bar is None:
            return
        pl_module.write_scalars({f"losses/{name}": value for name, value in losses.items()})
        pl_module.write_scalars({"speed/images_per_second": images_per_second, "speed/peak_memory_gib": memory})
        shown = {name: f"{value:.3f}" for name, value in losses.items()}
        shown |= {"images/s": f"{images_per_second:.1f}", "memory": f"{memory:.2f} GiB"}
        if pl_module.psnr:
            shown["validation"] = f"{pl_module.psnr:.2f} dB"
        self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leaves the bar as it is."""
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leaves the bar as it is, so that the message has a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def peak_memory(device: torch.device) -> float:
    """The most memory that tensors of a GPU, or else the process, had so far, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
