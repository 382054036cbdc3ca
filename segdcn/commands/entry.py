"""A function of a composed config as a console script."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal import utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from segdcn import UserError
from segdcn.commands.arguments import readable
from segdcn.commands.compose import CONFIG_PATH
from segdcn.commands.errors import one_line_errors
from segdcn.drawing.console import readable_output, telling
from segdcn.processes import is_first
from segdcn.runs.overrides import is_path


def console_script(
    config_name: str, free_keys: Callable[[list[str]], list[str]] | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """Make a function of the config ``conf/<config_name>.yaml`` and the command line's overrides a console script.

    free_keys: changes the overrides before Hydra composes them, such as to allow keys that it does not know.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @functools.wraps(function)
        def composed(config: DictConfig) -> Any:
            with one_line_errors():
                _check_hydra_keys()
                _check_kinds(config, config_name)
                return function(config)

        run = hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=config_name)(composed)

        @functools.wraps(function)
        def main() -> Any:
            readable_output()
            with telling(is_first()), one_line_errors(), _hydra_in_one_line():
                arguments = readable(sys.argv[1:])
                # Lightning repeats them for the processes that it starts
                sys.argv[1:] = free_keys(arguments) if free_keys else arguments
                return run()

        return main

    return decorate


@contextmanager
def _hydra_in_one_line() -> Iterator[None]:
    """What Hydra says of a command line, in several lines of its own, is told as any other error."""
    original = utils.run_and_report

    def told(func: Any) -> Any:
        def in_one_line() -> Any:
            with one_line_errors():
                return func()

        return original(in_one_line)

    utils.run_and_report = told
    try:
        yield
    finally:
        utils.run_and_report = original


def plain_script(function: Callable[[], Any]) -> Callable[[], Any]:
    """Make a function that reads its command line itself a console script."""

    @functools.wraps(function)
    def main() -> Any:
        readable_output()
        with telling(is_first()), one_line_errors():
            return function()

    return main


def _check_kinds(config: DictConfig, config_name: str) -> None:
    """That switches are true or false, paths are texts and groups are mappings; what they hold others look at."""
    defaults = yaml.safe_load(Path(CONFIG_PATH, f"{config_name}.yaml").read_text(encoding="utf-8"))
    groups = {group for one in defaults["defaults"] if isinstance(one, dict) for group in one}
    groups |= {key for key, value in defaults.items() if isinstance(value, dict)}
    for key in config:
        if OmegaConf.is_missing(config, key):
            continue
        value, name = config[key], str(key)
        if isinstance(defaults.get(key), bool) and not isinstance(value, bool):
            raise UserError(f"{name} must be true or false, got {value!r}")
        if is_path(name) and value is not None and (not isinstance(value, str) or not value):
            raise UserError(f"{name} must be a path, got {value!r}")
        if name in groups and not (value is None or OmegaConf.is_dict(value)):
            raise UserError(f"{name} must be a mapping of settings, got {value!r}")


def _check_hydra_keys() -> None:
    if HydraConfig.get().job.chdir:
        raise UserError(
            "hydra.job.chdir=true is of no use: paths are of the folder where the command is started, and everything is"
            " written to output_dir"
        )
