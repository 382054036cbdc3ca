"""Every path, command, experiment and key that the README names exists."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from runs import compose

from segdcn.benchmark import parse_arguments
from segdcn.commands.compose import CONFIG_PATH
from segdcn.report.__main__ import parse_arguments as parse_report_arguments
from segdcn.sweep.__main__ import parse_arguments as parse_sweep_arguments

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL))
GROUPS = {path.name for path in Path(CONFIG_PATH).iterdir() if path.is_dir()} - {"hydra"}


def commands() -> list[str]:
    """Commands of ours, from blocks and from the text, continued lines joined."""
    lines = [line for kind, block in BLOCKS if kind == "bash" for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in [*lines, *INLINE] for part in line.split("&&")]
    return sorted({part for part in parts if part.startswith("segdcn-")})


def default_config() -> DictConfig:
    return compose("train", "name=test", "output_dir=x")


def test_the_readme_was_read() -> None:
    assert "segdcn-train" in commands()
    assert len(commands()) >= 4
    assert len(INLINE) > 20


@pytest.mark.parametrize("command", commands())
def test_command_exists_and_composes(command: str) -> None:
    program, *arguments = shlex.split(command, comments=True)
    if "--config-dir" in arguments:  # a user's own config: tests/data/test_own_dataset.py runs it
        return
    assert program in {script.name for script in entry_points(group="console_scripts")}
    if program == "segdcn-benchmark":
        parse_arguments(arguments)
        return
    if program == "segdcn-report":
        parse_report_arguments(arguments)
        return
    if program == "segdcn-sweep":
        parse_sweep_arguments(arguments)
        return
    if arguments[:1] == ["-m"]:
        overrides = OverridesParser.create().parse_overrides(arguments[1:])
        for job in BasicSweeper.split_arguments(overrides, None)[0]:
            compose("train", "name=test", *job)
        return
    if any(argument.startswith("-") for argument in arguments):
        assert set(arguments) <= {"--help"}
        return
    if program == "segdcn-data":
        assert arguments.pop(0) == "check"
        compose("check", *arguments)
    elif program in ("segdcn-predict", "segdcn-export", "segdcn-analyze"):
        compose(program.removeprefix("segdcn-"), *arguments)
    elif program == "segdcn-train":
        compose("train", "name=test", *arguments)
    else:
        compose("evaluate", *arguments)


def test_experiments_exist() -> None:
    named = set(re.findall(r"experiment=(\w+)", TEXT))
    assert named
    for name in named:
        assert (Path(CONFIG_PATH) / "experiment" / f"{name}.yaml").is_file()


def paths() -> list[str]:
    """Files and folders of this repository, wherever they are named, and the targets of links."""
    top = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != ".git")
    named = re.findall(rf"(?<![\w/.-])((?:{top})/[\w./-]*|[\w-]+\.toml|\.[\w-]+\.yaml)", TEXT)
    linked = re.findall(r"\]\((?!https?:|#)([^)]+)\)", TEXT)
    return sorted({path.rstrip(".") for path in [*named, *linked] if not path.startswith("runs/")})


@pytest.mark.parametrize("path", paths())
def test_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


def keys() -> list[str]:
    """Dotted config keys in the text; ``.groups`` after ``model.deform.layers`` means ``model.deform.groups``."""
    first = set(default_config()) - {"name", "report"}  # report.html is a file
    found, previous = set(), ""
    for code in INLINE:
        name = code.partition("=")[0]
        if re.fullmatch(r"\w+(\.\w+)+", name) and name.partition(".")[0] in first:
            previous = name
            found.add(name)
        elif re.fullmatch(r"\.\w+", name) and previous:
            found.add(previous.rpartition(".")[0] + name)
    return sorted(found)


@pytest.mark.parametrize("key", keys())
def test_key_exists(key: str) -> None:
    parent, _, last = key.rpartition(".")
    # the data sets have keys of their own
    datasets = sorted(path.stem for path in (Path(CONFIG_PATH) / "dataset").glob("*.yaml"))
    configs = [compose("train", f"dataset={dataset}", "name=test", "output_dir=x") for dataset in datasets]
    assert any(last in OmegaConf.select(config, parent) for config in configs)


def test_options_in_the_table_of_groups_exist() -> None:
    checked = 0
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        groups = [group for group in re.findall(r"`(\w+)`", cells[0]) if group in GROUPS] if len(cells) == 2 else []
        if not groups:
            continue
        existing = {path.stem for group in groups for path in (Path(CONFIG_PATH) / group).glob("*.yaml")}
        named = set(re.findall(r"`(\w+)`", cells[1]))
        assert named == existing, f"{groups}: {named} are named, {existing} exist"
        checked += len(groups)
    assert checked


def test_extras_exist() -> None:
    named = set(re.findall(r"\.\[(\w+)\]", TEXT))
    assert named
    assert named <= set(metadata("segdcn").get_all("Provides-Extra", []))


def test_python_examples_import_what_exists() -> None:
    for kind, block in BLOCKS:
        for node in ast.walk(ast.parse(block)) if kind == "python" else ():
            if isinstance(node, ast.ImportFrom):
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)
