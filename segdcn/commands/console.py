"""A function of a composed config as a console script."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra._internal import utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from segdcn.commands.arguments import readable
from segdcn.commands.configs import CONFIG_PATH, check_hydra_keys
from segdcn.commands.errors import one_line_errors
from segdcn.commands.kinds import check_keys
from segdcn.commands.output import readable_output, telling
from segdcn.runs.distributed import is_first


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
                check_hydra_keys(HydraConfig.get())
                check_keys(config, config_name)
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

    def run(func: Any) -> Any:
        def in_one_line() -> Any:
            with one_line_errors():
                return func()

        return original(in_one_line)

    utils.run_and_report = run
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
