"""A picture, a table or a page that cannot be made never costs the figures, and says how to make it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from running import BARE, SMALL, call, make_camvid, process

from segdcn.commands import evaluate, train
from segdcn.commands import figures as figures_module
from segdcn.report.page import Page
from segdcn.training import task as task_module

FOLDER = (
    "dataset=folder",
    "model=tiny",
    "datamodule.crop_size=[64,64]",
    "datamodule.num_workers=0",
    "datamodule.batch_size=4",
    "model.head=aspp",
    "model.head_channels=16",
    "model.output_stride=16",
    "callbacks.panels.images=2",
)


def broken(*arguments: Any, **options: Any) -> Any:
    raise ZeroDivisionError("no picture\ntoday")


def warnings_of(text: str) -> list[str]:
    lines = text.splitlines()
    assert all(line.startswith("warning: ") for line in lines), text
    return lines


def make_folder_dataset(root: Path, masks: dict[str, int | None]) -> Path:
    """A bright square on dark noise; ``masks`` says of each image how many of its rows are labelled (None: all)."""
    for split in ("train", "val"):
        for number, (name, rows) in enumerate(masks.items()):
            rng = np.random.default_rng(number)
            image = rng.integers(0, 90, (64, 64, 3), np.uint8)
            image[16:48, 16:48] += 150
            label = np.zeros((64, 64), np.uint8)
            label[16:48, 16:48] = 1
            if rows is not None and split == "val":
                label[rows:] = 255
            for folder, array in (("images", image), ("masks", label)):
                (root / split / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / split / folder / f"{name}.png")
    return root


def test_figures_are_written_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there: list[bool] = []

    def look(*arguments: Any, **options: Any) -> Any:
        there.append((tmp_path / "metrics.json").is_file() and (tmp_path / "counts.npz").is_file())
        broken()

    monkeypatch.setattr(task_module, "comparison_panel", look)
    monkeypatch.setattr(figures_module, "_table", look)
    monkeypatch.setattr(Page, "html", look)
    settings = ("logger=none", "trainer.max_epochs=1", "callbacks.panels.images=2", f"output_dir={tmp_path}")
    assert call(train.main, *SMALL, *settings) == 0
    assert there == [True] * 4
    assert json.loads((tmp_path / "metrics.json").read_text())["val/miou"] is not None
    shown = capsys.readouterr()
    assert warnings_of(shown.err) == [
        "warning: no panel val_0.png: no picture today; segdcn-evaluate draws it again",
        "warning: no panel val_1.png: no picture today; segdcn-evaluate draws it again",
        f"warning: no table: no picture today; the figures are in {tmp_path}/metrics.json",
        f"warning: no report: no picture today; segdcn-report {tmp_path} tries again",
    ]
    monkeypatch.undo()
    assert call(evaluate.main, f"checkpoint={tmp_path}/checkpoints/best.ckpt", "trainer.accelerator=cpu") == 0
    assert (tmp_path / "evaluation" / "best_val" / "panels" / "val_0_sampling.png").is_file()


@pytest.mark.parametrize(
    "rows", [pytest.param((0, None, None), id="one"), pytest.param((0, 0, 0), id="all", marks=pytest.mark.slow)]
)
def test_images_without_a_labelled_pixel_have_pictures_and_no_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: tuple[int | None, ...]
) -> None:
    root = make_folder_dataset(tmp_path / "data", {f"im{n}": value for n, value in enumerate((*rows, *rows))})
    run = tmp_path / "run"
    command = (
        f"dataset.root={root}",
        "dataset.class_names=[ground,mark]",
        "trainer.max_steps=1",
        f"output_dir={run}",
    )
    assert call(train.main, *FOLDER, *command, "trainer.accelerator=cpu") == 0
    shown = capsys.readouterr()
    assert "warning: no" not in shown.err
    found = json.loads((run / "metrics.json").read_text())
    assert ("val/miou" in found) == (rows == (0, None, None))
    names = {path.name for path in (run / "panels").iterdir()}
    assert {"val_0.png", "val_0_sampling.png"} <= names
    assert (run / "report.html").is_file()
    assert call(evaluate.main, f"checkpoint={run}/checkpoints/best.ckpt", "trainer.accelerator=cpu") == 0


NAMES = ("road [/old] paved, <blink>", "道路 Straße $x_1$")


def test_class_names_are_shown_as_they_were_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder_dataset(tmp_path / "data", dict.fromkeys("abcd"))
    typed = json.dumps(NAMES, ensure_ascii=False)
    command = (f"dataset.root={root}", f"dataset.class_names={typed}", "trainer.max_steps=1", "trainer.accelerator=cpu")
    assert call(train.main, *FOLDER, *command, f"output_dir={tmp_path / 'run'}") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all(f"val/iou/{name}" in found for name in NAMES)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "road [/old] paved, &lt;blink&gt;" in page
    assert "<blink>" not in page


def test_class_names_that_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder_dataset(tmp_path / "data", dict.fromkeys("abcd"))
    command = (f"dataset.root={root}", "dataset.class_names=[0,1]", "trainer.max_steps=1", "trainer.accelerator=cpu")
    assert call(train.main, *FOLDER, *command, f"output_dir={tmp_path / 'run'}") == 0
    assert "warning" not in capsys.readouterr().err
    assert {"val/iou/0", "val/iou/1"} <= json.loads((tmp_path / "run" / "metrics.json").read_text()).keys()
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["segdcn"]["class_names"] == ["0", "1"]


@pytest.mark.slow
def test_an_output_that_knows_few_letters_ends_nothing(tmp_path: Path) -> None:
    """As a batch system's log, or a file on Windows."""
    root = make_folder_dataset(tmp_path / "data", dict.fromkeys("abcd"))
    command = ("-m", "segdcn.commands.train", *FOLDER, f"dataset.root={root}", 'dataset.class_names=["Straße","道路"]')
    ended = process(tmp_path, *command, "trainer.max_steps=1", "output_dir=run", PYTHONIOENCODING="cp1252")
    assert ended.returncode == 0, ended.stderr
    assert all("no font on this machine" in line for line in warnings_of(ended.stderr))  # or nothing
    assert "\\u9053\\u8def" in ended.stdout
    assert "Straße" in ended.stdout
    assert (tmp_path / "run" / "report.html").is_file()


def test_an_evaluation_of_a_split_without_labels_writes_its_submission(tmp_path: Path) -> None:
    root = make_camvid(tmp_path / "camvid")
    settings = [setting for setting in BARE if not setting.startswith("dataset.")]
    run = tmp_path / "run"
    for label in (root / "valannot").iterdir():
        Image.fromarray(np.full((72, 96), 11, np.uint8)).save(label)  # void
    assert call(train.main, "dataset=camvid", f"dataset.root={root}", *settings, f"output_dir={run}") == 0
    evaluated = tmp_path / "evaluated"
    command = (f"checkpoint={run}/checkpoints/best.ckpt", "trainer.accelerator=cpu", f"output_dir={evaluated}")
    assert call(evaluate.main, *command) == 0
    found = json.loads((evaluated / "metrics.json").read_text())
    assert "val/miou" not in found
    assert found["images"] == 3
    assert (evaluated / "panels" / "val_0_sampling.png").is_file()
