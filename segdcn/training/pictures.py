"""Pictures of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn

from segdcn.data.dataset import spread_over
from segdcn.drawing.decoration import decoration
from segdcn.runs.files import write_png
from segdcn.training.base import Task
from segdcn.training.folders import output_path


class Panels(pl.Callback):
    """panels/: the ``pictures`` that a task makes of images spread over the split, when a checkpoint is evaluated.

    Nothing is drawn within ``fit``: an epoch of a small run takes less time.

    folder: None is panels/ in Lightning's folder.  images: how many at most.

    The trainer must have been given a ``DataModule`` of ours.
    """

    def __init__(self, folder: str | Path | None = None, images: int = 6) -> None:
        self._given = folder
        self.images = images

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = output_path(trainer, self._given, "panels")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, cast(Task, pl_module), "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, cast(Task, pl_module), "test")

    @torch.no_grad()
    def _write(self, trainer: pl.Trainer, task: Task, split: str) -> None:
        if not trainer.is_global_zero:
            return
        data = cast(Any, trainer).datamodule
        samples = data.dataset.split(split)
        for number, place in enumerate(spread_over(len(samples), self.images)):
            with decoration(f"panel {split}_{number}.png", "segdcn-evaluate draws it again"):
                for suffix, picture in task.pictures(samples[place], data):
                    write_png(self.folder / f"{split}_{number}{suffix}.png", picture)
