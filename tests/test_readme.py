"""Every path, experiment and key that the README names exists; tests/test_commands.py composes its commands."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from runs import compose

from segdcn.commands.compose import CONFIG_PATH

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL))
GROUPS = {path.name for path in Path(CONFIG_PATH).iterdir() if path.is_dir()} - {"hydra"}


@cache
def default_config() -> DictConfig:
    return compose("train", "name=test", "output_dir=x")


def test_the_readme_was_read() -> None:
    assert len(INLINE) > 20


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
