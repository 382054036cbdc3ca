"""What each run of a sweep left behind, read and checked; nothing is written."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segdcn import UserError, is_passing
from segdcn.runs.files import file_hash, read_object, shown, typed
from segdcn.sweep.plan import Job, Sweep

STATES = ("finished", "failed", "stopped", "running", "waiting", "missing")
"""Of a run: metrics.json is there; as job.json says; nothing has been started."""


@dataclass(frozen=True)
class Run:
    """What is known of a planned run.

    error: why there is no figure.
    figure: the metric as metrics.json has it, a fraction.
    flops: of one image of ``flops_input`` pixels, "[height,width]".
    training_seconds, seconds_per_image: wall time of the training, and of inference for one image.
    paper: the published figure, as a fraction.
    facts: all of metrics.json; environment: all of environment.json.
    """

    job: Job
    state: str
    error: str | None = None
    figure: float | None = None
    parameters: int | None = None
    flops: int | None = None
    flops_input: str | None = None
    training_seconds: float | None = None
    seconds_per_image: float | None = None
    paper: float | None = None
    facts: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] | None = None


def read_run(sweep: Sweep, job: Job, metric: str) -> Run:
    """What ``job`` left behind.

    metric: of the run's own validation, or of a ``segdcn-evaluate split=test`` of its best checkpoint.

    Raises: ValueError, one line, for a file that is there and cannot be read, or a metric that the run does not know.
    """
    folder = sweep.path(job)
    paper = _paper(folder / "config.yaml") if metric.endswith("/miou") else None
    path = folder / "metrics.json"
    again = f"segdcn-train {typed(folder, 'resume')} writes it anew"
    if not path.is_file():
        return _unfinished(job, folder, paper)
    facts = read_object(path, again)
    if metric.startswith("test/"):
        path = folder / "evaluation" / "best_test" / "metrics.json"
        best = folder / "checkpoints" / "best.ckpt"
        again = f"segdcn-evaluate {typed(best, 'checkpoint')} split=test"
        tested = read_object(path, again) if path.is_file() else {}
        # figures of a checkpoint that was deleted since then stay, those of one that was trained on do not
        if tested and (not best.is_file() or tested.get("checkpoint_sha256") == file_hash(best)):
            facts |= {**tested, "checkpoint": Path(str(tested.get("checkpoint"))).name}
        else:
            facts[metric] = None
    if metric not in facts or "/" not in metric:  # without one it is a fact such as the seed
        figures = [key for key in facts if "/" in key]
        closest = difflib.get_close_matches(metric, figures, n=5, cutoff=0) or ["none"]
        raise UserError(f"{shown(path)} has no figure {metric!r}: the closest are {', '.join(closest)}")
    environment = folder / "environment.json"
    return Run(
        job,
        "finished",
        error=None if facts[metric] is not None else _why_none(metric, facts, again),
        figure=_number(facts, metric, path, again),
        parameters=_whole(_number(facts, "parameters", path, again)),
        flops=_whole(_number(facts, "flops", path, again)),
        flops_input=None if facts.get("flops_input") is None else str(facts["flops_input"]),
        training_seconds=_number(facts, "training_seconds", path, again),
        seconds_per_image=_number(facts, "seconds_per_image", path, again),
        paper=paper,
        facts=facts,
        environment=read_object(environment, "delete it to do without it") if environment.is_file() else None,
    )


def _why_none(metric: str, facts: Mapping[str, Any], remedy: str) -> str:
    """facts: of the run, or of its evaluation on the test split, where there is one of the checkpoint as it is now."""
    if facts.get("split") == metric.partition("/")[0]:
        return f"{metric} is not defined: there was nothing to count"
    return f"not evaluated yet: {remedy}"


def _unfinished(job: Job, folder: Path, paper: float | None) -> Run:
    path = folder / "job.json"
    if not path.is_file():
        return Run(job, "missing", "never started", paper=paper)
    told = read_object(path, "delete it and start the sweep again")
    state, error = told.get("state"), told.get("error")
    if state == "finished":
        state, error = "failed", "job.json says that it finished, but there is no metrics.json"
    if state not in STATES or not (error is None or isinstance(error, str)):
        raise UserError(f"{shown(path)} is no job's record: its state is {state!r}; delete it and start again")
    attempts = told.get("attempts")
    reason = f"{state} in attempt {attempts}" if isinstance(attempts, int) and attempts > 1 else state
    return Run(job, state, f"{reason}: {error}" if error else reason, paper=paper)


def _paper(path: Path) -> float | None:
    """``paper_miou`` of a run's config.yaml as a fraction; there it is in percent, null, or absent."""
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        if is_passing(error):
            raise
        raise UserError(f"{shown(path)} cannot be read: it is damaged ({type(error).__name__})") from error
    percent = config.get("paper_miou") if isinstance(config, dict) else None
    if percent is None:
        return None
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
        raise UserError(f"paper_miou in {shown(path)} must be a figure in percent or null, got {percent!r}")
    return percent / 100


def _number(facts: Mapping[str, Any], key: str, path: Path, remedy: str) -> float | None:
    value = facts.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key} in {shown(path)} is no number but {value!r}; {remedy}")
    return value


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
