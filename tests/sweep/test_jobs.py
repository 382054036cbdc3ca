"""What a sweep is on disk, and what its jobs are told."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from made_sweep import made_sweep

from segdcn.runs.folder import INHERITED_LOCK, LOCK, locked
from segdcn.runs.job import JobRecord
from segdcn.sweep.jobs import clear, ended, read_progress, read_record, train_command, train_environment
from segdcn.sweep.plan import Job, job_folder, read_sweep

CONFIG: dict[str, Any] = {
    "seed": 0,
    "dataset": {"_target_": "x.Data", "root": "here"},
    "datamodule": {"batch_size": 8, "num_workers": 2, "eval_batch_size": 1},
    "sweep": {"name": "a"},
    "launcher": {"slots": 1},
    "output_dir": "${run_folder:}",
}


def test_sweep_is_read_as_it_was_written_wherever_it_was_moved(tmp_path: Path) -> None:
    sweep = replace(made_sweep(tmp_path / "here", "a", "b"), baseline=("name=b",))
    sweep.write()
    (tmp_path / "here").rename(tmp_path / "there")
    assert read_sweep(tmp_path / "there") == replace(sweep, folder=tmp_path / "there")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"jobs": [{}]}', '{"jobs": 3}'])
def test_unreadable_sweep_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="is no sweep"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.json (cannot be read|does not describe)") as error:
        read_sweep(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [("ab", "ab", True), ("ab", "abc", True), ("abc", "b", True), ("ab", "bc", False), ("a", "b", False)],
)
def test_a_sweep_may_grow_or_be_run_in_part_but_not_be_another(
    tmp_path: Path, before: str, now: str, same: bool
) -> None:
    old, new = made_sweep(tmp_path, *before), made_sweep(tmp_path, *now)
    if not same:
        with pytest.raises(ValueError, match="holds another sweep"):
            new.check_same(old)
        return
    new.check_same(old)
    joined = [job.folder for job in new.joined(old).jobs]
    assert joined[: len(now)] == list(now)
    assert sorted(joined) == sorted({*before, *now})


def test_folder_names_what_is_trained_and_not_where() -> None:
    name = job_folder(["model.deform.layers=3", "dataset.class_names=[a,b]", "seed=0"], CONFIG)
    readable, _, digest = name.rpartition("_")
    assert readable == "model.deform.layers-3_dataset.class_names-a-b_seed-0"
    assert len(digest) == 8
    elsewhere = {
        **CONFIG,
        "dataset": {**CONFIG["dataset"], "root": "there"},
        "datamodule": {"batch_size": 8, "num_workers": 9, "eval_batch_size": 2},
        "sweep": {"name": "b"},
        "launcher": {"slots": 7},
        "output_dir": "there",
    }
    assert job_folder(["a=1"], elsewhere) == job_folder(["a=1"], CONFIG)
    for key, value in (("seed", 1), ("datamodule", {"batch_size": 4}), ("dataset", {"_target_": "x.Other"})):
        assert job_folder(["a=1"], {**CONFIG, key: value}) != job_folder(["a=1"], CONFIG)


@given(st.lists(st.text(min_size=1), max_size=5))
def test_folder_name_needs_no_quotes_whatever_the_overrides_hold(overrides: list[str]) -> None:
    name = job_folder(overrides, CONFIG)
    assert len(name) < 200
    assert "/" not in name
    (override,) = OverridesParser.create().parse_overrides([f"checkpoint=sweeps/{name}/checkpoints/best.ckpt"])
    assert override.value() == f"sweeps/{name}/checkpoints/best.ckpt"


def test_command_begins_a_run_and_resumes_one_that_has_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "it's a=b, c"
    job = Job("x", (), ("seed=1", "dataset.root=there", "optimizer.lr=0.1"))
    begin = train_command(job, folder)
    assert begin[1:3] == ["-m", "segdcn.commands.train"]
    assert set(job.arguments) < set(begin)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"")
    resume = train_command(job, folder)
    assert {"dataset.root=there", "trust=true"} < set(resume)
    assert not {"seed=1", "optimizer.lr=0.1"} & set(resume)
    for command, key in ((begin, "output_dir"), (resume, "resume")):
        (parsed,) = [one for one in OverridesParser.create().parse_overrides(command[3:]) if one.key_or_group == key]
        assert parsed.value() == str(folder)


def test_what_died_before_its_first_checkpoint_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.csv", "job.json", LOCK, "output.log", "tensorboard/x", "checkpoints/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "checkpoints" / "last.ckpt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    clear(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    clear(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["job.json", "output.log", LOCK]


def test_a_job_is_no_part_of_the_program_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "TORCHELASTIC_RUN_ID": "x"}
    slurm = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}
    for key, value in {**ours, **slurm, "PL_GLOBAL_SEED": "3"}.items():
        monkeypatch.setenv(key, value)
    alone = train_environment(None, OMP_NUM_THREADS="2")
    assert alone["OMP_NUM_THREADS"] == "2"
    assert alone["PATH"] == os.environ["PATH"]
    assert {key for key in {**ours, **slurm} if key in alone} == {"SLURM_JOB_ID"}
    task = train_environment(9, cluster_task=True)
    assert (alone.get(INHERITED_LOCK), task[INHERITED_LOCK]) == (None, "9")
    assert set({**ours, **slurm}) < set(task)
    assert not {"PL_GLOBAL_SEED"} & {*alone, *task}


def test_lock_lasts_as_long_as_a_process_that_inherited_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / LOCK
    with locked(path) as lock:
        assert lock is not None
        with locked(path) as other:
            assert other is None
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with locked(path) as lock:
        assert lock is None
    child.kill()
    child.wait()
    with locked(path) as lock:
        assert lock is not None


@pytest.mark.parametrize(
    ("status", "log", "error", "final"),
    [
        (1, "epoch 1\nerror: no file at x\n", "no file at x", True),
        (75, "epoch 1\nerror: Stale file handle\n", "exit status 75 (error: Stale file handle)", False),
        (1, "Traceback\nRuntimeError: out of memory\n", "exit status 1 (RuntimeError: out of memory)", False),
        (-9, "error: seen before\nepoch 3\n", "ended by SIGKILL (epoch 3)", False),
        (143, "", "ended by SIGTERM ()", False),
    ],
)
def test_why_an_attempt_failed(tmp_path: Path, status: int, log: str, error: str, final: bool) -> None:
    (tmp_path / "output.log").write_text(log)
    record = ended(JobRecord("running", attempts=1, seconds=5, started=1.0), tmp_path, status)
    assert (record.state, record.error, record.final) == ("failed", error, final)
    assert record.seconds > 5
    assert ended(record, tmp_path, status, stopped=True).state == "stopped"
    (tmp_path / "metrics.json").write_text("{}")
    assert ended(record, tmp_path, 0).state == "finished"


def test_progress_comes_from_the_runs_own_files(tmp_path: Path) -> None:
    assert read_progress(tmp_path, "val/miou").record == JobRecord()
    JobRecord("running", attempts=2, started=1.0).write(tmp_path)
    rows = ("epoch,step,val/miou,val/loss", "0,10,0.25,2", "1,20,,", "2,30,0.75,0.5", "3,40,0.5,1")
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    now = read_progress(tmp_path, "val/miou")
    assert (now.record.state, now.epochs, now.steps, now.best) == ("running", 4, 40, 0.75)
    assert read_progress(tmp_path, "val/loss").best == 0.5
    assert math.isnan(read_progress(tmp_path, "val/other").best)
    (tmp_path / "metrics.json").write_text(json.dumps({"val/miou": 0.875}))
    finished = read_progress(tmp_path, "val/miou")
    assert (finished.record.state, finished.best) == ("finished", 0.875)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"unknown": 1}'])
def test_unreadable_record_is_a_job_that_waits(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    assert read_record(tmp_path) == JobRecord()
