"""The recipe for real photographs, a few steps of it, on ten of them."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from running import call, compose, real_camvid

from segdcn.commands.evaluate import main
from segdcn.commands.train import train
from segdcn.data import CamVid
from segdcn.models.weights import MOBILENET_WHEEL


def ten_photographs(root: Path) -> Path:
    real = CamVid(real_camvid())
    for split, count in (("train", 7), ("val", 3)):
        pairs = real.split(split).pairs
        for pair in pairs[:: len(pairs) // count][:count]:
            for file in (pair.image, pair.mask):
                (root / file.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, root / file.parent.name)
    return root


def pretrained() -> str:
    try:
        metadata.distribution(MOBILENET_WHEEL)
    except metadata.PackageNotFoundError:
        return "null"
    return "imagenet"


@pytest.mark.slow
def test_recipe_trains_and_its_checkpoint_evaluates(tmp_path: Path) -> None:
    root = ten_photographs(tmp_path / "camvid")
    run = tmp_path / "run"
    miou = train(
        compose(
            "train",
            "experiment=camvid_cpu",
            f"dataset.root={root}",
            f"model.weights={pretrained()}",
            "datamodule.batch_size=2",
            "datamodule.num_workers=0",
            "trainer.accelerator=cpu",
            "trainer.max_epochs=1",
            "trainer.check_val_every_n_epoch=1",
            "callbacks.panels.images=1",
            f"output_dir={run}",
        )
    )
    assert {path.name for path in (run / "panels").iterdir()} == {"val_0.png", "val_0_sampling.png"}
    settings = ("trainer.accelerator=cpu", "datamodule.num_workers=0", "callbacks.panels=null")
    assert call(main, f"checkpoint={run}/checkpoints/best.ckpt", *settings) == 0
    evaluated = json.loads((run / "evaluation" / "best_val" / "metrics.json").read_text())
    assert evaluated["val/miou"] == miou
    assert 0 < miou < 1
    # roads are in all photographs, and void is no class
    assert evaluated["val/iou/road"] is not None
    assert "val/iou/void" not in evaluated
