"""A run that was stopped, however and wherever, ends as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FirstRun
from running import BARE, assert_same_run, call, compose, one_line, process, timeless

from segdcn.commands.train import main, train
from segdcn.training.task import SegmentationTask

# Five steps an epoch, fifteen in all; dropout, and an augmentation that draws.
RUN = (
    *BARE,
    "name=test",
    "dataset.train_images=40",
    "datamodule.scale=[0.5,2.0]",
    "datamodule.photometric=0.3",
    "trainer.max_epochs=3",
)
EVERY_3_STEPS = "callbacks.last_within_epoch.every_n_train_steps=3"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(compose("train", *RUN, f"output_dir={folder}"))
    return folder


def steps_saved(folder: Path) -> int:
    return int(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


@pytest.mark.parametrize(
    ("moment", "step", "setting", "saved"),
    [
        pytest.param("train", 9, (EVERY_3_STEPS, "datamodule.num_workers=2"), 9, id="in_the_middle_of_an_epoch"),
        pytest.param("train", 10, (), 10, id="at_the_start_of_an_epoch", marks=pytest.mark.slow),
        pytest.param("validation", 10, (EVERY_3_STEPS,), 9, id="before_validation", marks=pytest.mark.slow),
    ],
)
def test_killed_run_ends_like_the_uninterrupted_one(
    whole: Path, tmp_path: Path, moment: str, step: int, setting: tuple[str, ...], saved: int
) -> None:
    folder = tmp_path / "run"
    script = str(Path(__file__).parents[1] / "killed.py")
    killed = process(tmp_path, script, moment, str(step), *RUN, *setting, f"output_dir={folder}")
    assert killed.returncode == -9, killed.stderr
    assert not (folder / "metrics.json").exists()
    assert steps_saved(folder) == saved
    assert call(main, f"resume={folder}") == 0
    assert_same_run(folder, whole)
    assert list(tmp_path.iterdir()) == [folder]


class _StoppedError(Exception):
    pass


def stop(monkeypatch: pytest.MonkeyPatch, hook: str, step: int) -> None:
    """End the next run by an exception in a hook of its task, once it has made ``step`` steps."""

    def raise_it() -> None:
        raise _StoppedError

    when_trained(monkeypatch, hook, step, raise_it)


def when_trained(monkeypatch: pytest.MonkeyPatch, hook: str, step: int, act: Callable[[], object]) -> None:
    """Do something in a hook of the next run's task, once it has made ``step`` steps."""
    original = getattr(SegmentationTask, hook)

    def acting(self: SegmentationTask, *arguments: Any) -> None:
        if self.trainer.global_step == step and not self.trainer.sanity_checking:
            act()
        original(self, *arguments)

    monkeypatch.setattr(SegmentationTask, hook, acting)


@pytest.mark.parametrize(
    ("hook", "step", "setting", "saved"),
    [
        pytest.param("on_train_batch_start", 10, "seed=0", 10, id="at_the_start_of_an_epoch"),
        # The fifth step is an epoch's last: a checkpoint there would make Lightning skip that epoch's validation.
        pytest.param(
            "on_validation_start", 10, EVERY_3_STEPS.replace("3", "5"), 5, id="asked_to_save_at_the_last_batch"
        ),
        pytest.param("on_train_batch_start", 2, EVERY_3_STEPS.replace("3", "1"), 2, id="in_the_first_epoch"),
    ],
)
def test_stopped_run_ends_like_the_uninterrupted_one(
    whole: Path, tmp_path: Path, hook: str, step: int, setting: str, saved: int
) -> None:
    config = compose("train", *RUN, setting, f"output_dir={tmp_path}")
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, hook, step)
        with pytest.raises(_StoppedError):
            train(config)
    assert steps_saved(tmp_path) == saved
    assert call(main, f"resume={tmp_path}") == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("name", "hook", "step", "setting", "saved"),
    [
        pytest.param("SIGTERM", "on_train_batch_start", 7, ("datamodule.num_workers=2",), 8, id="within_an_epoch"),
        # the epoch's end is the next point that can be saved, after its validation
        pytest.param("SIGUSR1", "on_train_batch_start", 9, (), 10, id="in_the_last_batch_of_an_epoch"),
        pytest.param("SIGUSR2", "on_validation_start", 10, (), 10, id="before_validation", marks=pytest.mark.slow),
        # the run is trained, only its evaluation is missing
        pytest.param("SIGTERM", "on_validation_start", 15, (), 15, id="before_the_last_validation"),
    ],
)
def test_signal_stops_a_run_which_then_ends_like_the_uninterrupted_one(
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    hook: str,
    step: int,
    setting: tuple[str, ...],
    saved: int,
) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        when_trained(patch, hook, step, lambda: os.kill(os.getpid(), number))
        assert call(main, *RUN, *setting, f"output_dir={tmp_path}") == 128 + number
    assert signal.getsignal(number) == before
    assert f"stopped by {name}; continue with: segdcn-train resume={tmp_path}\n" in capsys.readouterr().out
    assert steps_saved(tmp_path) == saved
    assert not (tmp_path / "metrics.json").exists()
    assert call(main, f"resume={tmp_path}") == 0
    assert_same_run(tmp_path, whole)


def test_signal_between_accumulated_batches_waits_for_the_step(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        when_trained(patch, "on_train_batch_start", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        settings = ("trainer.accumulate_grad_batches=2", "trainer.max_epochs=1", f"output_dir={tmp_path}")
        assert call(main, *RUN, *settings) == 143
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert (checkpoint["global_step"], checkpoint["SegmentationDataModule"]["trained_batches"]) == (2, 4)


@pytest.mark.slow
def test_signal_to_a_whole_process_group_spares_the_loading_workers(whole: Path, tmp_path: Path) -> None:
    """As a scheduler sends it: without the workers the run would die before it has saved its state."""
    script = f"import os, runpy; os.setpgid(0, 0); runpy.run_path({str(Path(__file__).parents[1] / 'killed.py')!r})"
    settings = (*RUN, "datamodule.num_workers=2", f"output_dir={tmp_path}")
    stopped = process(tmp_path, "-c", script, "train", "7", *settings, KILLED_BY="SIGTERM", KILLED_GROUP="1")
    assert stopped.returncode == 143, stopped.stderr
    assert stopped.stderr == ""
    assert call(main, f"resume={tmp_path}") == 0
    assert_same_run(tmp_path, whole)


def test_interrupt_from_the_keyboard_stops_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        when_trained(patch, "on_train_batch_start", 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert call(main, *RUN, f"output_dir={tmp_path}") == 1
    signal.signal(signal.SIGINT, before)  # Lightning ignores further ones
    assert f"stopped; continue with: segdcn-train resume={tmp_path}\n" in capsys.readouterr().out
    assert steps_saved(tmp_path) == 5


@pytest.fixture
def copied_run(first_run: FirstRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of two epochs that was moved to another place, under another name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(first_run.folder, tmp_path / "moved")
    return tmp_path / "moved"


def test_moved_run_goes_on_longer_and_keeps_its_best(copied_run: Path, first_run: FirstRun) -> None:
    last = copied_run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    # as if the best epoch so far had been better than any that follows
    state = next(value for key, value in checkpoint["callbacks"].items() if "'val/miou'" in key)
    best = torch.tensor(0.99)
    state |= {"best_model_score": best, "kth_value": best, "best_k_models": {state["best_model_path"]: best}}
    checkpoint["callbacks"]["TrainingTime"]["time_elapsed"]["train"] = 1000.0
    torch.save(checkpoint, last)
    kept = (copied_run / "checkpoints" / "best.ckpt").read_bytes()
    rows = (copied_run / "metrics.csv").read_text().splitlines()

    assert call(main, "resume=moved", "trainer.max_epochs=4") == 0
    longer = (copied_run / "metrics.csv").read_text().splitlines()
    assert longer[:3] == rows
    assert [row.split(",")[:2] for row in longer[3:]] == [["2", "12"], ["3", "16"]]
    assert (copied_run / "checkpoints" / "best.ckpt").read_bytes() == kept
    assert steps_saved(copied_run) == 16
    assert 1000 < json.loads((copied_run / "metrics.json").read_text())["training_seconds"] < 1100
    # nothing was written where the run had been before
    assert steps_saved(first_run.folder) == 8
    assert list(copied_run.parent.iterdir()) == [copied_run]


def test_finished_run_is_evaluated_again_and_nothing_else(copied_run: Path) -> None:
    before, config = timeless(copied_run), (copied_run / "config.yaml").read_text()
    figures = json.loads((copied_run / "metrics.json").read_text())
    assert call(main, f"resume={copied_run}/checkpoints/last.ckpt") == 0
    assert timeless(copied_run) == before
    assert (copied_run / "config.yaml").read_text() == config
    again = json.loads((copied_run / "metrics.json").read_text())
    assert again["checkpoint"] == "best.ckpt"
    # the clock stood at the last checkpoint, written just before the first training's end
    assert 0.5 * figures["training_seconds"] < again["training_seconds"] <= figures["training_seconds"]


@pytest.mark.parametrize(
    "override",
    ["model=tiny", "model.backbone=resnet18", "optimizer.lr=0.1", "output_dir=elsewhere", "seed=3"],
)
def test_what_cannot_change_in_a_resumed_run_is_refused(
    copied_run: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    assert call(main, f"resume={copied_run}", override) == 1
    message = one_line(capsys.readouterr().err)
    assert override in message
    assert "trainer.*" in message
    assert not Path("elsewhere").exists()


def test_data_may_have_moved_and_an_unknown_key_is_named(copied_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the default data set has no root, so Hydra asks for a plus
    assert call(main, f"resume={copied_run}", "+dataset.root=PATH") == 1
    assert "dataset.root=PATH does not fit the config" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("size", [0, 1000, -1000])
def test_truncated_checkpoint_is_one_line(copied_run: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    last = copied_run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:size])
    assert call(main, "resume=moved") == 1
    message = one_line(capsys.readouterr().err)
    assert str(last.relative_to(Path.cwd())) in message
    assert "truncated" in message


def test_folder_without_a_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, f"resume={tmp_path}") == 1
    assert "holds no checkpoints/last.ckpt" in one_line(capsys.readouterr().err)
