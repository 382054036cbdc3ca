"""A command line made readable for Hydra: paths as they were typed, and a line that says how to quote the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from segdcn.commands.configs import CONFIG_PATH
from segdcn.commands.recipes import with_recipe
from segdcn.errors import UserError
from segdcn.runs.overrides import is_path, may_change_on_resume, quoted, split_override

_SHOWING = {"--cfg", "-c", "--info", "-i"}


def readable(arguments: Sequence[str]) -> list[str]:
    """The arguments with paths in quotes where Hydra's grammar would take them for something else, and null groups out.

    Raises: UserError, one line, for another argument that the grammar does not know, and where a sweep is to be shown.
    """
    parser = OverridesParser.create()
    several = bool({"-m", "--multirun"} & set(arguments))
    if several and (shows := _SHOWING.intersection(argument.partition("=")[0] for argument in arguments)):
        raise UserError(f"{min(shows)} shows one run's config or Hydra's, not several runs': leave -m out")
    return [_readable(argument, parser, several) for argument in arguments]


def _readable(argument: str, parser: OverridesParser, several: bool) -> str:
    if argument.startswith("-") or "=" not in argument:
        return argument
    problem = ""
    parsed: Override | None = None
    try:
        parsed = parser.parse_override(argument)
    except HydraException as error:
        problem = str(error).splitlines()[0]
    key, _, value = split_override(argument)
    if not key.strip("~"):
        raise UserError(f"{argument} names no setting: give KEY=VALUE")
    if value == "null" and (Path(CONFIG_PATH) / key).is_dir():  # a group, which Hydra takes out in another way
        return f"~{key}"
    # in a sweep a comma parts the values of two jobs
    if parsed is not None and (several or not parsed.is_sweep_override()):
        if is_path(key) and isinstance(parsed.value(), int | float):  # the name of a file or folder, as it was typed
            return argument[: len(argument) - len(value)] + quoted(value)
        return argument
    if is_path(key) and not value.startswith(("'", '"')):
        return argument[: len(argument) - len(value)] + quoted(value)
    if parsed is None:
        example = '["VALUE","VALUE"]' if value.startswith("[") else '"VALUE"'
        raise UserError(
            f"{argument} cannot be read ({problem}): a text that holds = , # ~ & : ( ) [ ] {{ }}, quotes or letters"
            f" beyond ASCII stands in quotes of its own within those of the shell: '{key}={example}'"
        )
    return argument


def freely(may_be_new: Callable[[str], bool]) -> Callable[[list[str]], list[str]]:
    """Overrides of keys that only a checkpoint's config has, as Hydra asks for them: with two pluses."""

    def free(overrides: list[str]) -> list[str]:
        return [
            f"++{one.lstrip('+')}" if one[0] not in "-~" and may_be_new(split_override(one)[0]) else one
            for one in overrides
        ]

    return free


def before_composing(overrides: list[str]) -> list[str]:
    """Overrides of segdcn-train as Hydra is given them: a run that goes on has its own config, another one a recipe."""
    resumes = any(split_override(override)[0] == "resume" for override in overrides)
    return freely(may_change_on_resume)(overrides) if resumes else with_recipe(overrides)
