"""SegmentationTask: the LightningModule. Image → network → loss → metric; it never asks which network it holds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from segdcn.data.datamodule import SegmentationDataModule
from segdcn.data.dataset import IGNORE_INDEX, voc_palette
from segdcn.errors import UserError
from segdcn.evaluation import EvaluationResult, Evaluator
from segdcn.models import DeepLab
from segdcn.models.contract import giving_logits
from segdcn.runs.checkpoint import FORMAT, GROUPS
from segdcn.training.losses import SegmentationLoss
from segdcn.training.optim import ADAMW, parameter_groups, poly

Batch = dict[str, Any]
"""{"image": float (N, 3, H, W), "label": int64 (N, H, W), "name": list of str}; evaluation adds "index" (N,)."""


class SegmentationTask(pl.LightningModule):
    """Trains and evaluates ``network``; everything it needs is passed in, nothing is looked up.

    network: image (N, 3, H, W) → logits (N, K, H, W), or a mapping of them under "out" alone. One that has a method
        ``training_logits(image)`` gives a list there: the logits, then those of auxiliary heads.
    class_names: K names.
    loss: logits, label → scalar; None is ``SegmentationLoss()``.
    optimizer: parameter groups → Optimizer.
    schedule: optimizer, total_steps (None where the training's length is not known) → LRScheduler, stepped per
        iteration.
    backbone_lr_mult, offset_lr_mult: see ``parameter_groups``.
    auxiliary_weight: of each auxiliary head's loss.
    channels_last: whether the channels of a pixel lie side by side in memory, for which most convolutions are faster;
        sums are taken in another order, so that figures differ a little.
    seed: of the randomness within the network.
    description: plain values saved in each checkpoint, from which the commands rebuild the run; None is what is known
        here, which is enough for ``segdcn.load``.
    evaluator: how validation and test predict and count; whole images at their own size unless one is set.
    result: of the last validation or test, with full precision (Lightning logs float32).

    Raises: UserError, one line: the network is no ``nn.Module``.
    """

    def __init__(
        self,
        network: nn.Module,
        class_names: Sequence[str],
        loss: nn.Module | None = None,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] = ADAMW,
        schedule: Callable[..., LRScheduler] = poly,
        backbone_lr_mult: float = 1.0,
        offset_lr_mult: float = 0.1,
        auxiliary_weight: float = 0.4,
        channels_last: bool = False,
        seed: int = 0,
        description: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = giving_logits(network)
        self.channels_last = channels_last
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.loss = SegmentationLoss() if loss is None else loss
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.class_names = [str(name) for name in class_names]
        self.backbone_lr_mult = backbone_lr_mult
        self.offset_lr_mult = offset_lr_mult
        self.auxiliary_weight = auxiliary_weight
        self.seed = seed
        self.description = description
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
        of_training: Any = getattr(self.network, "training_logits", lambda image: [self.network(image)])
        logits, *auxiliary = of_training(self._laid_out(batch["image"]))
        loss: Tensor = self.loss(logits, batch["label"])
        for each in auxiliary:
            loss = loss + self.auxiliary_weight * self.loss(each, batch["label"])
        if batch_idx == 0:
            self.train_loss.reset()
        self.train_loss.update(loss.detach(), weight=len(logits))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(logits))
        return loss

    def on_train_start(self) -> None:
        # With max_steps Lightning takes a checkpoint of an epoch's end for one within it, and would end that epoch once
        # more, without a batch.
        loop = self.trainer.fit_loop
        if loop.restarted_on_epoch_end:
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop.epoch_loop.restarting = False

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # The last weights are validated too, wherever the training ends: Lightning would leave them out within an
        # epoch, and in one that check_val_every_n_epoch passes over.
        if training_ends(self.trainer):
            self.trainer.should_stop = True
            if self.trainer.check_val_every_n_epoch is not None:
                self.trainer.check_val_every_n_epoch = 1

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.network, self.backbone_lr_mult, self.offset_lr_mult)
        try:
            optimizer = self.optimizer_factory(groups)
        except (TypeError, ValueError) as error:  # a setting that it does not take
            raise UserError(f"optimizer: {error}") from error
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_mult"]
        steps = self.trainer.estimated_stepping_batches
        try:
            schedule = self.schedule_factory(optimizer, total_steps=None if math.isinf(steps) else int(steps))
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"schedule: {error}") from error
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _laid_out(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image

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
        logits, label = self.evaluator.update(self.network, {**batch, "image": self._laid_out(batch["image"])})
        # image by image, weighted by labelled pixels: a loss that weighs or chooses pixels depends on what it is given
        # together, and the figure must not depend on how many images a batch holds
        for n in range(len(label)):
            truth = label[n : n + 1]
            labelled = (truth != IGNORE_INDEX).sum()
            self.mean_loss.update(self.loss(logits[n : n + 1], truth), weight=labelled)

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "averaging_state" not in checkpoint or self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if not any(isinstance(callback, WeightAveraging) for callback in cast(Any, self.trainer).callbacks):
            raise UserError(
                "the weights of this checkpoint are an average, from which a training would go on otherwise than it"
                " began: leave callbacks.ema in when it is resumed"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["segdcn"] = {"format": FORMAT, **(self.description or self._own_description())}

    def _own_description(self) -> dict[str, Any]:
        """For ``segdcn.load``: the network's settings where they are known, and what prepares and colours images."""
        palette: Sequence[Sequence[int]] = voc_palette(len(self.class_names))
        groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        if isinstance(self.network, DeepLab) and self.network.settings is not None:
            groups["model"] = {**self.network.settings}
            del groups["model"]["num_classes"]  # class_names say it
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SegmentationDataModule):
            palette, transform = data.dataset.palette, data.eval_transform
            bits = getattr(data.dataset, "bits", None)  # of ours; of a user's own data set it may mean anything
            groups["dataset"] = {"bits": bits} if isinstance(bits, int) else {}
            groups["datamodule"] = {"mean": [*map(float, transform.mean)], "std": [*map(float, transform.std)]}
        return {
            "config": {},
            "groups": groups,
            "class_names": self.class_names,
            "palette": [[int(value) for value in colour] for colour in palette],
        }


def training_ends(trainer: pl.Trainer) -> bool:
    """Whether the batch that was trained last is the last of the run; asked in ``on_train_batch_end``."""
    if trainer.should_stop:  # by max_time, for example
        met = trainer.current_epoch >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
        if met:
            return True
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    return trainer.is_last_batch and 0 <= epochs <= trainer.current_epoch + 1
