"""From a composed config to the objects of a run; shared by the commands, which alone know Hydra."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segdcn import UserError, is_passing
from segdcn.commands.errors import is_misconfiguration
from segdcn.runs.folder import find_checkpoint
from segdcn.runs.overrides import is_of_the_place, split_override

_PACKAGE = Path(__file__).resolve().parents[1]
# a wheel carries the configs inside the package; in a checkout they lie beside it
CONFIG_PATH = str(next((folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir()), ""))


def check_hydra_keys(hydra: HydraConf | DictConfig) -> None:
    """Refuse what Hydra's own keys could ask for and nothing here would do.

    Raises: UserError, one line.
    """
    if hydra.job.chdir:
        raise UserError(
            "hydra.job.chdir=true is of no use: paths are of the folder where the command is started, and everything is"
            " written to output_dir"
        )


def plain(config: DictConfig) -> dict[str, Any]:
    """A group of the config as plain values."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def build_dataset(config: DictConfig) -> Any:
    """The data set that ``config.dataset`` names."""
    return instantiate(config.dataset, _convert_="all")


def build_task(config: DictConfig, dataset: Any) -> Any:
    """Network, loss and optimisation as one ``SegmentationTask``, with the description its checkpoints carry."""
    from segdcn.runs.checkpoint import GROUPS

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
    from segdcn.runs.checkpoint import without_pretrained

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
    from segdcn.evaluation import Evaluator, get_protocol
    from segdcn.evaluation.protocols import CityscapesLike
    from segdcn.runs.submission import CityscapesSubmission, VocSubmission

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
    from pytorch_lightning.callbacks import LearningRateMonitor, ProgressBar

    from segdcn.data.datamodule import check_world_size
    from segdcn.training.checkpointing import AtomicCheckpoints

    for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if config.trainer.get(key) is not None and config.trainer[key] < 1:
            raise UserError(f"trainer.{key} must be at least 1, got {config.trainer[key]}")
    parts: dict[str, Any] = {"accelerator": usable_accelerator(config.trainer.accelerator)}
    callbacks, loggers = (
        [instantiate(part, _convert_="all") for part in (config.get(group) or {}).values() if part is not None]
        for group in ("callbacks", "logger")
    )
    if not loggers:  # which would refuse the run
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    if "enable_progress_bar" not in config.trainer and not any(isinstance(one, ProgressBar) for one in callbacks):
        parts["enable_progress_bar"] = sys.stdout.isatty()  # Lightning's own bar is for a person who waits
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
    return trainer


def usable_accelerator(name: str) -> str:
    """The device that a run takes: a CUDA GPU or the CPU.

    Apple's GPU has neither float64, in which figures are summed, nor the backward of the deformable operator.

    Raises: UserError, one line, where that GPU is asked for.
    """
    import torch
    from pytorch_lightning.accelerators import MPSAccelerator

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


# What was learned so far depends on all the rest; changes of it would be refused or silently lost in the middle of
# a run (the optimizer, for one, restores its learning rate).
_CHANGED_ON_RESUME = ("trainer.", "callbacks.", "logger.")


def may_change_on_resume(key: str) -> bool:
    """Whether a resumed run takes another value of a key."""
    return key.startswith(_CHANGED_ON_RESUME) or key == "report" or is_of_the_place(key)


def freely(may_be_new: Callable[[str], bool]) -> Callable[[list[str]], list[str]]:
    """Overrides of keys that only a checkpoint's config has, as Hydra asks for them: with two pluses."""

    def free(overrides: list[str]) -> list[str]:
        return [
            f"++{one.lstrip('+')}" if one[0] not in "-~" and may_be_new(split_override(one)[0]) else one
            for one in overrides
        ]

    return free


def resumed(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The config of the run that ``config.resume`` names, from its checkpoint, with this command's overrides.

    Raises: UserError for an override that a resumed run cannot follow, and for targets that are not trusted.
    """
    from segdcn.runs.checkpoint import GROUPS, read_checkpoint
    from segdcn.runs.targets import check_interpolations, check_targets

    path = find_checkpoint(config.resume)
    checkpoint = read_checkpoint(path)
    if not checkpoint.config:
        raise UserError(
            f"{path} is of a training from Python: continue it there, with trainer.fit(..., ckpt_path=PATH)"
        )
    if not config.trust:
        check_targets(checkpoint.config, "config", path)
        check_interpolations(checkpoint.config, path)
    saved = OmegaConf.create(dict(checkpoint.config))
    for group in (*GROUPS, "task", "optimizer", "schedule", "trainer", "callbacks", "logger"):
        if not (saved.get(group) is None or OmegaConf.is_dict(saved[group])):
            raise UserError(f"{path} cannot be continued: {group} in the config of its run is no mapping of settings")
    OmegaConf.set_struct(saved, True)
    parser = OverridesParser.create()
    for override in overrides:
        key = split_override(override.lstrip("~"))[0]
        if key in ("resume", "trust") or key.startswith("hydra."):
            continue
        if not may_change_on_resume(key):
            raise UserError(
                f"{override} cannot be changed when a run is resumed, only trainer.*, callbacks.*, logger.*, report,"
                " datamodule.num_workers, datamodule.eval_batch_size, and paths of the data set, such as dataset.root;"
                " a new run starts from its weights with model.weights=PATH"
            )
        # null leaves a callback out; a new key is a callback's or the trainer's
        value = None if override.startswith("~") else parser.parse_override(override).value()
        try:
            OmegaConf.update(saved, key, value, force_add=not key.startswith(("dataset.", "datamodule.")))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{override.lstrip('+')} does not fit the config of {path}: {reason}") from error
    saved.resume, saved.trust = str(path), config.trust
    return saved


def quiet_libraries() -> None:
    """Leave out what a newcomer can do nothing about; warnings that concern a run still show."""
    import pytorch_lightning  # noqa: F401  (its import sets the level that is changed here)

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
