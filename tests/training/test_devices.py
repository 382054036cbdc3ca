"""A run is the same experiment on every machine: one device unless asked, and a device that can do all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pytorch_lightning.accelerators import MPSAccelerator
from running import BARE, call, compose, one_line

from segdcn import UserError
from segdcn.commands.build import usable_accelerator
from segdcn.commands.train import main

RUN = (*BARE, "trainer.max_steps=1")


@pytest.mark.parametrize(
    "recipe", [(), ("experiment=camvid_cpu",), ("experiment=voc_deform3",), ("experiment=modern",)]
)
def test_a_recipe_takes_one_device_unless_asked(recipe: tuple[str, ...]) -> None:
    assert compose("train", *recipe).trainer.devices == 1
    assert compose("train", *recipe, "trainer=ddp").trainer.devices == "auto"


@pytest.mark.parametrize(
    ("recipe", "images"),
    [("voc_deform3", 8), ("cityscapes_atrous2", 8), ("voc_v3", 16), ("cityscapes_v3plus", 16)],
)
def test_a_recipe_makes_the_steps_of_its_protocol(recipe: str, images: int) -> None:
    config = compose("train", f"experiment={recipe}")
    made = config.datamodule.batch_size * config.trainer.devices * config.trainer.accumulate_grad_batches
    assert config.images_per_step == made == images


@pytest.mark.parametrize(("meant", "says_so"), [(32, True), (16, False), ("null", False)])
def test_another_number_of_images_per_step_is_said_in_the_first_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], meant: object, says_so: bool
) -> None:
    settings = ("trainer.accumulate_grad_batches=2", f"images_per_step={meant}", f"output_dir={tmp_path}")
    assert call(main, *RUN, *settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "batch    8 images x 2 accumulated = 16 per step, learning rate 0.003 (offsets x 0.1)" in lines
    notes = [line for line in lines if "images per step" in line and line.startswith("note ")]
    assert notes == (
        [
            "note     the recipe's protocol has 32 images per step, this run 16: trainer.devices x"
            " datamodule.batch_size x trainer.accumulate_grad_batches"
        ]
        if says_so
        else []
    )
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["images_per_step"] == 16
    assert found["images_per_step_of_recipe"] == (None if meant == "null" else meant)


@pytest.fixture
def apples_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with Apple silicon, whose GPU Lightning would take by itself."""
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))


def test_on_apple_silicon_a_run_takes_the_cpu_and_says_why(
    apples_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [setting for setting in RUN if not setting.startswith("trainer.accelerator")]
    assert call(main, *settings, f"output_dir={tmp_path}") == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "device   CPU: Apple's GPU lacks float64 and the backward of deformable convolution"
    )
    assert json.loads((tmp_path / "environment.json").read_text())["devices"] == 0


@pytest.mark.parametrize("name", ["mps", "gpu"])
def test_apples_gpu_is_refused_before_anything_is_written(
    apples_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert call(main, *RUN, f"trainer.accelerator={name}", f"output_dir={tmp_path / 'run'}") == 1
    message = one_line(capsys.readouterr().err)
    assert f"trainer.accelerator={name} cannot be used" in message
    assert "trainer.accelerator=cpu works" in message
    assert not (tmp_path / "run").exists()


def test_where_there_is_no_such_gpu_nothing_is_chosen() -> None:
    if MPSAccelerator.is_available():
        pytest.skip("this machine has one")
    assert [usable_accelerator(name) for name in ("auto", "cpu", "gpu")] == ["auto", "cpu", "gpu"]


def test_the_cpu_can_always_be_asked_for(apples_gpu: None) -> None:
    assert usable_accelerator("cpu") == "cpu"
    with pytest.raises(UserError, match="lacks float64"):
        usable_accelerator("mps")
