"""SegmentationTask: the LightningModule. Image → network → loss → metric; it never asks which network it holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from segdcn.evaluation import EvaluationResult, Evaluator
from segdcn.optim import parameter_groups

Batch = dict[str, Any]
"""{"image": float (N, 3, H, W), "label": int64 (N, H, W), "name": list of str}; evaluation adds "index" (N,)."""


class SegmentationTask(pl.LightningModule):
    """Trains and evaluates ``network``; everything it needs is passed in, nothing is looked up.

    network: image (N, 3, H, W) → logits (N, K, H, W); with ``with_auxiliary=True`` also the auxiliary logits.
    loss: logits, label → scalar.
    optimizer: parameter groups → Optimizer.  schedule: optimizer, total_steps → LRScheduler, stepped per iteration.
    description: plain values saved in each checkpoint, from which ``segdcn-evaluate`` rebuilds the run.
    evaluator: how validation and test predict and count; whole images at their own size unless one is set.
    result: of the last validation or test, with full precision (Lightning logs float32).
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        schedule: Callable[..., LRScheduler],
        class_names: Sequence[str],
        backbone_lr_mult: float = 1.0,
        offset_lr_mult: float = 0.1,
        auxiliary_weight: float = 0.4,
        seed: int = 0,
        description: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.class_names = list(class_names)
        self.backbone_lr_mult = backbone_lr_mult
        self.offset_lr_mult = offset_lr_mult
        self.auxiliary_weight = auxiliary_weight
        self.seed = seed
        self.description = description or {}
        self.evaluator = Evaluator(self.class_names)
        self.result: EvaluationResult | None = None
        self.mean_loss = MeanMetric()
        self.train_loss = MeanMetric()
        # in the checkpoint, so that a run resumed in the middle of an epoch logs the whole epoch's mean
        self.train_loss.persistent(True)

    # --- training ---------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Randomness inside the network (dropout) depends on the step alone: a resumed run repeats it bit for bit.
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        seed = int(np.random.SeedSequence((self.seed, step, self.global_rank)).generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, auxiliary = self.network(batch["image"], with_auxiliary=True)
        loss: Tensor = self.loss(logits, batch["label"])
        if auxiliary is not None:
            loss = loss + self.auxiliary_weight * self.loss(auxiliary, batch["label"])
        if batch_idx == 0:
            self.train_loss.reset()
        self.train_loss.update(loss.detach(), weight=len(logits))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(logits))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory(parameter_groups(self.network, self.backbone_lr_mult, self.offset_lr_mult))
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_mult"]
        schedule = self.schedule_factory(optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- evaluation -------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _evaluate(self, batch: Batch) -> None:
        logits, label = self.evaluator.update(self.network, batch)
        # weighted by labelled pixels, so that the mean is over pixels whatever the batches hold
        self.mean_loss.update(self.loss(logits, label), weight=(label != self.evaluator.metrics.ignore_index).sum())

    def _log_evaluation(self, stage: str) -> None:
        """All figures are over the whole split, summed over processes before anything is divided."""
        result = self.evaluator.compute()
        figures = {"loss": float(self.mean_loss.compute()), **result.figures}
        self.result = result._replace(figures={f"{stage}/{name}": value for name, value in figures.items()})
        # every process holds the same figures already; sync_dist only states that
        self.log_dict(self.result.figures, sync_dist=True)
        self.evaluator.reset()
        self.mean_loss.reset()

    # --- checkpoint -------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["segdcn"] = self.description
