"""python one_step.py OVERRIDES...: one step on images with very different numbers of labelled pixels, in float64.

Norm layers keep their first statistics, since those of a batch would depend on its size (synchronised batch norm runs
on GPUs only). Leaves before.pt, the weights before the step, and figures.json beside the checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from running import BARE, compose
from torch import nn

from segdcn.commands import segmentation
from segdcn.commands.segmentation import build_task
from segdcn.commands.train import train
from segdcn.data import Shapes
from segdcn.data.dataset import Sample


class Unequal(Shapes):
    """Of image k only the first 1 + 8k rows are labelled."""

    def split(self, name: str) -> Any:
        samples = list(super().split(name))
        for number, sample in enumerate(samples):
            label = sample.label.copy()
            label[1 + 8 * number :] = 255
            samples[number] = Sample(sample.image, label, sample.name)
        return samples


def build(config: Any, dataset: Any) -> Any:
    """The task of a run, whose norm layers stay in evaluation mode."""
    task = build_task(config, dataset)
    for module in task.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    original = task.on_train_end

    def on_train_end() -> None:
        original()
        if task.trainer.is_global_zero:
            figures = {name: float(value) for name, value in task.trainer.callback_metrics.items()}
            Path(config.output_dir, "figures.json").write_text(json.dumps(figures))

    task.on_train_end = on_train_end
    # the same on all processes, which Lightning starts later with the same seed
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    before = {name: parameter.detach().clone().double() for name, parameter in task.named_parameters()}
    torch.save(before, Path(config.output_dir, "before.pt"))
    return task


if __name__ == "__main__":
    segmentation.build_task = build
    train(
        compose(
            "train",
            *BARE,
            "dataset._target_=one_step.Unequal",
            "dataset.train_images=4",
            "dataset.val_images=3",
            "datamodule.crop_size=[96,96]",
            "model.head=paper",
            "optimizer=sgd",
            "optimizer.lr=1.0",
            "optimizer.momentum=0",
            "optimizer.weight_decay=0",
            "schedule=constant",
            "task.offset_lr_mult=1.0",
            "trainer.precision=64-true",
            "trainer.max_epochs=1",
            "name=test",
            *sys.argv[1:],
        )
    )
