"""A run's folder: one owner, files whole or not at all, and what is found in it again."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import FirstRun
from running import BARE, call, one_line, process, waiting

from segdcn import MissingFileError, UserError
from segdcn.commands import analyze, evaluate, run_folder, train
from segdcn.commands.errors import TRY_AGAIN
from segdcn.runs.environment import environment
from segdcn.runs.files import write_json, write_text
from segdcn.runs.folder import INHERITED_LOCK, LOCK, find_checkpoint, locked, new_folder, owned, run_folder_of
from segdcn.training.checkpointing import AtomicCheckpoints


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """As on a disk that is full after so many bytes of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    write_text(file, "old\n" * 10)
    with full_disk(1000), pytest.raises(OSError, match=r"File too large: .*metrics\.csv"):
        write_text(file, "new\n" * 1000)
    assert file.read_text() == "old\n" * 10
    assert list(tmp_path.iterdir()) == [file]


def test_file_that_cannot_be_replaced_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "metrics.csv"
    write_text(file, "old")

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(f"{target} is locked")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError, match="locked"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_a_full_disk_is_a_fault_of_the_moment_that_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(100_000):
        assert call(train.main, *BARE, "trainer.max_epochs=1", f"output_dir={tmp_path}") == TRY_AGAIN
    assert f"{tmp_path}/checkpoints/best.ckpt: File too large" in one_line(capsys.readouterr().err)
    assert list((tmp_path / "checkpoints").iterdir()) == []


class _Unsaved:
    def __reduce__(self) -> str:
        raise RuntimeError("in the middle of it")


def test_a_checkpoint_that_cannot_be_saved_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"weights": torch.ones(3)}, file)
    with pytest.raises(RuntimeError, match="in the middle"):
        AtomicCheckpoints().save_checkpoint({"weights": torch.zeros(1000), "more": _Unsaved()}, file)
    assert torch.load(file, weights_only=True)["weights"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [file]


def test_a_training_needs_no_other_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TMPDIR may lie on another file system, be full or not there."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert call(train.main, *BARE, "trainer.max_epochs=1", f"output_dir={tmp_path / 'run'}") == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_figures_that_do_not_exist_are_null(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", {"val/miou": 0.5, "val/iou/car": math.nan, "split": "val"})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "val/miou": 0.5,
        "val/iou/car": None,
        "split": "val",
    }
    write_json(tmp_path / "metrics.json", {"layers": [{"mean": math.nan, "span": (1.5, math.nan)}]})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"layers": [{"mean": None, "span": [1.5, None]}]}
    for infinite in (math.inf, [{"mean": -math.inf}]):
        with pytest.raises(ValueError, match="JSON"):  # strict readers refuse what is no JSON
            write_json(tmp_path / "metrics.json", {"val/loss": infinite})


def test_a_text_with_a_file_name_that_is_no_unicode_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / "areas.csv", os.fsdecode(b"caf\xe9.png") + ",道路\n")
    assert (tmp_path / "areas.csv").read_text(encoding="utf-8") == "caf\\udce9.png,道路\n"


def test_errors_name_the_file_and_not_what_is_written_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "report.html"
    folder.mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        write_text(folder, "x")
    assert raised.value.filename == str(folder)
    long = tmp_path / (250 * "x")  # there is room for it, but not for the name of the partial file
    with pytest.raises(OSError, match="too long") as refused:
        write_text(long, "x")
    assert refused.value.filename == str(long)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("own", ["", "mine", "mine/sub"])
def test_a_command_that_fails_removes_the_folders_that_it_made_and_no_others(
    first_run: FirstRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(own).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    checkpoint = f"checkpoint='{first_run.folder}/checkpoints/best.ckpt'"
    output = "output_dir=mine/sub"
    assert call(train.main, *BARE, "trainer.max_epochs=1", "dataset.seed=-1", output) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert call(evaluate.main, checkpoint, "protocol=pascal", output) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert call(analyze.main, checkpoint, "device=abacus", output) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_of_many_runs_that_start_in_one_second_each_has_its_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: new_folder(tmp_path / "runs", "2026-11-26_12-00-00"), range(24)))
    assert len(set(found)) == 24
    assert tmp_path / "runs" / "2026-11-26_12-00-00" in found
    assert tmp_path / "runs" / "2026-11-26_12-00-00_24" in found


@pytest.mark.slow
def test_two_trainings_started_at_once_have_a_folder_each(tmp_path: Path) -> None:
    """As `for seed in 0 1; do segdcn-train seed=$seed & done` starts them."""
    with ThreadPoolExecutor(2) as pool:
        command = ("-m", "segdcn.commands.train", *BARE, "trainer.max_steps=1")
        ended = list(pool.map(lambda seed: process(tmp_path, *command, f"seed={seed}"), range(2)))
    assert [one.returncode for one in ended] == [0, 0], ended
    runs = sorted((tmp_path / "runs" / "shapes").iterdir())
    assert {json.loads((run / "metrics.json").read_text())["seed"] for run in runs} == {0, 1}
    assert len(runs) == 2


def hold(folder: Path) -> subprocess.Popen[bytes]:
    """A process that owns a folder until it is killed."""
    script = (
        "import pathlib, sys, time; from segdcn.runs.folder import owned\n"
        "with owned(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    return waiting(script, folder, "held")


def test_the_lock_of_a_folder_dies_with_its_owner(tmp_path: Path) -> None:
    other = hold(tmp_path)
    with pytest.raises(UserError, match="is being written by another process"), owned(tmp_path, wait=0.2):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with owned(tmp_path, wait=0.2):
        pass


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="lies on a file system without locks"), owned(tmp_path / "run"):
        pass
    write_text(tmp_path / "file", "whole")  # which needs none
    assert (tmp_path / "file").read_text() == "whole"


def test_a_lock_that_was_inherited_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path / LOCK) as lock:
        with locked(tmp_path / LOCK) as again:
            assert again is None
        monkeypatch.setenv(INHERITED_LOCK, str(lock))
        with locked(tmp_path / LOCK) as inherited:
            assert inherited is not None
        with locked(tmp_path / "other") as other, locked(tmp_path / "other") as taken:
            assert other is not None  # of another file it says nothing
            assert taken is None


@pytest.mark.parametrize("arguments", [("resume={}",), (*BARE, "output_dir={}")])
def test_a_run_that_is_being_written_is_not_written_twice(
    first_run: FirstRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    import shutil

    monkeypatch.setattr(run_folder, "owned", partial(owned, wait=0.2))
    folder = tmp_path / "run"
    shutil.copytree(first_run.folder, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with owned(folder):
        assert call(train.main, *(argument.format(folder) for argument in arguments)) == 1
    assert "is being written by another process" in one_line(capsys.readouterr().err)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_cannot_be_written_to_is_one_line_that_names_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert call(train.main, *BARE, f"output_dir={tmp_path / 'file' / 'run'}") == 1
    message = one_line(capsys.readouterr().err)
    assert "cannot be written to (Not a directory)" in message
    assert "output_dir=DIR" in message


def test_checkpoint_of_a_file_and_of_a_run_folder(tmp_path: Path) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    with pytest.raises(MissingFileError, match="ended before its first checkpoint"):
        find_checkpoint(tmp_path / "run")
    last.touch()
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(last) == last
    assert run_folder_of(last) == (tmp_path / "run").resolve()
    with pytest.raises(MissingFileError, match="nowhere"):
        find_checkpoint(tmp_path / "nowhere")


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=x", "-c", "user.email=x@x")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_only_code_makes_a_checkout_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a repository of the same layout; what runs, sweeps and benchmarks leave there is none of its code."""
    from segdcn.runs import environment as module

    package = tmp_path / "segdcn" / "runs"
    package.mkdir(parents=True)
    (package / "environment.py").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(module, "__file__", str(package / "environment.py"))

    def dirty() -> bool:
        return bool(environment(0)["git"]["dirty"])

    (tmp_path / "sweeps").mkdir()
    for name in ("sweeps/results.json", "benchmark.json", "notes.txt"):
        (tmp_path / name).write_text("")
    assert not dirty()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text("")
    assert dirty()
    (tmp_path / "conf" / "mine.yaml").unlink()
    (package / "environment.py").write_text("changed")
    assert dirty()


def test_environment_can_be_written_and_its_command_typed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    monkeypatch.setattr(sys, "argv", ["segdcn-train", "dataset.root='my data'"])
    described = environment(seed=4)
    assert shlex.split(described["command"]) == sys.argv
    write_json(tmp_path / "environment.json", described)
    assert json.loads((tmp_path / "environment.json").read_text()) == described
    assert described["seed"] == 4


def test_time_of_an_error_stands_beside_it(tmp_path: Path) -> None:
    from segdcn.runs.folder import reporting

    (tmp_path / "begun").write_text("")
    for number in range(2):
        with pytest.raises(ZeroDivisionError), reporting(tmp_path):
            raise ZeroDivisionError(f"number {number}")
    text = (tmp_path / "error.txt").read_text()
    assert text.index("number 0") < text.index("number 1")  # an earlier attempt's is kept
    assert text.count(time.strftime("%Y-%m-%d")) == 2
    with reporting(tmp_path):
        pass
    assert not (tmp_path / "error.txt").exists()  # the run has ended well after all
