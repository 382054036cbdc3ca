"""What a run reports about itself, and when it stops."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from running import BARE, call, one_line
from torch import Tensor, nn
from torch.utils.data import DataLoader

from segdcn.commands.train import main
from segdcn.ops import DCNv3, DCNv4, DeformConv2d
from segdcn.training.checkpointing import Checkpoint
from segdcn.training.figures import MetricsFile
from segdcn.training.offset_health import OffsetHealth
from segdcn.training.progress import EpochLines
from segdcn.training.task import SegmentationTask


class OneLayer(pl.LightningModule):
    """Shows its network images and does nothing with what comes out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.network(batch)


def validate(network: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[OffsetHealth()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return dict(trainer.validate(OneLayer(network), DataLoader(batches, batch_size=None), verbose=False)[0])


@pytest.mark.parametrize("modulated", [False, True])
def test_offset_health_is_what_a_loop_over_all_samples_finds(modulated: bool) -> None:
    torch.manual_seed(0)
    kernel, stride, padding, dilation = (3, 2), (2, 1), (1, 0), (1, 2)
    layer = DeformConv2d(4, 2, kernel, stride, padding, dilation, offset_groups=2, modulated=modulated)
    nn.init.normal_(layer.offset.weight, std=0.3)
    nn.init.normal_(layer.offset.bias, std=1.0)
    batches = [torch.randn(n, 4, 9, 7) for n in (2, 1)]

    lengths, outside = [], []
    for batch in batches:
        offset = layer.offset(batch).detach().numpy()
        for n, group, i, j, row, col in np.ndindex(len(batch), 2, *kernel, *offset.shape[2:]):
            point = (group * 6 + i * 2 + j) * 2
            dy, dx = (float(offset[n, point + axis, row, col]) for axis in range(2))
            y = row * stride[0] - padding[0] + i * dilation[0] + dy
            x = col * stride[1] - padding[1] + j * dilation[1] + dx
            lengths.append(math.hypot(dy, dx))
            outside.append(not (-1 < y < 9 and -1 < x < 7))  # bilinear: the last pixel reaches one further
    figures = validate(nn.Sequential(nn.Identity(), layer), batches)
    assert figures.keys() == {"offset/1/mean", "offset/1/p95", "offset/1/outside"}
    assert figures["offset/1/mean"] == pytest.approx(np.mean(lengths), rel=1e-5)
    assert figures["offset/1/p95"] == pytest.approx(np.quantile(lengths, 0.95), rel=1e-5)
    assert figures["offset/1/outside"] == pytest.approx(np.mean(outside), rel=1e-5)
    assert 0 < np.mean(outside) < 1


def test_network_without_deformable_layers_has_no_offset_figures() -> None:
    assert validate(nn.Conv2d(4, 2, 3), [torch.randn(1, 4, 5, 7)]) == {}


@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
def test_aggregations_are_watched_but_those_without_a_centre(kind: type) -> None:
    x = torch.randn(1, 6, 7, 8)  # channels last
    assert set(validate(nn.Sequential(kind(8, group=2)), [x])) == {
        f"offset/0/{key}" for key in ("mean", "p95", "outside")
    }
    assert validate(nn.Sequential(kind(8, group=2, remove_center=True)), [x]) == {}


def damage(monkeypatch: pytest.MonkeyPatch, parameter: str, value: float) -> None:
    """Set a parameter of the network to one value before the seventh step, the third of its epoch."""
    original = SegmentationTask.on_train_batch_start

    def damaging(self: SegmentationTask, batch: Any, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        if self.trainer.global_step == 6:
            nn.init.constant_(self.network.get_parameter(parameter), value)

    monkeypatch.setattr(SegmentationTask, "on_train_batch_start", damaging)


LAYER = "backbone.layer4.0.conv2"


@pytest.mark.parametrize(
    ("parameter", "value", "save_every", "saved", "parts"),
    [
        (f"{LAYER}.weight", math.nan, 500, 4, ("the loss is nan", f"{LAYER} is the first layer", "optimizer.lr")),
        ("head.classifier.bias", math.inf, 500, 4, ("the loss is nan", "head.classifier is the first layer")),
        (f"{LAYER}.offset.bias", math.nan, 500, 4, (LAYER, "task.offset_lr_mult")),
        (f"{LAYER}.offset.bias", 1e4, 500, 4, (f"offsets of layer {LAYER}", "exploded", "task.offset_lr_mult")),
        # weights that are not finite never replace a checkpoint that is
        (f"{LAYER}.offset.bias", math.nan, 1, 6, ("weights are not finite", f"{LAYER}.offset is the first layer")),
    ],
)
def test_run_that_cannot_recover_stops_and_keeps_its_last_good_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    parameter: str,
    value: float,
    save_every: int,
    saved: int,
    parts: tuple[str, ...],
) -> None:
    damage(monkeypatch, parameter, value)
    every = f"callbacks.last_within_epoch.every_n_train_steps={save_every}"
    assert call(main, *BARE, every, f"output_dir={tmp_path}") == 1
    message = one_line(capsys.readouterr().err)
    for part in parts:
        assert part in message
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == saved
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["state_dict"].values())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0"]


class Scripted(pl.LightningModule):
    """Learns nothing and validates with the mIoU that is written down for each step."""

    def __init__(self, miou: dict[int, float]) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.miou = miou

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch).sum()
        self.log("train/loss", torch.tensor(float(self.trainer.global_step)), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/miou", torch.tensor(self.miou[self.trainer.global_step]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([{"params": self.layer.parameters(), "name": "head"}], lr=0.1)


def fit(folder: Path, miou: dict[int, float], resume: Path | None = None, **options: Any) -> None:
    """Two steps an epoch, with the callbacks that report."""
    data = DataLoader([torch.ones(1)] * 2, batch_size=None)
    last = Checkpoint(folder, "last", enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[EpochLines(), MetricsFile(folder / "metrics.csv"), last],
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(Scripted(miou), data, data, ckpt_path=resume)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_epoch_lines_mark_each_new_best_also_across_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    miou = {2: 0.2, 4: 0.1, 6: 0.3}
    fit(tmp_path, miou, max_epochs=1)
    fit(tmp_path, miou, tmp_path / "last.ckpt", max_epochs=3)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.endswith("*") for line in shown] == [True, False, True]
    assert "epoch   2/3  step      4  train/loss 2.5000  val/miou 0.1000" in shown[1]
    assert not any("\x1b" in line for line in shown)
    assert [row["val/miou"] for row in rows(tmp_path / "metrics.csv")] == ["0.2", "0.1", "0.3"]


def test_rows_of_epochs_that_are_run_again_are_replaced(tmp_path: Path) -> None:
    fit(tmp_path, {2: 0.1, 4: 0.2, 6: 0.3}, max_epochs=1)
    (tmp_path / "last.ckpt").rename(tmp_path / "first.ckpt")
    fit(tmp_path, {2: 0.1, 4: 0.2, 6: 0.3}, tmp_path / "first.ckpt", max_epochs=3)
    fit(tmp_path, {4: 0.9}, tmp_path / "first.ckpt", max_epochs=2)
    assert [(row["epoch"], row["val/miou"]) for row in rows(tmp_path / "metrics.csv")] == [("0", "0.1"), ("1", "0.9")]


def test_an_epoch_without_validation_does_not_repeat_older_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, {4: 0.5, 8: 0.5}, max_epochs=4, check_val_every_n_epoch=2)
    found = rows(tmp_path / "metrics.csv")
    assert [row["val/miou"] for row in found] == ["", "0.5", "", "0.5"]
    assert [row["train/loss"] for row in found] == ["0.5", "2.5", "4.5", "6.5"]
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["val/miou" in line for line in shown] == [False, True, False, True]


def test_figures_that_do_not_exist_are_empty_cells(tmp_path: Path) -> None:
    fit(tmp_path, {2: math.nan}, max_epochs=1)
    (row,) = rows(tmp_path / "metrics.csv")
    assert row["val/miou"] == ""
    assert {key: value for key, value in row.items() if key.startswith("lr")} == {"lr/head": "0.1"}


def test_checkpoint_remembers_the_best_score_in_a_moved_folder(tmp_path: Path) -> None:
    here, there = (Checkpoint(tmp_path / name, monitor="val/miou", mode="max") for name in ("here", "there"))
    here.best_model_score = here.kth_value = torch.tensor(0.8)
    there.load_state_dict(here.state_dict())
    assert there.best_model_score == 0.8
    assert there.kth_value == 0.8
    assert Path(str(there.dirpath)).name == "there"
