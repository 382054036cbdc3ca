"""Jobs through submitit: what is asked of a cluster, and what is made of its answers; a cluster is played here.

``scripts/emulated_slurm.py`` does it with a real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit
from made_sweep import made_sweep
from running import BARE, process

from segdcn.runs.job import JobRecord
from segdcn.sweep.jobs import read_record
from segdcn.sweep.local import SweepStopped
from segdcn.sweep.plan import Job
from segdcn.sweep.slurm import JobTask, SlurmLauncher, _queue_again


class Cluster:
    """Programs named sbatch, squeue and scontrol on the PATH, and submitit's executor, which runs ``happens(job)``."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[dict[str, Any]] = []
        self.submitted: list[str] = []
        self.happens: Callable[[str, Path], None] = lambda name, run: None
        folder.mkdir()
        for name in ("sbatch", "squeue", "scontrol"):
            self.program(name, "")
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setattr(submitit, "AutoExecutor", self.executor)

    def program(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "$@" >> {path}.asked\n{script}\n')
        path.chmod(0o755)

    def was_asked(self, name: str) -> list[str]:
        path = self.folder / f"{name}.asked"
        return path.read_text().splitlines() if path.exists() else []

    def executor(self, folder: Path, cluster: str) -> Any:
        def submit(task: JobTask) -> Any:
            self.submitted.append(Path(task.folder).name)
            self.happens(Path(task.folder).name, Path(task.folder))
            return SimpleNamespace(job_id=f"7_{len(self.submitted)}")

        return SimpleNamespace(
            update_parameters=lambda **given: self.asked.append(given), batch=contextlib.nullcontext, submit=submit
        )


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    return Cluster(tmp_path / "bin", monkeypatch)


def finish(name: str, run: Path) -> None:
    (run / "metrics.json").write_text(json.dumps({"val/miou": 0.5}))


def test_jobs_of_equal_needs_are_one_array_with_what_their_trainers_ask_for(tmp_path: Path, cluster: Cluster) -> None:
    sweep = made_sweep(tmp_path / "mine", *"abcd")
    needs = ({}, {}, {"accelerator": "gpu", "devices": 4, "nodes": 2}, {"accelerator": "auto"})
    sweep = replace(sweep, jobs=tuple(replace(job, **need) for job, need in zip(sweep.jobs, needs, strict=True)))
    cluster.happens = finish
    parameters = {"timeout_min": 60, "slurm_partition": "gpu", "mem_gb": None}
    SlurmLauncher(poll_seconds=0.01, parameters=parameters).run(sweep, sweep.jobs)
    assert cluster.submitted == [*"abcd"]
    common = {"name": "mine", "timeout_min": 60, "slurm_partition": "gpu"}
    assert cluster.asked == [
        {**common, "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0},
        {**common, "nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4},
        {**common, "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 1},
    ]


def test_what_is_lost_or_crashed_is_submitted_again_and_a_users_error_is_not(tmp_path: Path, cluster: Cluster) -> None:
    sweep = made_sweep(tmp_path / "mine", "fine", "lost", "wrong", "recovers")

    def happens(name: str, run: Path) -> None:
        if name == "fine" or (name == "recovers" and cluster.submitted.count(name) == 2):
            finish(name, run)
        elif name == "wrong":
            JobRecord("failed", attempts=1, error="no file at x", final=True).write(run)
        else:
            JobRecord("running", attempts=1).write(run)  # and then nothing is heard of it

    cluster.happens = happens
    SlurmLauncher(retries=2, poll_seconds=0.01).run(sweep, sweep.jobs)
    assert {name: cluster.submitted.count(name) for name in ("fine", "lost", "wrong", "recovers")} == {
        "fine": 1,
        "lost": 3,
        "wrong": 1,
        "recovers": 2,
    }
    assert read_record(sweep.folder / "lost").error == "its cluster job is gone"
    assert read_record(sweep.folder / "wrong").error == "no file at x"


@pytest.mark.parametrize("squeue", ["echo 7_1 7_2", "exit 1"])
def test_a_signal_ends_the_waiting_and_a_new_start_takes_the_jobs_up(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str], squeue: str
) -> None:
    sweep = made_sweep(tmp_path / "mine", *"ab")
    cluster.program("squeue", "echo 7_1 7_2")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SweepStopped, match="SIGTERM"):
        SlurmLauncher(poll_seconds=0.01).run(sweep, sweep.jobs)
    assert cluster.submitted == ["a", "b"]
    assert "scancel 7_1 7_2" in capsys.readouterr().out
    assert not cluster.was_asked("scontrol")

    def later() -> None:
        time.sleep(0.3)
        for job in sweep.jobs:
            finish(job.folder, sweep.path(job))

    cluster.program("squeue", squeue)  # it may be out of order for a while
    threading.Thread(target=later).start()
    SlurmLauncher(poll_seconds=0.01).run(sweep, sweep.jobs)
    assert cluster.submitted == ["a", "b"]


@pytest.mark.parametrize(("state", "queued"), [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False)])
@pytest.mark.parametrize("array", [True, False])
def test_a_job_that_ends_for_anothers_sake_is_queued_again_and_a_cancelled_one_is_not(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, state: str, queued: bool, array: bool
) -> None:
    cluster.program("squeue", f"echo {state}")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    _queue_again()
    assert cluster.was_asked("scontrol") == ([f"requeue {'7_3' if array else '9'}"] if queued else [])


def test_a_pruned_job_is_not_submitted_again(tmp_path: Path, cluster: Cluster) -> None:
    cluster.happens = lambda name, run: JobRecord("pruned", attempts=1).write(run) if name == "a" else finish(name, run)
    sweep = made_sweep(tmp_path / "sweep", *"ab")
    for _ in range(2):
        SlurmLauncher(poll_seconds=0.01).run(sweep, sweep.jobs)
    assert cluster.submitted == ["a", "b"]
    assert read_record(sweep.path(sweep.jobs[0])).state == "pruned"


def test_a_task_runs_the_job_and_passes_the_warning_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segdcn.sweep.slurm.clear", lambda folder: None)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    script = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"open({str(tmp_path / 'begun')!r}, 'w')\ntime.sleep(60)"
    )
    monkeypatch.setattr("segdcn.sweep.slurm.train_command", lambda job, folder: [sys.executable, "-c", script])
    task = JobTask(Job("x", ("seed=0",)), str(tmp_path))
    again: list[Any] = []

    def warn() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR2)

    # as submitit does: the handler runs within the task that waits for its process
    before = signal.signal(signal.SIGUSR2, lambda *_: again.append(task.checkpoint()))
    threading.Thread(target=warn).start()
    try:
        task()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert isinstance(again[0].function, JobTask)
    assert read_record(tmp_path).state == "stopped"
    script = "print('error: no file at x'); raise SystemExit(1)"
    monkeypatch.setattr("segdcn.sweep.slurm.train_command", lambda job, folder: [sys.executable, "-c", script])
    with pytest.raises(RuntimeError, match="no file at x"):
        task()
    record = read_record(tmp_path)
    assert (record.state, record.final, record.attempts) == ("failed", True, 2)


def test_what_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("x", ("seed=0",))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs sbatch"):
        SlurmLauncher().check([job])
    SlurmLauncher(cluster="local").check([job])
    with pytest.raises(ValueError, match=r"trainer\.devices"):
        SlurmLauncher(cluster="local").check([replace(job, devices="0,1")])
    with pytest.raises(ValueError, match=r"launcher\.cluster"):
        SlurmLauncher(cluster="pbs")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"segdcn\[slurm\]"):
        SlurmLauncher().check([job])


@pytest.mark.slow
def test_ddp_within_a_job_gives_the_same_figures_through_both_launchers(tmp_path: Path) -> None:
    trainer = ("trainer=ddp", "trainer.devices=2", "trainer.sync_batchnorm=false")
    settings = [setting for setting in BARE if not setting.startswith("datamodule.batch_size")]
    jobs = ("-m", *settings, *trainer, "datamodule.batch_size=4", "seed=0,1")
    launchers = {"here": (), "there": ("launcher=slurm", "launcher.cluster=local", "launcher.poll_seconds=1")}
    figures = {}
    for name, launcher in launchers.items():
        ended = process(tmp_path, "-m", "segdcn.commands.train", *jobs, f"sweep.name={name}", *launcher)
        assert ended.returncode == 0, ended.stderr
        results = json.loads((tmp_path / "sweeps" / name / "results.json").read_text())
        figures[name] = [run["figure"] for run in results["runs"]]
        for run in results["runs"]:
            log = (tmp_path / "sweeps" / name / run["folder"] / "output.log").read_text()
            assert "4 images x 2 devices = 8 per step" in log
    assert figures["here"] == figures["there"]
    assert len(set(figures["here"])) == 2
