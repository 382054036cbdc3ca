"""What a training says of itself before it begins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from segdcn.models import sampling_layers
from segdcn.runs.files import shown
from segdcn.training.base import Task

ROLES = {
    "offset": "offsets",
    "pool_offset": "offsets of pooling",
    "field_offset": "offset fields",
    "reduce": "1x1 convolution",
}
"""Roles of parameter groups in words."""


def introduce(
    config: DictConfig,
    dataset: Any,
    task: Task,
    conditions: dict[str, Any],
    found: Sequence[str],
    notes: Sequence[str],
) -> None:
    """What is trained on what, in a few lines.

    found: of what was left to the data and the machine.  notes: what is odd about the labels.
    """
    images = ", ".join(f"{len(dataset.split(split))} {split}" for split in ("train", "val"))
    print(f"data     {type(dataset).__name__}: {images} images, {len(dataset.class_names)} classes")
    for line in found:
        print(line)
    print(f"network  {_in_words(config.model)}, {conditions['parameters'] / 1e6:.2f} M parameters")
    print(f"         deformable: {_deformable(task.network)}")
    print(f"batch    {_batch(config, task, conditions['images_per_step'])}")
    if config.get("hint"):
        print(f"change   {config.hint}")
    run = shown(config.output_dir)
    print(f"run      {run}" + (f", resumed from {Path(config.resume).name}" if config.resume else ""))
    for note in notes:
        print(f"note     {note}")
    sys.stdout.flush()


def _deformable(network: Any) -> str:
    layers = sampling_layers(network)
    kinds = {type(layer).__name__ for layer in layers.values()}
    if kinds <= {"DeformConv2d"}:
        return ", ".join(layers) or "no layer"
    return f"{len(layers)} layers {', '.join(sorted(kinds))}"


def _in_words(model: DictConfig) -> str:
    """A network of ours by its parts, another one by its class."""
    if {"backbone", "head"} <= model.keys():
        return f"{model.backbone}, {model.head} head, output stride {model.get('output_stride')}"
    return str(model._target_)


def images_per_step(config: DictConfig, trainer: Any) -> dict[str, Any]:
    """How many images one step of the optimizer sees, and how many the recipe's protocol has."""
    images = config.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    return {"images_per_step": images, "images_per_step_of_recipe": config.images_per_step}


def _batch(config: DictConfig, task: Task, images: int) -> str:
    """What makes a step, how far it goes, and what of the settings is not as it seems."""
    batch, accumulated = config.datamodule.batch_size, config.trainer.get("accumulate_grad_batches") or 1
    parts = [f"{batch} images"]
    for number, what in ((images // (batch * accumulated), "devices"), (accumulated, "accumulated")):
        if number > 1:
            parts.append(f"{number} {what}")
    total = f" = {images} per step" if len(parts) > 1 else ""
    rate = f", learning rate {config.optimizer.lr:g}" if "lr" in config.optimizer else ""
    roles = {group["name"].partition("_layer")[0].removesuffix("_no_decay") for group in task.parameter_groups()}
    factors_in_words = [
        f"{ROLES.get(role, role)} x {factor:g}"
        for key, factor in config.task.items()
        if (role := str(key).removesuffix("_lr_mult")) != key and role in roles and factor != 1
    ]
    if (decay := config.task.get("layer_lr_decay", 1.0)) != 1:
        factors_in_words.append(f"each layer below x {decay:g}")
    lines = [" x ".join(parts) + total + rate + (f" ({', '.join(factors_in_words)})" if factors_in_words else "")]
    if config.task.backbone_lr_mult != 1 and "backbone" not in roles:
        lines.append("note     task.backbone_lr_mult has no effect: the network has no part backbone that learns")
    if config.images_per_step not in (None, images):
        lines.append(
            f"note     the recipe's protocol has {config.images_per_step} images per step, this run {images}:"
            " trainer.devices x datamodule.batch_size x trainer.accumulate_grad_batches"
        )
    return "\n".join(lines)
