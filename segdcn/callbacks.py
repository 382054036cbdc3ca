"""What happens beside the training loop: checkpoints, one line per epoch, metrics.csv, offset health, pictures."""

from __future__ import annotations

import csv
import io
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar, Timer
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from segdcn import UserError
from segdcn.analysis import sampling_points
from segdcn.data.dataset import Sample
from segdcn.drawing.decoration import decoration
from segdcn.evaluation.counts import COUNTS_FILE
from segdcn.evaluation.figures import write_figures
from segdcn.models import deformable_layers
from segdcn.ops import DeformConv2d, kernel_points, outside_map
from segdcn.panels import central_pixels, comparison_panel, sampling_panel
from segdcn.runs.folder import is_passing, replacing, shown, write_text
from segdcn.task import training_ends


class TrainingStopped(UserError):  # noqa: N818  (it reads as what happened)
    """Training cannot go on: the message says what happened, in which layer, and what to change."""


def _network(task: pl.LightningModule) -> nn.Module:
    return cast(nn.Module, task.network)


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written beside the file that they replace, then renamed.

    Lightning writes them into the system's folder for temporary files and moves them: to another file system that is a
    copy over the old one, and a process that is killed meanwhile leaves neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, made to resume exactly."""

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


class StopOnSignal(pl.Callback):
    """SIGTERM, SIGUSR1 or SIGUSR2 to any process of a run (a scheduler's warnings) stops all of them, resumably.

    The batch that is being trained is finished, ``checkpoint`` is saved and the run exits with status 128 + signal
    number. After an epoch's last batch, or within its validation, the validation is finished first: only the epoch's
    end can be saved then (see ``Checkpoint``). An evaluation outside of training stops at its next batch.

    Takes the place of Lightning's own handlers, which communicate within the handler (ranks that are in another
    collective at that moment hang) and, under SLURM, write checkpoints of another name and requeue the job themselves.

    checkpoint: file to save, the one that a run is resumed from; null saves nothing.
    """

    SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")  # Windows has the first only

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self.checkpoint = checkpoint
        self._received = 0

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
        if number := self._agreed(trainer):
            if self.checkpoint is not None:
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
        if trainer.world_size == 1:
            return self._received
        number = torch.tensor(self._received, device=trainer.strategy.root_device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        # Lightning kills a first process one of whose children ends with a status of its own before it does
        child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        raise SystemExit(0 if child else 128 + number)


class _EpochFigures(pl.Callback):
    """Knows which figures are of the epoch that ends: Lightning keeps those of earlier validations."""

    _validated_at = -1  # the step of the last validation

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validated_at = trainer.global_step

    def epoch_figures(self, trainer: pl.Trainer) -> dict[str, float]:
        """What this epoch logged, and the learning rates; LearningRateMonitor's (lr-...) are a logging step old."""
        validated = self._validated_at == trainer.global_step
        logged = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("train/") or (validated and not key.startswith("lr-"))
        }
        groups = trainer.optimizers[0].param_groups
        return logged | {f"lr/{group.get('name', number)}": float(group["lr"]) for number, group in enumerate(groups)}


class EpochLines(_EpochFigures, RichProgressBar):
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
        miou = metrics.get("val/miou", math.nan)
        marker = " *" if miou > self._best else ""
        self._best = max(self._best, miou)
        figures = [f"{key} {metrics[key]:.4f}" for key in ("train/loss", "val/loss", "val/miou") if key in metrics]
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


class MetricsFile(_EpochFigures):
    """metrics.csv: one row per epoch, every logged figure a column.

    The file is written whole after each epoch and read back when a run is resumed; rows of epochs that are run
    again replace the old ones. (Lightning's CSV logger starts the file anew on resume.)
    """

    FIRST = ("epoch", "step", "train/loss", "val/loss", "val/miou")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._rows: list[dict[str, str]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises: UserError, one line, where the file of a run that is resumed is damaged."""
        if not os.path.lexists(self.path):
            return
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, strict=True)
                self._rows = list(reader)
            if "epoch" not in (reader.fieldnames or ()) or any(
                None in row or None in row.values() or int(row["epoch"]) < 0 for row in self._rows
            ):
                raise ValueError("a row is not whole")
        except (OSError, ValueError, KeyError, csv.Error) as error:
            if is_passing(error):
                raise
            raise UserError(
                f"{shown(self.path)} is damaged ({type(error).__name__}): mend it, or delete it to begin a new one with"
                " the epochs that follow"
            ) from error

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        row = {"epoch": str(trainer.current_epoch), "step": str(trainer.global_step)}
        for key, value in sorted(self.epoch_figures(trainer).items()):
            row[key] = "" if math.isnan(value) else f"{value:.6g}"
        self._rows = [old for old in self._rows if int(old["epoch"]) < trainer.current_epoch] + [row]
        columns = list(dict.fromkeys([*self.FIRST, *(key for old in self._rows for key in old)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.path, text.getvalue())


class FiguresFile(pl.Callback):
    """metrics.json and counts.npz of an evaluation outside of training, before anything is drawn or printed of it.

    folder: where they are written.
    facts: what the figures depend on; the evaluation adds protocol, inference and time, and ``images_in_split`` where
        it was not of all images.
    """

    def __init__(self, folder: str | Path, facts: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.facts = facts

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.is_global_zero:  # of a run that had ended and goes on: they are of weights that are replaced now
            for name in ("metrics.json", COUNTS_FILE):
                (self.folder / name).unlink(missing_ok=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: pl.Trainer, pl_module: Any, split: str) -> None:
        if not trainer.is_global_zero:
            return
        result = pl_module.result
        self.facts |= pl_module.evaluator.describe()
        self.facts["seconds_per_image"] = result.seconds_per_image
        total = len(cast(Any, trainer).datamodule.dataset.split(split))
        if result.images != total:
            self.facts["images_in_split"] = total
        write_figures(result, split, self.facts, self.folder)


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

    _image: Tensor  # (N, 3, H, W), of the batch being trained

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._sums: dict[str, Tensor] = {}
        self._lengths: dict[str, list[Tensor]] = {}
        self._map_side: dict[str, int] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._image = batch["image"]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise self._not_finite(f"the loss is {float(loss.detach())}", trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not all(torch.isfinite(value).all() for value in _network(pl_module).state_dict().values()):
            raise self._not_finite("the weights are not finite", trainer, pl_module)

    def _not_finite(self, what: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> TrainingStopped:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            layer = _first_not_finite(_network(pl_module), self._image)
        where = f"{layer} is the first layer whose output is not finite" if layer else "all logits are finite"
        offsets = " (or model.deform.lr_mult)" if deformable_layers(_network(pl_module)) else ""
        return TrainingStopped(
            f"{what} at step {trainer.global_step}: {where}; "
            f"lower optimizer.lr{offsets}, or set trainer.gradient_clip_val=10"
        )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sums, self._lengths = {}, {}
        for name, layer in deformable_layers(_network(pl_module)).items():
            self._handles.append(layer.offset.register_forward_hook(self._measure(name, layer)))

    def _measure(self, name: str, layer: DeformConv2d) -> Any:
        def hook(branch: nn.Module, inputs: tuple[Tensor, ...], predicted: Tensor) -> None:
            offset, _ = layer.split_branch(predicted.detach())
            y, x = kernel_points(offset, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            length = torch.hypot(offset[:, 0::2].float(), offset[:, 1::2].float()).flatten()
            height, width = inputs[0].shape[-2:]
            outside = outside_map(y, x, height, width)
            sums = torch.stack((length.double().sum(), outside.double().sum())).cpu()
            count = torch.tensor([float(length.numel())], dtype=torch.float64)
            self._sums[name] = self._sums.get(name, torch.zeros(3, dtype=torch.float64)) + torch.cat((sums, count))
            stride = max(1, length.numel() // self.SAMPLES_PER_BATCH)
            self._lengths.setdefault(name, []).append(length[::stride].cpu())
            self._map_side[name] = max(height, width)

        return hook

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
                    "lower model.deform.lr_mult or optimizer.lr, or use fewer model.deform.layers"
                )


def _first_not_finite(network: nn.Module, image: Tensor) -> str | None:
    """The first layer, in the order of computation, whose output for ``image`` (N, 3, H, W) is not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in network.named_modules()]
    network(image)
    for handle in handles:
        handle.remove()
    return found[0] if found else None


class Panels(pl.Callback):
    """panels/: input, truth, prediction and errors of images spread over the split, when a checkpoint is evaluated.

    For a network with deformable layers also where its kernels sample, for one pixel of each of the three most
    frequent classes of an image. Predictions are made as for the figures (windows, scales, mirror images), at the
    image's own size whatever the protocol. Nothing is drawn within ``fit``: an epoch of a small run takes less time.
    """

    def __init__(self, folder: str | Path, images: int = 6) -> None:
        self.folder = Path(folder)
        self.images = images

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    @torch.no_grad()
    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        if not trainer.is_global_zero:
            return
        data, network = cast(Any, trainer).datamodule, _network(pl_module)
        samples = data.dataset.split(split)
        count = min(self.images, len(samples))
        for number in range(count):
            with decoration(f"panel {split}_{number}.png", "segdcn-evaluate draws it again"):
                self._draw(samples[number * len(samples) // count], f"{split}_{number}", data, network, pl_module)

    def _draw(self, sample: Sample, name: str, data: Any, network: nn.Module, task: Any) -> None:
        image, _ = data.eval_transform(sample.image, sample.label)
        image = image[None].to(task.device)
        prediction = task.evaluator.inference(network, image).argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
        names, palette = [str(one) for one in data.dataset.class_names], data.dataset.palette
        self._save(comparison_panel(sample.image, sample.label, prediction, names, palette, sample.name), name)
        if deformable_layers(network):
            # an image without a label: where it is looked at then, the network says
            pixels = central_pixels(sample.label) or central_pixels(prediction)
            points = sampling_points(network, image, pixels)
            pairs = [(pixel, depths[-1].numpy()) for pixel, depths in zip(pixels, points, strict=True)]
            self._save(sampling_panel(sample.image, pairs, sample.name), f"{name}_sampling")

    def _save(self, picture: Image.Image, name: str) -> None:
        with replacing(self.folder / f"{name}.png") as file:
            picture.save(file, format="PNG")
