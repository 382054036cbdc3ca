"""segdcn-train as a sweep, from the command line: what it plans, what it refuses, and that it survives its end."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from miniatures import make_cityscapes, make_sbd, make_voc
from PIL import Image
from running import BARE, call, make_camvid, one_line, process

from segdcn.commands import train
from segdcn.commands.configs import CONFIG_PATH
from segdcn.sweep.jobs import train_command
from segdcn.sweep.local import LocalLauncher
from segdcn.sweep.plan import Job, Sweep, read_sweep

NO_GRID = ("default", "shapes_optuna")  # of the second see test_search.py
SWEEPS = sorted(path.stem for path in (Path(CONFIG_PATH) / "sweep").glob("*.yaml") if path.stem not in NO_GRID)
JOBS = {"shapes_layers": 15, "shapes_atrous": 12, "modern_voc": 18, "modern_cityscapes": 18}
JOBS |= {"camvid_layers": 12, "camvid_layers_long": 12, "boxes_pooling": 35}
# epochs of one second, without what makes a run's folder large
TINY = tuple(setting for setting in BARE if not setting.startswith("trainer.max_epochs"))


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sweep]:
    """Run segdcn-train in an empty folder; what its launcher was asked to run."""
    asked: list[Sweep] = []

    def run(self: LocalLauncher, sweep: Sweep, jobs: tuple[Job, ...]) -> None:
        assert (sweep.folder / "sweep.json").is_file()
        asked.append(sweep)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LocalLauncher, "run", run)
    return asked


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "modern" in name else name for name in SWEEPS]
)
def test_every_sweep_is_planned_whole(planned: list[Sweep], name: str) -> None:
    data = []
    if name.endswith("voc"):
        sbd = make_sbd(Path("sbd"), make_voc(Path("data")))
        data = ["dataset.root=data", f"dataset.sbd_root={sbd}"]
    elif name.endswith("cityscapes"):
        make_cityscapes(Path("data"))
        data = ["dataset.root=data"]
    elif name.startswith("camvid"):
        make_camvid(Path("data"))
        data = ["dataset.root=data"]
    assert call(train.main, f"sweep={name}", *data) == 1  # no job of it has a figure
    (sweep,) = planned
    assert sweep == read_sweep(Path.cwd() / "sweeps" / name)
    assert len(sweep.jobs) == JOBS.get(name, 5)
    assert len({job.folder for job in sweep.jobs}) == len(sweep.jobs)
    assert all(job.epochs or job.steps for job in sweep.jobs)
    assert not any("dataset.root" in override for job in sweep.jobs for override in job.overrides)
    assert set(data) <= set(sweep.jobs[0].arguments)
    assert sweep.baseline_setting == sweep.jobs[0].setting


def test_a_users_own_sweep_is_planned_as_its_page_writes_it(planned: list[Sweep]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()
    (text,) = [block for block in re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S) if "MULTIRUN" in block]
    Path("my_conf", "sweep").mkdir(parents=True)
    Path("my_conf", "sweep", "rates.yaml").write_text(text)
    call(train.main, "--config-dir", "my_conf", "sweep=rates")
    (sweep,) = planned
    assert (sweep.folder.name, len(sweep.jobs)) == ("rates", 9)
    assert sweep.baseline_setting == ("optimizer.lr=0.003",)


def test_a_sweep_without_a_name_finds_its_folder_again(planned: list[Sweep]) -> None:
    for options in ((), ("launcher.retries=0",), ("datamodule.num_workers=3",)):
        call(train.main, "-m", "seed=0,1", "optimizer.lr=0.1", *options)
    call(train.main, "-m", "seed=0,1", "optimizer.lr=0.2")
    folders = [sweep.folder.name for sweep in planned]
    assert folders[0].startswith("shapes_")
    assert folders[0] == folders[1] == folders[2] != folders[3]
    assert [job.folder for job in planned[0].jobs] == [job.folder for job in planned[2].jobs]


def test_a_sweep_of_the_toys_recipe_on_other_data_is_refused(
    planned: list[Sweep], capsys: pytest.CaptureFixture[str]
) -> None:
    make_voc(Path("data"))
    assert call(train.main, "sweep=shapes_layers", "dataset=voc", "dataset.root=data") == 1
    assert "dataset=voc would be trained by the recipe shapes: add experiment=NAME" in capsys.readouterr().err
    assert not planned
    assert not Path("sweeps").exists()


def test_a_sweep_may_grow_by_seeds(planned: list[Sweep]) -> None:
    call(train.main, "-m", "sweep.name=mine", "seed=0,1")
    call(train.main, "-m", "sweep.name=mine", "seed=0,1,2")
    call(train.main, "-m", "sweep.name=mine", "seed=0")
    assert [len(sweep.jobs) for sweep in planned] == [2, 3, 3]


def test_jobs_find_a_users_own_config(planned: list[Sweep], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine", "dataset").mkdir(parents=True)
    Path("mine", "dataset", "ponds.yaml").write_text(
        "# @package _global_\ndatamodule: {crop_size: [64, 64]}\n"
        "dataset: {_target_: segdcn.data.ImageFolder, root: '???', class_names: [water, land]}\n"
    )
    for split, kind in itertools.product(("train", "val"), ("images", "masks")):
        file = Path("a=b", split, kind, "pond.png")
        file.parent.mkdir(parents=True)
        Image.new("L" if kind == "masks" else "RGB", (64, 64)).save(file)
    call(train.main, "-m", "--config-dir", "mine", "dataset=ponds", "dataset.root='a=b'", "seed=0,1")
    (sweep,) = planned
    capsys.readouterr()
    folder = sweep.path(sweep.jobs[1])
    for checkpoint in (False, True):
        command = train_command(sweep.jobs[1], folder)[3:]
        assert call(train.main, *command, "--cfg", "job") == 0
        assert "root: a=b" in capsys.readouterr().out
        assert ("dataset=ponds" in command) != checkpoint
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").write_bytes(b"")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("seed=0,1", "model.depth=1,2"), ("model.depth",)),
        (("experiment=shapes_deform3,shapes_deform4",), ("shapes_deform4", "experiment")),
        (("seed=range(0,201)",), ("201 jobs", "sweep.confirm=true")),
        (("seed=0,1", "dataset=camvid"), ("dataset.root must be given",)),
        (("seed=0,1", "dataset=camvid", "dataset.root=nowhere"), ("nowhere",)),
        (("seed=0,1", "hydra.job.chdir=true"), ("hydra.job.chdir",)),
        (("seed=0,1", "trainer.accelerator=cpu", "launcher.slots=500"), ("launcher.slots=500", "cores")),
        (("seed=0,1", "trainer.num_nodes=2"), ("launcher=slurm",)),
        (("seed=0,1", "launcher.slots=0"), ("launcher.slots", "1 or more")),
        (("seed=0,0",), ("twice with one seed",)),
        (("seed=0,1", "output_dir=here"), ("output_dir", "sweep.name")),
        (("seed=0,1", "sweep.baseline=['optimizer.lr=1']"), ("baseline", "optimizer.lr=1")),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_started(
    planned: list[Sweep], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    assert call(train.main, "-m", *arguments) == 1
    message = one_line(capsys.readouterr().err)
    for part in parts:
        assert part in message
    assert not planned
    assert not list(Path.cwd().iterdir())


def test_hydras_own_key_names_the_folder_of_a_sweep(planned: list[Sweep]) -> None:
    call(train.main, "-m", "seed=0,1", "hydra.sweep.dir=elsewhere/mine")
    assert [sweep.folder.resolve() for sweep in planned] == [Path("elsewhere", "mine").resolve()]
    assert not Path("sweeps").exists()


PONDS = """
import errno, os, pathlib
import numpy as np
from segdcn import UserError
from segdcn.data import Sample

class Ponds:
    class_names, palette, splits = ("land", "water"), ((0, 0, 0), (0, 0, 255)), ("train", "val")

    def __init__(self, fault):
        attempts, process = pathlib.Path("attempts"), os.environ.get("SEGDCN_LOCK")
        attempts.mkdir(exist_ok=True)
        self.fault = fault if process and fault != "none" else None

    def split(self, name):
        return self

    def __len__(self):
        return 4

    def __getitem__(self, index):
        first = pathlib.Path("attempts", f"{self.fault}")
        if self.fault == "disk":  # which is ill as long as the first attempt lasts
            if not first.exists():
                first.write_text(str(os.getpid()))
            if first.read_text() == str(os.getpid()):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if self.fault == "user":
            raise UserError("the ponds are dry: fill them")
        label = np.zeros((48, 64), np.uint8)
        label[index + 8 :] = 1
        return Sample(np.repeat(label[..., None] * 200, 3, 2), label, str(index))
"""


@pytest.mark.slow
def test_a_fault_of_the_moment_is_tried_again_and_a_users_error_is_not(tmp_path: Path) -> None:
    (tmp_path / "ponds.py").write_text(PONDS)
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "conf" / "dataset" / "ponds.yaml").write_text("_target_: ponds.Ponds\nfault: none\n")
    settings = [setting for setting in BARE if not setting.startswith("dataset.")]
    settings += ["dataset=ponds", "datamodule.batch_size=2", "datamodule.num_workers=0"]
    command = (
        "-m",
        "segdcn.commands.train",
        "--config-dir=conf",
        "-m",
        "sweep.name=ponds",
        "dataset.fault=disk,user",
        *settings,
    )
    ended = process(tmp_path, *command, "launcher.retries=2", PYTHONPATH=str(tmp_path))
    assert ended.returncode == 1, ended.stderr
    records = [json.loads(file.read_text()) for file in sorted((tmp_path / "sweeps" / "ponds").rglob("job.json"))]
    assert [(record["state"], record["attempts"]) for record in records] == [("finished", 2), ("failed", 1)]
    assert "the ponds are dry" in records[1]["error"]
    log, _ = sorted((tmp_path / "sweeps" / "ponds").rglob("output.log"))
    assert "Stale file handle" in log.read_text()


@pytest.mark.parametrize("holds", ["another sweep", "a run", "a damaged sweep"])
def test_a_folder_of_something_else_is_left_as_it_is(
    planned: list[Sweep], capsys: pytest.CaptureFixture[str], holds: str
) -> None:
    folder = Path("sweeps", "mine")
    if holds == "another sweep":
        call(train.main, "-m", "sweep.name=mine", "seed=0,1", "optimizer.lr=0.1")
    else:
        folder.mkdir(parents=True)
        (folder / ("config.yaml" if holds == "a run" else "sweep.json")).write_text("{")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert call(train.main, "-m", "sweep.name=mine", "seed=0,1") == 1
    assert "sweeps/mine" in one_line(capsys.readouterr().err)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert len(planned) == (holds == "another sweep")


@pytest.mark.slow
def test_a_sweep_trains_skips_what_is_finished_and_ends_with_a_table(tmp_path: Path) -> None:
    # one job cannot work, which neither stops the other nor is tried again
    command = (
        "-m",
        "segdcn.commands.train",
        "-m",
        *TINY,
        "model.output_stride=16,12",
        "trainer.max_epochs=1",
        "sweep.name=two",
    )
    first = process(tmp_path, *command)
    assert first.returncode == 1
    assert "1 of 2 runs have no figure" in first.stderr
    folder = tmp_path / "sweeps" / "two"
    results = json.loads((folder / "results.json").read_text())
    assert [run["state"] for run in results["runs"]] == ["finished", "failed"]
    assert "output_stride must be 8, 16 or 32, got 12" in results["runs"][1]["error"]
    assert json.loads((folder / results["runs"][1]["folder"] / "job.json").read_text())["attempts"] == 1
    for name in ("results.csv", "results.md", "results.png"):
        assert (folder / name).stat().st_size > 100
    logs = {path: path.read_text() for path in folder.glob("*/output.log")}
    assert len(logs) == 2

    again = process(tmp_path, *command)
    assert again.returncode == 1
    assert [(folder / run["folder"] / "output.log").read_text().count("attempt") for run in results["runs"]] == [1, 2]
    status = process(tmp_path, "-m", "segdcn.commands.sweep", "status", str(folder))
    assert status.returncode == 0
    assert "1 of 2 finished, 1 failed" in status.stdout


def table(folder: Path) -> dict[str, object]:
    """The results without what a clock measured."""
    results = json.loads((folder / "results.json").read_text())
    for row in (*results["settings"], *results["runs"]):
        for key in ("training_seconds", "seconds_per_image"):
            del row[key]
    return {key: value for key, value in results.items() if key not in ("name", "command")}


def end_of(sweep: subprocess.Popen[bytes]) -> None:
    """Kill a coordinator, and at the same moment the jobs that it had started."""
    jobs = subprocess.run(["pgrep", "-P", str(sweep.pid)], capture_output=True, text=True).stdout.split()
    for pid in (sweep.pid, *map(int, jobs)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    sweep.wait()


@pytest.mark.slow
def test_a_sweep_killed_ten_times_ends_like_the_undisturbed_one(tmp_path: Path) -> None:
    jobs = ("model.deform.layers=0,3", "seed=0,1,2", *TINY, "trainer.max_epochs=4", "dataset.train_images=160")
    settings = ("callbacks.last_within_epoch.every_n_train_steps=3", "launcher.slots=2")
    command = [sys.executable, "-m", "segdcn.commands.train", "-m", *jobs, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    whole = subprocess.run([*command, "sweep.name=whole"], cwd=tmp_path, env=environment, capture_output=True)
    seconds = time.monotonic() - began
    assert whole.returncode == 0, whole.stderr

    moments = random.Random(0)
    for _ in range(10):
        sweep = subprocess.Popen(
            [*command, "sweep.name=killed"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(2.0, seconds / 3))
        end_of(sweep)
    last = subprocess.run([*command, "sweep.name=killed"], cwd=tmp_path, env=environment, capture_output=True)
    assert last.returncode == 0, last.stderr
    killed = tmp_path / "sweeps" / "killed"
    assert table(killed) == table(tmp_path / "sweeps" / "whole")
    # the moments were such that it mattered
    assert sum(json.loads(path.read_text())["attempts"] for path in killed.glob("*/job.json")) >= 10
    assert any("resumed from last.ckpt" in path.read_text() for path in killed.glob("*/output.log"))
