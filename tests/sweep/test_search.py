"""``hydra/sweeper=optuna``: what is searched, that a search goes on where it was killed, and what pruning leaves."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason='needs Optuna: pip install -e ".[optuna]"')

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from running import BARE, call, one_line, process
from test_multirun import end_of

from segdcn.commands import train
from segdcn.commands.search import search_space
from segdcn.runs.files import write_json
from segdcn.runs.job import JobRecord
from segdcn.sweep.jobs import read_progress, read_record
from segdcn.sweep.local import LocalLauncher
from segdcn.sweep.plan import Job, Sweep, read_sweep
from segdcn.training.pruning import STUDY, journal

RATE = "optimizer.lr=tag(log, interval(1e-4, 1e-1))"
SEARCH = ("-m", "hydra/sweeper=optuna", "sweep.name=mine", "trainer.accelerator=cpu")
MINE = Path("sweeps", "mine")
Trials = list[tuple[TrialState, dict[str, Any], float | None]]


@pytest.mark.parametrize(
    ("value", "distribution"),
    [
        ("interval(1,8)", FloatDistribution(1, 8)),
        ("tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("int(interval(1,8))", IntDistribution(1, 8)),
        ("tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("range(1,10,2)", IntDistribution(1, 9, step=2)),
        ("range(10,1,-3)", IntDistribution(4, 10, step=3)),
        ("range(0.5,2,0.5)", FloatDistribution(0.5, 1.5, step=0.5)),
        ("sgd,adamw", CategoricalDistribution(["adamw", "sgd"])),
        ("choice([1,2],3)", CategoricalDistribution(["3", "[1,2]"])),
        ("shuffle(3,1,2)", CategoricalDistribution(["1", "2", "3"])),
    ],
)
def test_hydras_grammar_says_what_is_searched(value: str, distribution: object) -> None:
    parsed = OverridesParser.create().parse_overrides(["seed=1", f"+x={value}", "model.head=aspp"])
    assert search_space(parsed) == ({"+x": distribution}, ["seed=1", "model.head=aspp"])


def test_the_last_override_of_a_key_counts() -> None:
    parsed = OverridesParser.create().parse_overrides(["a=1,2", "b=interval(0,1)", "a=3"])
    assert search_space(parsed) == ({"b": FloatDistribution(0, 1)}, ["a=3"])


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run segdcn-train in an empty folder, with a launcher that makes figures up; the folders of its jobs in turn."""
    launched: list[str] = []

    def run(self: LocalLauncher, sweep: Sweep, jobs: list[Job]) -> None:
        assert read_sweep(sweep.folder) == sweep
        for job in jobs:
            launched.append(job.folder)
            chosen = sweep.path(job)
            (rate,) = re.findall(r"optimizer.lr=(\S+)", " ".join(job.overrides))
            if f"fail={rate}" in os.environ.get("TEST_FAULTS", ""):
                JobRecord("failed", 1, error="no memory").write(chosen)
            elif not (chosen / "job.json").is_file() or read_record(chosen).state != "pruned":
                write_json(chosen / "metrics.json", {"val/miou": float(rate) * 5})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LocalLauncher, "run", run)
    return launched


def trials(folder: Path) -> Trials:
    study = optuna.load_study(study_name=STUDY, storage=journal(folder))
    return [(one.state, one.params, one.value) for one in study.trials if one.state != TrialState.FAIL]


def test_a_search_ends_with_so_many_trials_and_goes_on_with_more(
    trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(train.main, *SEARCH, RATE, "hydra.sweeper.n_trials=3") == 0
    before = trials(MINE)
    assert [state for state, *_ in before] == [TrialState.COMPLETE] * 3
    assert len({json.dumps(params) for _, params, _ in before}) == 3
    best = max(value for *_, value in before if value is not None)
    assert f"(val/miou {100 * best:.2f})" in capsys.readouterr().out
    assert call(train.main, *SEARCH, RATE, "hydra.sweeper.n_trials=3") == 0
    assert len(trained) == 3
    assert call(train.main, *SEARCH, RATE, "hydra.sweeper.n_trials=5") == 0
    assert trials(MINE)[:3] == before
    assert trained == [job.folder for job in read_sweep(MINE).jobs]
    assert len(trained) == 5
    assert json.loads((MINE / "results.json").read_text())["runs"][0]["folder"] == trained[0]


def test_the_example_is_a_search(trained: list[str]) -> None:
    assert call(train.main, "sweep=shapes_optuna", "hydra.sweeper.n_trials=2", "trainer.accelerator=cpu") == 0
    for state, params, _ in trials(Path("sweeps", "shapes_optuna")):
        assert state == TrialState.COMPLETE
        assert params.keys() == {"optimizer.lr", "task.offset_lr_mult"}
    assert len(trained) == 2


def test_what_failed_has_another_chance_with_the_next_start(
    trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(train.main, *SEARCH, RATE, "hydra.sweeper.n_trials=1") == 0
    (job,) = read_sweep(MINE).jobs
    (first,) = [one.partition("=")[2] for one in job.overrides if one.startswith("optimizer.lr=")]
    (MINE / job.folder / "metrics.json").unlink()
    (MINE / "optuna.journal").unlink()
    monkeypatch.setenv("TEST_FAULTS", f"fail={first}")
    assert call(train.main, *SEARCH, RATE, "hydra.sweeper.n_trials=3") == 1
    assert [state for state, *_ in trials(MINE)] == [TrialState.RUNNING, TrialState.COMPLETE, TrialState.COMPLETE]
    monkeypatch.delenv("TEST_FAULTS")
    assert call(train.main, *SEARCH, RATE, "hydra.sweeper.n_trials=3") == 0
    assert [state for state, *_ in trials(MINE)] == [TrialState.COMPLETE] * 3


def test_settings_that_are_chosen_twice_are_one_job(trained: list[str]) -> None:
    for jobs in (1, 3):
        searched = "optimizer.lr=0.1,0.01"
        assert (
            call(
                train.main,
                *SEARCH,
                f"sweep.name=at{jobs}",
                searched,
                "hydra.sweeper.n_trials=6",
                f"hydra.sweeper.n_jobs={jobs}",
            )
            == 0
        )
        found = trials(Path("sweeps", f"at{jobs}"))
        assert [state for state, *_ in found] == [TrialState.COMPLETE] * 6
        assert all(value == float(params["optimizer.lr"]) * 5 for _, params, value in found)
        assert len(read_sweep(Path("sweeps", f"at{jobs}")).jobs) == 2


class Killed(BaseException):
    """In place of a SIGKILL."""


@pytest.mark.slow
def test_a_search_killed_before_any_write_goes_on_as_if_it_had_not_been(
    trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = JournalFileBackend.append_logs
    written = kill_at = 0

    def counting(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        nonlocal written
        written += 1
        if written == kill_at:
            raise Killed
        append(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", counting)
    # what is chosen depends on what was told from the second trial on
    monkeypatch.setattr("segdcn.commands.search.TPESampler", partial(TPESampler, n_startup_trials=1))
    command = [*SEARCH, RATE, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"]
    assert call(train.main, *command, "sweep.name=whole") == 0
    whole, total = trials(Path("sweeps", "whole")), written
    assert total > 12
    for kill_at in range(1, total + 1, 3):
        written = 0
        name = f"sweep.name=killed{kill_at}"
        with pytest.raises(Killed):
            call(train.main, *command, name)
        assert call(train.main, *command, name) == 0
        assert trials(Path("sweeps", f"killed{kill_at}")) == whole


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("nothing to search", "optimizer.lr=tag(log")),
        (("optimizer.lr=interval(2,1)",), ("optimizer.lr=interval(2,1)", "cannot be searched")),
        (("optimizer.lrr=interval(1,2)",), ("optimizer.lrr",)),
        ((RATE, "hydra.sweeper.n_trials=0"), ("hydra.sweeper.n_trials", "1 or more")),
        ((RATE, "hydra.sweeper.n_trials=201"), ("201 jobs", "sweep.confirm=true")),
        ((RATE, "hydra.sweeper.n_jobs=x"), ("hydra.sweeper.n_jobs",)),
        ((RATE, "dataset=camvid", "dataset.root=nowhere"), ("nowhere",)),
        ((RATE, "hydra.sweeper.seed=x"), ("hydra.sweeper.seed", "whole number")),
        ((RATE, "hydra.sweeper.pruning=true"), ("hydra.sweeper.pruning", "null")),
        ((RATE, "hydra.sweeper.pruning.startup_trials=x"), ("startup_trials", "whole number")),
        ((RATE, "hydra.sweeper.pruning.warmup_epochs=-1"), ("warmup_epochs", "negative")),
        ((RATE, "hydra.sweeper.n_jobs=2", "launcher.slots=500"), ("launcher.slots=500", "cores")),
        ((RATE, "launcher=slurm", "launcher.cluster=local"), ("hydra.sweeper.n_jobs", "launcher=slurm")),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_started(
    trained: list[str], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    assert call(train.main, *SEARCH, *arguments) == 1
    message = one_line(capsys.readouterr().err)
    for part in parts:
        assert part in message
    assert not trained
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "arguments", [("optimizer.lr=0.1,0.2",), ("hydra/sweeper=optuna", "optimizer.lr=interval(0.1, 0.2)")]
)
def test_another_search_or_sweep_needs_another_folder(
    trained: list[str], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert call(train.main, *SEARCH, RATE, "hydra.sweeper.n_trials=1") == 0
    before = {path: path.read_bytes() for path in MINE.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert call(train.main, "-m", "trainer.accelerator=cpu", "sweep.name=mine", *arguments) == 1
    assert "another sweep" in one_line(capsys.readouterr().err)
    assert {path: path.read_bytes() for path in MINE.rglob("*") if path.is_file()} == before


def test_without_optuna_one_line_says_what_to_install(
    trained: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert call(train.main, *SEARCH, RATE) == 1
    assert 'pip install -e ".[optuna]"' in one_line(capsys.readouterr().err)


def test_optuna_is_imported_by_a_search_alone(tmp_path: Path) -> None:
    script = "import sys; from hydra.core.plugins import Plugins; Plugins.instance(); print('optuna' in sys.modules)"
    started = process(tmp_path, "-c", script)
    assert started.stdout == "False\n", started.stderr


# --- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_behind_the_others_is_given_up_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    study = optuna.create_study(study_name=STUDY, storage=journal(tmp_path), direction="maximize")
    better = study.ask()
    for epoch in range(4):
        better.report(0.9, epoch)
    study.tell(better, 0.9)
    trial = study.ask()
    run = tmp_path / "run"
    JobRecord("running", attempts=1, started=time.time()).write(run)
    command = [*BARE, "trainer.max_epochs=4", f"output_dir={run}"]
    settings = f"folder:${{output_dir}},trial:{trial.number},startup_trials:1,warmup_epochs:1"
    assert (
        call(train.main, *command, f"++callbacks.pruning={{_target_:segdcn.training.pruning.Pruning,{settings}}}") == 0
    )
    told = capsys.readouterr().out
    assert "pruned: val/miou is behind" in told
    assert "continue with" not in told
    assert (read_record(run).state, read_record(run).attempts) == ("pruned", 1)
    assert not (run / "metrics.json").exists()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    rows = (run / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 2  # the first epoch is warm-up
    reported = study.trials[trial.number].intermediate_values
    assert [round(value, 4) for value in reported.values()] == [round(float(row.split(",")[4]), 4) for row in rows[1:]]

    # killed before that was written down, it is given up at once, as it was
    JobRecord("running", attempts=1, started=time.time()).write(run)
    assert call(train.main, f"resume={run}") == 0
    assert read_record(run).state == "pruned"
    assert (run / "metrics.csv").read_text().splitlines() == rows

    # once the search has been told, the run is as any other
    study.tell(trial.number, state=TrialState.PRUNED)
    assert call(train.main, f"resume={run}") == 0
    assert json.loads((run / "metrics.json").read_text())["val/miou"] > 0
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 4


@pytest.mark.slow
def test_a_search_killed_again_and_again_ends_like_the_undisturbed_one(tmp_path: Path) -> None:
    pruning = ("hydra.sweeper.pruning.startup_trials=1", "hydra.sweeper.pruning.warmup_epochs=0")
    search = ("optimizer.lr=tag(log, interval(1e-6, 1e-2))", "hydra.sweeper.n_trials=4", *pruning)
    replaced = ("trainer.max_epochs", "dataset.train_images")
    settings = [setting for setting in BARE if not setting.startswith(replaced)]
    settings += ["trainer.max_epochs=3", "dataset.train_images=160", "model.deform.layers=0"]
    command = [sys.executable, "-m", "segdcn.commands.train", "-m", "hydra/sweeper=optuna", *search, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    whole = subprocess.run([*command, "sweep.name=whole"], cwd=tmp_path, env=environment, capture_output=True)
    seconds = time.monotonic() - began
    assert whole.returncode == 0, whole.stderr
    undisturbed = trials(tmp_path / "sweeps" / "whole")
    assert {state for state, *_ in undisturbed} == {TrialState.COMPLETE, TrialState.PRUNED}

    moments = random.Random(0)
    for _ in range(2):
        killed = subprocess.Popen([*command, "sweep.name=killed"], cwd=tmp_path, env=environment)
        time.sleep(moments.uniform(seconds / 8, seconds / 3))
        end_of(killed)
    last = subprocess.run([*command, "sweep.name=killed"], cwd=tmp_path, env=environment, capture_output=True)
    assert last.returncode == 0, last.stderr
    folder = tmp_path / "sweeps" / "killed"
    assert trials(folder) == undisturbed
    # from all of a job's files: a command killed just as a job had ended has not written that down, and nobody need
    records = {job.folder: read_progress(folder / job.folder).record for job in read_sweep(folder).jobs}
    assert [record.state for record in records.values()] == [
        "pruned" if state == TrialState.PRUNED else "finished" for state, *_ in undisturbed
    ]
    assert sum(record.attempts for record in records.values()) > 4
