"""A moving average of the weights, which is what is validated and kept."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

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
        super().__init__(multi_avg_fn=self._update)

    @torch.no_grad()
    def _update(self, averages: Any, values: Any, updates: Tensor | int) -> None:
        """Tensors of one dtype, after so many updates."""
        if averages[0].is_floating_point():
            count = float(updates)
            # unlike a sum of two products this leaves what does not change, such as frozen layers, as it is to the bit
            torch._foreach_lerp_(averages, values, 1 - min(self.decay, (1 + count) / (10 + count)))
        else:  # counts of batches
            for average, value in zip(averages, values, strict=True):
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
