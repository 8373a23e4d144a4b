"""Training from a folder of images to a folder of checkpoints."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Subset, default_collate

from ..checkpoints import STATE, read_checkpoint
from ..data import LabelledImages, open_checked
from ..errors import InputError
from ..losses import PerceptualLoss
from ..serialisation import first_difference, to_values
from .ablations import without
from .checkpoints import LAST, Checkpoints, WholeFiles
from .configuration import MAY_CHANGE, TrainingConfiguration
from .module import Batch, ScamTraining
from .order import StepSampler, split
from .progress import Progress


class TrainingData(lightning.LightningDataModule):
    """The batches from the current step to the next validation, and the images kept for it.

    Args:
        images: of "train".
        module: whose step it is.
        workers: processes that load images for each process that trains; 0 loads in that one.
    """

    def __init__(self, images: LabelledImages, module: ScamTraining, workers: int) -> None:
        super().__init__()
        self.images, self.module, self.workers = images, module, workers
        configuration = module.configuration
        self.learned, self.kept = split(len(images), configuration.validation_share, configuration.seed)

    def train_dataloader(self) -> DataLoader[Any]:
        """Is asked for anew after each validation."""
        trainer, configuration, step = self._trainer(), self.module.configuration, self.module.step
        sampler = StepSampler(
            self.learned,
            batch_size=configuration.batch_size,
            seed=configuration.seed,
            begin=step,
            end=min(_next_multiple(step, configuration.validate_every), configuration.steps),
            process=trainer.global_rank,
            processes=trainer.world_size,
        )
        return self._loader(self.images, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """None of the images where none are kept."""
        trainer = self._trainer()
        own = self.kept[trainer.global_rank :: trainer.world_size]
        # All processes validate, or those that do would wait for the others: without an image of its own, on any.
        self.module.counts_in_validation = bool(own)
        own = own or self.kept[:1]
        batch_size = max(self.module.configuration.batch_size // trainer.world_size, 1)
        return self._loader(Subset(self.images, own), batch_size=batch_size) if self.kept else []

    def _trainer(self) -> lightning.Trainer:
        assert self.trainer is not None
        return self.trainer

    def _loader(self, images: Any, **options: Any) -> DataLoader[Any]:
        # A generator of its own: iterating would otherwise draw from the one that the noise comes from.
        return DataLoader(
            images,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            **options,
        )


def train(
    data: str | Path,
    configuration: TrainingConfiguration,
    out: str | Path,
    *,
    resume: bool = False,
    vgg: str | Path | None = None,
    skip_problems: bool = False,
    devices: int | Literal["auto"] = "auto",
    accelerator: str = "auto",
    workers: int = 4,
    report_every: int = 10,
    report: Callable[[str], None] = print,
) -> Path:
    """Trains, and writes checkpoints and TensorBoard's files.

    A run that was interrupted, by whatever, goes on from its last checkpoint with ``resume`` and ends with the same
    bits as if it had not been, on one process of the same kind.

    Args:
        data: a folder with train/images and train/labels.
        configuration: see :class:`TrainingConfiguration`.
        out: the folder that is written. ``last.ckpt`` and ``best.ckpt`` are in it.
        resume: whether to go on from ``last.ckpt`` if it is there.
        vgg: a file for the perceptual loss, see :meth:`scam_models.PerceptualLoss.from_file`. Without it that loss is
            off, and ``report`` is told.
        skip_problems: whether files that cannot be used are left out; otherwise they are an error.
        devices: number of processes, each with a GPU if there are any. "auto" takes all GPUs.
        accelerator: "cpu", "gpu" or "auto".
        workers: processes that load images for each of them.
        report_every: steps between updates of what is shown.
        report: is called with lines of text.

    Returns:
        the last checkpoint.

    Raises:
        InputError: if the data cannot be used, or a run is there already, or is another one's.
    """
    out = Path(out)
    last = out / LAST
    accelerator, count = _devices(devices, accelerator)
    if configuration.batch_size % count:
        raise InputError(f"batch_size: expected a multiple of the {count} processes, got {configuration.batch_size}")
    if getattr(rank_zero_only, "rank", 0):
        report = _say_nothing
    if vgg is None and configuration.losses.perceptual > 0:
        report(
            "perceptual loss: OFF, for it needs the weights of VGG19; give torchvision's vgg19 file with --vgg "
            "(results differ from the paper's)"
        )
        configuration = without(configuration, ["perceptual"])
    images = open_checked(
        data, "train", configuration.data, skip_problems=skip_problems, report=report, flip=configuration.data.flip
    )
    digest = hashlib.blake2b("\n".join(images.names).encode(), digest_size=16).hexdigest()
    if last.exists():
        _check_same_run(last, configuration, digest, resume)
    elif resume:
        report(f"{last}: not there yet; starting from step 0")

    perceptual = PerceptualLoss.from_file(vgg) if configuration.losses.perceptual > 0 and vgg is not None else None
    module = ScamTraining(configuration, perceptual=perceptual, data_digest=digest)
    begin = read_checkpoint(last)[STATE]["step"] if last.exists() else 0
    if begin >= configuration.steps:
        report(f"{last}: has its {begin} steps already; --steps with a larger number goes on")
        return last
    source = TrainingData(images, module, workers)
    # What Lightning finds and recommends is not what the user asked about.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=count,
        strategy=DDPStrategy(find_unused_parameters=True, broadcast_buffers=False) if count > 1 else "auto",
        precision="bf16-mixed" if configuration.precision == "bf16" else "32-true",
        # One epoch of Lightning's is what lies between two validations.
        max_epochs=-(-configuration.steps // configuration.validate_every) - begin // configuration.validate_every,
        reload_dataloaders_every_n_epochs=1,
        limit_val_batches=None if source.kept else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(out, name=None, version="tensorboard", purge_step=begin + 1),
        callbacks=[
            Checkpoints(out, configuration.steps, validates=bool(source.kept)),
            Progress(report_every, configuration.steps),
        ],
        plugins=[WholeFiles()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        # The number of workers and of batches is as the user wants it.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*number of training batches.*")
        # The averaged weights are meant to be.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        # Lightning's own business with PyTorch.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
        trainer.fit(module, datamodule=source, ckpt_path=last if last.exists() else None)
    return last


def _check_same_run(last: Path, configuration: TrainingConfiguration, digest: str, resume: bool) -> None:
    state = read_checkpoint(last)[STATE]
    if not resume:
        raise InputError(
            f"{last.parent}: holds a run at step {state['step']}; --resume goes on with it, or name another"
        )
    difference = first_difference(state["configuration"], to_values(configuration), ignored=MAY_CHANGE)
    if difference is not None:
        raise InputError(f"{last}: the run's {difference}; give the options that it was started with, or another --out")
    if state["data_digest"] != digest:
        raise InputError(f"{last}: was made from other images; give the folder that it was started with, as it was")


def _devices(devices: int | Literal["auto"], accelerator: str) -> tuple[str, int]:
    """What trains, "gpu" or "cpu", and in how many processes."""
    gpus = torch.cuda.device_count()
    if accelerator not in ("auto", "cpu", "gpu"):
        raise InputError(f"accelerator: expected cpu, gpu or auto, got {accelerator}")
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "cpu"
    every = max(gpus, 1) if accelerator == "gpu" else 1
    count = every if devices == "auto" else devices
    if count < 1:
        raise InputError(f"devices: expected a positive number, got {count}")
    if accelerator == "gpu" and count > gpus:
        raise InputError(f"devices: {count} GPUs were asked for, there are {gpus}; use fewer, or --accelerator cpu")
    return accelerator, count


def _say_nothing(line: str) -> None:
    """What the first process says is enough."""


def _next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every


def _collate(samples: list[Any]) -> Batch:
    return Batch(*default_collate(samples))
