"""From a composed config to the objects of a run."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import MPSAccelerator
from pytorch_lightning.callbacks import Checkpoint, ProgressBar

from segdcn.commands.compose import plain
from segdcn.commands.errors import is_misconfiguration
from segdcn.data.crops import fitting_crop
from segdcn.data.datamodule import check_world_size
from segdcn.data.frequencies import RULES, class_weights
from segdcn.errors import UserError, is_passing
from segdcn.evaluation import Evaluator, get_protocol
from segdcn.evaluation.protocols import CityscapesLike
from segdcn.models.contract import check_logits
from segdcn.models.deeplab import suited_stride
from segdcn.runs.checkpoint import GROUPS, without_pretrained
from segdcn.runs.submission import CityscapesSubmission, VocSubmission
from segdcn.training.checkpointing import AtomicCheckpoints

ON_GPU, ON_CPU, LIGHT_HEAD = "resnet50", "mobilenet_v2", "fpn"
"""What ``auto`` comes to for model.backbone, and on a CPU for model.head."""


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
    return lines


def _on_gpu(trainer: DictConfig) -> bool:
    return torch.cuda.is_available() and trainer.get("accelerator") != "cpu"


def build_task(config: DictConfig, dataset: Any) -> Any:
    """Network, loss and optimisation as one ``SegmentationTask``, with the description its checkpoints carry."""
    return _build(
        config.task,
        network=_network(config, len(dataset.class_names)),
        loss=instantiate(config.loss, _convert_="all"),
        optimizer=instantiate(config.optimizer, _convert_="all"),
        schedule=instantiate(config.schedule, _convert_="all"),
        class_names=dataset.class_names,
        description={
            # with its interpolations, so that a run folder can be moved: ${output_dir} is set anew on resume
            "config": OmegaConf.to_container(config),
            "groups": {group: OmegaConf.to_container(config[group], resolve=True) for group in GROUPS},
            "class_names": [str(name) for name in dataset.class_names],
            "palette": [list(colour) for colour in dataset.palette],
        },
    )


def _network(config: DictConfig, num_classes: int) -> Any:
    """The network that ``config.model`` names; of a run that goes on its checkpoint holds the weights."""
    model = plain(config.model)
    if config.resume:
        model = without_pretrained(model)
    return instantiate(model, num_classes=num_classes, _convert_="all")


def build_datamodule(config: DictConfig, dataset: Any) -> Any:
    """The batches of ``dataset``, as ``config.datamodule`` prepares them."""
    return _build(config.datamodule, dataset=dataset)


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


def build_trainer(config: DictConfig, *more: Any) -> Any:
    """Lightning's Trainer; callbacks and loggers are the values of their groups, null ones are left out.

    more: callbacks that come before those of the config.

    Raises: UserError for devices that this machine lacks, and for a launcher that started another number of processes.
    """
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if config.trainer.get(key) is not None and config.trainer[key] < 1:
            raise UserError(f"trainer.{key} must be at least 1, got {config.trainer[key]}")
    parts: dict[str, Any] = {"accelerator": usable_accelerator(config.trainer.accelerator)}
    callbacks, loggers = (_parts(config, group) for group in ("callbacks", "logger"))
    if "enable_progress_bar" not in config.trainer and not any(isinstance(one, ProgressBar) for one in callbacks):
        parts["enable_progress_bar"] = sys.stdout.isatty()  # Lightning's own bar is for a person who waits
    if "enable_checkpointing" not in config.trainer and not any(isinstance(one, Checkpoint) for one in callbacks):
        parts["enable_checkpointing"] = False  # or Lightning adds one of its own
    try:
        trainer = _build(
            config.trainer,
            **parts,
            callbacks=[*more, *callbacks],
            logger=loggers or False,
            plugins=[AtomicCheckpoints(), *instantiate(config.trainer.get("plugins") or [], _convert_="all")],
        )
    except Exception as error:
        if isinstance(error, RuntimeError) or is_misconfiguration(error):  # its words for devices and SLURM's variables
            raise UserError(f"trainer: {error}") from error
        raise
    check_world_size(trainer)
    if config.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise UserError("trainer.sync_batchnorm=true works on GPUs only: on CPUs set trainer.sync_batchnorm=false")
    return trainer


def _parts(config: DictConfig, group: str) -> list[Any]:
    """What the keys of a group that are not null are built to; UserError for settings of what another file builds."""
    parts = {name: part for name, part in (config.get(group) or {}).items() if part is not None}
    for name, part in parts.items():
        if "_target_" not in part:
            raise UserError(
                f"{group}.{name} has settings ({', '.join(map(str, part))}), but no _target_ that takes them:"
                f" choose the {group}=NAME that has one, or {group}.{name}=null, which leaves it out"
            )
    return [instantiate(part, _convert_="all") for part in parts.values()]


def check_network(config: DictConfig, dataset: Any, task: Any, trainer: Any) -> tuple[int, int]:
    """That the network can do with what it is given, before it is; returns the size of what it trains on.

    That is a crop, or one image where training sees whole ones.
    """
    samples = dataset.split("val")
    height, width = (samples if len(samples) else dataset.split("train"))[0].label.shape
    validated = task.evaluator.protocol.prepare(torch.empty(1, 3, height, width, device="meta")).shape
    trained: tuple[int, int] = tuple(config.datamodule.crop_size or (height, width))
    images = config.datamodule.batch_size * (trainer.world_size if config.trainer.get("sync_batchnorm") else 1)
    evaluated = (validated[2], validated[3])
    device = trainer.strategy.root_device
    check_logits(task.network, len(dataset.class_names), (images, trained), [evaluated], device)
    return trained


def usable_accelerator(name: str) -> str:
    """The device that a run takes: a CUDA GPU or the CPU.

    Apple's GPU has neither float64, in which figures are summed, nor the backward of the deformable operator.

    Raises: UserError, one line, where that GPU is asked for.
    """
    if not MPSAccelerator.is_available() or torch.cuda.is_available():
        return name
    lacks = "Apple's GPU lacks float64 and the backward of deformable convolution"
    if name in ("mps", "gpu"):
        raise UserError(f"trainer.accelerator={name} cannot be used: {lacks}; trainer.accelerator=cpu works")
    if name == "auto":
        print(f"device   CPU: {lacks}")
        return "cpu"
    return name


def _build(config: DictConfig, **parts: Any) -> Any:
    """The config's ``_target_`` with parts that are objects already, which Hydra would copy into a config."""
    try:
        return instantiate(config, _partial_=True, _convert_="all")(**parts)
    except UserError:
        raise
    except Exception as error:  # a key that the target does not know, or a value, as Hydra reports it elsewhere
        if is_passing(error):
            raise
        raise UserError(f"{config._target_}: {error}") from error


def quiet_libraries() -> None:
    """Leave out what a newcomer can do nothing about; warnings that concern a run still show."""
    for name in ("pytorch_lightning", "lightning_fabric.utilities.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",  # Lightning's call of torch's pytree
        ".*Encountered `nan` values in tensor.*",  # a run whose loss is not finite says more itself
        ".*does not have many workers.*",  # the recipes choose num_workers
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run: meant
        ".*`srun` command is available.*",  # a cluster's login node, or a sweep's own start of a job there
    ):
        warnings.filterwarnings("ignore", message)
