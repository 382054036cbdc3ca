"""A network of a user's own, and torchvision's, through every command; and weights of an own run to start from."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from running import call, one_line

import segdcn
from segdcn.commands import analyze, evaluate, export, predict, train
from segdcn.commands import report as report

MYNET = """
from torch import nn
from torch.nn import functional as F


class MyNet(nn.Module):
    def __init__(self, num_classes, width=16, classes_off=0, kernel=3, stride=1, enlarge=True):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, kernel, stride=stride, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.classifier = nn.Conv2d(width, num_classes + classes_off, 1)
        self.enlarge = enlarge

    def forward(self, image):
        logits = self.classifier(self.body(image))
        return F.interpolate(logits, image.shape[-2:], mode="bilinear") if self.enlarge else logits
"""
SMALL = (
    "dataset.train_images=8",
    "dataset.val_images=4",
    "dataset.test_images=4",
    "datamodule.batch_size=4",
    "datamodule.eval_batch_size=4",
    "datamodule.crop_size=[48,64]",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "logger=none",
    "callbacks.panels.images=1",
    "report=false",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a user, with a file and a config of their own."""
    (tmp_path / "mynet.py").write_text(MYNET)
    (tmp_path / "my_conf" / "model").mkdir(parents=True)
    (tmp_path / "my_conf" / "model" / "mynet.yaml").write_text("_target_: mynet.MyNet\nwidth: 8\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(segdcn.__file__).parents[1]}")
    monkeypatch.setattr("segdcn.report.viewer.MAX_FIELDS", 6)
    sys.modules.pop("mynet", None)
    return tmp_path


def trained(*arguments: str) -> int:
    return call(train.main, "--config-dir", "my_conf", *arguments, *SMALL)


def test_every_command_takes_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained("model=mynet", "model.width=6", "output_dir=run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "network  mynet.MyNet, 0.00 M parameters"
    assert lines[3] == "batch    4 images, learning rate 0.003"
    assert call(train.main, "resume=run", "trainer.max_epochs=2", "trust=true") == 0
    metrics = json.loads(Path("run/metrics.json").read_text())

    checkpoint = "checkpoint=run/checkpoints/best.ckpt"
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(image).save("photo.png")
    commands = (
        (evaluate.main, (checkpoint, "trainer.accelerator=cpu")),
        (predict.main, (checkpoint, "input=photo.png", "output=out", "device=cpu")),
        (export.main, (checkpoint,)),
        (analyze.main, (checkpoint, "device=cpu", "repeats=1", "pictures=1")),
    )
    capsys.readouterr()
    for main, arguments in commands:
        assert call(main, *arguments) == 1
        assert "mynet.MyNet, as its model; " in one_line(capsys.readouterr().err)
        assert call(main, *arguments, "trust=true") == 0, capsys.readouterr().err
        assert "warning" not in capsys.readouterr().err

    evaluated = json.loads(Path("run/evaluation/best_val/metrics.json").read_text())
    assert evaluated["val/miou"] == metrics["val/miou"]
    network = sys.modules["mynet"].MyNet(6, 6)
    predictor = segdcn.load("run/checkpoints/best.ckpt", "cpu", trust=True)
    built = segdcn.load("run/checkpoints/best.ckpt", "cpu", network=network)
    with Image.open("out/photo_labels.png") as picture:
        labels = np.asarray(picture)
    np.testing.assert_array_equal(predictor(image).labels, labels)
    np.testing.assert_array_equal(built(image).labels, labels)
    session = onnxruntime.InferenceSession("run/export/best.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": predictor.batch(image).numpy()})
    assert (logits[0].argmax(axis=0) == labels).mean() > 0.999
    analysis = json.loads(Path("run/analysis/analysis.json").read_text())
    assert [layer["name"] for layer in analysis["layers"]] == ["body.0"]
    assert analysis["cost"]["plain"]["parameters"] == sum(p.numel() for p in network.parameters())

    assert call(report.main, "run") == 0
    page = Path("run/report.html").read_text()
    assert "mynet.MyNet, as its model" in page
    assert "allow it with --trust" in page
    assert call(report.main, "run", "--trust") == 0
    page = Path("run/report.html").read_text()
    assert '<p class="subtitle">mynet.MyNet, seed 0</p>' in page
    assert "Where the kernels reach" in page
    assert 'aria-label="Notes"' not in page


@pytest.mark.slow
def test_a_sweep_takes_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("model=mynet", "seed=1", "sweep.name=widths", *SMALL)
    assert call(train.main, "--config-dir", "my_conf", "-m", *settings) == 0
    assert "1/1" in capsys.readouterr().out
    (run,) = Path("sweeps/widths").glob("*/")
    assert json.loads((run / "metrics.json").read_text())["seed"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("+model.classes_off=-1",), "gives logits of 5 classes, but the data set has 6"),
        (("+model.classes_off=2",), "gives logits of 8 classes, but the data set has 6"),
        (("+model.enlarge=false", "+model.stride=4"), "gives logits of 12x16 pixels for an image of 48x64"),
        (("+model.enlarge=false", "+model.stride=[1,2]"), "gives logits of 48x32 pixels for an image of 48x64"),
        (("+model.depth=3",), "unexpected keyword argument 'depth'"),
        (("model._target_=mynet.YourNet",), "YourNet"),
        (("model._target_=builtins.dict",), "got a mapping of width, num_classes"),
    ],
)
def test_a_network_that_does_not_fit_is_one_line_before_the_training(
    folder: Path, changes: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert trained("model=mynet", *changes, "output_dir=run") == 1
    shown = capsys.readouterr()
    assert message in one_line(shown.err)
    assert shown.out == ""
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts] == before


@pytest.mark.parametrize("changes", [("+model.kernel=1",), ("+model.stride=[2,3]",)], ids=["1x1", "stride 2x3"])
def test_what_a_network_cannot_tell_is_left_out(
    folder: Path, changes: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained("model=mynet", *changes, "output_dir=run") == 0
    capsys.readouterr()
    arguments = ("trust=true", "device=cpu", "repeats=1", "pictures=1")
    assert call(analyze.main, "checkpoint=run/checkpoints/best.ckpt", *arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found = json.loads(Path("run/analysis/analysis.json").read_text())
    written = {path.name for path in Path("run/analysis").iterdir()}
    assert {"analysis.json", "sampling_0.json", "receptive_field_0.png"} <= written
    assert call(report.main, "run", "--trust") == 0
    page = Path("run/report.html").read_text()
    if "kernel" in changes[0]:
        assert "note: no effective dilation and no sampling points, since the network has no 3x3 conv" in shown.out
        assert "layers" not in found
        assert "sampling_0.png" not in written
        assert "Without viewer: the network has no 3x3 convolutions" in page
        assert 'id="images"' in page
    else:
        (layer,) = found["layers"]
        assert layer["effective_dilation"]["all"]["mean"] == 1
        assert layer["effective_dilation"]["all"]["cells"] == 4 * (96 // 2) * (96 // 3)
        assert "sampling_0.png" in written
        assert 'aria-label="Notes"' not in page


def test_torchvisions_networks_need_no_trust(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "torchvision.models.segmentation.lraspp_mobilenet_v3_large"
    (folder / "my_conf" / "model" / "lraspp.yaml").write_text(
        f"_target_: {name}\nweights: null\nweights_backbone: null\n"
    )
    assert trained("model=lraspp", "task.backbone_lr_mult=0.5", "output_dir=run") == 0
    shown = capsys.readouterr().out
    assert f"network  {name}, 3.22 M parameters" in shown
    assert "learning rate 0.003 (backbone x 0.5)" in shown
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert call(evaluate.main, "checkpoint=run/checkpoints/best.ckpt", "trainer.accelerator=cpu") == 0
    assert json.loads(Path("run/evaluation/best_val/metrics.json").read_text())["val/miou"] == metrics["val/miou"]


def test_a_factor_without_effect_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained("model=mynet", "task.backbone_lr_mult=0.3", "output_dir=run") == 0
    assert "note     task.backbone_lr_mult has no effect" in capsys.readouterr().out


def test_a_run_starts_from_another_ones_weights_and_goes_on_without_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained("dataset.seed=1", "output_dir=first") == 0
    first = torch.load("first/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    for split in ("train", "val"):
        for kind, pixels in (("images", np.zeros((48, 64, 3), np.uint8)), ("masks", np.eye(48, 64, dtype=np.uint8))):
            Path("data", split, kind).mkdir(parents=True)
            Image.fromarray(pixels).save(Path("data", split, kind, "a.png"))
    data = [
        "dataset=folder",
        "model=tiny",
        "dataset.root=data",
        "dataset.class_names=[off,on]",
        "datamodule.num_workers=0",
    ]
    settings = [setting for setting in SMALL if not setting.startswith(("dataset.", "datamodule.batch"))]
    start = ("model.weights=first/checkpoints/best.ckpt", "optimizer.lr=0", "output_dir=second")
    capsys.readouterr()
    assert call(train.main, *data, *settings, *start, "datamodule.batch_size=1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "weights  first/checkpoints/best.ckpt: 73 of 75 tensors; not taken: head.classifier.weight (6x256x1x1 there,"
        " 2x256x1x1 here), head.classifier.bias (6 there, 2 here)"
    )
    second = torch.load("second/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    learned = [key for key in first if re.fullmatch(r"network\..*(weight|bias)", key)]  # no statistics; the rate is 0
    assert len(learned) > 40
    assert {key for key in learned if not torch.equal(first[key], second[key])} == {
        f"network.head.classifier.{part}" for part in ("weight", "bias")
    }

    for file in Path("first/checkpoints").iterdir():
        file.unlink()
    assert call(train.main, "resume=second", "trainer.max_epochs=2") == 0
    assert "weights" not in capsys.readouterr().out
    assert call(evaluate.main, "checkpoint=second/checkpoints/best.ckpt", "trainer.accelerator=cpu") == 0


@pytest.mark.parametrize(("head", "whole"), [("aspp", False), ("v3plus", True)])
def test_one_image_a_batch_is_answered_before_the_training(
    folder: Path, head: str, whole: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    single = ("datamodule.batch_size=1", "trainer.accumulate_grad_batches=4", "model.head_channels=8")
    settings = [*SMALL, *single, f"model.head={head}", *(("datamodule.crop_size=null",) if whole else ())]
    assert call(train.main, *settings, "output_dir=run") == 1
    shown = capsys.readouterr()
    assert re.search("batch of one image.*model.image_pooling=false or model.head=paper", one_line(shown.err))
    assert shown.out == ""
    assert not Path("run").exists()
    assert call(train.main, *settings, "model.image_pooling=false", "output_dir=run") == 0
