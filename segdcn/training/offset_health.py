"""Offsets that outgrow their map, and losses that are not finite, stop a run before it is lost."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from segdcn.analysis import LayerCall, follow
from segdcn.errors import UserError
from segdcn.models import deformable_layers, sampling_layers
from segdcn.training.base import Task
from segdcn.training.later import Later


class TrainingStopped(UserError):  # noqa: N818  (it reads as what happened)
    """Training cannot go on: the message says what happened, in which layer, and what to change."""


def _network(task: pl.LightningModule) -> nn.Module:
    return cast(nn.Module, task.network)


class OffsetHealth(pl.Callback):
    """Watches the offsets of each deformable layer and stops a run that cannot recover.

    Logged each epoch, measured over the validation split, per layer: ``offset/<layer>/mean`` and ``/p95``, the
    length of an offset in pixels of the layer's input map, and ``/outside``, the share of samples that read
    nothing because they lie outside that map (some do without any offset, at the border).

    Stops with ``TrainingStopped`` when the loss is not finite, before the weights are touched; when a layer's
    offsets are on average longer than its map: such samples have neither value nor gradient, so they never come
    back; and rather than let a checkpoint with weights that are not finite replace the last good one.
    """

    SAMPLES_PER_BATCH = 4096  # for the percentile; mean and share use every offset

    _batch: Any  # that is being trained

    def __init__(self) -> None:
        self._loss: tuple[Later, Any] | None = None  # with the batch that it is of
        self._handles: list[Any] = []
        self._sums: dict[str, Tensor] = {}
        self._lengths: dict[str, list[Tensor]] = {}
        self._map_side: dict[str, int] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._check_loss(trainer, pl_module)  # of a batch to whose gradients this one's are added
        self._loss = Later(loss), self._batch

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # only now: while this waits for the end of the forward pass, a GPU has the backward pass to do
        self._check_loss(trainer, pl_module)

    def _check_loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loss is None:
            return
        loss, batch = self._loss
        self._loss = None
        if not math.isfinite(value := loss.read()):
            raise self._not_finite(f"the loss is {value}", trainer, pl_module, batch)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not all(torch.isfinite(value).all() for value in _network(pl_module).state_dict().values()):
            raise self._not_finite("the weights are not finite", trainer, pl_module, self._batch)

    def _not_finite(self, what: str, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> TrainingStopped:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            layer = _first_not_finite(cast(Task, pl_module), batch)
        where = f"{layer} is the first layer whose output is not finite" if layer else "all outputs are finite"
        offsets = " (or task.offset_lr_mult)" if deformable_layers(_network(pl_module)) else ""
        return TrainingStopped(
            f"{what} at step {trainer.global_step}: {where}; "
            f"lower optimizer.lr{offsets}, or set trainer.gradient_clip_val=10"
        )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sums, self._lengths = {}, {}
        layers = sampling_layers(_network(pl_module))
        self._handles = [
            follow(name, layer, self._measure)
            for name, layer in layers.items()
            if not getattr(layer, "remove_center", False)  # of DCNv3 and DCNv4: not followed
        ]

    def _measure(self, call: LayerCall) -> None:
        length = call.offset_lengths().flatten()
        sums = torch.stack((length.double().sum(), call.outside().double().sum())).cpu()
        count = torch.tensor([float(length.numel())], dtype=torch.float64)
        self._sums[call.name] = self._sums.get(call.name, torch.zeros(3, dtype=torch.float64)) + torch.cat(
            (sums, count)
        )
        stride = max(1, length.numel() // self.SAMPLES_PER_BATCH)
        self._lengths.setdefault(call.name, []).append(length[::stride].cpu())
        self._map_side[call.name] = max(call.input_size)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name, sums in self._sums.items():
            if trainer.world_size > 1:  # so that all processes stop, or none
                sums = sums.to(pl_module.device)
                dist.all_reduce(sums)
            mean, outside = float(sums[0] / sums[2]), float(sums[1] / sums[2])
            p95 = float(np.quantile(torch.cat(self._lengths[name]).numpy(), 0.95))  # torch's has a limit of 16 M
            figures = {"mean": mean, "p95": p95, "outside": outside}
            pl_module.log_dict({f"offset/{name}/{key}": value for key, value in figures.items()}, sync_dist=True)
            if not trainer.sanity_checking and not mean <= self._map_side[name]:
                raise TrainingStopped(
                    f"the offsets of layer {name} are {mean:.0f} pixels long on average on a map of "
                    f"{self._map_side[name]}: they exploded after step {trainer.global_step}; "
                    "lower task.offset_lr_mult or optimizer.lr, or use fewer model.deform.layers"
                )


def _first_not_finite(task: Task, batch: Any) -> str | None:
    """The first layer, in the order of computation, whose output for ``batch`` is not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in task.network.named_modules()]
    task.outputs(batch)
    for handle in handles:
        handle.remove()
    return found[0] if found else None
