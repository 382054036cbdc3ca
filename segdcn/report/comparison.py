"""The pages that compare: several runs with the first of them, the settings of a sweep with its baseline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from segdcn import UserError
from segdcn.report import curves, tables
from segdcn.report.contents import FILE, MOVE_THE_LINE, THOROUGH, look, made, open_subjects, write_page
from segdcn.report.images import OpenDataset
from segdcn.report.records import RunRecord, read_run
from segdcn.runs.files import shown, typed
from segdcn.sweep.estimate import Estimate
from segdcn.sweep.plan import is_loss, shown_figure
from segdcn.sweep.results import Results, Row, collect

MAX_NETWORKS = 4  # in a viewer
GREY = (128, 128, 128)


def report_runs(
    folders: Sequence[Path], open_dataset: OpenDataset, output: Path, budget: float = THOROUGH, trust: bool = False
) -> Path:
    """Write the page that compares runs with the first of them.

    Raises: as ``report_run``; ValueError for runs whose classes differ.
    """
    read = [read_run(folder) for folder in folders]
    names = tables.unique_names(read)
    records = [replace(record, name=name) for record, name in zip(read, names, strict=True)]
    _check_comparable(records)
    contents: dict[str, Any] = {
        "title": " · ".join(dict.fromkeys(record.name for record in read)),
        "subtitle": f"{len(records)} runs",
        "kind": "a comparison of runs",
        "notes": [f"{record.name}: {note}" for record in records for note in record.notes],
    }
    parts = {"comparison": lambda: _runs_table(records)}
    parts |= _shared_parts(records, range(len(records)), names)
    class_names = next((record.class_names for record in records if record.iou), [])
    if class_names:
        parts["class_comparison"] = lambda: _class_comparison(
            class_names, records[0].name, records[0].iou, [(r.name, r.iou, None) for r in records[1:]]
        )
    contents |= made(parts, contents["notes"])
    return _with_images(contents, records[:MAX_NETWORKS], open_dataset, output, budget, trust)


def _runs_table(records: Sequence[RunRecord]) -> dict[str, Any]:
    head = "run|mean IoU, %|difference|95 % interval|pixel accuracy, %|boundary mIoU, %|parameters|FLOPs|training|seed"
    return {
        "lead": "Differences are in percentage points of the mean IoU, to the first run.",
        "head": head.split("|"),
        "rows": [list(row) for row in tables.compared_runs(records)],
        "notes": [
            "The interval is a paired bootstrap over the images: each resample draws the same images for both runs."
            " It tells how the difference varies with the images, not with the training’s seed."
        ],
    }


def report_sweep(
    folder: Path,
    open_dataset: OpenDataset,
    output: Path | None = None,
    budget: float = THOROUGH,
    trust: bool = False,
) -> Path:
    """Write the page of a sweep, by default into its folder: its settings compared by seed, baseline against best.

    Raises: as ``report_run``, and as ``segdcn.sweep.results.collect``; ValueError for a sweep without a finished run.
    """
    results = collect(folder)
    finished = [(row, run) for row in results.rows for run in row.runs if run.state == "finished"]
    if not finished:
        raise UserError(
            f"{shown(folder)} has no finished run yet: segdcn-sweep status {typed(folder)} tells how far it is"
        )
    records, colours = [], []
    for number, row in enumerate(results.rows):
        for run in row.runs:
            if run.state == "finished":
                seed = "" if run.job.seed is None else f", seed {run.job.seed}"
                records.append(replace(read_run(folder / run.job.folder), name=f"{tables.readable(row.label)}{seed}"))
                colours.append(number)
    _check_comparable(records)
    contents: dict[str, Any] = {
        "title": results.name,
        "kind": "a sweep",
        "subtitle": results.command,
        "notes": [
            *(f"{record.name}: {note}" for record in records for note in record.notes),
            *results.warnings,
        ],
    }
    parts = {
        "comparison": lambda: _sweep_table(results),
        "class_comparison": lambda: _sweep_classes(results, records[0]),
        **_shared_parts(records, colours, [tables.readable(row.label) for row in results.rows]),
    }
    contents |= made(parts, contents["notes"])
    pair = _baseline_and_best(results)
    by_folder = {record.folder: record for record in records}
    looked_at = [by_folder[folder / run.job.folder] for run in pair] if pair else records[:1]
    return _with_images(contents, looked_at, open_dataset, output or folder / FILE, budget, trust)


def _check_comparable(records: Sequence[RunRecord]) -> None:
    """Of runs that have figures; one that was not validated has none."""
    first, *others = [record for record in records if record.iou] or [records[0]]
    for record in others:
        if set(record.iou) != set(first.iou):
            raise UserError(
                f"{shown(first.folder)} and {shown(record.folder)} cannot be compared: their classes differ"
                f" ({len(first.iou)} and {len(record.iou)}); give runs on one data set"
            )


def _shared_parts(
    records: Sequence[RunRecord], colours: Sequence[int], labels: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    return {
        "charts": lambda: curves.overlaid(records, colours, labels),
        "epoch_tables": lambda: curves.miou_table(records),
        "provenance": lambda: [(record.name, tables.provenance(record)) for record in records],
    }


def _with_images(
    contents: dict[str, Any],
    records: Sequence[RunRecord],
    open_dataset: OpenDataset,
    output: Path,
    budget: float,
    trust: bool,
) -> Path:
    subjects, why_not = open_subjects(records, open_dataset, trust)
    contents["notes"] += why_not
    if subjects:
        contents |= look(subjects, budget, contents["notes"])
        first = subjects[0].predictor
        colours = dict(zip(first.class_names, first.palette, strict=True))
        for row in contents.get("class_comparison", {}).get("rows", ()):
            row["colour"] = tuple(colours.get(row["name"], GREY))
    if contents.get("gallery"):
        counted = all(record.counts is not None for record in records)
        names = " and ".join(record.name for record in records[:2])
        contents["gallery"] |= {
            "heading": "Where they disagree most" if counted and len(records) > 1 else "Images",
            "lead": (
                f"The images whose own mean IoU differs most between {names}. " if counted and len(records) > 1 else ""
            )
            + MOVE_THE_LINE,
        }
    return write_page(contents, output)


def _class_comparison(
    names: Sequence[str],
    base_name: str,
    base: Mapping[str, float | None],
    others: Sequence[tuple[str, Mapping[str, float | None], Mapping[str, float | None] | None]],
) -> dict[str, Any]:
    """others: name, IoU by class, and the difference by class where it is not that of the two figures."""
    rows, largest = [], 1e-9
    for name in names:
        cells = []
        for _, iou, differences in others:
            figure, first = iou.get(name), base.get(name)
            difference = figure - first if figure is not None and first is not None else None
            if differences is not None:
                difference = differences.get(name)
            largest = max(largest, abs(difference or 0))
            cells.append((figure, difference))
        rows.append({"name": name, "colour": GREY, "base": base.get(name), "others": cells})
    return {
        "lead": f"IoU in percent, and the difference to {base_name} in percentage points.",
        "head": [f"{base_name}, %", *(name for name, _, _ in others)],
        "rows": rows,
        "largest": largest,
    }


def _sweep_table(results: Results) -> dict[str, Any]:
    rows = []
    for row in results.rows:
        estimate, difference = row.estimate, row.difference
        rows.append(
            [
                tables.readable(row.label),
                f"{len(row.figures)} of {len(row.runs)}",
                _with_half(estimate, results.metric, ""),
                "baseline" if row.is_baseline else _with_half(difference, results.metric, "+"),
                "" if difference is None or difference.p is None else f"{difference.p:.3f}",
                tables.large(row.median("parameters")),
                tables.large(row.median("flops")),
                tables.duration(row.median("training_seconds")),
            ]
        )
    unit = "" if is_loss(results.metric) else ", %"
    head = f"setting|runs|{results.metric}{unit}|more than the baseline, by seed|p|parameters|FLOPs|training"
    return {
        "lead": f"{results.metric} over seeds; the difference to the baseline pairs runs of one seed.",
        "head": head.split("|"),
        "rows": rows,
        "notes": results.notes,
    }


def _with_half(estimate: Estimate | None, metric: str, plus: str) -> str:
    if estimate is None:
        return tables.NONE
    mean = shown_figure(estimate.mean, metric).replace("-", "−")
    half = "" if estimate.half is None else f" ± {shown_figure(estimate.half, metric)}"
    return f"{plus if estimate.mean > 0 else ''}{mean}{half}"


def _iou_by_class(row: Row, prefix: str) -> dict[str, dict[str | None, float]]:
    """class → seed → IoU."""
    found: dict[str, dict[str | None, float]] = {}
    for run in row.runs:
        for key, value in (run.facts or {}).items():
            if key.startswith(prefix) and isinstance(value, int | float):
                found.setdefault(key[len(prefix) :], {})[run.job.seed] = value
    return found


def _sweep_classes(results: Results, record: RunRecord) -> dict[str, Any]:
    prefix = f"{record.split}/iou/"
    base = _iou_by_class(results.baseline, prefix)
    means = {name: statistics.fmean(values.values()) for name, values in base.items()}
    others = []
    for row in results.rows:
        if row.is_baseline:
            continue
        found = _iou_by_class(row, prefix)
        differences: dict[str, float | None] = {}
        for name, values in found.items():
            pairs = [value - base[name][seed] for seed, value in values.items() if seed in base.get(name, {})]
            differences[name] = statistics.fmean(pairs) if pairs else None
        iou = {name: statistics.fmean(values.values()) for name, values in found.items()}
        others.append((tables.readable(row.label), iou, differences))
    found_table = _class_comparison(record.class_names, tables.readable(results.baseline.label), means, others)
    found_table["lead"] = (
        "Mean IoU over seeds in percent, and the mean difference to the baseline in percentage points, paired by seed."
    )
    return found_table


def _baseline_and_best(results: Results) -> list[Any]:
    """A run of the baseline and one of the best other setting, of one seed; empty where there is no such pair."""
    sign = -1 if is_loss(results.metric) else 1
    others = [row for row in results.rows if not row.is_baseline and row.estimate is not None]
    others.sort(key=lambda row: sign * row.estimate.mean if row.estimate else 0.0, reverse=True)
    base = {run.job.seed: run for run in results.baseline.runs if run.figure is not None}
    for row in others:
        for run in row.runs:
            if run.figure is not None and run.job.seed in base:
                return [base[run.job.seed], run]
    return []
