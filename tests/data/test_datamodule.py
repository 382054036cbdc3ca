"""Batches: the same for any number of workers, resumed exactly, and each evaluation image counted once."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from segdcn.data.batches import EvaluationOrder, TrainBatches
from segdcn.data.datamodule import SegmentationDataModule
from segdcn.data.dataset import DataError, ImageMaskFiles, ImageMaskPair, Sample, read_image

SIZES = {"train": 10, "val": 5, "test": 3}


class Noise:
    """Ten training images, five for validation, three for test, 40x56 pixels of noise."""

    class_names = ("a", "b", "c")
    palette = ((0, 0, 0), (1, 1, 1), (2, 2, 2))

    def split(self, name: str) -> Sequence[Sample]:
        rng = np.random.default_rng(len(name))
        return [
            Sample(
                rng.integers(0, 256, (40, 56, 3), dtype=np.uint8),
                rng.integers(0, 3, (40, 56), dtype=np.uint8),
                f"{name}{index}",
            )
            for index in range(SIZES[name])
        ]


def module(**settings: Any) -> SegmentationDataModule:
    defaults = {"batch_size": 3, "crop_size": (32, 40), "photometric": 0.3, "num_workers": 0, "seed": 5}
    return SegmentationDataModule(Noise(), **(defaults | settings))


# The order


@settings(max_examples=30)
@given(size=st.integers(1, 40), batch=st.integers(1, 6), world=st.integers(1, 4), epoch=st.integers(0, 3))
def test_processes_share_out_one_permutation(size: int, batch: int, world: int, epoch: int) -> None:
    if size < batch * world:
        with pytest.raises(ValueError, match=f"holds {size} images"):
            TrainBatches(size, batch, 0, 0, world)
        return
    steps = size // (batch * world)
    ranks = [list(TrainBatches(size, batch, 9, rank, world, position=lambda: epoch * steps)) for rank in range(world)]
    assert all(len(batches) == steps and all(len(b) == batch for b in batches) for batches in ranks)
    keys = [key for batches in ranks for b in batches for key in b]
    assert {e for e, _ in keys} == {epoch}
    indices = [index for _, index in keys]
    assert len(set(indices)) == len(indices) == steps * batch * world
    assert set(indices) <= set(range(size))
    # A global batch holds the same images whatever the number of processes.
    single = list(TrainBatches(size, batch * world, 9, position=lambda: epoch * steps))
    for step in range(steps):
        assert {key for batches in ranks for key in batches[step]} == set(single[step])


@settings(max_examples=30)
@given(size=st.integers(4, 30), batch=st.integers(1, 4), start=st.integers(0, 50))
def test_order_continues_at_any_position(size: int, batch: int, start: int) -> None:
    steps = size // batch
    order: list[list[tuple[int, int]]] = []
    from_the_start = TrainBatches(size, batch, 1, position=lambda: len(order))
    while len(order) < start + steps:
        order += from_the_start
    resumed = TrainBatches(size, batch, 1, position=lambda: start)
    assert list(resumed) == order[start : start + steps]
    assert len(resumed) == steps


def test_epochs_and_seeds_have_their_own_order() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [i for b in TrainBatches(50, 5, seed, position=lambda: 10 * epoch) for _, i in b]

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert len({tuple(o) for o in orders}) == 9


@settings(max_examples=30)
@given(size=st.integers(1, 30), world=st.integers(1, 8))
def test_evaluation_counts_each_image_once(size: int, world: int) -> None:
    ranks = [list(EvaluationOrder(size, rank, world)) for rank in range(world)]
    assert len({len(items) for items in ranks} | {len(EvaluationOrder(size, 0, world))}) == 1
    counted = [index for items in ranks for index, padding in items if not padding]
    assert sorted(counted) == list(range(size))
    assert all(0 <= index < size for items in ranks for index, _ in items)


# The batches


def test_batches_are_the_same_with_any_number_of_workers() -> None:
    random_state = torch.get_rng_state()
    expected = list(module().train_dataloader())
    assert torch.equal(torch.get_rng_state(), random_state)  # iterating draws nothing from the run's own generator
    assert len(expected) == 3
    assert [set(batch) for batch in expected] == [{"image", "label", "name"}] * 3
    for batch in expected:
        assert batch["image"].shape == (3, 3, 32, 40)
        assert batch["image"].dtype == torch.float32
        assert batch["label"].shape == (3, 32, 40)
        assert batch["label"].dtype == torch.int64
        assert len(batch["name"]) == 3
        assert all(isinstance(name, str) for name in batch["name"])
    for workers in (1, 2):
        batches = list(module(num_workers=workers).train_dataloader())
        assert [batch["name"] for batch in batches] == [batch["name"] for batch in expected]
        for batch, other in zip(batches, expected, strict=True):
            assert torch.equal(batch["image"], other["image"])
            assert torch.equal(batch["label"], other["label"])


def test_validation_sees_all_images_whole_and_in_order() -> None:
    data = module(eval_batch_size=2)
    batches = list(data.val_dataloader())
    assert [len(batch["name"]) for batch in batches] == [2, 2, 1]
    assert [name for batch in batches for name in batch["name"]] == [f"val{i}" for i in range(5)]
    labels = torch.cat([batch["label"] for batch in batches]).numpy()
    np.testing.assert_array_equal(labels, [sample.label for sample in Noise().split("val")])
    assert [batch["name"] for batch in data.test_dataloader()] == [["test0", "test1"], ["test2"]]


def test_padding_of_distributed_evaluation_is_all_ignored() -> None:
    labels: dict[str, list[Tensor]] = {}
    for rank in range(3):
        data = module()
        data.trainer = type("Trainer", (), {"global_rank": rank, "world_size": 3})()
        for batch in data.val_dataloader():
            labels.setdefault(batch["name"][0], []).append(batch["label"])
            padding = bool((batch["label"] == 255).all())
            assert batch["index"].tolist() == [-1 if padding else int(batch["name"][0][3:])]
    assert sorted(labels) == [f"val{i}" for i in range(5)]
    counted = [[bool((label != 255).any()) for label in copies] for copies in labels.values()]
    assert all(sum(copies) == 1 for copies in counted)
    assert sum(len(copies) for copies in counted) == 6


def test_too_few_images_for_one_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="10 images, fewer than one batch of 11"):
        module(batch_size=11).train_dataloader()


class Mixed(Noise):
    def split(self, name: str) -> Sequence[Sample]:
        samples = super().split(name)
        return [
            samples[0]._replace(image=samples[0].image[:, :50], label=samples[0].label[:, :50]),
            *samples[1:],
        ]


def test_mixed_sizes_in_one_evaluation_batch_are_one_clear_line() -> None:
    data = SegmentationDataModule(Mixed(), 3, (32, 40), eval_batch_size=2, num_workers=0)
    with pytest.raises(DataError, match=r"^images of different size .*val0 40x50.*eval_batch_size=1$"):
        list(data.val_dataloader())


def test_mixed_sizes_are_evaluated_one_by_one() -> None:
    data = SegmentationDataModule(Mixed(), 3, (32, 40), num_workers=0)
    assert [batch["image"].shape[3] for batch in data.val_dataloader()] == [50, 56, 56, 56, 56]


def test_whole_images_are_trained_one_by_one() -> None:
    data = SegmentationDataModule(Mixed(), 1, None, scale=(1, 1), num_workers=0)
    batches = list(data.train_dataloader())
    assert {batch["name"][0]: batch["image"].shape[3] for batch in batches} == {
        f"train{index}": 56 if index else 50 for index in range(10)
    }
    with pytest.raises(ValueError, match=r"crop_size=null .*batch of 8: .*accumulate_grad_batches=8") as caught:
        SegmentationDataModule(Mixed(), 8, None)
    assert "\n" not in str(caught.value)


class Broken(Noise):
    def __init__(self, path: Path) -> None:
        self.path = path

    def split(self, name: str) -> Sequence[Sample]:
        return _BrokenSplit(self.path)


class _BrokenSplit(Sequence[Sample]):
    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        return Sample(read_image(self.path), np.zeros((40, 56), np.uint8), "broken")


# Training that stops and goes on


class Recorder(pl.LightningModule):
    """Learns next to nothing and remembers each batch; its schedule asks for the number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)
        self.seen: list[tuple[list[str], Tensor]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen.append((batch["name"], batch["image"].mean(dim=(1, 2, 3))))
        return torch.nn.functional.cross_entropy(self.layer(batch["image"]), batch["label"], ignore_index=255)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch["image"]).mean(), batch_size=len(batch["name"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.PolynomialLR(
            optimizer, int(self.trainer.estimated_stepping_batches), power=0.9
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class InterruptedRunError(Exception):
    pass


class Interrupt(Callback):
    """Ends the run as a crash does once it has made a number of steps."""

    def __init__(self, before_step: int) -> None:
        self.before_step = before_step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.before_step:
            raise InterruptedRunError


def fit(
    workers: int,
    length: dict[str, int],
    callbacks: Sequence[Callback] = (),
    validate: bool = True,
    ckpt_path: Path | None = None,
    data: SegmentationDataModule | None = None,
) -> Recorder:
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        limit_val_batches=None if validate else 0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **length,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(InterruptedRunError):
            trainer.fit(recorder, datamodule=data or module(num_workers=workers), ckpt_path=ckpt_path)
    return recorder


# Three batches an epoch. A checkpoint may be written after each batch, after the validation that ends an
# epoch, and after the epoch.
CHECKPOINTS = {
    "batch": {"every_n_train_steps": 1, "save_on_train_epoch_end": False},
    "validation": {"save_on_train_epoch_end": False},
    "epoch": {"save_on_train_epoch_end": True},
}


@pytest.mark.parametrize("length", [{"max_epochs": 4}, {"max_steps": 12}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("kind", "stop", "validate", "workers"),
    [
        ("batch", 1, True, 0),  # in the first epoch
        ("batch", 5, True, 2),  # in the middle of a later one
        ("batch", 6, True, 0),  # after the last batch of an epoch
        ("batch", 6, False, 0),
        ("validation", 7, True, 2),
        ("epoch", 3, True, 0),
        ("epoch", 8, False, 2),
    ],
)
def test_resumed_run_sees_exactly_the_remaining_samples(
    tmp_path: Path, kind: str, stop: int, validate: bool, workers: int, length: dict[str, int]
) -> None:
    whole = fit(0, length, validate=validate).seen
    assert len(whole) == 12
    saving = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False, **CHECKPOINTS[kind])
    stopped = fit(workers, length, [saving, Interrupt(stop)], validate).seen
    path = tmp_path / "last.ckpt"
    trained = torch.load(path, weights_only=True)["global_step"]
    assert trained == (stop if kind == "batch" else stop // 3 * 3)
    resumed = fit(workers, length, validate=validate, ckpt_path=path).seen
    assert trained + len(resumed) == 12
    for run, start in ((stopped, 0), (resumed, trained)):
        expected = whole[start : start + len(run)]
        assert [names for names, _ in run] == [names for names, _ in expected]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(run, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 5, 6])
def test_shortened_epochs_leave_out_no_image(tmp_path: Path, workers: int, stop: int) -> None:
    """The recipes count in steps: an "epoch" of fewer batches than the data holds, and the order goes on after it."""
    length = {"max_steps": 12, "max_epochs": -1, "limit_train_batches": 2, "check_val_every_n_epoch": 3}
    whole = fit(0, {"max_steps": 12}).seen
    shortened = fit(workers, length).seen
    assert [names for names, _ in shortened] == [names for names, _ in whole]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(shortened, whole, strict=True))
    saving = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False, **CHECKPOINTS["batch"])
    fit(workers, length, [saving, Interrupt(stop)])
    resumed = fit(workers, length, ckpt_path=tmp_path / "last.ckpt").seen
    assert [names for names, _ in resumed] == [names for names, _ in whole[stop:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_file_is_one_line_also_from_a_worker(tmp_path: Path, workers: int) -> None:
    (tmp_path / "broken.png").write_bytes(b"rubbish")
    data = SegmentationDataModule(Broken(tmp_path / "broken.png"), 2, (32, 40), num_workers=workers)
    with pytest.raises(DataError) as caught:
        fit(workers, {"max_epochs": 1}, data=data)
    assert str(caught.value).startswith(str(tmp_path / "broken.png"))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS and Windows cannot tell who sent a signal")
def test_loading_workers_end_when_their_run_asks_and_for_nobody_else() -> None:
    data = SegmentationDataModule(Noise(), 1, [32, 32], num_workers=1)
    batches = iter(data.train_dataloader())
    next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    for name in ("TERM", "USR1", "USR2"):
        subprocess.run(["kill", "-s", name, str(worker.pid)], check=True)  # by a process that is not its parent
    worker.join(timeout=0.5)
    assert worker.is_alive()
    assert len(list(batches)) == 9
    worker.terminate()
    worker.join(timeout=10)
    assert not worker.is_alive()


class Counted:
    """As many images as one likes, under the names of files or not."""

    class_names, palette, splits = ("a", "b"), ((0, 0, 0), (1, 1, 1)), ("train", "val")

    def __init__(self, **names: list[str]) -> None:
        self.names = names

    def split(self, name: str) -> ImageMaskFiles:
        return ImageMaskFiles([ImageMaskPair(Path(one), None, one) for one in self.names[name]], num_classes=2)


@pytest.mark.parametrize(
    ("train", "val", "told"),
    [
        (["a", "b"], ["c"], []),
        (["a", "b"], ["c", "d"], ["the val split has other images than when the run was saved (1 then, 2 now)"]),
        (["a", "b"], ["d"], ["the val split has other images than when the run was saved (1 then, 1 now)"]),
        (["a"], ["c"], ["the train split has other images than when the run was saved (2 then, 1 now)"]),
    ],
)
def test_a_resumed_run_says_that_its_images_are_others(train: list[str], val: list[str], told: list[str]) -> None:
    saved = SegmentationDataModule(Counted(train=["a", "b"], val=["c"]), 1, (32, 32)).state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SegmentationDataModule(Counted(train=train, val=val), 1, (32, 32)).load_state_dict(saved)
    assert [str(warning.message).partition(":")[0] for warning in caught] == told
