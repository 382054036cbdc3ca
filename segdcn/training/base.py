"""What every Lightning module here shares: optimizer and schedule, randomness by step, figures of a split."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytorch_lightning as pl
import torch
from PIL.Image import Image
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from segdcn.errors import UserError
from segdcn.runs.checkpoint import FORMAT
from segdcn.training.optim import ADAMW, poly


class MeanLoss(MeanMetric):
    """torchmetrics' MeanMetric without its look for NaN, for which each step would wait for the device.

    Its own ``nan_strategy="disable"`` forgets the weights (1.9).
    """

    def update(self, value: Tensor, weight: float) -> None:  # type: ignore[override]
        self.mean_value += value * weight
        self.weight += weight


class Task(pl.LightningModule):
    """A network that learns; what it learns, and how that is counted, a subclass says.

    network: whatever the subclass trains.
    evaluator: predicts and counts a batch with ``update``, gives with ``compute`` what it found since
        ``reset``, the same on each process, and says with ``describe`` how.
    monitor: the figure of a validation by which a run is judged; more is better.
    optimizer: parameter groups → Optimizer.
    schedule: optimizer, total_steps (None where the training's length is not known) → LRScheduler, stepped per
        iteration.
    seed: of the randomness within the network.
    description: plain values saved in each checkpoint, from which the commands rebuild the run; None is what is known
        here.
    result: of the last validation or test, with full precision (Lightning logs float32).
    files: what ``write_figures`` writes.
    losses: the figures of a validation that are losses.
    """

    files: ClassVar[Sequence[str]]
    losses: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        network: nn.Module,
        evaluator: Any,
        monitor: str,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] = ADAMW,
        schedule: Callable[..., LRScheduler] = poly,
        seed: int = 0,
        description: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.evaluator = evaluator
        self.monitor = monitor
        self.result: Any = None
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.seed = seed
        self.description = description
        self.train_loss = MeanLoss()
        # in the checkpoint, so that a run resumed in the middle of an epoch logs the whole epoch's mean
        self.train_loss.persistent(True)

    # --- what a subclass says -----------------------------------------------------------------------------------

    def evaluate(self, batch: Any) -> None:
        """Predict and count a batch of a validation or test."""
        raise NotImplementedError

    def outputs(self, batch: Any) -> Any:
        """What the network gives for a batch, in the mode in which it is."""
        raise NotImplementedError

    def pictures(self, sample: Any, data: Any) -> Iterator[tuple[str, Image]]:
        """What is drawn of a sample of ``data.dataset`` with the network as it is: name endings and pictures."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters, each with its factor ``lr_mult`` on the learning rate; see ``optim``."""
        raise NotImplementedError

    def write_figures(self, split: str, conditions: Mapping[str, Any], folder: Path) -> None:
        """Write ``result`` as the files of a run's folder; ``conditions`` are what the figures depend on."""
        raise NotImplementedError

    def own_description(self) -> dict[str, Any]:
        """``description`` where none was given."""
        raise NotImplementedError

    # --- training ---------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Randomness inside the network (dropout) depends on the step alone: a resumed run repeats it bit for bit.
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        seed = int(np.random.SeedSequence((self.seed, step, self.global_rank)).generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def log_loss(self, loss: Tensor, batch_idx: int, images: int) -> None:
        """Log the loss of a batch of so many images as a part of the epoch's mean."""
        if batch_idx == 0:
            self.train_loss.reset()
        self.train_loss.update(loss.detach(), weight=images)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=images)

    def on_train_start(self) -> None:
        # With max_steps Lightning takes a checkpoint of an epoch's end for one within it, and would end that epoch once
        # more, without a batch.
        loop = self.trainer.fit_loop
        if loop.restarted_on_epoch_end:
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop.epoch_loop.restarting = False

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # The last weights are validated too, wherever the training ends: Lightning would leave them out within an
        # epoch, and in one that check_val_every_n_epoch passes over.
        if training_ends(self.trainer):
            self.trainer.should_stop = True
            if self.trainer.check_val_every_n_epoch is not None:
                self.trainer.check_val_every_n_epoch = 1

    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups()
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

    # --- evaluation -------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        """All figures are over the whole split, summed over processes before anything is divided."""
        result = self.evaluator.compute()
        figures = {**self.figures_beside(), **result.figures}
        self.result = result._replace(figures={f"{stage}/{name}": value for name, value in figures.items()})
        # every process holds the same figures already; sync_dist only states that
        self.log_dict(self.result.figures, sync_dist=True)
        self.evaluator.reset()

    def figures_beside(self) -> dict[str, float]:
        """Figures of the evaluation that ends, beside the evaluator's."""
        return {}

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
        checkpoint["segdcn"] = {"format": FORMAT, **(self.description or self.own_description())}


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
