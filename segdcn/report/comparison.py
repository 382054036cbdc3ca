"""Tables that compare: several runs with the first of them, the settings of a sweep with its baseline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from segdcn.drawing.numbers import NONE, duration, is_loss, large, metric_value, percent, signed, unit
from segdcn.evaluation import bootstrap_difference, get_protocol
from segdcn.report.curves import Shares
from segdcn.report.runs import PageRun, readable
from segdcn.report.tables import GREY, Colour
from segdcn.sweep.results import Estimate, Results, Row, Run

COSTS = {"parameters": "parameters", "flops": "FLOPs"}
INTERVAL, NOT_PAIRED = "95 % interval", "not the same images, or not counted"

ByClass = Mapping[str, float | None]
"""A figure of each class."""


def runs_table(
    runs: Sequence[PageRun],
    compared: Shares,
    interval: Callable[[str, PageRun], str],
    others: Shares = MappingProxyType({}),
) -> dict[str, Any]:
    """One row per run, the first as the baseline; without columns in which no run has anything.

    compared: figures of which the difference to the first run is told.
    interval: that of the difference of such a figure in a run, in words.
    others: figures that just stand there.
    """
    records = [run.record for run in runs]
    columns = [("run", [run.name for run in runs])]
    for key, label in compared.items():
        figures = [record.figure(key) for record in records]
        differences = [signed(_difference(figure, figures[0])) for figure in figures[1:]]
        columns.append((f"{label}, %", [percent(figure) for figure in figures]))
        columns.append(("difference", ["baseline", *differences]))
        columns.append((INTERVAL, ["", *(interval(key, run) for run in runs[1:])]))
    columns += [(f"{label}, %", [percent(record.figure(key)) for record in records]) for key, label in others.items()]
    columns += [(label, [large(record.number(key)) for record in records]) for key, label in COSTS.items()]
    columns.append(("training", [duration(record.number("training_seconds")) for record in records]))
    columns.append(("seed", [str(record.seed) for record in records]))
    columns = [(head, cells) for head, cells in columns if any(cell not in ("", NONE) for cell in cells)]
    head = [head for head, _ in columns]
    notes = [
        "The interval is a paired bootstrap over the images: each resample draws the same images for both runs."
        " It tells how the difference varies with the images, not with the training’s seed."
    ]
    return {
        "lead": "Differences are in percentage points, to the first run.",
        "head": head,
        "rows": list(zip(*(cells for _, cells in columns), strict=True)),
        "notes": notes if INTERVAL in head else [],
    }


def paired_interval(run: PageRun, first: PageRun) -> str:
    """The 95 % interval of the difference in mean IoU, by a bootstrap that draws the same images for both.

    ``NOT_PAIRED`` where they did not count the same images in the same way.
    """
    one, other = run.counts, first.counts
    if one is None or other is None or list(one.names) != list(other.names) or one.images.shape != other.images.shape:
        return NOT_PAIRED
    if not counted_alike(run, first) or not bool((one.images[:, 1] == other.images[:, 1]).all()):
        return NOT_PAIRED
    protocol = get_protocol(str(run.record.metrics.get("protocol", "native")), len(one.class_names))
    return ends(*bootstrap_difference(one.images, other.images, absent_is_zero=protocol.absent_is_zero))


def counted_alike(run: PageRun, other: PageRun) -> bool:
    """Whether the figures of two runs are of one split and by one protocol."""
    return all(run.record.metrics.get(key) == other.record.metrics.get(key) for key in ("split", "protocol"))


def ends(low: float, high: float) -> str:
    """An interval of a difference, in words."""
    return f"{signed(low)} to {signed(high)}"


def runs_classes(
    runs: Sequence[PageRun],
    colours: Mapping[str, Colour],
    kind: str = "iou",
    called: str = "IoU",
    intervals: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """A figure of each class in each run, and its difference to the first.

    kind, called: the figure, see ``RunRecord.by_class``, and what it is called.
    intervals: of each class a text for each run.
    """
    names = next((list(found) for run in runs if (found := run.record.by_class(kind))), None)
    if names is None:
        return None
    first, *others = runs
    base = first.record.by_class(kind)
    columns = []
    for run in others:
        figures = run.record.by_class(kind)
        columns.append((run.name, figures, {name: _difference(figures.get(name), base.get(name)) for name in names}))
    lead = f"{called} in percent, and the difference to {first.name} in percentage points."
    return _class_table(lead, names, (first.name, base), columns, colours, intervals)


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _class_table(
    lead: str,
    names: Sequence[str],
    base: tuple[str, ByClass],
    others: Sequence[tuple[str, ByClass, ByClass]],
    colours: Mapping[str, Colour],
    intervals: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """base: its name and figures; others: name, figures, and difference to the base; intervals: texts for each."""
    differences = [abs(value) for _, _, column in others for value in column.values() if value is not None]
    rows = [
        {
            "name": name,
            "colour": colours.get(name, GREY),
            "base": base[1].get(name),
            "others": [(figures.get(name), difference.get(name)) for _, figures, difference in others],
            "intervals": intervals.get(name),
        }
        for name in names
    ]
    head = [f"{base[0]}, %", *(name for name, _, _ in others)]
    return {"lead": lead, "head": head, "rows": rows, "largest": max(differences, default=0) or 1}


# --- of a sweep -------------------------------------------------------------------------------------------------------


def sweep_table(results: Results) -> dict[str, Any]:
    """One row per setting."""
    metric = results.metric
    head = f"setting|runs|{metric}{unit(metric)}|more than the baseline, by seed|p|parameters|FLOPs|training"
    rows = [
        [
            readable(row.label),
            f"{len(row.figures)} of {len(row.runs)}",
            _with_half(row.estimate, metric, ""),
            "baseline" if row.is_baseline else _with_half(row.difference, metric, "+"),
            "" if row.difference is None or row.difference.p is None else f"{row.difference.p:.3f}",
            large(row.cost("parameters")),
            large(row.cost("flops")),
            duration(row.cost("training_seconds")),
        ]
        for row in results.rows
    ]
    return {
        "lead": f"{metric} over seeds; the difference to the baseline pairs runs of one seed.",
        "head": head.split("|"),
        "rows": rows,
        "notes": results.notes,
    }


def _with_half(estimate: Estimate | None, metric: str, plus: str) -> str:
    if estimate is None:
        return NONE
    mean = metric_value(estimate.mean, metric).replace("-", "−")
    half = "" if estimate.half is None else f" ± {metric_value(estimate.half, metric)}"
    return f"{plus if estimate.mean > 0 else ''}{mean}{half}"


def sweep_classes(
    results: Results, names: Sequence[str], colours: Mapping[str, Colour], kind: str = "iou", called: str = "IoU"
) -> dict[str, Any]:
    """The mean over seeds of a figure of each class, see ``runs_classes``, and its mean difference to the baseline."""
    base = _by_class(results.baseline, kind)
    columns = []
    for row in results.rows:
        if not row.is_baseline:
            figures = _by_class(row, kind)
            differences = {
                name: _mean([value - base[name][seed] for seed, value in seeds.items() if seed in base.get(name, {})])
                for name, seeds in figures.items()
            }
            columns.append((readable(row.label), _means(figures), differences))
    lead = (
        f"Mean {called} over seeds in percent, and the mean difference to the baseline in percentage points, paired by"
        " seed."
    )
    return _class_table(lead, names, (readable(results.baseline.label), _means(base)), columns, colours)


def _by_class(row: Row, kind: str) -> dict[str, dict[str | None, float]]:
    """class → seed → figure."""
    found: dict[str, dict[str | None, float]] = {}
    for run in row.runs:
        for name, value in run.record.by_class(kind).items():
            if value is not None:
                found.setdefault(name, {})[run.job.seed] = value
    return found


def _means(by_class: Mapping[str, Mapping[str | None, float]]) -> ByClass:
    return {name: statistics.fmean(seeds.values()) for name, seeds in by_class.items()}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def baseline_and_best(results: Results) -> tuple[Run, Run] | None:
    """A run of the baseline and one of the best other setting, of one seed; None where there is no such pair."""
    sign = -1 if is_loss(results.metric) else 1
    others = [(row.estimate.mean, row) for row in results.rows if not row.is_baseline and row.estimate is not None]
    others.sort(key=lambda one: sign * one[0], reverse=True)
    base = {run.job.seed: run for run in results.baseline.runs if run.figure is not None}
    for _, row in others:
        for run in row.runs:
            if run.figure is not None and run.job.seed in base:
                return base[run.job.seed], run
    return None
