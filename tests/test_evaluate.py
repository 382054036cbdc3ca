"""segdcn-evaluate: the same figures as in training, from the checkpoint alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FirstRun
from runs import BARE, call, compose, make_camvid, one_line

from segdcn.evaluate import main
from segdcn.train import train


@pytest.fixture
def checkpoint(first_run: FirstRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The best checkpoint of a run, without the rest of its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return Path(shutil.copy(first_run.folder / "checkpoints" / "best.ckpt", tmp_path / "run" / "checkpoints"))


def figures(folder: Path) -> dict[str, object]:
    return {key: value for key, value in json.loads((folder / "metrics.json").read_text()).items() if "/" in key}


def test_figures_are_those_of_training(
    checkpoint: Path, first_run: FirstRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(main, f"checkpoint={checkpoint}", "trainer.accelerator=cpu", "callbacks.panels.images=1") == 0
    folder = checkpoint.parents[1] / "evaluation" / "best_val"
    trained = {key: value for key, value in figures(first_run.folder).items() if key.startswith("val/")}
    assert figures(folder) == trained
    assert json.loads((folder / "metrics.json").read_text())["split"] == "val"
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "environment.json", "panels"}
    assert {path.name for path in (folder / "panels").iterdir()} == {"val_0.png", "val_0_sampling.png"}
    table = capsys.readouterr().out
    for name in ("background", "crescent", "mean IoU", "pixel accuracy"):
        assert name in table
    assert f"{100 * float(str(trained['val/miou'])):.2f}" in table


def test_test_split_has_figures_of_its_own(checkpoint: Path, first_run: FirstRun) -> None:
    # a checkpoint holds its weights: the pretrained file that it started from is not asked for
    state = torch.load(checkpoint, weights_only=True)
    state["segdcn"]["config"]["model"]["weights"] = "nowhere.pth"
    torch.save(state, checkpoint)
    assert call(main, f"checkpoint={checkpoint}", "split=test", "trainer.accelerator=cpu", "callbacks.panels=null") == 0
    test = figures(checkpoint.parents[1] / "evaluation" / "best_test")
    assert {"test/miou", "test/loss", "test/pixel_accuracy", "test/iou/star"} <= test.keys()
    assert not any(key.startswith("val/") for key in test)
    assert test["test/loss"] != figures(first_run.folder)["val/loss"]


def test_data_in_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = make_camvid(tmp_path / "camvid")
    train(
        compose(
            "train",
            "dataset=camvid",
            f"dataset.root={root}",
            *(setting for setting in BARE if not setting.startswith("dataset.")),
            "datamodule.crop_size=[48,64]",
            "datamodule.num_workers=0",
            "trainer.max_epochs=1",
            "name=test",
            f"output_dir={tmp_path / 'run'}",
        )
    )
    root.rename(tmp_path / "moved")
    here = f"checkpoint={tmp_path / 'run' / 'checkpoints' / 'best.ckpt'}"
    capsys.readouterr()
    assert call(main, here, "callbacks.panels=null") == 1
    assert str(root) in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run" / "evaluation").exists()
    settings = ("callbacks.panels=null", "trainer.accelerator=cpu", "datamodule.eval_batch_size=1")
    assert call(main, here, f"dataset.root={tmp_path / 'moved'}", f"output_dir={tmp_path / 'out'}", *settings) == 0
    trained = {key: value for key, value in figures(tmp_path / "run").items() if key.startswith("val/")}
    assert figures(tmp_path / "out") == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "checkpoint must be given"),
        (("checkpoint=nowhere.ckpt",), "no checkpoint file at nowhere.ckpt"),
        (("checkpoint=run",), "no checkpoint file at run"),
        (("checkpoint=damaged.ckpt",), "damaged.ckpt cannot be read"),
        (("checkpoint=other.ckpt",), "other.ckpt is not a segdcn checkpoint"),
        (("checkpoint=run/checkpoints/best.ckpt", "split=train"), "split must be val or test, got 'train'"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], part: str
) -> None:
    Path("damaged.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, "other.ckpt")
    before = sorted(Path().rglob("*"))
    assert call(main, *arguments) == 1
    assert part in one_line(capsys.readouterr().err)
    assert sorted(Path().rglob("*")) == before
