"""How far a training is: a line per epoch, and its time."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar, Timer

from segdcn.training.figures import EpochFigures, learning_rates, monitored, shown_figures


class LearningRates(pl.Callback):
    """Each parameter group's learning rate for the loggers, where there are any, as often as they get a loss."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.log_metrics(learning_rates(trainer), step=trainer.global_step)


class EpochLines(EpochFigures, RichProgressBar):
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
        judged = metrics.get(monitored(pl_module), math.nan)
        marker = " *" if judged > self._best else ""
        self._best = max(self._best, judged)
        figures = [f"{key} {metrics[key]:.4f}" for key in shown_figures(pl_module) if key in metrics]
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
