"""How far a training is: a line and a row of metrics.csv per epoch, its time, and the figures at its end."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar, Timer
from pytorch_lightning.trainer.states import TrainerFn

from segdcn import UserError, is_passing
from segdcn.runs.figures import COUNTS_FILE, write_figures
from segdcn.runs.files import shown, write_text


class _EpochFigures(pl.Callback):
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
        groups = trainer.optimizers[0].param_groups
        return logged | {f"lr/{group.get('name', number)}": float(group["lr"]) for number, group in enumerate(groups)}


class LearningRates(pl.Callback):
    """Each parameter group's learning rate for the loggers, where there are any, as often as they get a loss."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            groups = trainer.optimizers[0].param_groups
            rates = {f"lr/{group.get('name', number)}": float(group["lr"]) for number, group in enumerate(groups)}
            for logger in trainer.loggers:
                logger.log_metrics(rates, step=trainer.global_step)


class EpochLines(_EpochFigures, RichProgressBar):
    """Rich's bar in a terminal, nothing in a log file; one plain line per epoch in both."""

    def __init__(self) -> None:
        super().__init__(leave=False, refresh_rate=1 if sys.stdout.isatty() else 0)
        self._started = 0.0
        self._best = -math.inf

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started = time.monotonic()  # of an epoch that is resumed in its middle, what is left of it

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        metrics = self.epoch_figures(trainer)
        miou = metrics.get("val/miou", math.nan)
        marker = " *" if miou > self._best else ""
        self._best = max(self._best, miou)
        figures = [f"{key} {metrics[key]:.4f}" for key in ("train/loss", "val/loss", "val/miou") if key in metrics]
        of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        line = f"epoch {trainer.current_epoch + 1:>3}{of}  step {trainer.global_step:>6}  " + "  ".join(figures)
        print(f"{line}  {time.monotonic() - self._started:.0f} s{marker}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]


class TrainingTime(Timer):
    """Lightning's Timer, which counts on when a run is resumed; where it is, ``trainer.max_time`` must be its own."""


def training_seconds(trainer: pl.Trainer) -> float | None:
    """Wall time of the training so far, validations included, over all resumes; None without ``TrainingTime``.

    What a killed run did after its last checkpoint is not in it.
    """
    timers = [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, TrainingTime)]
    return timers[0].time_elapsed() if timers else None


class MetricsFile(_EpochFigures):
    """metrics.csv: one row per epoch, every logged figure a column.

    The file is written whole after each epoch and read back when a run is resumed; rows of epochs that are run
    again replace the old ones. (Lightning's CSV logger starts the file anew on resume.)
    """

    FIRST = ("epoch", "step", "train/loss", "val/loss", "val/miou")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._rows: list[dict[str, str]] = []

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
        columns = list(dict.fromkeys([*self.FIRST, *(key for old in self._rows for key in old)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.path, text.getvalue())


class FiguresFile(pl.Callback):
    """metrics.json and counts.npz of an evaluation outside of training, before anything is drawn or printed of it.

    folder: where they are written.
    facts: what the figures depend on; the evaluation adds protocol, inference and time, and ``images_in_split`` where
        it was not of all images.
    """

    def __init__(self, folder: str | Path, facts: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.facts = facts

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.is_global_zero:  # of a run that had ended and goes on: they are of weights that are replaced now
            for name in ("metrics.json", COUNTS_FILE):
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
        self.facts |= pl_module.evaluator.describe()
        self.facts["seconds_per_image"] = result.seconds_per_image
        total = len(cast(Any, trainer).datamodule.dataset.split(split))
        if result.images != total:
            self.facts["images_in_split"] = total
        write_figures(result, split, self.facts, self.folder)
