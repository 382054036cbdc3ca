"""segdcn-report on run folders and sweeps: what the page holds, and what goes wrong in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FirstRun
from running import call, one_line

from segdcn.commands.report import main
from segdcn.data import Shapes
from segdcn.report import images, viewer
from segdcn.report.images import ImageOptions
from segdcn.report.pages import run_page
from segdcn.report.runs import read_finished
from segdcn.runs.checkpoint import Checkpoint
from segdcn.runs.files import file_hash, read_object
from segdcn.sweep.plan import Job, Sweep

Make = Callable[..., Path]


@pytest.fixture
def make_run(first_run: FirstRun, tmp_path: Path) -> Make:
    """A copy of the first run; of a plain network with ``plain``, as if it had been trained so."""

    def make(name: str, plain: bool = False) -> Path:
        folder = tmp_path / name
        ignored = shutil.ignore_patterns("tensorboard", "panels", "report.html")
        shutil.copytree(first_run.folder, folder, ignore=ignored)
        if plain:
            path = folder / "checkpoints" / "best.ckpt"
            checkpoint = torch.load(path, weights_only=True)
            for part in ("config", "groups"):
                checkpoint["segdcn"][part]["model"]["deform"]["layers"] = 0
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key: value for key, value in state.items() if ".offset." not in key}
            torch.save(checkpoint, path)
            config = (folder / "config.yaml").read_text()
            (folder / "config.yaml").write_text(config.replace("layers: 3", "layers: 0"))
        return folder

    return make


@pytest.fixture(autouse=True)
def few_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receptive fields are what takes time."""
    monkeypatch.setattr("segdcn.report.viewer.MAX_FIELDS", 6)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="viewer-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def open_shapes(checkpoint: Checkpoint) -> Shapes:
    return checkpoint.dataset()


def html(
    run: Path, open_dataset: Callable[[Checkpoint], Any] = open_shapes, budget: float = ImageOptions.budget
) -> str:
    """The page of a run."""
    return run_page(read_finished(run), ImageOptions(open_dataset, budget=budget)).html()


def test_training_writes_the_page_of_its_run(first_run: FirstRun) -> None:
    page = (first_run.folder / "report.html").read_text()
    figures = json.loads((first_run.folder / "metrics.json").read_text())
    for text in (f"{100 * figures['val/miou']:.2f}", "crescent", "Effective", "Where the kernels reach", "protocol"):
        assert text.lower() in page.lower()
    assert len(page) < 10e6
    assert not re.search(r"""(src|href)="(?!data:|#)|url\((?!#)|@import""", page)
    data = data_of(page)
    assert data["panes"] == [0, 1]
    learned, regular = data["images"][0]["networks"]
    assert [layer["taps"] is None for layer in learned["layers"]] == [False] * 3
    assert [layer["taps"] is None for layer in regular["layers"]] == [True] * 3
    assert learned["fields"]["pixels"][0] == data["images"][0]["start"]


def test_what_it_may_cost_limits_fields_and_studied_images(make_run: Make) -> None:
    page = html(make_run("run"), budget=1.0)
    assert "Measured on 4 of the 8 val images" in page
    assert data_of(page)["images"][0]["networks"][0]["fields"] is None


def test_command_writes_it_anew_and_elsewhere(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("run")
    assert call(main, str(run), "--output", str(run / "other.html")) == 0
    assert re.search(r"report in .*other\.html \(\d\.\d MB\)", capsys.readouterr().out)
    assert not (run / "report.html").exists()
    assert not list(run.glob("*.partial"))


def test_a_plain_network_has_one_pane_and_no_dilations(make_run: Make) -> None:
    page = html(make_run("plain", plain=True))
    assert data_of(page)["panes"] == [0]
    assert 'id="offsets"' not in page
    assert "points form the regular grid" in page


def test_without_data_the_page_has_figures_and_says_why(make_run: Make) -> None:
    def moved(checkpoint: Checkpoint) -> Any:
        raise FileNotFoundError("no images at /nowhere")

    page = html(make_run("run"), moved)
    assert "no images at /nowhere" in page
    assert "--data ROOT" in page
    assert 'id="viewer"' not in page
    assert 'id="confusion' in page or 'class="confusion' in page


def test_a_page_with_images_is_not_replaced_by_one_without(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("run")
    assert call(main, str(run)) == 0
    page = run / "report.html"
    before = page.read_text()
    (run / "checkpoints" / "best.ckpt").unlink()
    capsys.readouterr()
    assert call(main, str(run)) == 1
    assert re.search(r"^error: .*report.html has images .*best.ckpt.* --output FILE", capsys.readouterr().err)
    assert page.read_text() == before
    other = run / "other.html"
    other.write_bytes(b'\xff<title>of another run</title><section id="images">')  # and no UTF-8
    assert call(main, str(run), "--output", str(other)) == 0
    assert "<html" in other.read_text(encoding="utf-8")


def test_where_data_are_is_nothing_to_a_data_set_that_is_generated(make_run: Make) -> None:
    run = make_run("run")
    assert call(main, str(run), "--data", "/nowhere") == 0
    assert 'id="viewer"' in (run / "report.html").read_text()


def test_other_data_than_were_counted_are_not_shown(make_run: Make) -> None:
    page = html(make_run("run"), lambda _: Shapes(train_images=1, val_images=5))
    assert "the data at hand are not the 8 val images that were counted" in page


def test_a_run_without_counts_has_images_all_the_same(make_run: Make) -> None:
    run = make_run("run")
    (run / "counts.npz").unlink()
    page = html(run)
    assert "segdcn-evaluate checkpoint=" in page
    assert "Best, median" not in page
    assert len(data_of(page)["images"]) == images.VIEWER_IMAGES


def test_images_that_make_the_page_too_large_are_left_out(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("run")
    whole = data_of(html(run, budget=0))["images"]
    monkeypatch.setattr(viewer, "VIEWER_BYTES", len(json.dumps(whole[0])) + len(json.dumps(whole[1])) + 100)
    page = html(run, budget=0)
    assert len(data_of(page)["images"]) == 2
    assert f"{len(whole) - 2} more images would have made this file too large" in page


def test_a_study_of_this_checkpoint_is_taken_as_it_is(make_run: Make) -> None:
    run = make_run("run")
    cell = {"mean": 7.77, "std": 0.5, "cells": 3}
    layer = {
        "name": "backbone.named",
        "dilation": [1, 1],
        "outside": 0.5,
        "histogram": {"edges": [0.0, 1.0, 2.0], "counts": [3, 1]},
        "effective_dilation": dict.fromkeys(("small", "medium", "large", "background"), cell),
    }
    study = {"split": "val", "images": 99, "objects": {"thresholds": [3, 4]}, "layers": [layer]}
    file = run / "analysis" / "analysis.json"
    file.parent.mkdir()
    checkpoint = file_hash(run / "checkpoints" / "best.ckpt")
    file.write_text(json.dumps({**study, "checkpoint_sha256": checkpoint}))
    assert "7.77 ± 0.50" in html(run, budget=0)
    for change in ({"checkpoint_sha256": "another"}, {"split": "test"}):
        file.write_text(json.dumps({**study, "checkpoint_sha256": checkpoint, **change}))
        assert "7.77 ±" not in html(run, budget=0)


def test_two_runs_are_compared(make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make_run("plain", plain=True), make_run("deformable")
    assert call(main, str(first), str(second), "--output", str(tmp_path / "page.html")) == 0
    page = (tmp_path / "page.html").read_text()
    for text in ("shapes, deform.layers=0", "shapes, deform.layers=3", "+0.00 to +0.00", "Where they disagree most"):
        assert text in page
    plain, deformable = data_of(page)["images"][0]["networks"]
    assert [layer["taps"] is None for layer in plain["layers"]] == [True] * 3
    assert [layer["taps"] is None for layer in deformable["layers"]] == [False] * 3


def test_a_sweep_is_compared_by_seed(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[Path] = []

    def read(path: Path, remedy: str) -> dict[str, Any]:
        opened.append(path)
        return read_object(path, remedy)

    monkeypatch.setattr("segdcn.runs.record.read_object", read)
    jobs = []
    for layers in (0, 3):
        for seed in (0, 1):
            run = make_run(f"sweep/layers{layers}_{seed}", plain=layers == 0)
            figures = json.loads((run / "metrics.json").read_text())
            figures["val/miou"], figures["val/iou/disc"] = 0.1 + 0.01 * seed + 0.02 * layers, 0.2 + 0.1 * layers
            (run / "metrics.json").write_text(json.dumps(figures))
            jobs.append(Job(run.name, (f"model.deform.layers={layers}", f"seed={seed}")))
    sweep = tmp_path / "sweep"
    Sweep(
        sweep, "sweep", "segdcn-train -m", None, "val/miou", (*jobs, Job("unborn", ("model.deform.layers=1",)))
    ).write()
    assert call(main, str(sweep)) == 0
    page = (sweep / "report.html").read_text()
    assert "+6.00" in page  # paired by seed: the same for both, so that it has no interval
    assert "+30.00" in page  # of the discs
    assert "0 of 1" in page
    assert "deform.layers=3, seed 0" in page
    assert len(opened) == len(set(opened)) == 2 * 4  # metrics and environment of each run, once
    assert call(main, str(sweep), str(sweep / "layers0_0")) == 1
    assert "is a sweep: give it alone" in one_line(capsys.readouterr().err)


def test_errors_are_one_line(make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, str(tmp_path / "nothing")) == 1
    assert "no run folder at" in one_line(capsys.readouterr().err)
    run, other = make_run("run"), make_run("other")
    assert call(main, str(run), "--output", str(tmp_path)) == 1
    assert f"--output {tmp_path} is a folder: give a file, such as {tmp_path}/report.html" in one_line(
        capsys.readouterr().err
    )
    figures = json.loads((other / "metrics.json").read_text())
    del figures["val/iou/disc"]
    (other / "metrics.json").write_text(json.dumps(figures))
    assert call(main, str(run), str(other)) == 1
    assert "cannot be compared: their classes differ" in one_line(capsys.readouterr().err)
    (run / "metrics.json").write_text("{")
    assert call(main, str(run)) == 1
    one_line(capsys.readouterr().err)


def test_offsets_that_cannot_be_studied_leave_the_rest_of_the_page(make_run: Make) -> None:
    run = make_run("run")
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for key, value in checkpoint["state_dict"].items():
        if key.endswith("layer4.0.conv2.offset.bias"):
            value.fill_(torch.nan)
    torch.save(checkpoint, path)
    page = html(run)
    assert "Without dilations: the offsets of layer backbone.layer4.0.conv2 are not finite" in page
    assert 'id="images"' in page
    assert 'id="offsets"' not in page


def test_figures_that_do_not_exist_are_dashes(make_run: Make) -> None:
    run = make_run("run")
    figures = json.loads((run / "metrics.json").read_text())
    empty = {key: None if key.startswith("val/") else value for key, value in figures.items()}
    (run / "metrics.json").write_text(json.dumps(empty))
    (run / "counts.npz").unlink()
    (run / "metrics.csv").unlink()
    page = html(run, budget=0)
    assert "<b>–</b>" in page
    assert 'id="training"' not in page
