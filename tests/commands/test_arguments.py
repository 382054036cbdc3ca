"""The command line as people type it: paths with any characters, and a line that says how to quote the rest."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from running import call, one_line

from segdcn import UserError
from segdcn.commands import data as data
from segdcn.commands.arguments import readable
from segdcn.runs.files import typed
from segdcn.runs.overrides import is_of_the_place, is_path, quoted

NAMES = (
    "my data",
    "data (1)",
    "daten_ä",
    "数据",
    "a=b",
    "R&D",
    "data#2",
    "a,b",
    "it's",
    "data [v2]",
    "~",
    "x\\y",
)
# a value as Hydra reads it; an interpolation is one within quotes too
PATHS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1).filter(
    lambda text: "${" not in text
)


def value(override: str) -> object:
    return OverridesParser.create().parse_override(override).value()


@given(PATHS)
def test_a_quoted_text_is_read_as_it_is(text: str) -> None:
    assert value(f"key={quoted(text)}") == text


@given(PATHS.filter(lambda text: text[0] not in "'\"" and text.strip() == text))
def test_a_path_is_taken_as_it_was_typed(text: str) -> None:
    (argument,) = readable([f"dataset.root={text}"])
    found = value(argument)
    # what the grammar reads by itself it may read as a number or a truth value, which means the same path
    assert found == text or str(found).lower() == text.lower() or argument == f"dataset.root={text}"


def test_what_is_quoted_already_is_left_alone() -> None:
    once = readable(["dataset.root=a=b", "checkpoint='a=b'", "++resume=it's"])
    assert once == ["dataset.root='a=b'", "checkpoint='a=b'", "++resume='it\\'s'"]
    assert readable(once) == once


def test_other_arguments_are_left_alone() -> None:
    arguments = ["-m", "seed=0,1", "--config-dir", "a (b)", "model=tiny", "~callbacks.panels", "dataset.root=a,b"]
    assert readable(arguments) == arguments  # in a sweep the comma parts two jobs
    assert readable(["model.deform.layers=0,3"]) == ["model.deform.layers=0,3"]  # Hydra says what is missing


def test_a_group_that_is_null_is_taken_out() -> None:
    assert readable(["callbacks=null", "+logger=null"]) == ["~callbacks", "~logger"]
    assert readable(["resume=null", "model.weights=null"]) == ["resume=null", "model.weights=null"]


@pytest.mark.parametrize("path", NAMES)
def test_a_printed_command_can_be_typed(path: str) -> None:
    (word,) = shlex.split(typed(path, "checkpoint"))
    (argument,) = readable([word])
    assert str(value(argument)) == path


@pytest.mark.parametrize(
    ("argument", "example"), [("name=kätzchen", '"VALUE"'), ("dataset.class_names=[背景,кот]", '["VALUE","VALUE"]')]
)
def test_how_to_quote_fits_the_value(argument: str, example: str) -> None:
    with pytest.raises(UserError, match="letters beyond ASCII") as error:
        readable([argument])
    advice = f"{argument.partition('=')[0]}={example}"
    assert str(error.value).endswith(f"'{advice}'")
    right = advice.replace("VALUE", "кот")
    assert readable([right]) == [right]


@pytest.mark.parametrize("argument", ["dataset.class_names=[a,b", "name=a (b)", "loss.class_weights=[1,2]]"])
def test_what_cannot_be_read_is_one_line_that_says_how_to_quote(argument: str) -> None:
    with pytest.raises(UserError, match="quotes of its own within those of the shell") as error:
        readable([argument])
    assert argument in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_data_folder_of_any_name_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    # the error of a folder that is there and empty names it, so the path has come through
    Path(name).mkdir()
    assert call(data.main, "check", "dataset=folder", f"dataset.root={name}", "dataset.class_names=[a,b]") == 1
    assert f"no images in {name}:" in one_line(capsys.readouterr().err)


def test_which_keys_are_paths_and_of_the_place() -> None:
    assert all(
        map(is_path, ("checkpoint", "dataset.root", "dataset.sbd_root", "dataset.labels_dir", "hydra.sweep.dir"))
    )
    assert not any(map(is_path, ("seed", "dataset.class_names", "model.backbone")))
    assert is_of_the_place("dataset.images_folder")
    assert is_of_the_place("datamodule.num_workers")
    assert not is_of_the_place("model.weights")
    assert not is_of_the_place("dataset.seed")


@pytest.mark.parametrize("arguments", [["-m", "seed=0,1", "--cfg", "job"], ["--multirun", "--cfg=job"], ["-m", "-i"]])
def test_a_sweep_of_a_command_that_only_shows_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="not several runs'"):
        readable(arguments)
