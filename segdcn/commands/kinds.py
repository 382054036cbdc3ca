"""Whether the settings of a config are of the kinds that its classes and functions say they take."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf

from segdcn.commands.configs import CONFIG_PATH
from segdcn.errors import UserError
from segdcn.runs.overrides import is_path
from segdcn.runs.targets import find

_PACKAGES = ("segdcn.", "torch.", "pytorch_lightning.")
_MAY_BE_NULL = ("callbacks", "logger")
_COUNTS = ("images_per_step", "paper_miou")
_TEXTS = (str, Path)
_NUMBERS: Mapping[Any, tuple[type, ...]] = {int: (int,), float: (int, float)}


def check_kinds(settings: Any, key: str = "") -> None:
    """That what plain settings give to each ``_target_`` of segdcn, torch or Lightning is of the kind it asks for.

    A class finds some settings wrong only when it uses them, in the middle of a run. Those of other packages are not
    looked at: what they say they take may be more or less than what they take.

    key: where the settings stand in their config.

    Raises: UserError that names the setting.
    """
    if not isinstance(settings, Mapping):
        return
    wanted = {**_wanted(str(settings.get("_target_", ""))), "_partial_": bool}
    for name, value in settings.items():
        place = f"{key}.{name}" if key else str(name)
        if name in wanted and value != "???" and not _fits(value, wanted[name]):
            raise UserError(f"{place} must be {' or '.join(dict.fromkeys(_words(wanted[name])))}, got {value!r}")
        check_kinds(value, place)


def _wanted(target: str) -> dict[str, Any]:
    """The annotations of what a target takes; none where it cannot be found, which is told when it is built."""
    if not target.startswith(_PACKAGES):
        return {}
    try:
        found = find(target)
        return get_type_hints(found.__init__ if inspect.isclass(found) else found)
    except Exception:  # whatever an import raises, or a name that is there for type checkers alone
        return {}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is one of a kind; what cannot be told fits."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if isinstance(value, Mapping) and "_target_" in value:
        return True  # what it builds
    if kind in (None, type(None)):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool) and value == value  # NaN is none
    if kind in _TEXTS:
        return isinstance(value, str)
    plain = origin or kind
    if not inspect.isclass(plain) or plain is object:
        return True
    if isinstance(value, list):
        return any(issubclass(one, plain) for one in (list, tuple, set)) and (
            len(arguments) != 1 or all(_fits(one, arguments[0]) for one in value)
        )
    if isinstance(value, Mapping):
        return issubclass(dict, plain)
    return isinstance(value, plain)


def _words(kind: Any) -> Iterator[str]:
    """A kind as a user reads it."""
    if get_origin(kind) in (Union, types.UnionType):
        for one in get_args(kind):
            yield from _words(one)
    elif get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    else:
        plain = get_origin(kind) or kind
        words = {bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
        words |= dict.fromkeys(_TEXTS, "a text")
        if plain in words:
            yield words[plain]
        elif inspect.isclass(plain) and issubclass(plain, Mapping):
            yield "a mapping"
        elif inspect.isclass(plain) and issubclass(list, plain):
            yield "a list"
        else:
            yield str(getattr(plain, "__name__", plain))


def check_keys(config: DictConfig, config_name: str) -> None:
    """That switches are true or false, paths are texts and groups are mappings; ``check_kinds`` looks at the rest.

    config_name: the file in conf/ that ``config`` was composed from.

    Raises: UserError that names the key.
    """
    defaults = yaml.safe_load(Path(CONFIG_PATH, f"{config_name}.yaml").read_text(encoding="utf-8"))
    groups = {group for one in defaults["defaults"] if isinstance(one, dict) for group in one}
    if "task" in groups:  # whose files hold several
        texts = (file.read_text(encoding="utf-8") for file in Path(CONFIG_PATH, "task").glob("*.yaml"))
        groups |= {key for text in texts for key, value in yaml.safe_load(text).items() if isinstance(value, dict)}
    groups |= {key for key, value in defaults.items() if isinstance(value, dict)}
    for key in config:
        if OmegaConf.is_missing(config, key):
            continue
        value, name = config[key], str(key)
        if isinstance(defaults.get(key), bool) and not isinstance(value, bool):
            raise UserError(f"{name} must be true or false, got {value!r}")
        if is_path(name) and value is not None and (not isinstance(value, str) or not value):
            raise UserError(f"{name} must be a path, got {value!r}")
        if name in groups and not (OmegaConf.is_dict(value) or (value is None and name in _MAY_BE_NULL)):
            raise UserError(f"{name} must be a mapping of settings, got {value!r}")
        if name in _COUNTS and not (value is None or type(value) in (int, float)):
            raise UserError(f"{name} must be a number or null, got {value!r}")
