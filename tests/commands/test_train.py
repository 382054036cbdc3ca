"""A run, end to end: what it leaves behind, that its figures are true, that it learns and that it repeats."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import FirstRun
from PIL import Image
from running import BARE, assert_same_checkpoint, call, compose, one_line
from torch._inductor.exc import InvalidCxxCompiler

from segdcn.commands import export
from segdcn.commands.train import main, train
from segdcn.data import Shapes
from segdcn.models import Deform, build_deeplab
from segdcn.models.cost import count_flops

CLASSES = ("background", "disc", "ring", "cross", "star", "crescent")


def test_run_folder_holds_what_was_promised(first_run: FirstRun) -> None:
    folder = first_run.folder
    for name in ("config.yaml", "environment.json", "metrics.csv", "metrics.json"):
        assert (folder / name).is_file(), name
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert not list(folder.rglob("*.partial"))
    panels = sorted(path.name for path in (folder / "panels").iterdir())
    assert panels == ["val_0.png", "val_0_sampling.png", "val_1.png", "val_1_sampling.png"]
    assert all(np.asarray(Image.open(folder / "panels" / name)).std() > 10 for name in panels)
    assert list(folder.rglob("events.out.tfevents*"))


def test_config_and_environment_describe_the_run(first_run: FirstRun) -> None:
    config = yaml.safe_load((first_run.folder / "config.yaml").read_text())
    assert config["model"]["head"] == "aspp"
    assert config["datamodule"]["crop_size"] == [48, 64]
    assert config["name"] == "shapes"
    environment = json.loads((first_run.folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["seed"] == 0
    assert "model.head=aspp" in environment["command"]
    assert {"device", "git", "python", "threads"} <= environment.keys()


def test_metric_names_and_ranges(first_run: FirstRun) -> None:
    figures = json.loads((first_run.folder / "metrics.json").read_text())
    names = {"val/loss", "val/miou", "val/pixel_accuracy", *(f"val/iou/{name}" for name in CLASSES)}
    assert names <= figures.keys()
    assert all(figures[name] is None or 0 <= figures[name] <= 1 for name in names - {"val/loss"})
    assert not any(isinstance(value, dict | list) for value in figures.values())
    network = build_deeplab(
        6, "resnet_tiny", "aspp", weights=None, output_stride=16, head_channels=16, deform=Deform(layers=3)
    )
    assert figures["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert figures["flops"] == count_flops(network, (48, 64))
    assert figures["flops_input"] == "[48,64]"
    assert 0 < figures["training_seconds"] < 300
    assert 0 < figures["seconds_per_image"] < 10
    with (first_run.folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "4"), ("1", "8")]
    assert names | {"train/loss", "lr/head", "lr/offset"} <= rows[0].keys()
    assert all(float(row["train/loss"]) > 0 for row in rows)
    best = max(rows, key=lambda row: float(row["val/miou"]))
    assert float(best["val/miou"]) == pytest.approx(figures["val/miou"], rel=1e-5)


def test_figures_are_those_of_the_best_checkpoint(first_run: FirstRun) -> None:
    """Counted pixel by pixel from the definition, with a network built by hand from plain tensors."""
    checkpoint = torch.load(first_run.folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["segdcn"]["class_names"] == list(CLASSES)
    network = build_deeplab(6, "resnet_tiny", "aspp", 16, weights=None, deform=Deform(3), head_channels=16).eval()
    weights = {k.removeprefix("network."): v for k, v in checkpoint["state_dict"].items() if k.startswith("network.")}
    network.load_state_dict(weights)
    both, truth, predicted, loss, pixels = [0] * 6, [0] * 6, [0] * 6, 0.0, 0
    for sample in Shapes(train_images=1, val_images=8).split("val"):
        image = (sample.image / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        with torch.no_grad():
            logits = network(torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None])[0].numpy()
        log_sum = np.log(np.exp(logits.astype(np.float64)).sum(axis=0))
        for y, x in np.ndindex(sample.label.shape):
            label, guess = int(sample.label[y, x]), int(logits[:, y, x].argmax())
            truth[label] += 1
            predicted[guess] += 1
            both[label] += label == guess
            loss += log_sum[y, x] - logits[label, y, x]
            pixels += 1
    union = [t + p - b for t, p, b in zip(truth, predicted, both, strict=True)]
    ious = [b / u if u else math.nan for b, u in zip(both, union, strict=True)]
    figures = json.loads((first_run.folder / "metrics.json").read_text())
    for name, iou in zip(CLASSES, ious, strict=True):
        reported = figures[f"val/iou/{name}"]
        assert math.isnan(iou) if reported is None else reported == pytest.approx(iou, abs=1e-4)
    assert figures["val/miou"] == pytest.approx(np.nanmean(ious), abs=1e-4)
    assert figures["val/pixel_accuracy"] == pytest.approx(sum(both) / pixels, abs=1e-4)
    assert figures["val/loss"] == pytest.approx(loss / pixels, abs=1e-4)


def test_same_seed_gives_the_same_weights_with_any_number_of_workers(tmp_path: Path) -> None:
    # shapes draws no scales and colours; here each sample is augmented by its own seed
    common = (*BARE, "datamodule.scale=[0.5,2.0]", "datamodule.photometric=0.3", "trainer.max_epochs=1", "name=test")
    for name, changed in (
        ("one", ()),
        ("workers", ("datamodule.num_workers=2",)),
        ("other", ("seed=1", "datamodule.seed=0", "task.seed=0")),
    ):
        train(compose("train", *common, f"output_dir={tmp_path / name}", *changed))
    last = {name: tmp_path / name / "checkpoints" / "last.ckpt" for name in ("one", "workers", "other")}
    assert_same_checkpoint(last["one"], last["workers"])
    with pytest.raises(AssertionError):  # other weights to begin with
        assert_same_checkpoint(last["one"], last["other"])
    config = compose("train", "seed=3")
    assert config.datamodule.seed == config.task.seed == 3


def test_a_folder_that_holds_a_run_is_refused(first_run: FirstRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = (first_run.folder / "config.yaml").read_text()
    assert call(main, *BARE, "seed=7", f"output_dir={first_run.folder}") == 1
    message = one_line(capsys.readouterr().err)
    assert "holds a run already" in message
    assert "resume=" in message
    assert (first_run.folder / "config.yaml").read_text() == before


class _Memorised(Shapes):
    """The training images are the validation images."""

    def split(self, name: str) -> list:
        return super().split("train")


@pytest.mark.slow
def test_learns_four_images_by_heart(tmp_path: Path) -> None:
    config = compose(
        "train",
        "dataset._target_=test_train._Memorised",
        "dataset.train_images=4",
        "datamodule.batch_size=4",
        "datamodule.flip=0",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=200",
        "trainer.check_val_every_n_epoch=50",
        "logger=none",
        "callbacks.panels=null",
        "name=test",
        f"output_dir={tmp_path}",
    )
    assert train(config) > 0.9


@pytest.mark.slow
def test_a_compiled_run_resumes_and_is_exported_as_any_other(tmp_path: Path) -> None:
    settings = (*BARE, "task.compile=true", "trainer.max_epochs=1", f"output_dir={tmp_path / 'run'}")
    assert call(main, *settings) == 0
    assert call(main, f"resume={tmp_path / 'run'}", "trainer.max_epochs=2") == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    network = build_deeplab(6, "resnet_tiny", "aspp", 16, weights=None, head_channels=16)
    assert {f"network.{name}" for name in network.state_dict()} <= torch.load(checkpoint, weights_only=True)[
        "state_dict"
    ].keys()
    assert call(export.main, f"checkpoint={checkpoint}") == 0


def test_a_machine_that_cannot_compile_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile(*_: object) -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", lambda function: compile)
    assert call(main, *BARE, "task.compile=true", f"output_dir={tmp_path}") == 1
    line = one_line(capsys.readouterr().err)
    assert line.startswith("error: torch.compile cannot do with this network or machine: set task.compile=false (")
    assert "No working C++ compiler" in line
