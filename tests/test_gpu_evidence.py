"""scripts/gpu_evidence.py: on a machine without a GPU all parts run tiny, the first ones with PyTorch alone."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import process

from segdcn.benchmarks import agreement
from segdcn.runs.files import write_json

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_evidence.py"

# A machine on which nothing but PyTorch, torchvision, Triton and what they need themselves is installed.
BARE = """
from importlib.machinery import PathFinder
ABSENT = set(
    "hydra omegaconf pytorch_lightning lightning_fabric torchmetrics albumentations cv2 scipy rich yaml safetensors"
    " timm matplotlib pytest hypothesis pyspng tensorboard onnx jinja2".split()
)
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *others: None if name.partition(".")[0] in ABSENT else find(name, *others)
"""


def evidence(folder: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """What the script finds in its reduced form."""
    ended = process(folder, str(SCRIPT), "--reduced", "--output", "found", *arguments, **environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads((folder / "found" / "evidence.json").read_text())


def test_the_first_parts_need_pytorch_alone_and_the_others_say_what_they_miss(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARE)
    found = evidence(tmp_path, "--minutes", "5", "--only", "operators", "trainings", PYTHONPATH=str(tmp_path))
    assert {"torch", "torchvision", "device", "git", "reduced"} <= found["conditions"].keys()
    assert "hydra, pytorch_lightning, torchmetrics, albumentations, cv2, rich" in found["trainings"]["left_out"]
    assert "error" not in found["operators"]
    row = found["operators"]["rows"][0]
    assert row["figures"].keys() >= {"conv2d", "torchvision", "gather"}
    assert row["differences"]["torchvision"] == 0
    assert 0 < row["differences"]["gather"] < 0.05
    tables = (tmp_path / "found" / "tables.md").read_text()
    assert "| gather / conv2d |" in tables
    assert "left_out: not installed here: hydra" in tables


def test_what_a_part_finds_before_it_fails_is_kept_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(SCRIPT))

    def failing(setting: Any) -> Iterator[dict[str, Any]]:
        yield {"run": "first", "seconds": 1.5}
        raise RuntimeError("no memory left\nand much advice")

    monkeypatch.setitem(script["PARTS"], "resume", script["PARTS"]["resume"]._replace(measure=failing))
    script["put"](tmp_path, "conditions", {"device": "mine"})
    options = Namespace(part="resume", seconds=60, output=tmp_path, reduced=True, without=None, camvid=None)
    with pytest.raises(SystemExit):
        script["measure"](options)
    found = json.loads((tmp_path / "evidence.json").read_text())
    assert found["resume"]["rows"] == [{"run": "first", "seconds": 1.5}]
    assert found["resume"]["error"] == "no memory left"
    tables = (tmp_path / "tables.md").read_text()
    assert tables.startswith("device mine\n\n## Killed and resumed\n")
    assert "| first | 1.5 |" in tables
    assert tables.endswith("error: no memory left\n")


def test_without_a_backend_it_is_not_even_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose kernels end the process would end the second try too."""
    script, tried = runpy.run_path(str(SCRIPT)), []
    monkeypatch.setattr(agreement, "deform_conv2d", lambda *_, backend, **__: tried.append(backend))
    script["put"](tmp_path, "conditions", {})
    monkeypatch.setitem(script["PARTS"], "right", script["PARTS"]["right"]._replace(measure=lambda setting: iter(())))
    options = Namespace(part="right", seconds=60, output=tmp_path, reduced=True, without="triton", camvid=None)
    script["measure"](options)
    assert tried == ["torchvision", "gather", "grid_sample"]
    assert "right, without triton" in json.loads((tmp_path / "evidence.json").read_text())


WAITING = """
import pathlib, signal, sys, time
ready, told = map(pathlib.Path, sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(told.touch()))
ready.touch()
time.sleep(60)
"""


def test_a_command_for_which_there_is_no_time_is_told_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, told = tmp_path / "ready", tmp_path / "told"

    def left(setting: Any) -> float:
        while not ready.exists():
            time.sleep(0.01)
        return 0.01

    kind = runpy.run_path(str(SCRIPT))["Setting"]
    monkeypatch.setattr(kind, "left", left)
    with pytest.raises(subprocess.TimeoutExpired):
        kind(torch.device("cpu"), True, {}, [], 0.0, tmp_path, None).command("-c", WAITING, str(ready), str(told))
    assert told.exists()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_the_largest_difference_and_can_be_written(tmp_path: Path, wrong: float) -> None:
    expected = {"output": torch.ones(2), "input": torch.ones(2), "weight": torch.ones(2)}
    found = expected | {"input": torch.tensor([1.0, wrong]), "weight": torch.tensor([1.0, 1.5])}
    name, difference = agreement.largest_difference(found, expected)
    assert name == "input"
    assert math.isnan(difference)
    write_json(tmp_path / "a.json", {"difference": difference})
    assert agreement.largest_difference({**found, "input": torch.ones(2)}, expected) == ("weight", 0.5)


@pytest.mark.slow
def test_all_parts_run(tmp_path: Path) -> None:
    found = evidence(tmp_path, "--minutes", "10")
    errors = {name: part["error"] for name, part in found.items() if "error" in part}
    assert errors == {}
    right = [row for row in found["right"]["rows"] if "right" in row]
    assert len(right) > 20
    assert all(row["right"] for row in right)
    assert {row["compiled"] for row in found["steps"]["rows"]} == {False, True}
    assert found["trainings"]["rows"][0]["val/miou"] > 0
    undisturbed, pixels, resumed = found["resume"]["rows"]
    assert resumed["val/miou of each epoch"] == undisturbed["val/miou of each epoch"]
    assert pixels["pixels"].startswith("0 of ")
    assert len(found["one_of_several"]["rows"]) == 3


def test_evidence_of_another_run_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evidence.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--reduced", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds the evidence of another run: give --output another folder"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (tmp_path / "evidence.json").read_text() == "{}"
