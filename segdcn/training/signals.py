"""A run that is told to stop saves a checkpoint first."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.trainer.states import TrainerFn

from segdcn.training.folders import output_path
from segdcn.training.later import Later


class StopOnSignal(pl.Callback):
    """SIGTERM, SIGUSR1 or SIGUSR2 to any process of a run (a scheduler's warnings) stops all of them, resumably.

    The batch that is being trained is finished, and of several processes the next one, ``checkpoint`` is saved and the
    run exits with status 128 + signal number. After an epoch's last batch, or within its validation, the validation is
    finished first: only the epoch's end can be saved then (see ``Checkpoint``). An evaluation outside of training stops
    at its next batch.

    Takes the place of Lightning's own handlers, which communicate within the handler (ranks that are in another
    collective at that moment hang) and, under SLURM, write checkpoints of another name and requeue the job themselves.

    checkpoint: file to save, the one that a run is resumed from; None is checkpoints/last.ckpt in Lightning's folder.
    """

    SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")  # Windows has the first only

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self._given = checkpoint
        self._received = 0
        self._asked: Later | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.checkpoint = output_path(trainer, self._given, "checkpoints", "last.ckpt")

    def _listen(self) -> None:
        """Lightning sets its handlers just before this and, when it ends, brings back those that were there before."""
        if threading.current_thread() is threading.main_thread():
            for name in self.SIGNALS:
                if hasattr(signal, name):
                    signal.signal(getattr(signal, name), self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # between two batches whose gradients are added up there is nothing to save
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if number := self._agreed_before(trainer):
            trainer.save_checkpoint(self.checkpoint)
            self._stop(trainer, number)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_if_asked(trainer)  # asked after the last batch of the epoch before, which has been saved

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._listen()

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._stop_if_asked(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()

    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if number := self._agreed(trainer):
            self._stop(trainer, number)

    def _agreed(self, trainer: pl.Trainer) -> int:
        """The signal that any process has received, 0 for none; all of them ask at the same point."""
        return self._received if trainer.world_size == 1 else int(self._ask(trainer).read())

    def _agreed_before(self, trainer: pl.Trainer) -> int:
        """As ``_agreed``, but of several processes when they were asked last: so no step waits for the GPU's end."""
        if trainer.world_size == 1:
            return self._received
        before, self._asked = self._asked, self._ask(trainer)
        return 0 if before is None else int(before.read())

    def _ask(self, trainer: pl.Trainer) -> Later:
        number = torch.full((), self._received, device=trainer.strategy.root_device)  # a copy from here would wait
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return Later(number)

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        # Lightning kills a first process one of whose children ends with a status of its own before it does
        child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        raise SystemExit(0 if child else 128 + number)
