"""How the tests run the commands: small settings, in this process where a process of its own is not the point."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from PIL import Image

from segdcn.commands.configs import CONFIG_PATH
from segdcn.commands.recipes import with_recipe

# Four steps an epoch, a crop that is not square, dropout in the head.
SMALL = (
    "dataset.train_images=32",
    "dataset.val_images=8",
    "dataset.test_images=8",
    "datamodule.batch_size=8",
    "datamodule.eval_batch_size=4",
    "datamodule.crop_size=[48,64]",
    "model=tiny",
    "model.head=aspp",
    "model.head_channels=16",
    "model.output_stride=16",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
)
BARE = (*SMALL, "logger=none", "callbacks.panels=null", "report=false")

# Of images of one's own, in the folder ``run``.
ONE_EPOCH = (
    "datamodule.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1",
    "callbacks.panels=null",
    "logger=none",
    "report=false",
    "output_dir=run",
)


def compose(config_name: str, *overrides: str) -> DictConfig:
    """The config that a command gets, for calling ``train`` or ``evaluate`` themselves."""
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return hydra.compose(config_name, with_recipe(list(overrides)) if config_name == "train" else list(overrides))


def call(main: Callable[[], Any], *arguments: str) -> int:
    """A console script's ``main`` in this process, with its command line; returns its exit status."""
    before = sys.argv
    sys.argv = ["segdcn", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    return 0


def clean_environment() -> dict[str, str]:
    """This process's, without what earlier tests left behind: a seed, what Lightning tells processes that it starts."""
    left_behind = ("PL_", "MASTER_", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "SEGDCN_DIE")
    return {key: value for key, value in os.environ.items() if not key.startswith(left_behind)}


def process(cwd: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a user types it, with as many threads as this process has."""
    environment = {**clean_environment(), "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, encoding=encoding, timeout=300
    )


def waiting(script: str, path: Path, word: str) -> subprocess.Popen[bytes]:
    """A process of a Python script that is given a path, once it has said a word; it runs on until it is killed."""
    started = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    assert started.stdout is not None
    assert started.stdout.readline() == f"{word}\n".encode()
    return started


def one_line(captured: str) -> str:
    """The single line of an error; fails on anything else."""
    assert captured.startswith("error: "), captured
    assert captured.count("\n") == 1, captured
    return captured.strip()


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Equal bit for bit: weights, statistics, the optimizer's state and the schedule's."""
    first, second = (torch.load(path, map_location="cpu", weights_only=True) for path in (one, other))
    assert first["global_step"] == second["global_step"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        _assert_equal(first[part], second[part], part)


def _assert_equal(one: Any, other: Any, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_equal(a, b, f"{where}.{number}")
    else:
        assert one == other, where


def timeless(folder: Path) -> dict[str, str]:
    """The lines of metrics.csv and metrics.json that no clock has a part in."""
    texts = {name: (folder / name).read_text() for name in ("metrics.csv", "metrics.json")}
    return {name: re.sub(r'.*"(training_seconds|seconds_per_image)".*\n', "", text) for name, text in texts.items()}


def assert_same_run(folder: Path, whole: Path) -> None:
    """Equal to the last bit, but for how long it took."""
    for name in ("last.ckpt", "best.ckpt"):
        assert_same_checkpoint(folder / "checkpoints" / name, whole / "checkpoints" / name)
    assert timeless(folder) == timeless(whole)


def make_camvid(root: Path, train: int = 8, val: int = 3, size: tuple[int, int] = (72, 96)) -> Path:
    """A miniature data set in CamVid's real layout: blocks of one colour per class, some void pixels."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (12, 3), dtype=np.uint8)
    for split, count in (("train", train), ("val", val)):
        lines = []
        for number in range(count):
            label = np.kron(rng.integers(0, 12, (3, 4)), np.ones((size[0] // 3, size[1] // 4))).astype(np.uint8)
            for folder, array in ((split, colours[label]), (f"{split}annot", label)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / folder / f"{number:04d}.png")
            lines.append(f"/SegNet/CamVid/{split}/{number:04d}.png /SegNet/CamVid/{split}annot/{number:04d}.png\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def real_camvid() -> Path:
    """The folder of the real data set; skips where it is not at hand."""
    return _real("camvid", "CamVid", "SEGDCN_CAMVID")


def real_bccd() -> Path:
    """The folder of the Blood Cell Count and Detection set; skips where it is not at hand."""
    return _real("bccd", "BCCD", "SEGDCN_BCCD")


def _real(folder: str, name: str, variable: str) -> Path:
    root = Path(os.environ.get(variable, Path(__file__).parents[2] / "shared" / "data" / folder))
    if not root.is_dir():
        pytest.skip(f"no {name}: set {variable} to its folder")
    return root
