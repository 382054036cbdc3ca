"""The results of a sweep: one row per setting, with what its seeds tell about the difference to the baseline."""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group

from segdcn.runs.files import shown, write_bytes, write_json, write_text
from segdcn.sweep import tables
from segdcn.sweep.estimate import Estimate, mean_over_seeds, paired_difference
from segdcn.sweep.plan import Sweep, is_loss, read_sweep
from segdcn.sweep.runs import STATES, Run, read_run

KINDS = ("csv", "json", "md", "png")


@dataclass(frozen=True)
class Row:
    """One setting; figures are fractions, as in metrics.json.

    estimate: over the runs that have a figure; None without any.
    difference: to the baseline, paired by seed; None of the baseline itself and without a common seed.
    """

    label: str
    overrides: tuple[str, ...]
    runs: tuple[Run, ...]
    is_baseline: bool
    estimate: Estimate | None
    difference: Estimate | None

    @property
    def states(self) -> dict[str, int]:
        """How many runs there are in each state, finished ones first, those without a figure apart."""
        found = Counter("without a figure" if run.state == "finished" and run.error else run.state for run in self.runs)
        return {state: found[state] for state in (*STATES, "without a figure") if found[state]}

    @property
    def figures(self) -> dict[str | None, float]:
        """Figure by seed, of the runs that have one."""
        return {run.job.seed: run.figure for run in self.runs if run.figure is not None}

    @property
    def paper(self) -> float | None:
        return next((run.paper for run in self.runs if run.paper is not None), None)

    def median(self, cost: str) -> Any:
        """The median of a cost over the runs that know it: ``parameters``, ``flops``, ``training_seconds``, ..."""
        known = [getattr(run, cost) for run in self.runs if getattr(run, cost) is not None]
        if not known:
            return None
        return statistics.median_low(known) if isinstance(known[0], int) else statistics.median(known)

    @property
    def flops_input(self) -> str | None:
        return next((run.flops_input for run in self.runs if run.flops_input is not None), None)


@dataclass(frozen=True)
class Results:
    """All settings of a sweep in its order; ``rich.print`` shows the table, ``write`` leaves the files.

    notes, warnings: what a reader must know to understand and to trust the figures, in whole sentences.
    stem: of the files' names.
    """

    name: str
    command: str
    metric: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    stem: str = "results"

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.runs]

    @property
    def without_figure(self) -> list[Run]:
        return [run for run in self.runs if run.figure is None]

    @property
    def baseline(self) -> Row:
        return next(row for row in self.rows if row.is_baseline)

    def write(self, folder: Path) -> None:
        """A file of each of ``KINDS``, whole or not at all.

        Same runs, same bytes: no time stamps.
        """
        from segdcn.sweep.plot import plot

        picture = plot(self)  # whatever can go wrong does before a file is replaced
        csv, markdown, plain = tables.as_csv(self), tables.as_markdown(self), tables.as_json(self)
        write_text(folder / f"{self.stem}.csv", csv)
        write_json(folder / f"{self.stem}.json", plain)
        write_text(folder / f"{self.stem}.md", markdown)
        write_bytes(folder / f"{self.stem}.png", picture)

    def __rich__(self) -> Group:
        return tables.as_rich(self)


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
    runs = {setting: tuple(read_run(sweep, job, metric) for job in jobs) for setting, jobs in sweep.settings.items()}
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
    return Results(sweep.name, sweep.command, metric, rows, notes, warnings, stem)


def report(folder: Path, metric: str | None = None, baseline: Sequence[str] | None = None) -> bool:
    """Print the results of the sweep in ``folder`` and write them there; returns whether every run has a figure.

    Raises: ValueError as ``collect`` does, before anything is written.
    """
    results = collect(folder, metric, baseline)
    results.write(folder)
    console = Console() if sys.stdout.isatty() else Console(width=160)  # in a file nothing has to be folded
    console.print(results)
    print(f"{results.stem}.{{{','.join(KINDS)}}} in {shown(folder)}", flush=True)
    if results.without_figure:
        lacking, planned = len(results.without_figure), len(results.runs)
        print(f"incomplete: {lacking} of {planned} runs have no figure", file=sys.stderr)
    return not results.without_figure


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
    for fact in _different(finished, _protocol):
        yield f"Figures: {fact}."
    sizes = _different(finished, lambda run: run.flops_input)
    if sizes:
        of = " or ".join(size.strip("[]").replace(",", "×") for size in sizes)
        yield (
            f"FLOPs: of one image of {of} pixels, a multiply-add is two. Training: wall time, validations included. "
            "Inference: wall time of the last validation. Medians over the finished runs; runs side by side on one "
            "machine slow each other."
        )
    for fact in _different(finished, _commit):
        yield f"Code: {fact}."
    for fact in _different(finished, _hardware):
        yield f"Hardware: {fact}."


def _warnings(sweep: Sweep, finished: list[Run]) -> Iterable[str]:
    for what, told in (
        ("protocol, inference or checkpoint", _protocol),
        ("commit", _commit),
        ("hardware", _hardware),
        ("versions of Python or packages", _versions),
    ):
        if len(_different(finished, told)) > 1:
            yield f"The runs differ in {what}."
    unknown = sum(run.environment is None for run in finished)
    if unknown:
        yield f"The environment of {unknown} finished run(s) is not known: no environment.json."
    if any(_git(run).get("dirty") for run in finished):
        yield "Code was changed and not committed when a run was started: the commit alone does not give its figure."
    for key in ("parameters", "flops"):
        for setting, label in sweep.labels.items():
            counts = {getattr(run, key) for run in finished if run.job.setting == setting} - {None}
            if len(counts) > 1:
                yield f"The runs of {label} differ in {key}."


def _different(runs: list[Run], told: Callable[[Run], str | None]) -> list[str]:
    """What runs tell, each answer once, in their order."""
    return list(dict.fromkeys(answer for run in runs if (answer := told(run)) is not None))


def _protocol(run: Run) -> str:
    facts = run.facts or {}
    parts = [
        f"protocol {facts.get('protocol', 'unknown')}",
        facts.get("protocol_rule"),
        facts.get("inference"),
        None if "images" not in facts else f"{facts['images']} {facts.get('split', '')} images",
        facts.get("checkpoint"),
    ]
    return ", ".join(" ".join(str(part).split()) for part in parts if part)


def _git(run: Run) -> dict[str, Any]:
    git = (run.environment or {}).get("git")
    return git if isinstance(git, dict) else {}


def _commit(run: Run) -> str | None:
    if run.environment is None:
        return None
    git = _git(run)
    if not git:
        return "an installed package, commit unknown"
    return f"commit {git.get('commit')}" + (", with changes" if git.get("dirty") else "")


def _hardware(run: Run) -> str | None:
    if run.environment is None:
        return None
    about = run.environment
    devices = about.get("devices") or 0
    return f"{f'{devices} × ' if devices else ''}{about.get('device')}, {about.get('threads')} thread(s)"


def _versions(run: Run) -> str | None:
    if run.environment is None:
        return None
    return f"{run.environment.get('python')} {run.environment.get('packages')}"
