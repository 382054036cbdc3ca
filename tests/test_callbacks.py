"""What a run reports about itself, and when it stops."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from runs import BARE, call, one_line
from torch import Tensor, nn
from torch.utils.data import DataLoader

from segdcn.callbacks import Checkpoint, EpochLines, MetricsFile, OffsetHealth
from segdcn.ops import DeformConv2d
from segdcn.task import SegmentationTask
from segdcn.train import main


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
        (f"{LAYER}.offset.bias", math.nan, 500, 4, (LAYER, "model.deform.lr_mult")),
        (f"{LAYER}.offset.bias", 1e4, 500, 4, (f"offsets of layer {LAYER}", "exploded", "model.deform.lr_mult")),
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


def at_epoch_end(epoch: int, **figures: float) -> Any:
    """As much of a trainer as the reporting callbacks look at."""
    return SimpleNamespace(
        is_global_zero=True,
        current_epoch=epoch,
        global_step=10 * (epoch + 1),
        max_epochs=3,
        callback_metrics={key.replace("_", "/"): torch.tensor(value) for key, value in figures.items()},
        check_val_every_n_epoch=1,
        optimizers=[SimpleNamespace(param_groups=[{"name": "head", "lr": 0.1}])],
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_epochs_that_are_run_again_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first, again = MetricsFile(path), MetricsFile(path)
    first.on_fit_start(at_epoch_end(0), None)  # type: ignore[arg-type]
    for epoch in range(3):
        first.on_train_epoch_end(at_epoch_end(epoch, train_loss=epoch), None)  # type: ignore[arg-type]
    again.on_fit_start(at_epoch_end(0), None)  # type: ignore[arg-type]
    # resumed from epoch 1's checkpoint; a figure that is new gets a column, one that is missing an empty cell
    again.on_train_epoch_end(at_epoch_end(1, train_loss=7.0, val_miou=0.25), None)  # type: ignore[arg-type]
    assert [(row["epoch"], row["train/loss"], row["val/miou"]) for row in rows(path)] == [
        ("0", "0", ""),
        ("1", "7", "0.25"),
    ]


def test_an_epoch_without_validation_does_not_repeat_older_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, lines = MetricsFile(tmp_path / "metrics.csv"), EpochLines()
    for epoch in range(4):
        trainer = at_epoch_end(epoch, train_loss=epoch, val_miou=0.5)
        trainer.check_val_every_n_epoch = 2
        file.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
        lines.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert [row["val/miou"] for row in rows(tmp_path / "metrics.csv")] == ["", "0.5", "", "0.5"]
    assert ["val/miou" in line for line in capsys.readouterr().out.splitlines()] == [False, True, False, True]


def test_figures_that_do_not_exist_are_empty_cells(tmp_path: Path) -> None:
    trainer = at_epoch_end(0, val_miou=math.nan, val_loss=1 / 3)
    # Lightning's monitor of the learning rate: a stale figure, which a resumed run would not have
    trainer.callback_metrics["lr-SGD/head"] = torch.tensor(0.2)
    MetricsFile(tmp_path / "metrics.csv").on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    (row,) = rows(tmp_path / "metrics.csv")
    assert row["val/miou"] == ""
    assert float(row["val/loss"]) == pytest.approx(1 / 3, rel=1e-5)
    assert {key: value for key, value in row.items() if key.startswith("lr")} == {"lr/head": "0.1"}


def test_epoch_lines_mark_each_new_best(capsys: pytest.CaptureFixture[str]) -> None:
    lines = EpochLines()
    for epoch, miou in enumerate((0.2, 0.1, 0.3)):
        lines.on_train_epoch_end(at_epoch_end(epoch, val_miou=miou), None)  # type: ignore[arg-type]
        if epoch == 0:  # also across a resume
            state, lines = lines.state_dict(), EpochLines()
            lines.load_state_dict(state)
    shown = capsys.readouterr().out.splitlines()
    assert [line.endswith("*") for line in shown] == [True, False, True]
    assert "epoch   2/3  step     20  val/miou 0.1000" in shown[1]
    assert not any("\x1b" in line for line in shown)


def test_checkpoint_remembers_the_best_score_in_a_moved_folder(tmp_path: Path) -> None:
    here, there = (Checkpoint(tmp_path / name, monitor="val/miou", mode="max") for name in ("here", "there"))
    here.best_model_score = here.kth_value = torch.tensor(0.8)
    there.load_state_dict(here.state_dict())
    assert there.best_model_score == 0.8
    assert there.kth_value == 0.8
    assert Path(str(there.dirpath)).name == "there"
