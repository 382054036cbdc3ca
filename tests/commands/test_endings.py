"""Where a training may end, the last weights are validated, the figures are theirs, and a longer one goes on."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
from running import BARE, assert_same_checkpoint, call, one_line, process

from segdcn.commands import evaluate
from segdcn.commands.train import main

# Five steps an epoch; the learning rate does not depend on the length of the training.
RUN = (*BARE, "dataset.train_images=40", "schedule=constant", "trainer.max_epochs=-1")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def figures(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "metrics.json").read_text()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs and two steps, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert call(main, *RUN, "trainer.max_steps=12", f"output_dir={folder}") == 0
    return folder


def test_max_steps_within_an_epoch_validates_the_last_weights(whole: Path, tmp_path: Path) -> None:
    assert [(row["epoch"], row["step"]) for row in rows(whole)] == [("0", "5"), ("1", "10"), ("2", "12")]
    last = rows(whole)[-1]
    checkpoint = whole / "checkpoints" / "last.ckpt"
    arguments = (f"checkpoint={checkpoint}", "trainer.accelerator=cpu", "callbacks.panels=null")
    assert call(evaluate.main, *arguments, f"output_dir={tmp_path / 'x'}") == 0
    found = figures(tmp_path / "x")
    assert float(last["val/miou"]) == pytest.approx(found["val/miou"], rel=1e-5)
    assert float(last["val/loss"]) == pytest.approx(found["val/loss"], rel=1e-4)
    assert figures(whole)["val/miou"] == pytest.approx(max(float(row["val/miou"]) for row in rows(whole)), rel=1e-5)


@pytest.mark.parametrize("first", [10, 7], ids=["at_an_epochs_end", "within_an_epoch"])
def test_a_run_that_ended_by_max_steps_goes_on_as_if_it_had_not(whole: Path, tmp_path: Path, first: int) -> None:
    assert call(main, *RUN, f"trainer.max_steps={first}", f"output_dir={tmp_path}") == 0
    assert rows(tmp_path)[-1]["step"] == str(first)
    assert call(main, f"resume={tmp_path}", "trainer.max_steps=12") == 0
    assert_same_checkpoint(tmp_path / "checkpoints" / "last.ckpt", whole / "checkpoints" / "last.ckpt")
    assert (tmp_path / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_the_last_epoch_is_validated_though_it_is_none_of_the_others(tmp_path: Path) -> None:
    settings = ("trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2", f"output_dir={tmp_path}")
    assert call(main, *RUN, *settings) == 0
    assert [row["val/miou"] != "" for row in rows(tmp_path)] == [False, True, True]
    assert figures(tmp_path)["checkpoint"] == "best.ckpt"


def test_a_best_checkpoint_can_be_resumed_from(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the message about a damaged last.ckpt says."""
    settings = ("trainer.max_epochs=1", f"output_dir={tmp_path}")
    assert call(main, *RUN, *settings) == 0
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    assert call(main, f"resume={tmp_path}", "trainer.max_steps=12") == 1
    message = one_line(capsys.readouterr().err)
    assert f"resume={tmp_path}/checkpoints/best.ckpt goes on from step 5" in message
    resume = f"resume={tmp_path}/checkpoints/best.ckpt"
    assert call(main, resume, "trainer.max_epochs=-1", "trainer.max_steps=12") == 0
    assert_same_checkpoint(last, whole / "checkpoints" / "last.ckpt")
    assert (tmp_path / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


@pytest.mark.slow
def test_figures_go_when_the_weights_that_they_are_of_do(whole: Path, tmp_path: Path) -> None:
    """A run that had ended, goes on and is killed: what is left must not tell old figures of new weights."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = ("trainer.max_epochs=-1", "trainer.max_steps=20", "datamodule.num_workers=0")
    killed = process(
        tmp_path, str(Path(__file__).parents[1] / "killed.py"), "train", "18", f"resume={run}", "trust=true", *config
    )
    assert killed.returncode == -9
    assert not (run / "metrics.json").exists()
    assert not (run / "counts.npz").exists()
    assert call(main, f"resume={run}", *config) == 0
    assert figures(run)["val/miou"] is not None
    told = json.loads((run / "environment.json").read_text())
    assert len(told["resumed"]) == 2
    assert "max_steps=20" in told["resumed"][0]["command"]


def test_max_time_ends_a_training_without_another_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, *RUN, "+trainer.max_time=00:00:00:02", f"output_dir={tmp_path / 'a'}") == 0
    assert figures(tmp_path / "a")["val/miou"] is not None
    assert rows(tmp_path / "a")[-1]["val/miou"] != ""
    capsys.readouterr()
    settings = ("schedule=one_cycle", "+trainer.max_time=00:00:00:02", f"output_dir={tmp_path / 'b'}")
    assert call(main, *RUN, *settings) == 1
    assert "schedule=one_cycle needs the length of the training" in one_line(capsys.readouterr().err)


def test_without_validation_there_are_no_figures_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("trainer.max_steps=2", "trainer.limit_val_batches=0", "report=true", f"output_dir={tmp_path}")
    assert call(main, *RUN, *settings) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "trainer.limit_val_batches=0: nothing was validated" in shown.out
    assert (figures(tmp_path)["val/miou"], figures(tmp_path)["checkpoint"]) == (None, "last.ckpt")
    assert (tmp_path / "report.html").is_file()


def test_a_shortened_validation_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("trainer.max_steps=2", "trainer.limit_val_batches=1", "report=true", f"output_dir={tmp_path}")
    assert call(main, *RUN, *settings) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "val split, only 4 of 8 images" in shown.out
    assert (figures(tmp_path)["images"], figures(tmp_path)["images_in_split"]) == (4, 8)
    assert "Best, median and worst images" in (tmp_path / "report.html").read_text()
    command = (f"checkpoint={tmp_path}/checkpoints/best.ckpt", "trainer.limit_val_batches=1")
    assert call(evaluate.main, *command) == 1
    assert "trainer.limit_val_batches would leave images" in one_line(capsys.readouterr().err)


def test_fast_dev_run_goes_well_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(main, *RUN, "trainer.max_epochs=2", "+trainer.fast_dev_run=true") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.splitlines()[-1].startswith("trainer.fast_dev_run: 1 step(s) trained and validated")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (("~callbacks.panels",), {"best.ckpt", "last.ckpt"}),
        (("~logger",), {"best.ckpt", "last.ckpt"}),
        (("callbacks=null",), set()),
        (("~callbacks.best",), {"last.ckpt"}),
    ],
)
def test_parts_that_were_taken_out_are_not_missed(tmp_path: Path, settings: tuple[str, ...], kept: set[str]) -> None:
    common = [setting for setting in RUN if setting not in ("logger=none", "callbacks.panels=null")]
    assert call(main, *common, "trainer.max_steps=1", *settings, f"output_dir={tmp_path}") == 0
    assert not math.isnan(float(str(figures(tmp_path)["val/miou"])))
    there = {path.name for path in tmp_path.glob("checkpoints/*.ckpt")}
    assert kept <= there
    assert (tmp_path / "panels").is_dir() == (settings == ("~logger",) or settings == ("~callbacks.best",))


@pytest.mark.parametrize("seed", ["-1", "4294967296", "abc"])
def test_a_seed_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: str) -> None:
    assert call(main, *RUN, f"seed={seed}", f"output_dir={tmp_path / 'run'}") == 1
    assert "seed must be a number from 0 to 4294967295" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
