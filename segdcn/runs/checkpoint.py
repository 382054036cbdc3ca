"""From a checkpoint to its data set and its network: the one way of all commands, and the one rule of trust.

A checkpoint names classes and functions (``_target_``) with their arguments. It may come from anywhere, so that only
what is known to do no more than its name says is called; everything else needs ``trust``.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segdcn import UserError
from segdcn.runs.folder import check_checkpoint, is_passing, run_folder_of, typed

GROUPS = ("dataset", "datamodule", "model", "loss")
"""The parts of a config from which objects are built again; a checkpoint has them resolved."""

# Of segdcn any class of these modules, and these functions
_MODULES = (
    "segdcn.data",
    "segdcn.models",
    "segdcn.losses",
    "segdcn.task",
    "segdcn.callbacks",
    "segdcn.sweep.local",
    "segdcn.sweep.slurm",
)
_FUNCTIONS = (
    "segdcn.models.deeplab.build_deeplab",
    *(f"segdcn.optim.{n}" for n in ("poly", "one_cycle", "step", "constant")),
)
# What recipes use: another setting as it stands. Resolvers such as oc.create could make a target of a text.
_INTERPOLATION = re.compile(r"\$\{(\.*[\w.]+|hydra:[\w.]+|oc\.select:[\w.]+(,[\w.]+)?)\}")
# Of torch, torchvision and Lightning classes of these kinds
_KINDS = (
    "torch.nn.modules.module.Module",
    "torch.optim.optimizer.Optimizer",
    "torch.optim.lr_scheduler.LRScheduler",
    "pytorch_lightning.trainer.trainer.Trainer",
    "pytorch_lightning.callbacks.callback.Callback",
    "pytorch_lightning.loggers.logger.Logger",
)


@dataclass(frozen=True)
class Checkpoint:
    """What ``segdcn-train`` saved, read but not built.

    config: the run's, as it was composed, with its interpolations; for resuming and for what it tells.
    groups: ``GROUPS`` of it as plain values without interpolations.
    state_dict: of the run's task; the network's names begin with ``network.``.
    trust: whether targets of other packages may be called.
    """

    path: Path
    config: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Any]]
    class_names: Sequence[str]
    palette: Sequence[Sequence[int]]
    state_dict: Mapping[str, Tensor] = field(repr=False)
    trust: bool = False

    @property
    def run(self) -> Path:
        """The run folder."""
        return run_folder_of(self.path)

    @property
    def seed(self) -> int:
        return int(self.config.get("seed") or 0)

    def dataset(self, changes: Mapping[str, Any] | None = None) -> Any:
        """The data set of the run.

        changes: settings given anew, such as ``root``; None keeps one. A ``_target_`` among them is trusted.

        Raises: UserError, one line: a target that is not trusted, data that are not there, other classes.
        """
        dataset = build(self.dataset_settings(changes), self.path)
        names = [str(name) for name in dataset.class_names]
        if names != list(self.class_names):
            raise UserError(
                f"{self.path} was trained with the {len(self.class_names)} classes {', '.join(self.class_names)}, but"
                f" the data set has the {len(names)} classes {', '.join(names)}: give a checkpoint that was trained on"
                " it, or the data set's own classes"
            )
        return dataset

    def dataset_settings(self, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the data set is built from, see ``dataset``.

        Raises: UserError for a target that is not trusted.
        """
        given = {key: value for key, value in (changes or {}).items() if value is not None}
        saved = {key: value for key, value in self.groups["dataset"].items() if key not in given}
        self._check(saved, "dataset")
        return {**saved, **given}

    def network(self, network: nn.Module | None = None) -> nn.Module:
        """The network with its trained weights, in evaluation mode.

        network: built by the caller as it was for the training; None builds it from the checkpoint's settings.

        Raises: UserError, one line: a target that is not trusted, settings or weights that do not fit.
        """
        from segdcn.models.contract import giving_logits
        from segdcn.models.weights import NETWORK, misfit

        if network is None:
            self._check(self.groups["model"], "model")
            settings = without_pretrained(self.groups["model"])
            network = build(settings, self.path, num_classes=len(self.class_names))
        network = giving_logits(network)
        weights = {
            key.removeprefix(NETWORK): value for key, value in self.state_dict.items() if key.startswith(NETWORK)
        }
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"{self.path} does not fit its network, the {type(network).__name__} that is built here:"
                f" {misfit(network.state_dict(), weights) or ' '.join(str(error).split())}"
            ) from error
        return network.eval()

    def datamodule(self, dataset: Any, changes: Mapping[str, Any] | None = None) -> Any:
        """The batches of a data set as the run had them.

        changes: settings given anew; None keeps one.

        Raises: UserError for a target that is not trusted.
        """
        self._check(self.groups["datamodule"], "datamodule")
        given = {key: value for key, value in (changes or {}).items() if value is not None}
        return build({**self.groups["datamodule"], **given}, self.path, dataset=dataset)

    def loss(self) -> nn.Module:
        """The training loss, which an evaluation computes as well."""
        self._check(self.groups["loss"], "loss")
        loss: nn.Module = build(self.groups["loss"], self.path)
        return loss

    def _check(self, settings: Any, group: str) -> None:
        if not self.trust:
            check_targets(settings, group, self.path)


def read_checkpoint(path: Path, trust: bool = False) -> Checkpoint:
    """Read a checkpoint of ours, plain values and tensors only.

    Raises: MissingFileError, or UserError when the file is damaged or not from segdcn; one line each.
    """
    check_checkpoint(path)
    from segdcn.models.weights import DamagedFileError, read_saved

    try:
        content = read_saved(path)
    except DamagedFileError as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is damaged, truncated or no checkpoint"
            f" ({error}){_another(path)}"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("segdcn"), dict):
        raise UserError(f"{path} is not a segdcn checkpoint: it lacks the description of its run")
    about = content["segdcn"]
    try:
        return Checkpoint(
            path,
            _of_texts(about["config"], "config"),
            {group: _of_texts(about["groups"][group], group) for group in GROUPS},
            _listed(about["class_names"], str, "class_names"),
            _listed(about["palette"], list, "palette"),
            _of_tensors(content["state_dict"]),
            trust,
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} lacks a part of the description of its run ({error}): it was written by another version of segdcn"
        ) from error


def _of_texts(values: Any, name: str) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise TypeError(f"{name} is no mapping")
    return dict(values)


def _of_tensors(values: Any) -> dict[str, Tensor]:
    if not all(isinstance(value, Tensor) for value in _of_texts(values, "state_dict").values()):
        raise TypeError("state_dict holds more than tensors")
    return dict(values)


def _listed(values: Any, kind: type, name: str) -> list[Any]:
    if not isinstance(values, list | tuple) or not values or not all(isinstance(value, kind) for value in values):
        raise TypeError(f"{name} is no list of {kind.__name__}")
    return list(values)


def _another(path: Path) -> str:
    """What to resume from instead of a damaged last.ckpt."""
    best = path.with_name("best.ckpt")
    if path.name != "last.ckpt" or not best.is_file():
        return ""
    try:
        step = torch.load(best, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception:  # damaged too
        return ""
    return f"; {typed(best, 'resume')} goes on from step {step}"


def without_pretrained(model: Mapping[str, Any]) -> dict[str, Any]:
    """A network's settings without those that fetch weights to begin with, by the names that are common for them.

    For a network whose weights are in a checkpoint: the file may not be here any more.
    """
    names = ("weights", "weights_backbone", "encoder_weights")
    empty = {name: None for name in names if isinstance(model.get(name), str)}
    return {**model, **empty, **({"pretrained": False} if model.get("pretrained") is True else {})}


# --- building ---------------------------------------------------------------------------------------------------------


def build(settings: Any, source: Path, **more: Any) -> Any:
    """The object that plain settings with a ``_target_`` describe, as Hydra builds it; the targets must be trusted.

    source: the checkpoint that holds them, for messages; more: further arguments.

    Raises: UserError, one line: a target that cannot be found or does not take its arguments.
    """
    if isinstance(settings, Mapping):
        values = {key: build(value, source) for key, value in settings.items() if not _is_special(key)}
        if "_target_" not in settings:
            return values
        name = str(settings["_target_"])
        target, arguments = _located(name, source), build(settings.get("_args_", []), source)
        if settings.get("_partial_"):
            return functools.partial(target, *arguments, **values, **more)
        try:
            return target(*arguments, **values, **more)
        except UserError:
            raise
        except Exception as error:  # a setting that this version does not know, or its class refuses
            if is_passing(error):
                raise
            raise UserError(f"{source} describes a {name} that cannot be built here: {error}") from error
    if isinstance(settings, list | tuple):
        return [build(value, source) for value in settings]
    return settings


def _is_special(key: Any) -> bool:
    return key in ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")


def _located(name: str, source: Path) -> Any:
    try:
        return find(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{source} names {name}, which cannot be found here ({error}): is the folder of its module on PYTHONPATH?"
        ) from error


def find(name: str) -> Any:
    """The object of a dotted name; ImportError or AttributeError where there is none."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # of a module that is there and imports one that is not
            missing = error
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise missing if len(parts) > 1 else ImportError(f"{name!r} names no module")


# --- trust ------------------------------------------------------------------------------------------------------------


def check_targets(settings: Any, group: str, source: Path) -> None:
    """That calling what plain settings name does no more than build a part of a run.

    Raises: UserError that names a target which may do anything.
    """
    for node in _nodes(settings):
        if isinstance(node, Mapping) and "_target_" in node and not _is_known(target := str(node["_target_"])):
            raise UserError(
                f"{source} names code that is not segdcn's, torch's or torchvision's: {target}, as its {group}; if you"
                " know where the file comes from, allow it with trust=true"
            )


def check_interpolations(config: Any, source: Path) -> None:
    """That texts of a config, which OmegaConf will resolve, stand for other settings of it and make no new ones.

    Raises: UserError that names a text which may become any target.
    """
    for node in _nodes(config):
        for found in re.finditer(r"\$\{", node) if isinstance(node, str) else ():
            if not _INTERPOLATION.match(node, found.start()):
                raise UserError(
                    f"{source} holds {node!r} in the config of its run, which could become any setting; if you know"
                    " where the file comes from, allow it with trust=true"
                )


def _nodes(settings: Any) -> Iterator[Any]:
    """Plain settings and all that is in them, at any depth."""
    yield settings
    inner = settings.values() if isinstance(settings, Mapping) else settings
    for value in inner if isinstance(settings, Mapping | list | tuple) else ():
        yield from _nodes(value)


def _is_known(target: str) -> bool:
    """By what the name leads to, not by the name: modules have the names of others among their own."""
    if target.partition(".")[0] not in ("segdcn", "torch", "torchvision", "pytorch_lightning"):
        return False
    try:
        found = find(target)
    except (Exception, SystemExit):  # whatever an import raises
        return False
    own = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if inspect.isclass(found):
        kinds = {f"{base.__module__}.{base.__qualname__}" for base in found.__mro__}
        if own.startswith(tuple(f"{module}." for module in _MODULES)):
            return True
        return own.startswith(("torch.", "torchvision.", "pytorch_lightning.")) and bool(kinds & set(_KINDS))
    if own.startswith("torchvision.models."):  # one of its networks
        models, name = import_module("torchvision.models"), target.rpartition(".")[2]
        return name in models.list_models() and models.get_model_builder(name) is found
    return own in _FUNCTIONS
