"""Pictures of an evaluation: predictions, errors, sampling points."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn

from segdcn.analysis import sampling_points
from segdcn.data.dataset import Sample, spread_over
from segdcn.drawing.decoration import decoration
from segdcn.drawing.panels import central_pixels, comparison_panel, sampling_panel
from segdcn.models import sampling_layers
from segdcn.runs.files import write_png
from segdcn.training.folders import output_path


class Panels(pl.Callback):
    """panels/: input, truth, prediction and errors of images spread over the split, when a checkpoint is evaluated.

    For a network with deformable layers also where its kernels sample, for one pixel of each of the three most
    frequent classes of an image. Predictions are made as for the figures (windows, scales, mirror images), at the
    image's own size whatever the protocol. Nothing is drawn within ``fit``: an epoch of a small run takes less time.

    folder: None is panels/ in Lightning's folder.  images: how many at most.

    The trainer must have been given a ``SegmentationDataModule``.
    """

    def __init__(self, folder: str | Path | None = None, images: int = 6) -> None:
        self._given = folder
        self.images = images

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = output_path(trainer, self._given, "panels")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    @torch.no_grad()
    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        if not trainer.is_global_zero:
            return
        data, network = cast(Any, trainer).datamodule, cast(nn.Module, pl_module.network)
        samples = data.dataset.split(split)
        for number, place in enumerate(spread_over(len(samples), self.images)):
            with decoration(f"panel {split}_{number}.png", "segdcn-evaluate draws it again"):
                self._draw(samples[place], f"{split}_{number}", data, network, pl_module)

    def _draw(self, sample: Sample, name: str, data: Any, network: nn.Module, task: Any) -> None:
        image, _ = data.eval_transform(sample.image, sample.label)
        image = image[None].to(task.device)
        prediction = task.evaluator.inference(network, image).argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
        names, palette = [str(one) for one in data.dataset.class_names], data.dataset.palette
        panel = comparison_panel(sample.image, sample.label, prediction, names, palette, sample.name)
        write_png(self.folder / f"{name}.png", panel)
        if sampling_layers(network):
            # an image without a label: where it is looked at then, the network says
            pixels = central_pixels(sample.label) or central_pixels(prediction)
            points = sampling_points(network, image, pixels)
            pairs = [(pixel, depths[-1].numpy()) for pixel, depths in zip(pixels, points, strict=True)]
            panel = sampling_panel(sample.image, pairs, sample.name)
            write_png(self.folder / f"{name}_sampling.png", panel)
