"""Which recipe a command trains by, what it is called, and the recipe for a user's own images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from running import ONE_EPOCH, call, compose, one_line

from segdcn.commands import evaluate, predict, train
from segdcn.commands.configs import CONFIG_PATH, build_dataset
from segdcn.commands.recipes import run_name
from segdcn.commands.segmentation import settle
from segdcn.data import ImageFolder
from segdcn.data.crops import fitting_crop

QUICK = ("model.weights=null", "model.backbone=resnet_tiny", *ONE_EPOCH)


def composed(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    """What ``segdcn-train --cfg job`` shows."""
    assert call(train.main, "--cfg", "job", *overrides) == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def test_the_command_alone_is_the_recipe_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    alone = composed(capsys)
    assert alone == composed(capsys, "experiment=shapes") == composed(capsys, "dataset=shapes")
    assert alone["model"]["backbone"] == "resnet_tiny"


def test_a_flag_may_stand_behind_a_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(train.main, "dataset=voc", "dataset.root=x", "--cfg", "job") == 0
    assert "backbone: resnet50" in capsys.readouterr().out


def test_no_setting_of_the_toy_is_another_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    config = composed(capsys, "dataset=voc", "dataset.root=x")
    assert config == composed(capsys, "dataset=voc", "dataset.root=x", "experiment=none")
    assert (config["model"]["backbone"], config["model"]["weights"]) == ("resnet50", "imagenet")
    assert (config["datamodule"]["crop_size"], config["datamodule"]["scale"]) == ("auto", [0.5, 2.0])
    recipe = yaml.safe_load(Path(CONFIG_PATH, "experiment", "shapes.yaml").read_text())
    for group in ("datamodule", "optimizer", "trainer"):
        for key, value in recipe[group].items():
            assert config[group][key] != value, f"{group}.{key}"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ((), ("auto", "auto")),
        (("model=deeplabv3plus_resnet101",), ("resnet101", "v3plus")),
        (("model=paper_resnet101",), ("resnet101", "paper")),
    ],
)
def test_a_network_that_is_chosen_is_trained_by_the_recipe_for_own_images(
    capsys: pytest.CaptureFixture[str], model: tuple[str, ...], expected: tuple[str, str]
) -> None:
    config = composed(capsys, "experiment=finetune", "dataset.root=x", *model)
    assert (config["model"]["backbone"], config["model"]["head"]) == expected


@pytest.mark.parametrize(
    ("bfloat16", "accelerator", "settings", "precision"),
    [
        (True, "auto", (), "bf16-mixed"),
        (True, "cpu", (), "32-true"),
        (False, "auto", (), "32-true"),
        (True, "auto", ("trainer.precision=32-true",), "32-true"),
    ],
)
def test_own_images_are_learned_in_bfloat16_where_a_gpu_has_it(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    bfloat16: bool,
    accelerator: str,
    settings: tuple[str, ...],
    precision: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    root = make_folder(here / "mine")
    config = compose("train", "experiment=finetune", "dataset=folder", f"dataset.root={root}", *settings)
    config.trainer.accelerator = accelerator
    lines = settle(config, build_dataset(config))
    assert config.trainer.precision == precision
    assert any(line.startswith("mixed    bf16-mixed") for line in lines) == (precision == "bf16-mixed")


def test_the_papers_recipes_keep_their_precision() -> None:
    for recipe in ("paper", "modern", "voc_paper", "cityscapes_v3plus", "ade20k_upernet_internimage_t", "shapes"):
        assert compose("train", f"experiment={recipe}").trainer.precision == "32-true"


@pytest.mark.parametrize(
    ("recipe", "dataset", "overrides", "name"),
    [
        ("shapes", "shapes", [], "shapes"),
        ("none", "voc", ["dataset=voc", "experiment=none"], "voc"),
        ("voc_paper", "voc_aug", ["experiment=voc_paper"], "voc_paper"),
        ("voc_paper", "voc", ["experiment=voc_paper", "dataset=voc"], "voc_paper"),
        ("shapes_atrous2", "voc", ["experiment=shapes_atrous2", "dataset=voc"], "voc_shapes_atrous2"),
        ("finetune", "folder", ["experiment=finetune", "dataset=folder"], "folder_finetune"),
    ],
)
def test_a_run_is_called_after_what_it_is(recipe: str, dataset: str, overrides: list[str], name: str) -> None:
    assert run_name({"experiment": recipe, "dataset": dataset}, overrides) == name


def test_a_sweeps_file_cannot_bring_the_toys_recipe_to_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_conf" / "sweep").mkdir(parents=True)
    (tmp_path / "my_conf" / "sweep" / "mine.yaml").write_text("# @package _global_\ndefaults: [default]\n")
    assert call(train.main, "--config-dir", "my_conf", "sweep=mine", "dataset=folder", "dataset.root=x") == 1
    assert "experiment=none" in one_line(capsys.readouterr().err)


def make_folder(root: Path, classes: int = 3, white: bool = False) -> Path:
    """Images of 100x140 pixels in blocks of one colour a class."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (classes, 3), dtype=np.uint8)
    for split, count in (("train", 4), ("val", 2)):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for number in range(count):
            label = np.kron(rng.permutation(20).reshape(4, 5) % classes, np.ones((25, 28))).astype(np.uint8)
            Image.fromarray(colours[label]).save(root / split / "images" / f"{number}.jpg")
            mask = 255 * label if white else np.where(np.arange(140) < 3, 255, label).astype(np.uint8)
            Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_images_in_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the recipe to predictions where the masks are gone; what was found is kept."""
    make_folder(here / "mine")
    settings = [one for one in QUICK if not one.startswith("model.backbone")]
    assert call(train.main, "experiment=finetune", "dataset=folder", "dataset.root=mine", *settings) == 0
    said = capsys.readouterr().out
    assert "class_0 to class_2, since all 4 train masks hold 0..2 and 255; name them in mine/classes.txt" in said
    assert "crops    96x96 pixels" in said
    assert "light    mobilenet_v2 and the head fpn, since this is a CPU" in said
    assert "conf/experiment/finetune.yaml" in said
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert config["name"] == "folder_finetune"
    assert config["dataset"]["class_names"] == ["class_0", "class_1", "class_2"]
    assert config["datamodule"]["crop_size"] == [96, 96]
    chosen = [config["model"][key] for key in ("backbone", "head", "output_stride")]
    assert chosen == ["mobilenet_v2", "fpn", 32]

    # names that are written later change nothing of the run
    (here / "mine" / "classes.txt").write_text("sky\ntree\nroad\n")
    shutil.rmtree(here / "mine" / "train")
    checkpoint = "checkpoint=run/checkpoints/best.ckpt"
    assert call(evaluate.main, checkpoint, "trainer.accelerator=cpu", "datamodule.num_workers=0") == 0
    figures = json.loads((here / "run" / "evaluation" / "best_val" / "metrics.json").read_text())
    assert "val/iou/class_2" in figures
    images = here / "mine" / "val" / "images"
    images.rename(here / "photos")
    shutil.rmtree(here / "mine")
    assert call(predict.main, checkpoint, "input=photos", "output=out", "device=cpu") == 0
    assert len(list((here / "out").rglob("*.png"))) >= 2


def test_names_in_the_folder_are_the_classes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(here / "mine", classes=2)
    (here / "mine" / "classes.txt").write_text("ground\n\n  a car \n")
    assert call(train.main, "dataset=folder", "dataset.root=mine", "model=tiny", *QUICK, "datamodule.batch_size=2") == 0
    assert "classes  ground, a car, as mine/classes.txt names them" in capsys.readouterr().out
    assert "val/iou/a car" in json.loads((here / "run" / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("white", "names", "overrides", "words"),
    [
        (True, None, (), ("0 and 255 alone", "dataset.mapping={255:1}")),
        (False, "sky\ntree\n", ("dataset.class_names=[tree,sky]",), ("dataset.class_names has tree, sky", "sky, tree")),
        (False, "sky\n", (), ("classes.txt", "2 to 255 different names")),
        (False, "sky\nsky\n", (), ("classes.txt", "2 to 255 different names")),
    ],
)
def test_classes_that_cannot_be_told_are_one_line(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    white: bool,
    names: str | None,
    overrides: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    make_folder(here / "mine", classes=2, white=white)
    if names is not None:
        (here / "mine" / "classes.txt").write_text(names)
    assert call(train.main, "experiment=finetune", "dataset=folder", "dataset.root=mine", *QUICK, *overrides) == 1
    line = one_line(capsys.readouterr().err)
    assert all(word in line for word in words), line
    assert not (here / "run").exists()


def test_numbers_of_masks_are_looked_at_through_the_mapping(tmp_path: Path) -> None:
    root = make_folder(tmp_path, classes=2, white=True)
    assert ImageFolder(root, mapping={255: 1}).class_names == ("class_0", "class_1")
    assert ImageFolder(root, mapping={255: 6}).class_names == tuple(f"class_{number}" for number in range(7))


@pytest.mark.parametrize(("value", "match"), [(0, "hold 0, which are not"), (300, "hold 300, which are not")])
def test_masks_that_are_no_class_numbers_are_named(tmp_path: Path, value: int, match: str) -> None:
    root = make_folder(tmp_path)
    for path in (root / "train" / "masks").iterdir():
        Image.fromarray(np.full((100, 140), value, np.uint16)).save(path)
    with pytest.raises(ValueError, match=match):
        ImageFolder(root)


def test_crops_fit_the_images(tmp_path: Path) -> None:
    samples = ImageFolder(make_folder(tmp_path)).split("train")  # of 100x140
    assert fitting_crop(samples) == (96, 96)
    assert fitting_crop(samples, short_side=300) == (288, 288)
    assert fitting_crop(samples, short_side=300, long_side=210) == (128, 128)  # the longer side decides: 150x210
    assert fitting_crop(samples, short_side=2000) == (512, 512)
    assert fitting_crop([samples[0]._replace(label=samples[0].label[:20])]) == (32, 32)


def test_a_data_set_of_ones_own_is_a_file_of_its_own_keys(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a package header; and it does not get the toy's settings either."""
    make_folder(here / "mine")
    (here / "my_conf" / "dataset").mkdir(parents=True)
    text = "_target_: segdcn.data.ImageFolder\nroot: mine\nclass_names: [a, b, c]\n"
    (here / "my_conf" / "dataset" / "ponds.yaml").write_text(text)
    settings = ("--config-dir", "my_conf", "dataset=ponds", "model=tiny")
    assert call(train.main, *settings, *QUICK, "datamodule.batch_size=2") == 0
    assert "data     ImageFolder: 4 train, 2 val images, 3 classes" in capsys.readouterr().out
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert config["dataset"] == {"_target_": "segdcn.data.ImageFolder", "root": "mine", "class_names": ["a", "b", "c"]}
    assert (config["optimizer"]["_target_"], config["datamodule"]["scale"]) == ("torch.optim.SGD", [0.5, 2.0])


def test_no_callbacks_and_no_logger_are_options(here: Path) -> None:
    small = ("dataset.train_images=16", "dataset.val_images=2", "trainer.accelerator=cpu", "trainer.max_epochs=1")
    assert call(train.main, *small, "callbacks=none", "logger=none", "report=false", "output_dir=run") == 0
    names = {path.name for path in (here / "run").iterdir()}
    assert "metrics.json" in names
    assert not names & {"checkpoints", "metrics.csv", "panels", "tensorboard"}


def test_settings_of_a_callback_that_is_not_chosen_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("dataset.train_images=16", "dataset.val_images=2", "trainer.accelerator=cpu")
    assert call(train.main, *small, "+callbacks.ema.decay=0.9", "output_dir=run") == 1
    assert "callbacks.ema has settings (decay), but no _target_" in one_line(capsys.readouterr().err)


FILES = sorted(path.relative_to(CONFIG_PATH).as_posix() for path in Path(CONFIG_PATH).rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_headed_by_what_it_is_and_its_command(file: str) -> None:
    lines = Path(CONFIG_PATH, file).read_text().splitlines()
    heading = []
    for line in lines[lines[0] == "# @package _global_" :]:
        if not line.startswith("#"):
            break
        heading.append(line)
    assert heading[0].startswith("# ")
    assert not heading[0].startswith("#  ")
    assert any(line.startswith("#   segdcn-") for line in heading), heading
    if file.startswith(("model/", "experiment/")):
        assert any("Result: " in line for line in heading), heading
