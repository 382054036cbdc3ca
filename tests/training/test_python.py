"""Training, prediction and analysis from a user's own script, without Hydra: docs/python.md, and what it promises."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from running import call, one_line
from torch import nn

import segdcn
from segdcn import SegmentationDataModule, SegmentationTask
from segdcn.analysis.offset_study import study_split
from segdcn.commands import evaluate, predict, train
from segdcn.data import ImageFolder
from segdcn.models import Deform, build_deeplab, make_deformable
from segdcn.training import Checkpoint, MetricsFile, OffsetHealth, StopOnSignal

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def make_photos(root: Path, images: int = 4) -> ImageFolder:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for number in range(images):
            image, mask = rng.integers(0, 255, (70, 80, 3), np.uint8), np.zeros((70, 80), np.uint8)
            mask[20:50, 10 * number : 10 * number + 30] = 1
            image[mask == 1, 0] //= 4
            Image.fromarray(image).save(root / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")
    return ImageFolder(root, ["background", "cat"], palette=[[1, 2, 3], [200, 100, 0]])


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    run = tmp_path / "runs" / "mine"
    assert {"metrics.csv", "metrics.json", "counts.npz", "panels", "checkpoints"} == {p.name for p in run.iterdir()}
    assert len((run / "metrics.csv").read_text().splitlines()) == 3
    assert (run / "panels" / "val_0.png").is_file()
    assert (run / "panels" / "val_0_sampling.png").is_file()
    assert names["study"]["images"] == 8


def tiny(head: str = "paper", **options: Any) -> nn.Module:
    return build_deeplab(backbone="resnet_tiny", head=head, num_classes=2, weights=None, head_channels=8, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SegmentationTask]:
    """The folder of a training with other colours and mean than the defaults, and its task."""
    folder = tmp_path_factory.mktemp("python")
    dataset = make_photos(folder / "photos")
    data = SegmentationDataModule(dataset, 2, (64, 64), num_workers=0, mean=np.array((0.5, 0.4, 0.3)))
    network = tiny(head="v3plus", deform=Deform(layers=2, modulated=True))
    task = SegmentationTask(network, dataset.class_names)
    trainer(folder, Checkpoint(), OffsetHealth(), MetricsFile()).fit(task, datamodule=data)
    return folder, task


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{"max_epochs": 1, **options},
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def test_a_checkpoint_opens_without_the_network_it_was_built_from(trained: tuple[Path, SegmentationTask]) -> None:
    folder, task = trained
    predictor = segdcn.load(folder / "checkpoints" / "best.ckpt", device="cpu")
    assert predictor.class_names == ["background", "cat"]
    assert predictor.palette == [(1, 2, 3), (200, 100, 0)]
    assert predictor.transform.mean == (0.5, 0.4, 0.3)
    image = np.asarray(Image.open(folder / "photos" / "val" / "images" / "0.png"))
    with torch.inference_mode():
        logits = task.eval().network(predictor.batch(image))
    assert (predictor(image).labels == logits.argmax(dim=1)[0].numpy()).all()


def test_training_and_analysis_measure_offsets_alike(trained: tuple[Path, SegmentationTask]) -> None:
    folder, _ = trained
    predictor = segdcn.load(folder / "checkpoints" / "best.ckpt", device="cpu")
    dataset = ImageFolder(folder / "photos", ["background", "cat"])
    study = study_split(predictor, dataset, "val", dataset.split("val"), range(4))
    with (folder / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert len(study["layers"]) == 2
    for layer in study["layers"]:
        logged = {key: float(row[f"offset/{layer['name']}/{key}"]) for key in ("mean", "outside")}
        assert logged["mean"] > 0
        assert layer["length"]["mean"] == pytest.approx(logged["mean"], rel=1e-5)
        assert layer["outside"] == pytest.approx(logged["outside"], rel=1e-5)


def test_the_commands_predict_with_it_and_say_what_it_does_not_tell(
    trained: tuple[Path, SegmentationTask], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    checkpoint = f"checkpoint={folder / 'checkpoints' / 'best.ckpt'}"
    photos = folder / "photos" / "val" / "images"
    assert call(predict.main, checkpoint, f"input={photos}", f"output={tmp_path / 'predicted'}") == 0
    assert len(list((tmp_path / "predicted").glob("*_labels.png"))) == 4
    capsys.readouterr()
    assert call(evaluate.main, checkpoint, f"output_dir={tmp_path / 'evaluated'}") == 1
    assert "a training from Python and does not say how its dataset was built" in one_line(capsys.readouterr().err)
    assert call(train.main, f"resume={folder / 'checkpoints' / 'best.ckpt'}") == 1
    assert "trainer.fit(..., ckpt_path=PATH)" in one_line(capsys.readouterr().err)


class Small(nn.Module):
    """A network that segdcn has not built; torchvision's give a mapping like this."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.layers(image)}


@pytest.mark.parametrize("own", [True, False])
def test_of_another_network_it_asks_for_the_network(tmp_path: Path, own: bool) -> None:
    """Of one that segdcn has not built, and of one that was changed after it was."""
    dataset = make_photos(tmp_path / "photos")
    network = Small() if own else tiny(deform=Deform(layers=0))
    assert len(make_deformable(network, last=1)) == 1
    task = SegmentationTask(network, dataset.class_names)
    trainer(tmp_path, Checkpoint()).fit(task, datamodule=SegmentationDataModule(dataset, 2, (64, 64), num_workers=0))
    checkpoint = tmp_path / "checkpoints" / "best.ckpt"
    with pytest.raises(ValueError, match=r"segdcn\.load\(path, network=NETWORK\)") as refused:
        segdcn.load(checkpoint)
    assert "\n" not in str(refused.value)
    labels = segdcn.load(checkpoint, "cpu", network=network)(tmp_path / "photos" / "val" / "images" / "0.png").labels
    assert labels.shape == (70, 80)


def test_a_training_goes_on_where_a_signal_stopped_it(tmp_path: Path) -> None:
    """In a process of its own, which the signal ends."""
    make_photos(tmp_path / "photos")
    script = f"""
import os, signal, sys
import pytorch_lightning as pl
import test_python
from segdcn import SegmentationDataModule, SegmentationTask
from segdcn.training import Checkpoint, StopOnSignal

class Asked(pl.Callback):
    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

pl.seed_everything(0)
test_python.fit({str(tmp_path)!r}, Asked(), StopOnSignal())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, timeout=120, capture_output=True)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr.decode()
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    pl.seed_everything(0)
    resumed = fit(tmp_path, StopOnSignal(), ckpt_path=last)
    pl.seed_everything(0)
    whole = fit(tmp_path, StopOnSignal())
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def fit(folder: str | Path, *callbacks: pl.Callback, **options: Any) -> SegmentationTask:
    """Three epochs of two steps each."""
    dataset = ImageFolder(Path(folder, "photos"), ["background", "cat"])
    data = SegmentationDataModule(dataset, 2, (64, 64), num_workers=0)
    network = tiny(deform=Deform(layers=1))
    task = SegmentationTask(network, dataset.class_names)
    trainer(Path(folder), *callbacks, max_epochs=3, enable_checkpointing=False).fit(task, datamodule=data, **options)
    return task
