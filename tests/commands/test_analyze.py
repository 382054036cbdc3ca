"""segdcn-analyze: what it writes and prints of trained, undeformed and plain networks, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import FirstRun
from running import BARE, call, compose, make_camvid, one_line, process, real_camvid

import segdcn
from segdcn.analysis import effective_dilation, record, sampling_points
from segdcn.commands.analyze import analyze, main
from segdcn.commands.train import train
from segdcn.data import Shapes
from segdcn.models import deformable_layers, plain_twin
from segdcn.models.cost import network_cost
from segdcn.runs.files import file_hash

LAYERS = [f"backbone.{name}" for name in ("layer3.0.conv2", "layer4.0.conv1", "layer4.0.conv2")]
QUICK = ("device=cpu", "repeats=1")


def changed(first_run: FirstRun, folder: Path, bias: float | None) -> Path:
    """The first run's checkpoint with offsets that are all alike, or (None) as it is, in a run folder of its own."""
    file = folder / "checkpoints" / "best.ckpt"
    file.parent.mkdir(parents=True)
    state = torch.load(first_run.folder / "checkpoints" / "best.ckpt", weights_only=True)
    for key, value in state["state_dict"].items() if bias is not None else ():
        if ".offset." in key:
            value.fill_(bias if key.endswith("bias") else 0)
    torch.save(state, file)
    return file


def result(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint.parents[1] / "analysis" / "analysis.json").read_text())


def test_a_run_is_analysed_beside_its_checkpoint(
    first_run: FirstRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = changed(first_run, tmp_path / "run", None)
    assert call(main, f"checkpoint={checkpoint}", *QUICK, "pictures=2") == 0
    folder, found, shown = tmp_path / "run" / "analysis", result(checkpoint), capsys.readouterr()
    names = {"analysis.json", "effective_dilation.csv", "effective_dilation.md", "offset_lengths.png"}
    names |= {f"{kind}_{n}.png" for kind in ("sampling", "receptive_field") for n in (0, 1)}
    assert {path.name for path in folder.iterdir()} == names | {"sampling_0.json", "sampling_1.json"}
    for path in folder.glob("*.png"):
        picture = cv2.imread(str(path))
        assert min(picture.shape[:2]) > 200
        assert picture.std() > 10
    assert shown.err == ""

    assert found["checkpoint_sha256"] == file_hash(checkpoint)
    assert (found["split"], found["images"], found["environment"]["seed"]) == ("val", 8, 0)
    assert found["objects"]["classes"] == ["disc", "ring", "cross", "star", "crescent"]
    # one figure by the same functions, from the start
    network, samples = segdcn.load(checkpoint, device="cpu"), Shapes(val_images=8).split("val")
    values = [effective_dilation(record(network.network, network.batch(sample.image))[-1]) for sample in samples]
    last = found["layers"][-1]["effective_dilation"]["all"]
    assert last["mean"] == pytest.approx(torch.cat(values).mean().item())
    assert [layer["name"] for layer in found["layers"]] == LAYERS
    (row, *_) = csv.DictReader((folder / "effective_dilation.csv").open())
    assert (row["layer"], float(row["all_mean"])) == (LAYERS[-1], last["mean"])
    large = found["layers"][-1]["effective_dilation"]["large"]
    for text in (shown.out, (folder / "effective_dilation.md").read_text()):
        assert f"{large['mean']:.2f} ± {large['std']:.2f}" in text

    points = json.loads((folder / "sampling_1.json").read_text())
    assert points["image"] == samples[4].name == found["pictures"][1]["image"]
    assert points["layers"] == LAYERS[::-1]
    pixels = [tuple(entry["pixel"]) for entry in points["pixels"]]
    expected = sampling_points(network.network, network.batch(samples[4].image), pixels)
    for entry, depths in zip(points["pixels"], expected, strict=True):
        for listed, traced in zip(entry["points"], depths, strict=True):
            torch.testing.assert_close(torch.tensor(listed), traced, atol=6e-4, rtol=0)

    for name, one in (("deformable", network.network), ("plain", plain_twin(network.network))):
        cost = network_cost(one, (96, 96))
        assert (found["cost"][name]["parameters"], found["cost"][name]["flops"]) == (cost["parameters"], cost["flops"])
        assert found["cost"][name]["milliseconds"] > 0


def test_without_offsets_all_is_the_dilation_from_one_end_to_the_other(first_run: FirstRun, tmp_path: Path) -> None:
    checkpoint = changed(first_run, tmp_path / "run", 0.0)
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), np.full((256, 256, 3), 90, np.uint8))
    options = (f"image={image}", "pixels=[[128,128]]", "output_dir=" + str(tmp_path / "out"))
    assert call(main, f"checkpoint={checkpoint}", *QUICK, *options) == 0
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    for layer in found["layers"]:
        assert layer["length"]["max"] == 0
        for figures in [*layer["effective_dilation"].values(), *layer["by_class"].values()]:
            assert figures["cells"] == 0 or (figures["mean"], figures["std"]) == (1, 0)
    (entry,) = json.loads((tmp_path / "out" / "sampling_0.json").read_text())["pixels"]
    # cell (8, 8) of 16 at output stride 16
    assert [len(points) for points in entry["points"]] == [9, 81, 729]
    for reach, points in enumerate(entry["points"], start=1):
        assert {value for point in points for value in point} == {
            (8 + step + 0.5) * 16 - 0.5 for step in range(-reach, reach + 1)
        }


def test_known_offsets_are_told(first_run: FirstRun, tmp_path: Path) -> None:
    checkpoint = changed(first_run, tmp_path / "run", -30.0)  # (-30, -30): far outside a map of 6
    assert call(main, f"checkpoint={checkpoint}", *QUICK, "pictures=0", "images=3") == 0
    found = result(checkpoint)
    assert found["images"] == 3
    for layer in found["layers"]:
        assert layer["outside"] == 1
        assert layer["length"]["mean"] == pytest.approx(30 * 2**0.5)
        assert layer["effective_dilation"]["all"]["mean"] == pytest.approx(1)


@pytest.mark.parametrize("bias", [float("nan"), float("inf")])
def test_offsets_that_are_no_numbers_leave_the_rest(
    first_run: FirstRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], bias: float
) -> None:
    checkpoint = changed(first_run, tmp_path, bias)
    assert call(main, f"checkpoint={checkpoint}", *QUICK, "pictures=1", "images=1") == 0
    assert "warning: no sampling_0.json: " in capsys.readouterr().err
    assert result(checkpoint)["cost"]["size"] == [96, 96]


GROUPS = ("model.deform.layers=2", "model.deform.modulated=true", "model.deform.offset_groups=4")


@pytest.mark.parametrize("deform", [("model.deform.layers=0",), GROUPS], ids=["plain", "groups"])
def test_a_users_data_and_every_kind_of_layer(deform: tuple[str, ...], tmp_path: Path) -> None:
    """A plain network, and modulated layers with groups; data that move after the training."""
    root = make_camvid(tmp_path / "data", train=4, val=1)
    settings = [setting for setting in BARE if not setting.startswith("dataset.")]
    data = ("dataset=camvid", f"dataset.root={root}", "datamodule.num_workers=0", "trainer.limit_train_batches=1")
    run = f"output_dir={tmp_path / 'run'}"
    batch = ("datamodule.batch_size=4", "trainer.max_epochs=1", "name=test", run)
    train(compose("train", *settings, *data, *deform, *batch))
    shutil.move(root, tmp_path / "moved")
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    found = analyze(
        compose("analyze", f"checkpoint={checkpoint}", f"dataset.root={tmp_path / 'moved'}", "objects=[car]", *QUICK)
    )
    deformable = deform == GROUPS
    assert len(found["layers"]) == (2 if deformable else 3)
    assert found["images"] == len(found["pictures"]) == 1
    assert found["objects"]["classes"] == ["car"]
    assert ("deformable" in found["cost"]) == deformable
    for layer in found["layers"]:
        assert layer["deformable"] == deformable
        groups = 4 if deformable else 1
        assert layer["effective_dilation"]["all"]["cells"] == groups * 5 * 6  # of 72 x 96 pixels at output stride 16

    for file in (tmp_path / "moved" / "valannot").iterdir():  # a split without labels, as a benchmark's test split
        cv2.imwrite(str(file), np.full((72, 96), 11, np.uint8))
    found = analyze(compose("analyze", f"checkpoint={checkpoint}", f"dataset.root={tmp_path / 'moved'}", *QUICK))
    assert found["objects"]["thresholds"] == []
    assert found["pictures"][0]["pixels"]
    for layer in found["layers"]:
        cells = {name: figures["cells"] for name, figures in layer["effective_dilation"].items()}
        assert cells.pop("all") > 0
        assert set(cells.values()) == {0}


def test_a_photograph_needs_no_data(first_run: FirstRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photograph, out = tmp_path / "photo $x.png", tmp_path / "out"
    cv2.imwrite(str(photograph), np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    checkpoint = first_run.folder / "checkpoints" / "best.ckpt"
    arguments = (f"checkpoint='{checkpoint}'", "images=0", f"output_dir={out}", *QUICK)
    assert call(main, *arguments, f"image='{photograph}'") == 0
    found = json.loads((out / "analysis.json").read_text())
    assert "layers" not in found
    assert found["cost"]["size"] == [50, 70]
    assert found["pictures"][0]["image"] == "photo $x.png"
    assert not (out / "offset_lengths.png").exists()
    assert "effective dilation" not in capsys.readouterr().out
    run = changed(first_run, tmp_path / "run", None)
    assert call(main, f"checkpoint={run}", "images=0", f"image='{photograph}'", *QUICK) == 0
    assert call(main, f"checkpoint={run}", "images=1", "pictures=0", "split=test", *QUICK) == 0
    folders = {path.parent.name for path in (tmp_path / "run").glob("*/analysis.json")}
    assert folders == {"analysis_pictures_photo $x", "analysis_test"}  # and val's figures would still be there
    assert call(main, *arguments, f"image='{photograph}'", "pixels=[[50,0]]") == 1
    assert "row 50, column 0 lies outside photo $x.png of 50 x 70" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "checkpoint must be given"),
        (("checkpoint=none.ckpt",), "no checkpoint file at none.ckpt"),
        (("CHECKPOINT", "split=train2"), "split=train2: the data set has the splits train, val, test"),
        (("CHECKPOINT", "objects=[car]"), "no class 'car'"),
        (("CHECKPOINT", "object_sizes=[5]"), "object_sizes must be two sides"),
        (("CHECKPOINT", "images=-1"), "images must be at least 0"),
        (("CHECKPOINT", "image=none.png"), "no image at none.png"),
        (("CHECKPOINT", "pixels=[3]"), "pixels must be pairs"),
        (("CHECKPOINT", "repeats=0"), "repeats must be at least 1"),
        (("CHECKPOINT", "device=tpu9"), "device=tpu9 cannot be used here"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...],
    message: str,
    first_run: FirstRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = f"checkpoint='{first_run.folder / 'checkpoints' / 'best.ckpt'}'"
    given = [checkpoint if argument == "CHECKPOINT" else argument for argument in arguments]
    assert call(main, *given, "output_dir=out") == 1
    assert message in one_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_command_is_there_and_tells_itself(tmp_path: Path) -> None:
    help_text = process(tmp_path, "-m", "segdcn.commands.analyze", "--help").stdout
    assert "segdcn-analyze checkpoint=" in help_text
    assert "object_sizes: null" in help_text
    assert "HYDRA_FULL_ERROR=1" in help_text


@pytest.mark.slow
def test_camvid_by_its_real_objects(tmp_path: Path) -> None:
    root = real_camvid()
    small = ("trainer.max_steps=1", "trainer.max_epochs=-1", "trainer.limit_val_batches=1", "logger=none")
    data = (
        "dataset=camvid",
        "model=tiny",
        f"dataset.root={root}",
        "datamodule.num_workers=0",
        "datamodule.batch_size=2",
    )
    others = ("callbacks.panels=null", "trainer.accelerator=cpu", "name=test", f"output_dir={tmp_path / 'run'}")
    train(compose("train", *data, *small, *others))
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    found = analyze(compose("analyze", f"checkpoint={checkpoint}", "images=20", "pictures=1", *QUICK))
    assert found["objects"]["classes"] == ["sign", "car", "pedestrian", "bicyclist"]
    counts = found["objects"]["counts"]
    assert min(counts.values()) > 20
    assert max(counts.values()) - min(counts.values()) <= 0.2 * sum(counts.values())
    assert len(deformable_layers(segdcn.load(checkpoint).network)) == len(found["layers"]) == 3
