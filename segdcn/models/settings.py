"""What a network was built from, as plain values that a checkpoint can hold."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, Protocol, TypeVar


class HasSettings(Protocol):
    """An object that remembers how it was built."""

    settings: Mapping[str, Any] | None


P = ParamSpec("P")
Built = TypeVar("Built", bound=HasSettings)


def with_settings(builder: Callable[P, Built]) -> Callable[P, Built]:
    """The same function, which leaves ``settings`` on what it builds: its own name as ``_target_``, its arguments."""

    @functools.wraps(builder)
    def build(*args: P.args, **kwargs: P.kwargs) -> Built:
        built = builder(*args, **kwargs)
        given = inspect.signature(builder).bind(*args, **kwargs)
        given.apply_defaults()  # those of this version
        built.settings = _described(builder, given.arguments)
        return built

    return build


def _described(target: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: _plain(value) for key, value in arguments.items()}
    return {"_target_": f"{target.__module__}.{target.__qualname__}", **values}


def _plain(value: Any) -> Any:
    """A dataclass as its class and fields, a path as a text; all else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return _described(type(value), {field.name: getattr(value, field.name) for field in fields(value)})
    return os.fspath(value) if isinstance(value, os.PathLike) else value
