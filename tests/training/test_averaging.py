"""Averaged weights: what is validated, kept and gone on with, by the real commands."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import BARE, assert_same_run, call, one_line

from segdcn.commands.evaluate import main as evaluate
from segdcn.commands.train import main
from segdcn.training.averaging import AveragedWeights
from segdcn.training.task import SegmentationTask

# Four steps an epoch; a schedule that does not depend on the length, dropout, statistics of batch norm.
RUN = (
    *BARE,
    "name=test",
    "dataset.train_images=16",
    "dataset.val_images=4",
    "datamodule.batch_size=4",
    "schedule=constant",
    "trainer.max_epochs=3",
    "loss.class_weights=[0.3,1,1,1,1,1.7]",
)
EMA = ("callbacks=ema", "callbacks.ema.decay=0.4")  # which the first steps do not reach, and the others do
PREFIX = "network."


def saved(run: Path, name: str = "last") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """A run of three epochs, and the weights after each of its steps."""
    run, steps = tmp_path_factory.mktemp("averaged"), []
    original = SegmentationTask.on_train_batch_end

    def recording(self: SegmentationTask, *arguments: Any) -> None:
        steps.append({key: value.numpy().copy() for key, value in self.network.state_dict().items()})
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationTask, "on_train_batch_end", recording)
        assert call(main, *RUN, *EMA, f"output_dir={run}") == 0
    return run, steps


def test_checkpoints_hold_the_average_and_what_training_goes_on_with(
    whole: tuple[Path, list[dict[str, np.ndarray]]],
) -> None:
    run, steps = whole
    assert len(steps) == 12
    average = {key: value.astype(np.float64) for key, value in steps[0].items()}
    for number, weights in enumerate(steps[1:], start=1):
        decay = min(0.4, (1 + number) / (10 + number))
        average = {key: decay * average[key] + (1 - decay) * value for key, value in weights.items()}
    checkpoint = saved(run)
    moved = 0
    for key, value in steps[-1].items():
        kept = checkpoint["state_dict"][PREFIX + key].numpy()
        np.testing.assert_array_equal(checkpoint["current_model_state"][PREFIX + key], value)
        if key.endswith("num_batches_tracked"):
            assert kept == value
        else:
            np.testing.assert_allclose(kept, average[key], rtol=1e-4, atol=1e-6)
            moved += bool(np.abs(kept - value).max() > 1e-4)
    assert moved > 10


@pytest.mark.slow
def test_training_itself_is_the_same_without(whole: tuple[Path, Any], tmp_path: Path) -> None:
    assert call(main, *RUN, f"output_dir={tmp_path}") == 0
    plain, averaged = saved(tmp_path), saved(whole[0])
    for key, value in plain["state_dict"].items():
        assert torch.equal(value, averaged["current_model_state"][key]), key
    assert [row["train/loss"] for row in rows(tmp_path)] == [row["train/loss"] for row in rows(whole[0])]
    assert [row["val/loss"] for row in rows(tmp_path)] != [row["val/loss"] for row in rows(whole[0])]


def test_figures_of_validation_are_those_of_the_kept_average(whole: tuple[Path, Any], tmp_path: Path) -> None:
    run, _ = whole
    best = max(rows(run), key=lambda row: float(row["val/miou"]))
    at_the_end = json.loads((run / "metrics.json").read_text())
    settings = ("callbacks.panels=null", "trainer.accelerator=cpu", f"output_dir={tmp_path}")
    assert call(evaluate, f"checkpoint={run}/checkpoints/best.ckpt", *settings) == 0
    evaluated = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("val/miou", "val/loss"):
        assert f"{at_the_end[name]:.6g}" == best[name]
        assert evaluated[name] == at_the_end[name]


@pytest.mark.slow
def test_resumed_run_ends_like_the_uninterrupted_one(whole: tuple[Path, Any], tmp_path: Path) -> None:
    assert call(main, *RUN, *EMA, "trainer.max_epochs=2", f"output_dir={tmp_path}") == 0
    assert call(main, f"resume={tmp_path}", "trainer.max_epochs=3") == 0
    assert_same(tmp_path, whole[0])


def test_run_stopped_within_an_epoch_ends_like_the_uninterrupted_one(whole: tuple[Path, Any], tmp_path: Path) -> None:
    original = SegmentationTask.on_train_batch_start

    def stopping(self: SegmentationTask, *arguments: Any) -> None:
        if self.trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationTask, "on_train_batch_start", stopping)
        assert call(main, *RUN, *EMA, f"output_dir={tmp_path}") == 128 + signal.SIGTERM
    assert saved(tmp_path)["global_step"] == 6
    assert call(main, f"resume={tmp_path}") == 0
    assert_same(tmp_path, whole[0])


def test_an_averaged_run_does_not_go_on_without_its_average(
    whole: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole[0], tmp_path / "run")
    capsys.readouterr()
    assert call(main, f"resume={run}", "trainer.max_epochs=4", "callbacks.ema=null") == 1
    assert "leave callbacks.ema in when it is resumed" in one_line(capsys.readouterr().err)


def assert_same(run: Path, whole: Path) -> None:
    assert_same_run(run, whole)
    one, other = saved(run), saved(whole)
    assert one["averaging_state"] == other["averaging_state"]
    for key, value in one["current_model_state"].items():
        assert torch.equal(value, other["current_model_state"][key]), key


@pytest.mark.slow
def test_pictures_are_of_the_average(whole: tuple[Path, Any], tmp_path: Path) -> None:
    """The run's own, and those that an evaluation of its best checkpoint draws."""
    drawn = (
        "callbacks.panels={_target_: segdcn.training.pictures.Panels, folder: '" + f"{tmp_path}/run/panels" + "'}",
    )
    settings = [setting for setting in RUN if not setting.startswith("callbacks.panels")]
    assert call(main, *settings, *EMA, *drawn, "trainer.max_epochs=1", f"output_dir={tmp_path}/run") == 0
    best = f"checkpoint={tmp_path}/run/checkpoints/best.ckpt"
    assert call(evaluate, best, "trainer.accelerator=cpu", f"output_dir={tmp_path}/again") == 0
    pictures = sorted((tmp_path / "run" / "panels").iterdir())
    assert len(pictures) > 3
    for picture in pictures:
        assert picture.read_bytes() == (tmp_path / "again" / "panels" / picture.name).read_bytes(), picture.name


def test_impossible_decay_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, *BARE, "callbacks=ema", "callbacks.ema.decay=1", f"output_dir={tmp_path / 'run'}") == 1
    assert "decay of averaged weights must be at least 0 and below 1, got 1" in one_line(capsys.readouterr().err)
    with pytest.raises(ValueError, match=r"below 1, got -0\.1$"):
        AveragedWeights(-0.1)


def test_what_does_not_change_stays_to_the_bit() -> None:
    values = [torch.rand(1000)]
    averages = [values[0].clone()]
    for number in range(1, 300):
        AveragedWeights()._update(averages, values, number)
    assert torch.equal(averages[0], values[0])
