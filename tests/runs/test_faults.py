"""What kills, damaged files and senseless settings leave: nothing half, nothing lost, and one line."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FirstRun
from running import BARE, call, one_line, waiting

from segdcn import UserError
from segdcn.commands import predict, train
from segdcn.commands.kinds import check_kinds
from segdcn.models.weights import DamagedFileError, read_saved
from segdcn.runs.checkpoint import read_checkpoint
from segdcn.runs.files import replacing, write_text


def half_written(file: Path) -> subprocess.Popen[bytes]:
    """A process that has written a part of the file and waits to be killed."""
    script = (
        "import pathlib, sys, time; from segdcn.runs.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half' * 1000); file.flush(); print('written', flush=True); time.sleep(60)"
    )
    return waiting(script, file, "written")


def test_what_killed_writers_leave_is_one_file_and_gone_after_the_next(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    write_text(file, "whole")
    for _ in range(2):
        process = half_written(file)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert file.read_text() == "whole"
        assert len(list(tmp_path.iterdir())) == 2
    write_text(file, "new")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_two_writers_at_once_are_both_right(tmp_path: Path) -> None:
    file = tmp_path / "areas.csv"
    with replacing(file) as first:
        first.write(b"first")
        with replacing(file) as second:
            second.write(b"second, longer")
        assert file.read_text() == "second, longer"
        write_text(file, "third")
    assert file.read_text() == "first"
    assert list(tmp_path.iterdir()) == [file]


def test_a_flipped_bit_of_a_weight_is_seen(first_run: FirstRun, tmp_path: Path) -> None:
    data = bytearray((first_run.folder / "checkpoints" / "best.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    file = tmp_path / "best.ckpt"
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"best\.ckpt cannot be read as a checkpoint.*the checksum of \S+ is wrong"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, OSError), (errno.EINVAL, DamagedFileError), (None, DamagedFileError)]
)
def test_a_fault_of_the_moment_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, kind: type[Exception]
) -> None:
    torch.save({}, tmp_path / "x.pt")
    assert read_saved(tmp_path / "x.pt") == {}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no") if number is None else OSError(number, os.strerror(number))

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(kind):
        read_saved(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("part", "value"),
    [("config", 5), ("groups", None), ("class_names", [1, 2]), ("palette", {}), ("state_dict", {"network.x": None})],
)
def test_a_checkpoint_with_something_else_in_it_is_one_line(
    first_run: FirstRun, tmp_path: Path, part: str, value: Any
) -> None:
    content = torch.load(first_run.folder / "checkpoints" / "best.ckpt", weights_only=True)
    (content if part == "state_dict" else content["segdcn"])[part] = value
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x\.ckpt lacks a part of the description of its run"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("trainer.max_epochs=abc", "trainer.max_epochs must be a whole number or null, got 'abc'"),
        ("trainer.max_epoch=3", "Could not override 'trainer.max_epoch'."),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be at least 1, got 0"),
        ("callbacks.last.filename=[1]", "callbacks.last.filename must be a text, got [1]"),
        ("model.deform.modulated=yes_please", "model.deform.modulated must be true or false"),
        ("task.offset_lr_mult=nan", "task.offset_lr_mult must be a number, got nan"),
        ("optimizer.lr=-1", "optimizer: Invalid learning rate: -1"),
        ("trust=maybe", "trust must be true or false, got 'maybe'"),
        ("datamodule.num_workers=-1", "num_workers must be at least 0, got -1"),
        ("datamodule.crop_size=[99999999,99999999]", "the memory does not suffice"),
        ("dataset.seed=-1", "seed must be at least 0"),
        ("=1", "=1 names no setting"),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, words: str
) -> None:
    assert call(train.main, *BARE, setting, f"output_dir={tmp_path / 'run'}") == 1
    assert words in one_line(capsys.readouterr().err)


def test_settings_of_other_packages_are_theirs() -> None:
    check_kinds({"_target_": "somebody.Network", "width": float("nan"), "deep": [None]})
    with pytest.raises(UserError, match=r"head\.p must be a number"):
        check_kinds({"_target_": "somebody.Network", "head": {"_target_": "torch.nn.Dropout", "p": "x"}})


def test_an_experiment_that_is_no_yaml_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("a: [1\n")
    assert call(train.main, "--config-dir", str(tmp_path), "experiment=mine") == 1
    assert "mine.yaml" in one_line(capsys.readouterr().err)


def test_a_group_that_is_no_mapping_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptimizer: 3\n")
    assert call(train.main, "--config-dir", str(tmp_path), "experiment=mine") == 1
    assert one_line(capsys.readouterr().err) == "error: optimizer must be a mapping of settings, got 3"


def test_a_path_of_digits_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(predict.main, "checkpoint=12", "input=2012", "output=1e3") == 1
    assert one_line(capsys.readouterr().err).startswith("error: input=2012 does not exist")
    assert call(predict.main, "checkpoint=[[]]", "input=x", "output=y") == 1
    assert one_line(capsys.readouterr().err) == "error: checkpoint must be a path, got [[]]"


@pytest.mark.parametrize("text", ["", "epoch,step\n0,4\n1", "epoch,step\nx,4\n", "\0"])
def test_a_damaged_table_of_epochs_is_one_line(
    first_run: FirstRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(first_run.folder, run)
    (run / "metrics.csv").write_text(text)
    assert call(train.main, f"resume={run}", "trainer.max_epochs=3") == 1
    assert "metrics.csv is damaged" in one_line(capsys.readouterr().err)
    assert (run / "metrics.csv").read_text() == text


def test_a_run_that_was_killed_before_it_finished_anything_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("half a confi")
    settings = (*BARE, "trainer.max_epochs=1", f"output_dir={run}")
    assert call(train.main, *settings) == 0
    capsys.readouterr()
    (run / "checkpoints" / "last.ckpt").unlink()
    assert call(train.main, *settings) == 1
    assert "without a checkpoints/last.ckpt" in one_line(capsys.readouterr().err)
    assert call(train.main, f"resume={run}") == 1
    assert "checkpoints/best.ckpt goes on" in one_line(capsys.readouterr().err)
