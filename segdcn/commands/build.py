"""From a composed config to the objects of a run."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import MPSAccelerator
from pytorch_lightning.callbacks import Checkpoint, ProgressBar

from segdcn.commands.configs import plain
from segdcn.commands.errors import is_misconfiguration
from segdcn.data.batches import check_world_size
from segdcn.errors import UserError, is_passing
from segdcn.runs.checkpoint import GROUPS, without_pretrained
from segdcn.training.checkpointing import AtomicCheckpoints


def build_network(config: DictConfig, num_classes: int) -> Any:
    """The network that ``config.model`` names; of a run that goes on its checkpoint holds the weights."""
    model = plain(config.model)
    if config.resume:
        model = without_pretrained(model)
    return instantiate(model, num_classes=num_classes, _convert_="all")


def describe_run(config: DictConfig, dataset: Any) -> dict[str, Any]:
    """What a task's checkpoints hold to rebuild the run; a group that its kind of task lacks is empty."""
    return {
        # with its interpolations, so that a run folder can be moved: ${output_dir} is set anew on resume
        "config": OmegaConf.to_container(config),
        "groups": {group: plain(config[group]) if group in config else {} for group in GROUPS},
        "class_names": [str(name) for name in dataset.class_names],
        "palette": [list(colour) for colour in dataset.palette],
    }


def build_datamodule(config: DictConfig, dataset: Any) -> Any:
    """The batches of ``dataset``, as ``config.datamodule`` prepares them."""
    return build_with(config.datamodule, dataset=dataset)


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
        trainer = build_with(
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


def build_with(config: DictConfig, **parts: Any) -> Any:
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
