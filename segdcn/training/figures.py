"""The figures of a run as files: metrics.csv, a row per epoch, and metrics.json and counts.npz at the end."""

from __future__ import annotations

import csv
import io
import math
import os
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from segdcn.errors import UserError, is_passing
from segdcn.runs.files import shown, write_text
from segdcn.training.base import Task
from segdcn.training.folders import output_path


def learning_rates(trainer: pl.Trainer) -> dict[str, float]:
    """Of each parameter group, as ``lr/<name>``."""
    groups = trainer.optimizers[0].param_groups
    return {f"lr/{group.get('name', number)}": float(group["lr"]) for number, group in enumerate(groups)}


def monitored(task: pl.LightningModule) -> str:
    """The figure of a validation by which a run is judged: a ``Task``'s own, of another module the mean IoU."""
    return task.monitor if isinstance(task, Task) else "val/miou"


def shown_figures(task: pl.LightningModule) -> tuple[str, ...]:
    """The figures of an epoch that are looked at first."""
    losses = task.losses if isinstance(task, Task) else ("val/loss",)
    return ("train/loss", *losses, monitored(task))


class EpochFigures(pl.Callback):
    """Knows which figures are of the epoch that ends: Lightning keeps those of earlier validations."""

    _validated_at = -1  # the step of the last validation

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validated_at = trainer.global_step

    def epoch_figures(self, trainer: pl.Trainer) -> dict[str, float]:
        """What this epoch logged, and the learning rates; LearningRateMonitor's (lr-...) are a logging step old."""
        validated = self._validated_at == trainer.global_step
        logged = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("train/") or (validated and not key.startswith("lr-"))
        }
        return logged | learning_rates(trainer)


class MetricsFile(EpochFigures):
    """metrics.csv: one row per epoch, every logged figure a column.

    The file is written whole after each epoch and read back when a run is resumed; rows of epochs that are run
    again replace the old ones. (Lightning's CSV logger starts the file anew on resume.)

    path: None is metrics.csv in Lightning's folder.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._given = path
        self._rows: list[dict[str, str]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.path = output_path(trainer, self._given, "metrics.csv")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises: UserError, one line, where the file of a run that is resumed is damaged."""
        if not os.path.lexists(self.path):
            return
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, strict=True)
                self._rows = list(reader)
            if "epoch" not in (reader.fieldnames or ()) or any(
                None in row or None in row.values() or int(row["epoch"]) < 0 for row in self._rows
            ):
                raise ValueError("a row is not whole")
        except (OSError, ValueError, KeyError, csv.Error) as error:
            if is_passing(error):
                raise
            raise UserError(
                f"{shown(self.path)} is damaged ({type(error).__name__}): mend it, or delete it to begin a new one with"
                " the epochs that follow"
            ) from error

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        row = {"epoch": str(trainer.current_epoch), "step": str(trainer.global_step)}
        for key, value in sorted(self.epoch_figures(trainer).items()):
            row[key] = "" if math.isnan(value) else f"{value:.6g}"
        self._rows = [old for old in self._rows if int(old["epoch"]) < trainer.current_epoch] + [row]
        first = ("epoch", "step", *shown_figures(pl_module))
        columns = list(dict.fromkeys([*first, *(key for old in self._rows for key in old)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.path, text.getvalue())


class FiguresFile(pl.Callback):
    """metrics.json and the task's other files of an evaluation outside of training, before anything is drawn of it.

    folder: where they are written; None is Lightning's folder.
    conditions: what the figures depend on; the evaluation adds protocol, inference and time, and ``images_in_split``
        where it was not of all images.
    """

    def __init__(self, folder: str | Path | None = None, conditions: dict[str, Any] | None = None) -> None:
        self._given = folder
        self.conditions = {} if conditions is None else conditions

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = output_path(trainer, self._given)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.is_global_zero:  # of a run that had ended and goes on: they are of weights that are replaced now
            for name in cast(Task, pl_module).files:
                (self.folder / name).unlink(missing_ok=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: pl.Trainer, pl_module: Any, split: str) -> None:
        if not trainer.is_global_zero:
            return
        result = pl_module.result
        self.conditions |= pl_module.evaluator.describe()
        self.conditions["seconds_per_image"] = result.seconds_per_image
        total = len(cast(Any, trainer).datamodule.dataset.split(split))
        if result.images != total:
            self.conditions["images_in_split"] = total
        pl_module.write_figures(split, self.conditions, self.folder)
