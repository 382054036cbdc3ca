"""segdcn-evaluate: the same figures as in training, from the checkpoint alone."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FirstRun
from miniatures import make_cityscapes, make_voc
from PIL import Image
from running import BARE, call, compose, make_camvid, one_line, process

import segdcn
from segdcn.commands import evaluate
from segdcn.commands.evaluate import main
from segdcn.commands.train import main as train_main
from segdcn.commands.train import train
from segdcn.data.cityscapes import Cityscapes
from segdcn.runs.folder import LOCK, owned


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
    written = json.loads((folder / "metrics.json").read_text())
    assert {"split": "val", "images": 8, "protocol": "native", "seed": 0}.items() <= written.items()
    assert written["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert written["inference"] == "whole image, single scale"
    assert 0 < written["seconds_per_image"] < 10
    left = {"metrics.json", "counts.npz", "environment.json", "panels", LOCK}
    assert {path.name for path in folder.iterdir()} == left
    assert {path.name for path in (folder / "panels").iterdir()} == {"val_0.png", "val_0_sampling.png"}
    table = capsys.readouterr().out
    for name in ("background", "crescent", "mean IoU", "pixel accuracy"):
        assert name in table
    assert f"{100 * float(str(trained['val/miou'])):.2f}" in table


def test_figures_of_a_light_network_are_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch norms are folded in both, and its memory has another format."""
    monkeypatch.setattr("segdcn.models.folding.LEAST_PIXELS", 0)
    light = ("model.backbone=mobilenet_v2", "model.head=fpn", "model.weights=null", "task.channels_last=true")
    assert call(train_main, *BARE, *light, "callbacks=ema", f"output_dir={tmp_path}") == 0
    checkpoint = tmp_path / "checkpoints" / "best.ckpt"
    assert call(main, f"checkpoint={checkpoint}", "trainer.accelerator=cpu", "callbacks.panels=null") == 0
    assert figures(tmp_path / "evaluation" / "best_val") == figures(tmp_path)
    stem = segdcn.load(checkpoint, "cpu").network.backbone.features[0][0].weight
    assert stem.is_contiguous(memory_format=torch.channels_last)


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


CPU = ("trainer.accelerator=cpu", "callbacks.panels=null")


@pytest.mark.parametrize("loss", ["class_weights=[1,2,3,4,5,6]", "ohem_fraction=0.25"])
def test_loss_does_not_depend_on_how_many_images_are_evaluated_at_once(tmp_path: Path, loss: str) -> None:
    run = tmp_path / "run"
    assert call(train_main, *BARE, "trainer.max_steps=1", f"loss.{loss}", f"output_dir={run}") == 0
    for size in (1, 2, 8):
        common = (f"checkpoint={run}/checkpoints/best.ckpt", f"output_dir={tmp_path / str(size)}", *CPU)
        assert call(main, *common, f"datamodule.eval_batch_size={size}") == 0
    losses = [json.loads((tmp_path / str(size) / "metrics.json").read_text())["val/loss"] for size in (1, 2, 8)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_inference_options_have_a_folder_and_figures_of_their_own(checkpoint: Path) -> None:
    options = ("inference.scales=[0.75,1.25]", "inference.flip=true", "inference.window=[64,64]")
    panels = ("trainer.accelerator=cpu", "callbacks.panels.images=1")
    assert call(main, f"checkpoint={checkpoint}", *options, *panels) == 0
    assert call(main, f"checkpoint={checkpoint}", *CPU) == 0
    evaluations = checkpoint.parents[1] / "evaluation"
    own = evaluations / "best_val_scales0.75-1.25_flip_window64-64"
    written = json.loads((own / "metrics.json").read_text())
    assert written["inference.scales"] == "[0.75,1.25]"
    assert written["inference.flip"] is True
    assert written["inference.window"] == "[64,64]"
    assert written["inference.stride"] is None
    assert written["inference"] == "window 64×64, stride 43×43, scales 0.75, 1.25, mirrored too"
    assert (own / "panels" / "val_0.png").is_file()
    assert figures(own) != figures(evaluations / "best_val")


def test_other_data_have_a_folder_of_their_own_and_are_told(checkpoint: Path) -> None:
    assert call(main, f"checkpoint={checkpoint}", *CPU) == 0
    own = checkpoint.parents[1] / "evaluation" / "best_val"
    before = figures(own)
    assert call(main, f"checkpoint={checkpoint}", "dataset.val_images=3", "dataset.seed=5", *CPU) == 0
    other = own.with_name("best_val_seed5_val_images3")
    written = json.loads((other / "metrics.json").read_text())
    assert {"dataset.seed": 5, "dataset.val_images": 3, "images": 3}.items() <= written.items()
    assert figures(own) == before != figures(other)


def test_names_of_folders_of_other_data_are_no_longer_than_a_file_system_takes(checkpoint: Path) -> None:
    def name(*settings: str) -> str:
        return evaluate.evaluation_folder(compose("evaluate", f"checkpoint={checkpoint}", *settings)).name

    assert name("dataset.root=/data/x", "++dataset.masks_dir=y") == "best_val"
    assert name("++dataset.shift=-1", "++dataset.crop=[1,2]") == "best_val_crop1-2_shift-1"
    many = [f"++dataset.class_names=[{','.join(100 * [kind])}]" for kind in ("road", "lane")]
    assert name(many[0]) != name(many[1])
    assert len(name(many[0])) < 50


def test_an_evaluation_that_is_being_written_is_not_written_twice(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "owned", partial(owned, wait=0.2))
    folder = checkpoint.parents[1] / "evaluation" / "best_val"
    with owned(folder):
        assert call(main, f"checkpoint={checkpoint}", *CPU) == 1
    assert "evaluation/best_val is being written by another process" in one_line(capsys.readouterr().err)
    assert [path.name for path in folder.iterdir()] == [LOCK]


@pytest.mark.slow
@pytest.mark.parametrize("images", [5, 1])
def test_two_processes_give_the_figures_of_one(checkpoint: Path, tmp_path: Path, images: int) -> None:
    shared = (f"checkpoint={checkpoint}", f"+dataset.val_images={images}", "datamodule.eval_batch_size=1", *CPU)
    found = []
    for options in (("trainer.devices=1",), ("trainer.devices=2", "trainer.strategy=ddp")):
        folder = tmp_path / options[0]
        ended = process(tmp_path, "-m", "segdcn.commands.evaluate", *shared, *options, f"output_dir='{folder}'")
        assert ended.returncode == 0, ended.stderr
        assert json.loads((folder / "metrics.json").read_text())["images"] == images
        found.append(figures(folder))
    losses = [one.pop("val/loss") for one in found]
    assert found[1] == found[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # a sum of floats in another order


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint for each benchmark, trained for an epoch on its miniature."""
    checkpoints = {}
    for name, make in (("cityscapes", make_cityscapes), ("voc", make_voc)):
        run, root = tmp_path_factory.mktemp(name), make(tmp_path_factory.mktemp(f"{name}_data"))
        train(
            compose(
                "train",
                f"dataset={name}",
                f"dataset.root={root}",
                *(setting for setting in BARE if not setting.startswith("dataset.")),
                "datamodule.batch_size=2",
                "datamodule.eval_batch_size=1",
                "datamodule.num_workers=0",
                "trainer.max_epochs=1",
                "name=test",
                f"output_dir={run}",
            )
        )
        checkpoints[name] = run / "checkpoints" / "best.ckpt"
    return checkpoints


def test_cityscapes_protocol_and_submission(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("protocol=cityscapes", "submission=true", f"output_dir={tmp_path}")
    assert call(main, f"checkpoint={trained['cityscapes']}", *options, *CPU) == 0
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert (written["protocol"], written["images"]) == ("cityscapes", 2)
    for key in ("val/miou", "val/category_miou", "val/category_iou/vehicle", "val/instance_miou"):
        assert 0 <= written[key] <= 1
    assert "mean of categories" in capsys.readouterr().out
    files = sorted((tmp_path / "submission").iterdir())
    assert [file.name for file in files] == [
        "munster_000000_000019_labelIds.png",
        "munster_000001_000020_labelIds.png",
    ]
    with Image.open(files[0]) as picture:
        assert picture.size == (128, 64)
        assert set(np.unique(picture)) <= set(Cityscapes.label_ids)


def test_voc_and_paper_protocols_and_submission(trained: dict[str, Path], tmp_path: Path) -> None:
    options = ("protocol=voc", "submission=true", f"output_dir={tmp_path / 'voc'}")
    assert call(main, f"checkpoint={trained['voc']}", *options, *CPU) == 0
    folder = tmp_path / "voc" / "submission" / "results" / "VOC2012" / "Segmentation" / "comp6_val_cls"
    assert sorted(file.name for file in folder.iterdir()) == ["2007_000033.png", "2008_000009.png"]
    assert call(main, f"checkpoint={trained['voc']}", "protocol=paper", f"output_dir={tmp_path / 'paper'}", *CPU) == 0
    own, paper = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("voc", "paper"))
    assert (own["protocol"], paper["protocol"]) == ("voc", "paper")
    assert own["images"] == paper["images"] == 2
    # classes that the two images lack are left out by the one rule and count 0 by the other
    for written, classes in ((own, None), (paper, 21)):
        present = [value for key, value in written.items() if key.startswith("val/iou/") and value is not None]
        assert 0 < len(present) < 21
        assert written["val/miou"] == pytest.approx(sum(present) / (classes or len(present)))


def test_a_recipe_counts_by_its_protocol_and_is_rebuilt_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row of the paper's table in miniature: frozen parts, whole images, length in steps, protocol paper."""
    monkeypatch.chdir(tmp_path)
    root = make_voc(tmp_path / "data", train=[f"2007_00000{number}" for number in range(5)])
    small = ("model.backbone=resnet_tiny", "model.weights=null", "+model.head_channels=16", "datamodule.num_workers=0")
    steps = ("trainer.max_steps=4", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=4")
    data = (f"dataset.root={root}", "dataset.sbd_root=null")
    options = (*data, *small, *steps, "trainer.check_val_every_n_epoch=1", "logger=none", *CPU)
    assert call(train_main, "experiment=voc_deform3", *options) == 0
    assert "published for this setting: mean IoU 75.20" in capsys.readouterr().out
    (run,) = (tmp_path / "runs" / "voc_deform3").iterdir()
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(row["val/miou"] for row in rows)  # the last step is validated
    written = json.loads((run / "metrics.json").read_text())
    assert written["protocol"] == "paper"
    present = [value for key, value in written.items() if key.startswith("val/iou/") and value is not None]
    assert written["val/miou"] == pytest.approx(sum(present) / 21)

    checkpoint = run / "checkpoints" / "best.ckpt"
    names = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert "network.backbone.layer4.0.bn2.running_var" in names
    assert not any("num_batches_tracked" in name for name in names)
    assert call(main, f"checkpoint={checkpoint}", "protocol=paper", *CPU) == 0
    assert figures(run / "evaluation" / "best_val_paper") == figures(run)
    assert call(main, f"checkpoint={checkpoint}", *CPU) == 0
    assert figures(run / "evaluation" / "best_val")["val/miou"] != written["val/miou"]


def test_split_without_labels_gives_files_and_no_figures(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("protocol=cityscapes", "submission=true", "split=test", f"output_dir={tmp_path}")
    assert call(main, f"checkpoint={trained['cityscapes']}", *options, *CPU) == 0
    assert "test split: 1 images without labels" in capsys.readouterr().out
    assert figures(tmp_path) == {}
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == 1
    assert len(list((tmp_path / "submission").iterdir())) == 1


@pytest.mark.parametrize(
    "option",
    [
        "trainer.limit_val_batches=1",
        "trainer.limit_val_batches=0",
        "+trainer.fast_dev_run=true",
        "+trainer.overfit_batches=1",
    ],
)
def test_partial_evaluation_is_no_evaluation(checkpoint: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert call(main, f"checkpoint={checkpoint}", option, *CPU) == 1
    message = one_line(capsys.readouterr().err)
    assert f"{option.lstrip('+').partition('=')[0]} would leave images of split val out" in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "checkpoint must be given"),
        (("checkpoint=classes.ckpt",), "classes.ckpt was trained with the 5 classes background, disc"),
        (("checkpoint=run/checkpoints/best.ckpt", "protocol=pascal"), "protocol must be one of native, voc"),
        (("checkpoint=run/checkpoints/best.ckpt", "protocol=cityscapes"), "19 classes, but the data set has 6"),
        (("checkpoint=run/checkpoints/best.ckpt", "submission=true"), "protocol=voc or protocol=cityscapes"),
        (("checkpoint=run/checkpoints/best.ckpt", "inference.scales=[0]"), "inference.scales must be a list"),
        (("checkpoint=run/checkpoints/best.ckpt", "inference.scales=2"), "inference.scales must be a list"),
        (
            ("checkpoint=run/checkpoints/best.ckpt", "inference.window=64"),
            "inference.window and inference.stride must be",
        ),
        (("checkpoint=run/checkpoints/best.ckpt", "inference.stride=[8,8]"), "inference.stride needs"),
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
    state = torch.load(checkpoint, weights_only=True)
    del state["segdcn"]["class_names"][-1]
    torch.save(state, "classes.ckpt")
    before = sorted(Path().rglob("*"))
    assert call(main, *arguments) == 1
    assert part in one_line(capsys.readouterr().err)
    assert sorted(Path().rglob("*")) == before
