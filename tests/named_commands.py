"""Commands of ours as texts name them, and whether they are ones: their options exist and their config composes."""

from __future__ import annotations

import re
import shlex
from functools import cache
from importlib.metadata import entry_points

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from omegaconf import OmegaConf
from running import compose

from segdcn.commands import benchmark
from segdcn.commands import report as report
from segdcn.commands import sweep as sweep
from segdcn.commands.arguments import freely, readable
from segdcn.runs.overrides import may_change_on_resume

COMMAND = r"segdcn-(?:train|evaluate|predict|analyze|export|data (?:check|convert)|benchmark|sweep|report)\b(?!:)"
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def commands_in(text: str) -> list[str]:
    """Lines that are a command, behind a "#" or "$" or before an explanation, and code within a line.

    Continued lines are joined; of several commands in one line (``&&``, ``;``) each is one. What holds an ellipsis is
    none.
    """
    joined = re.sub(r"[ \t]*\\\n[ \t]*#?[ \t]*", " ", text)
    found = re.findall(rf"^[ \t#$]*((?:.*&& )?{COMMAND}.*?)(?: {{3,}}\S.*)?$", joined, re.MULTILINE)
    found += re.findall(rf"^#.*: ({COMMAND}.*=.*)$", joined, re.MULTILINE)
    found += re.findall(rf"`({COMMAND}[^`\n]*)`", FENCED.sub("", joined))
    parts = {part.strip() for one in found for part in re.split("&&|; ", one)}
    return sorted(part for part in parts if re.match(COMMAND, part) and "…" not in part)


def assert_composes(command: str) -> None:
    """Fails for a program or an option that there is not, and for a config that lacks a value.

    A program's name alone says nothing of options, but for segdcn-train's.
    """
    program, *arguments = shlex.split(command, comments=True)
    assert program in _installed(), f"{program} is no command"
    if program == "segdcn-data":
        assert arguments[0] in ("check", "convert")
        program = f"segdcn-{arguments.pop(0)}"
    plain = {"benchmark": benchmark, "report": report, "sweep": sweep}
    program = program.removeprefix("segdcn-")
    if program in plain and arguments:
        plain[program].parse_arguments(arguments)
    elif program not in plain and arguments != ["--help"] and (arguments or program == "train"):
        for job in _jobs(program, arguments):
            config = compose(program, *job)
            OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@cache
def _installed() -> set[str]:
    return {script.name for script in entry_points(group="console_scripts")}


def _jobs(program: str, arguments: list[str]) -> list[list[str]]:
    """The overrides of each run that a command starts, as Hydra is given them."""
    overrides = [argument for argument in readable(arguments) if argument != "-m"]
    assert not [argument for argument in overrides if argument.startswith("-")]
    if "-m" in arguments or any(argument.startswith("sweep=") for argument in arguments):
        parser = OverridesParser.create()
        for number, override in enumerate(parser.parse_overrides(overrides)):
            if isinstance(interval := override.value(), IntervalSweep):  # of which a search chooses, a grid cannot
                assert "hydra/sweeper=optuna" in overrides
                overrides[number] = f"{override.get_key_element()}={interval.start}"
        jobs = BasicSweeper.split_arguments(parser.parse_overrides(overrides), None)[0]
    else:
        jobs = [overrides]
    if program == "train":
        resumes = any(override.startswith("resume=") for override in overrides)
        free = freely(may_change_on_resume) if resumes else list
        # which options were chosen only Hydra itself knows, when a command is started
        return [["name=test", "output_dir=x", *free(job)] for job in jobs]
    return [freely(lambda key: key.startswith("dataset."))(job) for job in jobs]
