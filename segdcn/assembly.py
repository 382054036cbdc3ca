"""From a composed config to the objects of a run; shared by the commands, which alone know Hydra."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from segdcn.processes import run_name
from segdcn.run_folder import find_checkpoint, run_folder_of

_STARTED = time.time()
_PACKAGE = Path(__file__).resolve().parent
# a wheel carries the configs inside the package; in a checkout they lie beside it
CONFIG_PATH = str(next((folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir()), ""))


def _run_folder(resume: str | None, name: str) -> str:
    """``resume``'s own run folder, or a new one: runs/<experiment or dataset>/<date_time>."""
    if not resume:
        return f"runs/{name}/{run_name()}"
    try:
        return str(run_folder_of(find_checkpoint(resume)))
    except FileNotFoundError:
        return _NOWHERE


def _evaluation_folder(checkpoint: str | None, split: str, protocol: str, inference: DictConfig) -> str:
    """RUN/evaluation/<checkpoint>_<split>..., so that no evaluation overwrites the figures of another kind."""
    if not checkpoint or not Path(checkpoint).is_file():
        return _NOWHERE
    parts = [Path(checkpoint).stem, split]
    if protocol != "native":
        parts.append(protocol)
    for name, default in (("scales", [1.0]), ("flip", False), ("window", None), ("stride", None)):
        if inference[name] != default:
            numbers = re.findall(r"[\d.]+", str(inference[name]))  # whatever was typed: it is checked later
            parts.append(name + "-".join(numbers))
    return str(run_folder_of(Path(checkpoint)) / "evaluation" / "_".join(parts))


# Hydra makes the output folder before a command can look at its options: a path that does not exist is reported
# by the command in one line, until then the folder is one that nobody has to clean up.
_NOWHERE = str(Path(tempfile.gettempdir()) / f"segdcn-{os.getpid()}")
OmegaConf.register_new_resolver("run_folder", _run_folder, use_cache=True, replace=True)
OmegaConf.register_new_resolver("evaluation_folder", _evaluation_folder, use_cache=True, replace=True)


def build_dataset(config: DictConfig) -> Any:
    """The data set that ``config.dataset`` names."""
    return instantiate(config.dataset, _convert_="all")


def build_task(config: DictConfig, dataset: Any) -> Any:
    """Network, loss and optimisation as one ``SegmentationTask``, with the description its checkpoints carry."""
    description = {
        # with its interpolations, so that a run folder can be moved: ${output_dir} is set anew on resume
        "config": OmegaConf.to_container(config),
        "class_names": list(dataset.class_names),
        "palette": [list(colour) for colour in dataset.palette],
    }
    return _build(
        config.task,
        network=instantiate(config.model, num_classes=len(dataset.class_names), _convert_="all"),
        loss=instantiate(config.loss, _convert_="all"),
        optimizer=instantiate(config.optimizer, _convert_="all"),
        schedule=instantiate(config.schedule, _convert_="all"),
        class_names=dataset.class_names,
        description=description,
    )


def build_datamodule(config: DictConfig, dataset: Any) -> Any:
    """The batches of ``dataset``, as ``config.datamodule`` prepares them."""
    return _build(config.datamodule, dataset=dataset)


def build_evaluator(
    protocol: str, dataset: Any, split: str, inference: Any = None, submission: Path | None = None
) -> Any:
    """How a split of ``dataset`` is predicted and counted, by the protocol of that name.

    inference: an ``Inference``; None is whole images at one scale.
    submission: the folder for the files that the benchmark's server takes; None writes none.

    Raises: ValueError where the data set does not fit the protocol, or the protocol a submission.
    """
    from segdcn.evaluation import Evaluator, get_protocol
    from segdcn.evaluation.protocols import CityscapesLike
    from segdcn.evaluation.submission import CityscapesSubmission, VocSubmission

    chosen = get_protocol(protocol, len(dataset.class_names))
    options: dict[str, Any] = {}
    if chosen.categories:
        if not isinstance(dataset, CityscapesLike):
            raise ValueError(
                f"protocol={chosen.name} needs a data set with categories, label_ids and instance_files, which"
                f" {type(dataset).__name__} has not: use protocol=native"
            )
        options["categories"], options["label_ids"] = dataset.categories, dataset.label_ids
        options["instance_files"] = dataset.instance_files(split)
    if submission is not None:
        if chosen.name == "voc":
            options["sink"] = VocSubmission(submission, split, dataset.palette)
        elif chosen.name == "cityscapes":
            options["sink"] = CityscapesSubmission(submission, dataset.label_ids)
        else:
            raise ValueError(f"submission=true needs protocol=voc or protocol=cityscapes, got {chosen.name}")
    return Evaluator(dataset.class_names, inference, chosen, **options)


def build_trainer(config: DictConfig) -> Any:
    """Lightning's Trainer; callbacks and loggers are the values of their groups, null ones are left out.

    Raises: ValueError for devices that this machine lacks, and for a launcher that started another number of processes.
    """
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    from segdcn.data.datamodule import check_world_size

    parts = {
        group: [instantiate(part, _convert_="all") for part in (config[group] or {}).values() if part is not None]
        for group in ("callbacks", "logger")
    }
    try:
        trainer = _build(config.trainer, callbacks=parts["callbacks"], logger=parts["logger"] or False)
    except (MisconfigurationException, RuntimeError) as error:  # Lightning's words for devices and SLURM's variables
        raise ValueError(f"trainer: {error}") from error
    check_world_size(trainer)
    return trainer


def _build(config: DictConfig, **parts: Any) -> Any:
    """The config's ``_target_`` with parts that are objects already, which Hydra would copy into a config."""
    try:
        return instantiate(config, _partial_=True, _convert_="all")(**parts)
    except TypeError as error:  # a key that the target does not know, as Hydra reports it elsewhere
        raise ValueError(f"{config._target_}: {error}") from error


TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def cause_of(error: BaseException) -> BaseException:
    """What a class itself raised, where Hydra has wrapped it."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def user_error(error: Exception) -> str | None:
    """The one line to print for an error that a user can cause.

    None for a bug, and where ``HYDRA_FULL_ERROR=1`` asks for tracebacks.
    """
    cause = cause_of(error)
    lost = lost_process(cause)
    expected = (
        lost
        or isinstance(cause, ValueError | OSError | ImportError | MissingMandatoryValue | HydraException)
        or isinstance(error, InstantiationException)  # an argument that a class does not have
        or type(cause).__name__ == "TrainingStopped"
    )
    if os.environ.get("HYDRA_FULL_ERROR") == "1" or not expected:
        return None
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key} must be given: add {cause.full_key}=VALUE to the command"
    message = " ".join(str(cause).split())
    if lost:
        return f"another process of this run has ended or cannot be reached: see what it said ({message})"
    return message


def one_line_errors(command: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Print a user's error as one line and exit with status 1; the traceback goes to error.txt in the run folder.

    The status is ``TRY_AGAIN`` where another process of the run is lost. Of several processes with one run folder the
    first speaks for all that fail alike.
    ``HYDRA_FULL_ERROR=1`` shows it instead. Errors that are no user's (a bug) keep their traceback.
    """

    @functools.wraps(command)
    def wrapped(config: DictConfig) -> Any:
        try:
            return command(config)
        except Exception as error:
            message = user_error(error)
            if message is None:
                raise
            folder, report = Path(HydraConfig.get().runtime.output_dir), traceback.format_exc()
            if _reported_by_first(folder):
                sys.exit(1)
            _leave_behind(folder, report)
            print(f"error: {message}", file=sys.stderr)
            sys.exit(TRY_AGAIN if lost_process(cause_of(error)) else 1)

    return wrapped


def lost_process(error: BaseException) -> bool:
    """Whether torch.distributed failed because a process is not there (any more); gloo has no class of its own."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _reported_by_first(folder: Path) -> bool:
    """On other processes than the first: whether that one has reported an error of its own, given time to do it."""
    from pytorch_lightning.utilities import rank_zero_only

    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        return False
    time.sleep(2)
    report = folder / "error.txt"
    # an empty folder is taken away by the process that reports
    return not folder.exists() or (report.exists() and report.stat().st_mtime > _STARTED)


def _leave_behind(folder: Path, report: str) -> None:
    """error.txt in a run folder where something was begun; of an empty one, which Hydra made, nothing."""
    if folder == Path.cwd():  # of a command that has no folder of its own
        return
    with contextlib.suppress(OSError):  # a full disk is the error that is being reported
        if any(folder.iterdir()):
            (folder / "error.txt").write_text(report)
            return
        folder.rmdir()
        for parent in folder.parents:
            if Path.cwd() not in parent.parents or any(parent.iterdir()):
                break
            parent.rmdir()


# What was learned so far depends on all the rest; changes of it would be refused or silently lost in the middle of
# a run (the optimizer, for one, restores its learning rate).
CHANGED_ON_RESUME = (
    "trainer.",
    "callbacks.",
    "logger.",
    "report",
    "dataset.root",
    "dataset.sbd_root",
    "datamodule.num_workers",
    "datamodule.eval_batch_size",
)


def resumed(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The config of the run that ``config.resume`` names, from its checkpoint, with this command's overrides.

    Raises: ValueError for an override that a resumed run cannot follow.
    """
    from segdcn.run_folder import load_checkpoint

    checkpoint = find_checkpoint(config.resume)
    saved = DictConfig(load_checkpoint(checkpoint)["segdcn"]["config"])
    OmegaConf.set_struct(saved, True)
    for override in overrides:
        override = override.lstrip("+")  # asked for by Hydra for a key that only the resumed run's data set has
        if override.startswith(("resume=", "hydra.")):
            continue
        if not override.startswith(CHANGED_ON_RESUME):
            raise ValueError(
                f"{override} cannot be changed when a run is resumed, only trainer.*, callbacks.*, logger.*, report, "
                "dataset.root, dataset.sbd_root, datamodule.num_workers and datamodule.eval_batch_size"
            )
        try:
            saved.merge_with_dotlist([override])
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{override} does not fit the config of {checkpoint}: {reason}") from error
    saved.resume = str(checkpoint)
    return saved


def quiet_libraries() -> None:
    """Leave out what a newcomer can do nothing about; warnings that concern a run still show."""
    import pytorch_lightning  # noqa: F401  (its import sets the level that is changed here)

    for name in ("pytorch_lightning", "lightning_fabric.utilities.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",  # Lightning's call of torch's pytree
        ".*Encountered `nan` values in tensor.*",  # a run whose loss is not finite says more itself
        ".*The `srun` command is available.*",  # one process, or several that Lightning starts, are right as well
        ".*does not have many workers.*",  # the recipes choose num_workers
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run: meant
        ".*`srun` command is available.*",  # a cluster's login node, or a sweep's own start of a job there
    ):
        warnings.filterwarnings("ignore", message)
