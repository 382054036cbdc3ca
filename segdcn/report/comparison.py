"""Tables that compare: several runs with the first of them, the settings of a sweep with its baseline."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from segdcn.drawing.numbers import NONE, duration, is_loss, large, metric_value, percent, signed, unit
from segdcn.evaluation import bootstrap_difference, get_protocol
from segdcn.report.runs import PageRun, readable
from segdcn.report.tables import GREY, Colour
from segdcn.sweep.results import Estimate, Results, Row, Run

Iou = Mapping[str, float | None]
"""Of each class."""


def runs_table(runs: Sequence[PageRun]) -> dict[str, Any]:
    """One row per run, the first as the baseline."""
    head = "run|mean IoU, %|difference|95 % interval|pixel accuracy, %|boundary mIoU, %|parameters|FLOPs|training|seed"
    first, rows = runs[0], []
    for run in runs:
        record = run.record
        miou, base = record.figure("miou"), first.record.figure("miou")
        difference, interval = "baseline", ""
        if run is not first:
            difference = NONE if miou is None or base is None else signed(miou - base)
            interval = paired_interval(run, first) or "not the same images, or not counted"
        rows.append(
            [
                run.name,
                percent(miou),
                difference,
                interval,
                percent(record.figure("pixel_accuracy")),
                percent(record.figure("boundary_miou")),
                large(record.number("parameters")),
                large(record.number("flops")),
                duration(record.number("training_seconds")),
                str(record.seed),
            ]
        )
    return {
        "lead": "Differences are in percentage points of the mean IoU, to the first run.",
        "head": head.split("|"),
        "rows": rows,
        "notes": [
            "The interval is a paired bootstrap over the images: each resample draws the same images for both runs."
            " It tells how the difference varies with the images, not with the training’s seed."
        ],
    }


def paired_interval(run: PageRun, first: PageRun) -> str | None:
    """The 95 % interval of the difference in mean IoU, by a bootstrap that draws the same images for both.

    None where they did not count the same images in the same way.
    """
    one, other = run.counts, first.counts
    if one is None or other is None or list(one.names) != list(other.names) or one.images.shape != other.images.shape:
        return None
    alike = all(run.record.metrics.get(key) == first.record.metrics.get(key) for key in ("split", "protocol"))
    if not alike or not bool((one.images[:, 1] == other.images[:, 1]).all()):
        return None
    protocol = get_protocol(str(run.record.metrics.get("protocol", "native")), len(one.class_names))
    low, high = bootstrap_difference(one.images, other.images, absent_is_zero=protocol.absent_is_zero)
    return f"{signed(low)} to {signed(high)}"


def runs_classes(runs: Sequence[PageRun], colours: Mapping[str, Colour]) -> dict[str, Any] | None:
    """IoU of each class in each run, and its difference to the first."""
    names = next((list(run.record.iou) for run in runs if run.record.iou), None)
    if names is None:
        return None
    first, *others = runs
    base = first.record.iou
    columns = []
    for run in others:
        iou = run.record.iou
        columns.append((run.name, iou, {name: _difference(iou.get(name), base.get(name)) for name in names}))
    lead = f"IoU in percent, and the difference to {first.name} in percentage points."
    return _class_table(lead, names, (first.name, base), columns, colours)


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _class_table(
    lead: str,
    names: Sequence[str],
    base: tuple[str, Iou],
    others: Sequence[tuple[str, Iou, Iou]],
    colours: Mapping[str, Colour],
) -> dict[str, Any]:
    """base: its name and IoU; others: name, IoU, and difference to the base."""
    differences = [abs(value) for _, _, column in others for value in column.values() if value is not None]
    rows = [
        {
            "name": name,
            "colour": colours.get(name, GREY),
            "base": base[1].get(name),
            "others": [(iou.get(name), difference.get(name)) for _, iou, difference in others],
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


def sweep_classes(results: Results, names: Sequence[str], colours: Mapping[str, Colour]) -> dict[str, Any]:
    """Mean IoU of each class over seeds, and its mean difference to the baseline's."""
    base = _iou_by_class(results.baseline)
    columns = []
    for row in results.rows:
        if not row.is_baseline:
            iou = _iou_by_class(row)
            differences = {
                name: _mean([value - base[name][seed] for seed, value in seeds.items() if seed in base.get(name, {})])
                for name, seeds in iou.items()
            }
            columns.append((readable(row.label), _means(iou), differences))
    lead = (
        "Mean IoU over seeds in percent, and the mean difference to the baseline in percentage points, paired by seed."
    )
    return _class_table(lead, names, (readable(results.baseline.label), _means(base)), columns, colours)


def _iou_by_class(row: Row) -> dict[str, dict[str | None, float]]:
    """class → seed → IoU."""
    found: dict[str, dict[str | None, float]] = {}
    for run in row.runs:
        for name, value in run.record.iou.items():
            if value is not None:
                found.setdefault(name, {})[run.job.seed] = value
    return found


def _means(by_class: Mapping[str, Mapping[str | None, float]]) -> Iou:
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
