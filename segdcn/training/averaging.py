"""A moving average of the weights, which is what is validated and kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn

from segdcn.errors import UserError


class AveragedWeights(WeightAveraging):
    """Exponential moving average of weights and batch norms' statistics, updated after each step of the optimizer.

    Lightning's callback: validation sees the average, a checkpoint's ``state_dict`` is the average, so that whoever
    loads it has that, and what training goes on with lies beside it. After the training the network holds the average.

    It stands before callbacks that save within an epoch, such as ``StopOnSignal``: what they save must hold the step's
    update.

    decay: share of the average that stays at a step, 0 <= decay < 1; at step n at most (1 + n) / (10 + n), so that a
        short training is not an average of its beginning (as in TensorFlow's ``ExponentialMovingAverage``).

    Raises: UserError, a decay out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise UserError(f"decay of averaged weights must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self._updates = 0
        super().__init__()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._average_model is not None
        self._updates = int(self._average_model.n_averaged)  # of a run that is resumed

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning's asks the device for the number of updates, so that each step would wait for its end.
        if trainer.global_step > self._latest_update_step:
            assert self._average_model is not None
            self._update(_tensors(self._average_model.module), _tensors(pl_module), self._updates)
            self._average_model.n_averaged += 1  # in the checkpoint
            self._updates += 1
            self._latest_update_step = trainer.global_step

    @torch.no_grad()
    def _update(self, averages: Sequence[Tensor], values: Sequence[Tensor], updates: int) -> None:
        """After so many updates; the first takes the values as they are."""
        decay = min(self.decay, (1 + updates) / (10 + updates)) if updates else 0.0
        learned = [
            (average, value) for average, value in zip(averages, values, strict=True) if value.is_floating_point()
        ]
        # unlike a sum of two products this leaves what does not change, such as frozen layers, as it is to the bit
        torch._foreach_lerp_([average for average, _ in learned], [value for _, value in learned], 1 - decay)
        for average, value in zip(averages, values, strict=True):
            if not value.is_floating_point():  # counts of batches
                average.copy_(value)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning copies the network while it still lies on the CPU, and each step would bring the weights there.
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is not None:  # Lightning would warn of what is meant
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning would exchange the weights once more in an evaluation that follows, and draw those of the training.
        self._average_model = None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
