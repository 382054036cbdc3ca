"""What a checkpoint names (``_target_``) made into objects, and the one rule of trust.

A checkpoint may come from anywhere, so that only what is known to do no more than its name says is called; everything
else needs ``trust``.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from segdcn.errors import UserError, is_passing

# Of segdcn any class of these modules, and these functions
_MODULES = (
    "segdcn.data",
    "segdcn.detection",
    "segdcn.models",
    "segdcn.training",
    "segdcn.sweep.local",
    "segdcn.sweep.slurm",
)

_FUNCTIONS = (
    "segdcn.models.deeplab.build_deeplab",
    "segdcn.detection.networks.build_detector",
    *(f"segdcn.training.optim.{n}" for n in ("poly", "one_cycle", "step", "constant")),
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
