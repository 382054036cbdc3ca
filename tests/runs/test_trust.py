"""A checkpoint may come from anywhere: nothing that it names is called unless it is known, or asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FirstRun
from running import call, one_line

import segdcn
from segdcn import UserError
from segdcn.commands import analyze, evaluate, export, predict, train
from segdcn.commands import report as report
from segdcn.runs.checkpoint import check_targets, read_checkpoint

COMMANDS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "evaluate": (evaluate.main, ("checkpoint=run/checkpoints/best.ckpt", "trainer.accelerator=cpu")),
    "predict": (predict.main, ("checkpoint=run/checkpoints/best.ckpt", "input=photo.png", "output=out", "device=cpu")),
    "export": (export.main, ("checkpoint=run/checkpoints/best.ckpt", "format=torch")),
    "analyze": (analyze.main, ("checkpoint=run/checkpoints/best.ckpt", "images=0", "pictures=1", "repeats=1")),
    "train": (train.main, ("resume=run", "trainer.max_epochs=3")),
}
COPY = {"_target_": "shutil.copyfile", "src": "secret", "dst": "stolen"}


@pytest.fixture
def run(first_run: FirstRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run, a photograph and a file that nobody may copy, in the working folder."""
    import shutil

    from PIL import Image

    monkeypatch.chdir(tmp_path)
    shutil.copytree(first_run.folder, tmp_path / "run")
    (tmp_path / "secret").write_text("x")
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.png")
    return tmp_path / "run"


def poison(run: Path, group: str, settings: Any) -> None:
    """Let both checkpoints of a run name something else."""
    for path in (run / "checkpoints").iterdir():
        content = torch.load(path, weights_only=True)
        content["segdcn"]["config"][group] = settings
        if group in content["segdcn"]["groups"]:
            content["segdcn"]["groups"][group] = settings
        torch.save(content, path)


def nested(settings: Any) -> Any:
    """Where a walk through the outermost settings alone would not look."""
    return {"_target_": "segdcn.models.build_deeplab", "backbone": "resnet_tiny", "head": "paper", "deform": [settings]}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("group", "settings"),
    [("model", COPY), ("model", nested(COPY)), ("dataset", COPY), ("datamodule", {"mean": COPY}), ("loss", COPY)],
)
def test_no_command_calls_what_a_checkpoint_names(
    run: Path, capsys: pytest.CaptureFixture[str], command: str, group: str, settings: Any
) -> None:
    unused = {"dataset": ["predict"], "loss": ["predict", "export", "analyze"]}
    unused["datamodule"] = ["predict", "export", "analyze"]  # of which they take numbers
    poison(run, group, settings)
    main, arguments = COMMANDS[command]
    if command in unused.get(group, ()):
        call(main, *arguments)
        assert not Path("stolen").exists()
        return
    assert call(main, *arguments) == 1
    message = one_line(capsys.readouterr().err)
    assert "shutil.copyfile" in message
    assert "trust=true" in message
    assert not Path("stolen").exists()


WRITE = {
    "_target_": "segdcn.runs.files.write_text",  # which Hydra itself does not stop
    "path": {"_target_": "pathlib.Path", "_args_": ["stolen"]},
    "text": "x",
}


def as_text(settings: Any) -> str:
    """Settings as a resolver of OmegaConf makes them of a text."""
    if isinstance(settings, dict):
        return "{" + ",".join(f"{key}:{as_text(value)}" for key, value in settings.items()) + "}"
    return "[" + ",".join(map(as_text, settings)) + "]" if isinstance(settings, list) else str(settings)


@pytest.mark.parametrize("place", ["launcher", "callbacks", "text", "text within quotes", "default"])
def test_a_resumed_run_makes_no_target_of_a_text(run: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    evil = {"_target_": "segdcn.training.losses.SegmentationLoss", "x": WRITE}
    made = "${oc.create:" + as_text(evil) + "}"
    poison(
        run,
        *{
            "launcher": ("launcher", WRITE),
            "callbacks": ("callbacks", {"mine": WRITE}),
            "text": ("optimizer", made),
            "text within quotes": ("callbacks", {"mine": "\\" + made}),
            "default": ("optimizer", "${oc.select:nowhere," + made + "}"),
        }[place],
    )
    assert call(train.main, "resume=run", "trainer.max_epochs=3") == 1
    assert "trust=true" in one_line(capsys.readouterr().err)
    assert not Path("stolen").exists()


@pytest.mark.parametrize("group", ["callbacks", "optimizer", "trainer"])
def test_a_resumed_run_calls_no_callback_of_a_strangers(
    run: Path, capsys: pytest.CaptureFixture[str], group: str
) -> None:
    poison(run, group, {"mine": COPY} if group == "callbacks" else COPY)
    assert call(train.main, "resume=run", "trainer.max_epochs=3") == 1
    assert "shutil.copyfile" in one_line(capsys.readouterr().err)
    assert not Path("stolen").exists()


@pytest.mark.parametrize("group", ["model", "dataset"])
def test_a_report_without_trust_leaves_out_what_it_would_have_to_build(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    poison(run, group, COPY)
    monkeypatch.setattr(sys, "argv", ["segdcn-report", "run", "--output", "page.html"])
    report.main()
    assert capsys.readouterr().err == ""
    assert "shutil.copyfile" in Path("page.html").read_text()  # the note says why
    assert not Path("stolen").exists()


def test_with_trust_it_is_called(run: Path) -> None:
    poison(run, "dataset", COPY)
    call(evaluate.main, *COMMANDS["evaluate"][1], "trust=true")
    assert Path("stolen").read_text() == "x"


def test_a_data_set_that_is_given_anew_is_trusted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours.py").write_text("from segdcn.data import Shapes\nclass Ours(Shapes): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    poison(run, "dataset", {"_target_": "shutil.copyfile", "train_images": 4, "val_images": 8})
    command, arguments = COMMANDS["evaluate"]
    assert call(command, *arguments, "dataset._target_=ours.Ours", "callbacks.panels=null") == 0


def test_python_api(run: Path) -> None:
    poison(run, "model", COPY)
    with pytest.raises(UserError, match=r"shutil\.copyfile"):
        segdcn.load(run / "checkpoints" / "best.ckpt", device="cpu")
    network = torch.nn.Conv2d(3, 6, 1)
    with pytest.raises(UserError, match="does not fit its network"):
        segdcn.load(run / "checkpoints" / "best.ckpt", device="cpu", network=network)
    assert not Path("stolen").exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.hub.load",
        "torch.load",
        "torch.utils.cpp_extension.load",
        "torch.nn.modules.module.functools.partial",
        "torchvision.models._api.importlib.import_module",
        "torchvision.models.segmentation.deeplabv3.partial",
        "segdcn.training.figures.write_text",
        "segdcn.training.pictures.write_png",
        "segdcn.data.dataset.read_image",
        "segdcn.commands.predict.predict",
        "segdcn.runs.files.write_bytes",
        "pytorch_lightning.utilities.rank_zero.rank_zero_only",
        "pytorch_lightning.cli.LightningCLI",
        "no.such.thing",
        "segdcn",
        "",
    ],
)
def test_targets_that_may_do_anything(target: str) -> None:
    with pytest.raises(UserError, match="allow it with trust=true"):
        check_targets({"a": [{"_target_": target}]}, "model", Path("x.ckpt"))


@pytest.mark.parametrize(
    "target",
    [
        "segdcn.models.build_deeplab",
        "segdcn.models.Deform",
        "segdcn.data.Cityscapes",
        "segdcn.training.losses.SegmentationLoss",
        "segdcn.training.optim.poly",
        "segdcn.training.offset_health.OffsetHealth",
        "torch.nn.Conv2d",
        "torch.optim.AdamW",
        "torchvision.models.segmentation.lraspp_mobilenet_v3_large",
        "pytorch_lightning.Trainer",
        "pytorch_lightning.callbacks.EarlyStopping",
        "pytorch_lightning.loggers.TensorBoardLogger",
    ],
)
def test_targets_that_only_build_a_part_of_a_run(target: str) -> None:
    check_targets({"a": [{"_target_": target}]}, "model", Path("x.ckpt"))


class _Unsafe:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("executed", "w")


def test_a_pickle_with_code_is_refused_unexecuted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"segdcn": _Unsafe()}, "unsafe.ckpt")
    with pytest.raises(UserError, match=r"^unsafe\.ckpt cannot be read"):
        read_checkpoint(Path("unsafe.ckpt"))
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"state_dict": {}}, "is not a segdcn checkpoint"),
        ({"segdcn": 3}, "is not a segdcn checkpoint"),
        ({"segdcn": {"config": {}}, "state_dict": {}}, "another version of segdcn, as checkpoints of format 1"),
        ({"segdcn": {"format": 2, "config": {}}, "state_dict": {}}, "lacks a part of the description of its run"),
        ({"segdcn": {"format": torch.ones(2)}, "state_dict": {}}, "another version of segdcn"),
        ([1, 2], "is not a segdcn checkpoint"),
    ],
)
def test_something_else_is_refused(tmp_path: Path, content: Any, told: str) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=told) as error:
        read_checkpoint(tmp_path / "other.ckpt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [None, 3])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_of_another_layout_is_refused_by_every_command(
    run: Path, capsys: pytest.CaptureFixture[str], command: str, number: int | None
) -> None:
    for path in (run / "checkpoints").iterdir():
        content = torch.load(path, weights_only=True)
        assert content["segdcn"].pop("format") == 2
        content["segdcn"] |= {} if number is None else {"format": number}
        torch.save(content, path)
    before = sorted(run.rglob("*"))
    main, arguments = COMMANDS[command]
    assert call(main, *arguments) == 1
    message = one_line(capsys.readouterr().err)
    assert f"was written by another version of segdcn, as checkpoints of format {number or 1}" in message
    assert "use it with that version, or train again" in message
    assert [path for path in sorted(run.rglob("*")) if path.name not in ("error.txt", "run.lock")] == [
        path for path in before if path.name not in ("error.txt", "run.lock")
    ]
    with pytest.raises(UserError, match="another version of segdcn"):
        segdcn.load(run / "checkpoints" / "best.ckpt")
