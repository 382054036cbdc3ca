"""Files of a run folder are there whole or not at all, and are found again."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import pytest
import torch

from segdcn.run_folder import environment, find_checkpoint, load_checkpoint, run_folder_of, write_json, write_text


def test_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    write_text(file, "old\n" * 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_text(file, "new\n" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
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


def test_figures_that_do_not_exist_are_null(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", {"val/miou": 0.5, "val/iou/car": math.nan, "split": "val"})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "val/miou": 0.5,
        "val/iou/car": None,
        "split": "val",
    }
    with pytest.raises(ValueError, match="JSON"):  # strict readers refuse what is no JSON
        write_json(tmp_path / "metrics.json", {"val/loss": math.inf})


def test_checkpoint_of_a_file_and_of_a_run_folder(tmp_path: Path) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="ended before its first checkpoint"):
        find_checkpoint(tmp_path / "run")
    last.touch()
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(last) == last
    assert run_folder_of(last) == (tmp_path / "run").resolve()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_checkpoint(tmp_path / "nowhere")


def test_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt is not a segdcn checkpoint"):
        load_checkpoint(tmp_path / "other.ckpt")


class _Unsafe:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, ("executed", "w")


def test_checkpoint_with_code_is_refused_unexecuted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"segdcn": _Unsafe()}, "unsafe.ckpt")
    with pytest.raises(ValueError, match=r"^unsafe\.ckpt cannot be read"):
        load_checkpoint(Path("unsafe.ckpt"))
    assert not Path("executed").exists()


def test_environment_can_be_written(tmp_path: Path) -> None:
    described = environment(seed=4)
    write_json(tmp_path / "environment.json", described)
    assert json.loads((tmp_path / "environment.json").read_text()) == described
    assert described["seed"] == 4
    assert {"torch", "pytorch-lightning", "hydra-core"} <= described["packages"].keys()
