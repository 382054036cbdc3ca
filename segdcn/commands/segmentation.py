"""What the commands do with label maps; for boxes there is ``detection``, with functions of the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from segdcn.commands.build import build_network, build_with, describe_run
from segdcn.commands.figures import print_figures as print_figures
from segdcn.data.crops import fitting_crop
from segdcn.data.frequencies import RULES, class_weights
from segdcn.data.labels import labels_before_training as labels_before_training
from segdcn.errors import UserError
from segdcn.evaluation import Evaluator, get_protocol
from segdcn.evaluation.protocols import CityscapesLike
from segdcn.models.contract import check_logits
from segdcn.models.cost import network_cost
from segdcn.models.deeplab import suited_stride
from segdcn.runs.checkpoint import Checkpoint
from segdcn.runs.submission import CityscapesSubmission, VocSubmission
from segdcn.training.task import SegmentationTask

ON_GPU, ON_CPU, LIGHT_HEAD = "resnet50", "mobilenet_v2", "fpn"
"""What ``auto`` comes to for model.backbone, and on a CPU for model.head."""
MIXED = "bf16-mixed"
"""What an open trainer.precision comes to on a GPU that computes in bfloat16; elsewhere float32."""


def settle(config: DictConfig, dataset: Any) -> list[str]:
    """Put values in the place of what a config leaves to the data and the machine; one line each of what was found.

    A run keeps them, so that whoever goes on with it or evaluates it finds the same without another look.
    """
    lines = []
    if "class_names" in config.dataset and config.dataset.class_names is None:
        config.dataset.class_names = [str(name) for name in dataset.class_names]
        lines.append(f"classes  {getattr(dataset, 'classes_found', ', '.join(config.dataset.class_names))}")
    for key, value in getattr(dataset, "settings_found", {}).items():
        if key in config.dataset and config.dataset[key] is None:
            config.dataset[key] = value
    if divided := getattr(dataset, "split_found", None):
        lines.append(f"split    {divided}")
    data, model = config.datamodule, config.model
    if data.get("crop_size") == "auto":
        data.crop_size = list(fitting_crop(dataset.split("train"), data.get("short_side"), data.get("long_side")))
        height, width = data.crop_size
        lines.append(f"crops    {height}x{width} pixels, which fit the images; datamodule.crop_size=[H,W] makes others")
    if (rule := config.loss.get("class_weights")) in RULES:
        weights = [float(f"{weight:.4g}") for weight in class_weights(dataset, rule)]
        config.loss.class_weights = weights
        least, most = int(np.argmin(weights)), int(np.argmax(weights))
        names = dataset.class_names
        lines.append(f"weights  {rule}: {weights[least]:g} ({names[least]}) to {weights[most]:g} ({names[most]})")
    by_machine = model.get("backbone") == "auto"
    if by_machine:
        model.backbone = ON_GPU if _on_gpu(config.trainer) else ON_CPU
    if model.get("head") == "auto":
        model.head = LIGHT_HEAD if model.backbone == ON_CPU else "v3plus"
    ours = str(model.get("_target_")).endswith(".build_deeplab") and {"head", "backbone"} <= model.keys()
    if ours and model.get("output_stride", 16) is None:
        model.output_stride = suited_stride(model.head, model.backbone)
    if by_machine and model.backbone == ON_CPU:
        lines.append(
            f"light    {ON_CPU} and the head {model.head}, since this is a CPU (on a GPU {ON_GPU} and v3plus);"
            " model.backbone=NAME takes another"
        )
    if config.trainer.get("precision", "") is None:
        half = _on_gpu(config.trainer) and torch.cuda.is_bf16_supported(including_emulation=False)
        config.trainer.precision = MIXED if half else "32-true"
        if half:
            lines.append(f"mixed    {MIXED}, which this GPU has; trainer.precision=32-true does without")
    return lines


def _on_gpu(trainer: DictConfig) -> bool:
    return torch.cuda.is_available() and trainer.get("accelerator") != "cpu"


def build_task(config: DictConfig, dataset: Any) -> Any:
    """Network, loss and optimisation as one ``SegmentationTask``, with the description its checkpoints carry."""
    task = build_with(
        config.task,
        network=build_network(config, len(dataset.class_names)),
        loss=instantiate(config.loss, _convert_="all"),
        optimizer=instantiate(config.optimizer, _convert_="all"),
        schedule=instantiate(config.schedule, _convert_="all"),
        class_names=dataset.class_names,
        description=describe_run(config, dataset),
    )
    task.evaluator = build_evaluator(config.protocol, dataset, "val")
    return task


def evaluation_task(config: DictConfig, checkpoint: Checkpoint, dataset: Any) -> SegmentationTask:
    """The task of a checkpoint, which evaluates ``config.split`` as segdcn-evaluate is asked to."""
    task = SegmentationTask(
        checkpoint.network(), dataset.class_names, checkpoint.loss(), channels_last=checkpoint.channels_last
    )
    task.evaluator = build_evaluator(
        config.protocol,
        dataset,
        config.split,
        inference=instantiate(config.inference, _convert_="all"),
        submission=Path(config.output_dir) / "submission" if config.submission else None,
    )
    return task


def build_evaluator(
    protocol: str, dataset: Any, split: str, inference: Any = None, submission: Path | None = None
) -> Any:
    """How a split of ``dataset`` is predicted and counted, by the protocol of that name.

    inference: an ``Inference``; None is whole images at one scale.
    submission: the folder for the files that the benchmark's server takes; None writes none.

    Raises: UserError where the data set does not fit the protocol, or the protocol a submission.
    """
    chosen = get_protocol(protocol, len(dataset.class_names))
    options: dict[str, Any] = {}
    if chosen.categories:
        if not isinstance(dataset, CityscapesLike):
            raise UserError(
                f"protocol={chosen.name} needs a data set with categories, label_ids and instances, which"
                f" {type(dataset).__name__} has not: use protocol=native"
            )
        options["categories"], options["label_ids"] = dataset.categories, dataset.label_ids
        options["instances"] = dataset.instances(split)
    if submission is not None:
        if chosen.name == "voc":
            options["sink"] = VocSubmission(submission, split, dataset.palette)
        elif chosen.name == "cityscapes":
            options["sink"] = CityscapesSubmission(submission, dataset.label_ids)
        else:
            raise UserError(f"submission=true needs protocol=voc or protocol=cityscapes, got {chosen.name}")
    return Evaluator(dataset.class_names, inference, chosen, **options)


def check_network(config: DictConfig, dataset: Any, task: Any, trainer: Any) -> dict[str, Any]:
    """That the network can do with what it is given, before it is; returns what it costs.

    That is for a crop, or for one image where training sees whole ones.
    """
    samples = dataset.split("val")
    height, width = (samples if len(samples) else dataset.split("train"))[0].label.shape
    validated = task.evaluator.protocol.prepare(torch.empty(1, 3, height, width, device="meta")).shape
    trained: tuple[int, int] = tuple(config.datamodule.crop_size or (height, width))
    images = config.datamodule.batch_size * (trainer.world_size if config.trainer.get("sync_batchnorm") else 1)
    evaluated = (validated[2], validated[3])
    device = trainer.strategy.root_device
    check_logits(task.network, len(dataset.class_names), (images, trained), [evaluated], device)
    return network_cost(task.network, trained)


def report_training(folder: Path, dataset: Any) -> Path:
    """Write the page of a run that has just ended; returns where it is."""
    from segdcn.report.pages import report_training as write_page  # here: few runs of a sweep need it

    return write_page(folder, dataset)
