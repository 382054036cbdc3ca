"""The runs of a sweep → its results; nothing is written."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from segdcn.drawing.numbers import is_loss
from segdcn.errors import UserError
from segdcn.runs.files import shown
from segdcn.runs.record import checked_number, read_run, resume_command
from segdcn.sweep.estimate import mean_over_seeds, paired_difference
from segdcn.sweep.plan import Job, Sweep, read_sweep
from segdcn.sweep.results import COSTS, Results, Row, Run


def collect(folder: Path, metric: str | None = None, baseline: Sequence[str] | None = None) -> Results:
    """Read the sweep in ``folder``; nothing is written.

    metric: a figure of metrics.json, or of the test split; None is the sweep's own.
    baseline: overrides of the setting that the others are compared with; None is the sweep's own.

    Raises: ValueError, one line, when sweep.json or a file of a run cannot be read or a run has no such metric. Runs
    that are missing or failed are no error but rows of the results.
    """
    sweep = read_sweep(folder)
    parts = [] if metric in (None, sweep.metric) else [str(metric)]
    parts += [f"than {override}" for override in baseline or ()]
    stem = "_".join(["results", *(re.sub(r"\W+", "-", part) for part in parts)])  # the sweep's own table stays
    asked = sweep.baseline if baseline is None else tuple(baseline)
    sweep = replace(sweep, metric=metric or sweep.metric, baseline=asked)
    metric, compared = sweep.metric, sweep.baseline_setting
    runs = {setting: tuple(_read(sweep, job, metric) for job in jobs) for setting, jobs in sweep.settings.items()}
    figures = {setting: {r.job.seed: r.figure for r in ones if r.figure is not None} for setting, ones in runs.items()}
    rows = tuple(
        Row(
            label=sweep.labels[setting],
            overrides=setting,
            runs=ones,
            is_baseline=setting == compared,
            estimate=mean_over_seeds(list(figures[setting].values())),
            difference=None if setting == compared else paired_difference(figures[setting], figures[compared]),
        )
        for setting, ones in runs.items()
    )
    finished = [run for ones in runs.values() for run in ones if run.state == "finished"]
    notes, warnings = tuple(_notes(metric, rows, finished)), tuple(_warnings(sweep, finished))
    return Results(folder, sweep.name, sweep.command, metric, rows, notes, warnings, stem)


def _read(sweep: Sweep, job: Job, metric: str) -> Run:
    """What ``job`` left behind.

    metric: of the run's own validation, or of a ``segdcn-evaluate split=test`` of its checkpoint.

    Raises: UserError, one line, for a file that is there and cannot be read, or a metric that the run does not know.
    """
    record = read_run(sweep.path(job))
    published = record.published if metric.endswith("/miou") else None
    if record.state != "finished":
        return Run(job, record, record.error, published=published)
    metrics, folder, again = record.metrics, record.folder, resume_command(record.folder)
    if metric.startswith("test/"):
        tested, again = record.evaluation("test"), record.evaluation_command("test")
        if tested is None:
            metrics = {**metrics, metric: None}
        else:
            folder = tested.folder
            metrics = {**metrics, **tested.metrics, "checkpoint": record.checkpoint.name}
    path = folder / "metrics.json"
    if metric not in metrics or "/" not in metric:  # without one it is a fact such as the seed
        figures = [key for key in metrics if "/" in key]
        closest = difflib.get_close_matches(metric, figures, n=5, cutoff=0) or ["none"]
        raise UserError(f"{shown(path)} has no figure {metric!r}: the closest are {', '.join(closest)}")
    return Run(
        job,
        record,
        error=None if metrics[metric] is not None else _why_none(metric, metrics, again),
        figure=checked_number(metrics, metric, path, again),
        costs={key: checked_number(metrics, key, path, again) for key in COSTS},
        published=published,
        metrics=metrics,
    )


def _why_none(metric: str, metrics: Mapping[str, Any], remedy: str) -> str:
    """metrics: of the run, or of its evaluation on the test split where there is one of the checkpoint as it is now."""
    if metrics.get("split") == metric.partition("/")[0]:
        return f"{metric} is not defined: there was nothing to count"
    return f"not evaluated yet: {remedy}"


def _notes(metric: str, rows: tuple[Row, ...], finished: list[Run]) -> Iterable[str]:
    unit = "" if is_loss(metric) else " in percent"
    yield (
        f"{metric}{unit}; ± is half the 95 % interval of the mean over seeds (Student's t). One run alone has none, "
        "and neither have equal figures."
    )
    if len(rows) > 1:
        compared = sum(row.difference is not None and row.difference.p is not None for row in rows)
        correction = (
            f" The table makes {compared} comparisons and corrects no p value for that: times {compared} (at most 1) "
            "they are, by Bonferroni."
            if compared > 1
            else ""
        )
        baseline = next(row.label for row in rows if row.is_baseline)
        yield (
            f"More than the baseline ({baseline}): the mean difference of runs with the same seed, its 95 % interval "
            f"and the p value of the two-sided paired t test.{correction}"
        )
    for protocol in _different(finished, _protocol):
        yield f"Figures: {protocol}."
    sizes = _different(finished, lambda run: run.flops_input)
    if sizes:
        of = " or ".join(size.strip("[]").replace(",", "×") for size in sizes)
        yield (
            f"FLOPs: of one image of {of} pixels, a multiply-add is two. Training: wall time, validations included. "
            "Inference: wall time of the last validation. Medians over the finished runs; runs side by side on one "
            "machine slow each other."
        )
    for commit in _different(finished, lambda run: run.record.commit):
        yield f"Code: commit {commit}."
    for hardware in _different(finished, lambda run: run.record.hardware):
        yield f"Hardware: {hardware}."


def _warnings(sweep: Sweep, finished: list[Run]) -> Iterable[str]:
    for what, describe in (
        ("protocol, inference or checkpoint", _protocol),
        ("commit", lambda run: run.record.commit),
        ("hardware", lambda run: run.record.hardware),
        ("versions of Python or packages", _versions),
    ):
        if len(_different(finished, describe)) > 1:
            yield f"The runs differ in {what}."
    unknown = sum(not run.record.environment for run in finished)
    if unknown:
        yield f"The environment of {unknown} finished run(s) is not known: no environment.json."
    if any(run.record.git.get("dirty") for run in finished):
        yield "Code was changed and not committed when a run was started: the commit alone does not give its figure."
    for key in ("parameters", "flops"):
        for setting, label in sweep.labels.items():
            counts = {run.cost(key) for run in finished if run.job.setting == setting} - {None}
            if len(counts) > 1:
                yield f"The runs of {label} differ in {key}."


def _different(runs: list[Run], describe: Callable[[Run], str | None]) -> list[str]:
    """How runs are described, each description once, in their order."""
    return list(dict.fromkeys(text for run in runs if (text := describe(run))))


def _protocol(run: Run) -> str:
    metrics = run.metrics
    parts = [
        f"protocol {metrics.get('protocol', 'unknown')}",
        metrics.get("protocol_rule"),
        metrics.get("inference"),
        None if "images" not in metrics else f"{metrics['images']} {metrics.get('split', '')} images",
        metrics.get("checkpoint"),
    ]
    return ", ".join(" ".join(str(part).split()) for part in parts if part)


def _versions(run: Run) -> str | None:
    if not run.record.environment:
        return None
    return f"{run.record.environment.get('python')} {run.record.environment.get('packages')}"
