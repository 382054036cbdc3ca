"""What happens beside the training loop: one line per epoch, metrics.csv, offset health, pictures."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from torch import Tensor, nn

from segdcn.models import deformable_layers
from segdcn.models.sampling_points import sampling_points
from segdcn.ops import DeformConv2d, kernel_points, outside_map
from segdcn.panels import comparison_panel, sampling_panel
from segdcn.run_folder import write_text


class TrainingStopped(RuntimeError):
    """Training cannot go on: the message says what happened, in which layer, and what to change."""


class EpochLines(RichProgressBar):
    """Rich's bar in a terminal, nothing in a log file; one plain line per epoch in both."""

    def __init__(self) -> None:
        super().__init__(leave=False, refresh_rate=1 if sys.stdout.isatty() else 0)
        self._started = 0.0
        self._best = -math.inf

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
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


class MetricsFile(pl.Callback):
    """metrics.csv: one row per epoch, every logged figure a column.

    The file is written whole after each epoch and read back when a run is resumed; rows of epochs that are run
    again replace the old ones. (Lightning's CSV logger starts the file anew on resume.)
    """

    FIRST = ("epoch", "step", "train/loss", "val/loss", "val/miou")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._rows: list[dict[str, str]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                self._rows = list(csv.DictReader(file))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        row = {"epoch": str(trainer.current_epoch), "step": str(trainer.global_step)}
        for key, value in sorted(trainer.callback_metrics.items()):
            number = float(value)
            row[key] = "" if math.isnan(number) else f"{number:.6g}"
        self._rows = [old for old in self._rows if int(old["epoch"]) < trainer.current_epoch] + [row]
        columns = list(dict.fromkeys([*self.FIRST, *(key for old in self._rows for key in old)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.path, text.getvalue())


class OffsetHealth(pl.Callback):
    """Watches the offsets of each deformable layer and stops a run that cannot recover.

    Logged each epoch, measured over the validation split, per layer: ``offset/<layer>/mean`` and ``/p95``, the
    length of an offset in pixels of the layer's input map, and ``/outside``, the share of samples that read
    nothing because they lie outside that map (some do without any offset, at the border).

    Stops with ``TrainingStopped`` when the loss is not finite, and when a layer's offsets are on average longer
    than its map: such samples have neither value nor gradient, so they never come back.
    """

    SAMPLES_PER_BATCH = 4096  # for the percentile; mean and share use every offset

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._sums: dict[str, Tensor] = {}
        self._lengths: dict[str, list[Tensor]] = {}
        self._map_side: dict[str, int] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            raise TrainingStopped(
                f"the loss is {float(loss)} at step {trainer.global_step}: {_first_broken(pl_module.network)}; "
                "lower optimizer.lr (or model.deform.lr_mult), or set trainer.gradient_clip_val=10"
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sums, self._lengths = {}, {}
        for name, layer in deformable_layers(pl_module.network).items():
            self._handles.append(layer.register_forward_hook(self._measure(name)))

    def _measure(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, DeformConv2d)
            feature = inputs[0].detach()
            with torch.no_grad():
                offset, _ = layer.split_branch(layer.offset(feature))
                y, x = kernel_points(offset, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
                pairs = offset.float().unflatten(1, (-1, 2))
                length = torch.linalg.vector_norm(pairs, dim=2).flatten()
                height, width = feature.shape[-2:]
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
            mean, outside = float(sums[0] / sums[2]), float(sums[1] / sums[2])
            p95 = float(torch.cat(self._lengths[name]).nanquantile(0.95))
            figures = {"mean": mean, "p95": p95, "outside": outside}
            pl_module.log_dict({f"offset/{name}/{key}": value for key, value in figures.items()}, sync_dist=True)
            if not trainer.sanity_checking and not mean <= self._map_side[name]:
                raise TrainingStopped(
                    f"the offsets of layer {name} are {mean:.0f} pixels long on average on a map of "
                    f"{self._map_side[name]}: they exploded after step {trainer.global_step}; "
                    "lower model.deform.lr_mult or optimizer.lr, or use fewer model.deform.layers"
                )


def _first_broken(network: nn.Module) -> str:
    """The first layer, in network order, whose parameters are no longer finite."""
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"{name.rpartition('.')[0]} is the first layer with values that are not finite"
    return "all parameters are still finite, so the gradients or the input are to blame"


class Panels(pl.Callback):
    """panels/: input, truth, prediction and errors of images spread over the split, after each validation.

    For a network with deformable layers also where its kernels sample, for three pixels of each image. The files
    are overwritten, so they show the latest validation; the last of a run is that of the best checkpoint.
    """

    def __init__(self, folder: str | Path, images: int = 6) -> None:
        self.folder = Path(folder)
        self.images = images

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    @torch.no_grad()
    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        samples = data.dataset.split(split)
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in range(min(self.images, len(samples))):
            sample = samples[number * len(samples) // min(self.images, len(samples))]
            image, _ = data.eval_transform(sample.image, sample.label)
            image = image[None].to(pl_module.device)
            prediction = pl_module.network(image).argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
            panel = comparison_panel(
                sample.image, sample.label, prediction, data.dataset.class_names, data.dataset.palette, sample.name
            )
            self._save(panel, f"{split}_{number}.png")
            if deformable_layers(pl_module.network):
                height, width = sample.label.shape
                pixels = [(height // 2, width // 4), (height // 2, width // 2), (height // 2, 3 * width // 4)]
                points = sampling_points(pl_module.network, image, pixels)
                pairs = [(pixel, cells.cpu().numpy()) for pixel, cells in zip(pixels, points, strict=True)]
                self._save(sampling_panel(sample.image, pairs, sample.name), f"{split}_{number}_sampling.png")

    def _save(self, picture: Any, name: str) -> None:
        partial = self.folder / f".{name}.partial"
        picture.save(partial, format="PNG")
        partial.replace(self.folder / name)
