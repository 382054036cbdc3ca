"""Checkpoints that are whole, and from which a run goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from segdcn.runs.files import replacing
from segdcn.training.base import training_ends


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written beside the file that they replace, then renamed.

    Lightning writes them into the system's folder for temporary files and moves them: to another file system that is a
    copy over the old one, and a process that is killed meanwhile leaves neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, made to resume exactly; unless asked otherwise best.ckpt, by the mean IoU.

    options: of Lightning's, the others.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str = "best",
        monitor: str | None = "val/miou",
        mode: str = "max",
        every_n_train_steps: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            dirpath,
            filename,
            monitor,
            mode=mode,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=enable_version_counter,
            **options,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # From a checkpoint between an epoch's last batch and its validation, Lightning would go on with the next
        # epoch: no figures, no best checkpoint. The epoch's end is saved anyway.
        if trainer.is_last_batch:
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._save_on_train_epoch_end and training_ends(trainer):
            trainer.save_checkpoint(self.format_checkpoint_name({}))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Of an epoch that the run's last step cut short that step was saved: from here Lightning would go on with the
        # next epoch. Without validation there is no best one.
        wanted = trainer.is_last_batch if self.monitor is None else trainer.enable_validation
        if wanted:
            super().on_train_epoch_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning forgets the best score when the folder has another name, and a worse best.ckpt would replace it.
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})
