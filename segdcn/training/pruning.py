"""A run that is a trial of a search ends early where it falls behind the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytorch_lightning as pl
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from pytorch_lightning.trainer.states import TrainerFn

from segdcn.errors import UserError
from segdcn.runs.job import read_job

STUDY = "segdcn"
JOURNAL = "optuna.journal"  # in the folder of the search


def journal(search: Path) -> JournalStorage:
    """Where the study of a search is kept: a file in its folder, which all of its processes write to."""
    return JournalStorage(JournalFileBackend(str(search / JOURNAL)))


class Pruning(pl.Callback):
    """Tells Optuna the figure of each validation, and ends the run where Optuna's median pruner gives it up.

    A run is given up between two epochs, with all of the first one written and saved; its ``job.json`` says so. Asked
    again, after an end of whatever kind, Optuna gives the same answer: the trials that it compares with are those that
    had ended when this one began. What is no trial of a search any more trains as any other run.

    Args:
        folder: the run's, within the folder of the search.
        trial: the trial's number.
        metric: a figure that a validation logs, better when it is more, but for a loss.
        startup_trials: how many trials run to their end before one is pruned.
        warmup_epochs: the epochs of a trial's beginning after which it is not pruned yet.
    """

    def __init__(
        self,
        folder: str | Path,
        trial: int,
        metric: str = "val/miou",
        startup_trials: int = 4,
        warmup_epochs: int = 1,
    ) -> None:
        if startup_trials < 0 or warmup_epochs < 0:
            raise UserError(
                f"startup_trials and warmup_epochs must not be negative, got {startup_trials} and {warmup_epochs}"
            )
        self.folder = Path(folder)
        self.number = trial
        self.metric = metric
        self.pruner = optuna.pruners.MedianPruner(startup_trials, warmup_epochs)
        self._trial: optuna.Trial | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        search = self.folder.absolute().parent
        if not trainer.is_global_zero or not (search / JOURNAL).is_file():
            return
        study = optuna.load_study(study_name=STUDY, storage=journal(search), pruner=self.pruner)
        trial = study.trials[self.number]
        if not trial.state.is_finished():
            self._trial = optuna.Trial(study, trial._trial_id)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises: UserError for a metric that no validation logs."""
        if self._trial is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.metric not in trainer.callback_metrics:
            raise UserError(
                f"pruning needs a figure of each validation, which {self.metric} is not: choose another sweep.metric,"
                " or set hydra.sweeper.pruning=null"
            )
        self._trial.report(float(trainer.callback_metrics[self.metric]), trainer.current_epoch)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_if_pruned(trainer)  # of a run that goes on: by its last report

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_if_pruned(trainer)

    def _end_if_pruned(self, trainer: pl.Trainer) -> None:
        pruned = trainer.strategy.broadcast(self._trial is not None and self._trial.should_prune())
        if not pruned:
            return
        if trainer.is_global_zero:
            replace(read_job(self.folder), state="pruned").write(self.folder)
            print(f"pruned: {self.metric} is behind the median of the other trials at this epoch", flush=True)
        raise SystemExit(0)
