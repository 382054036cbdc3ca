"""What a sweep planned (sweep.json) and what each of its runs left behind, read and checked; nothing is written."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segdcn.run_folder import shown

STATES = ("finished", "failed", "stopped", "running", "missing")
"""Of a run: metrics.json is there; as job.json says; nothing has been started."""

Setting = tuple[str, ...]
"""The overrides of a job without its seed."""


@dataclass(frozen=True)
class Job:
    """One planned run: its folder within the sweep's, and Hydra's overrides."""

    folder: str
    overrides: tuple[str, ...]

    @property
    def seed(self) -> str | None:
        """As it was typed; None where the config's own seed is used."""
        seeds = [value for key, _, value in map(_parts, self.overrides) if key == "seed"]
        return seeds[-1] if seeds else None  # Hydra takes the last one too

    @property
    def setting(self) -> Setting:
        return tuple(override for override in self.overrides if _parts(override)[0] != "seed")


@dataclass(frozen=True)
class Plan:
    """A sweep as it was asked for."""

    folder: Path
    name: str
    command: str
    metric: str
    jobs: tuple[Job, ...]
    baseline: Setting

    @property
    def settings(self) -> dict[Setting, list[Job]]:
        """The jobs of each setting, in the sweep's order."""
        settings: dict[Setting, list[Job]] = {}
        for job in self.jobs:
            settings.setdefault(job.setting, []).append(job)
        return settings

    @property
    def labels(self) -> dict[Setting, str]:
        """The name of each setting: the overrides that not all settings have."""
        settings = list(self.settings)
        common = set(settings[0]).intersection(*settings) if len(settings) > 1 else set()
        return {
            setting: " ".join(override for override in setting if override not in common) or "(nothing changed)"
            for setting in settings
        }


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


def read_plan(folder: Path) -> Plan:
    """The plan of the sweep in ``folder``; reads sweep.json and nothing of the runs.

    Raises: ValueError, one line, when there is none, when it cannot be read, when two jobs are the same run, or when
    its baseline is not exactly one of its settings.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise ValueError(f"{shown(folder)} is no sweep: it holds no sweep.json; give a folder such as sweeps/NAME")
    plan = _read_json(path, "start the sweep again with the same name to write it anew")
    name, command = plan.get("name", folder.name), plan.get("command", "")
    metric, wanted = plan.get("metric", "val/miou"), plan.get("baseline")
    jobs = plan.get("jobs")
    if (
        not all(isinstance(text, str) for text in (name, command, metric))
        or not (wanted is None or _are_texts(wanted))
        or not (isinstance(jobs, list) and jobs and all(_is_job(job) for job in jobs))
    ):
        raise ValueError(
            f"{shown(path)} does not describe a sweep: it must hold name, command, baseline (a list or null), metric "
            "and jobs, each with a folder's name and a list of overrides"
        )
    result = Plan(folder, name, command, metric, tuple(Job(job["folder"], tuple(job["overrides"])) for job in jobs), ())
    for setting, ones in result.settings.items():
        if len({job.seed for job in ones}) < len(ones):
            raise ValueError(
                f"{shown(path)} plans {' '.join(setting) or 'the config as it is'} twice with one seed: such runs are "
                "the same, give each a seed of its own"
            )
    return Plan(folder, name, command, metric, result.jobs, _baseline(result, wanted, path))


def _baseline(plan: Plan, wanted: Sequence[str] | None, path: Path) -> Setting:
    if wanted is None:
        return next(iter(plan.settings))
    searched = {override.lstrip("+") for override in wanted}
    found = [setting for setting in plan.settings if searched <= {override.lstrip("+") for override in setting}]
    if len(found) != 1:
        labels = list(plan.labels.values()) if not found else [plan.labels[setting] for setting in found]
        raise ValueError(
            f"the baseline {' '.join(wanted)!r} in {shown(path)} is {'none' if not found else 'more than one'} of the "
            f"sweep's settings: write down one of {'; '.join(labels)}"
        )
    return found[0]


def read_run(plan: Plan, job: Job, metric: str) -> Run:
    """What ``job`` left behind.

    Raises: ValueError, one line, for a file that is there and cannot be read, or a metric that the run does not know.
    """
    folder = plan.folder / job.folder
    paper = _paper(folder / "config.yaml") if metric.endswith("/miou") else None
    path = folder / "metrics.json"
    again = f"segdcn-train resume={shown(folder)} writes it anew"
    if not path.is_file():
        return _unfinished(job, folder, paper)
    facts = _read_json(path, again)
    if metric not in facts or "/" not in metric:  # without one it is a fact such as the seed
        figures = [key for key in facts if "/" in key]
        closest = difflib.get_close_matches(metric, figures, n=5, cutoff=0) or ["none"]
        raise ValueError(f"{shown(path)} has no figure {metric!r}: the closest are {', '.join(closest)}")
    environment = folder / "environment.json"
    return Run(
        job,
        "finished",
        error=f"{metric} is not defined: there was nothing to count" if facts[metric] is None else None,
        figure=_number(facts, metric, path, again),
        parameters=_whole(_number(facts, "parameters", path, again)),
        flops=_whole(_number(facts, "flops", path, again)),
        flops_input=None if facts.get("flops_input") is None else str(facts["flops_input"]),
        training_seconds=_number(facts, "training_seconds", path, again),
        seconds_per_image=_number(facts, "seconds_per_image", path, again),
        paper=paper,
        facts=facts,
        environment=_read_json(environment, "delete it to do without it") if environment.is_file() else None,
    )


def _unfinished(job: Job, folder: Path, paper: float | None) -> Run:
    path = folder / "job.json"
    if not path.is_file():
        return Run(job, "missing", "never started", paper=paper)
    told = _read_json(path, "delete it and start the sweep again")
    state, error = told.get("state"), told.get("error")
    if state == "finished":
        state, error = "failed", "job.json says that it finished, but there is no metrics.json"
    if state not in STATES or not (error is None or isinstance(error, str)):
        raise ValueError(f"{shown(path)} is no job's record: its state is {state!r}; delete it and start again")
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
        raise ValueError(f"{shown(path)} cannot be read: it is damaged ({type(error).__name__})") from error
    percent = config.get("paper_miou") if isinstance(config, dict) else None
    if percent is None:
        return None
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
        raise ValueError(f"paper_miou in {shown(path)} must be a figure in percent or null, got {percent!r}")
    return percent / 100


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        raise ValueError(
            f"{shown(path)} cannot be read: it is damaged or truncated ({type(error).__name__}); {remedy}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{shown(path)} cannot be read: it holds no JSON object; {remedy}")
    return content


def _number(facts: Mapping[str, Any], key: str, path: Path, remedy: str) -> float | None:
    value = facts.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} in {shown(path)} is no number but {value!r}; {remedy}")
    return value


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _parts(override: str) -> tuple[str, str, str]:
    """Key, "=" and value; Hydra's pluses, which say that the key may be new, left out."""
    return override.lstrip("+").partition("=")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_job(job: Any) -> bool:
    """A folder that lies nowhere but in the sweep's, and overrides."""
    return (
        isinstance(job, dict)
        and isinstance(job.get("folder"), str)
        and job["folder"] not in ("", ".", "..")
        and Path(job["folder"]).name == job["folder"]
        and _are_texts(job.get("overrides"))
    )
