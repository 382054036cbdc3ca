"""What the page of a run, of several runs, or of a sweep shows, from what they left behind."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segdcn.report import tables
from segdcn.report.charts import Chart, Series, line_chart
from segdcn.report.images import OpenDataset, Subject, chosen_images, gallery, offset_study, open_subject, viewer
from segdcn.report.page import render
from segdcn.report.records import RunRecord, read_run
from segdcn.run_folder import shown, write_text
from segdcn.sweep.results import Results, Row, collect

FILE = "report.html"
STUDIED_IMAGES = 64
# Floating point operations for receptive fields: within a training's last seconds, and for a command of its own
QUICK, THOROUGH = 130e9, 500e9
MAX_NETWORKS = 4  # in a viewer
GREY = (128, 128, 128)


def report_run(folder: Path, open_dataset: OpenDataset, output: Path | None = None, budget: float = THOROUGH) -> Path:
    """Write the page of one run, by default into its folder; returns where it is.

    Raises: FileNotFoundError, ValueError, OSError, one line: no finished run in the folder, or a damaged file of it.
    """
    record = read_run(folder)
    epochs = record.epochs
    contents: dict[str, Any] = {
        "title": record.name,
        "kind": "a training run",
        "subtitle": ", ".join(filter(None, (tables.network_of(record), f"seed {record.seed}"))),
        "tiles": tables.tiles(record),
        "charts": _run_charts(epochs, record.split),
        "epoch_tables": _epoch_table("Figures of each epoch", epochs, record.split),
        "provenance": [("What these figures depend on", tables.provenance(record))],
        "notes": list(record.notes),
    }
    palette: Sequence[Sequence[int]] = ()
    subject, why_not = _open([record], open_dataset)
    if subject:
        palette = subject[0].predictor.palette
        contents |= _looked_at(subject, budget)
        if contents["gallery"]:
            counted = record.counts is not None
            contents["gallery"] |= {
                "heading": "Best, median and worst images" if counted else "Images",
                "lead": (
                    "By the mean IoU over the classes that occur in the image. " if counted else ""
                )
                + "Move the line in a picture to see what lies under it.",
            }
    contents["notes"] += why_not
    rows = tables.classes(record, palette)
    contents["classes"] = {"rows": rows, "intervals": record.counts is not None} if rows else None
    if record.counts is not None:
        contents["confusion"] = tables.confusion(record.counts)
    return _write(contents, output or folder / FILE)


def report_runs(
    folders: Sequence[Path], open_dataset: OpenDataset, output: Path, budget: float = THOROUGH
) -> Path:
    """Write the page that compares runs with the first of them.

    Raises: as ``report_run``; ValueError for runs whose classes differ.
    """
    records = [read_run(folder) for folder in folders]
    names = tables.unique_names(folders, [record.name for record in records])
    records = [_named(record, name) for record, name in zip(records, names, strict=True)]
    _check_comparable(records)
    rows = [list(row) for row in tables.compared_runs(records)]
    head = "run|mean IoU, %|difference|95 % interval|pixel accuracy, %|boundary mIoU, %|parameters|FLOPs|training|seed"
    contents = _comparison_of(records, list(range(len(records))))
    contents |= {
        "title": " · ".join(names) if len(names) < 4 else f"{len(names)} runs",
        "kind": "a comparison of runs",
        "comparison": {
            "lead": "Differences are in percentage points of the mean IoU, to the first run.",
            "head": head.split("|"),
            "rows": rows,
            "notes": [
                "The interval is a paired bootstrap over the images: each resample draws the same images for both runs."
                " It tells how the difference varies with the images, not with the training’s seed."
            ],
        },
        "class_comparison": _class_comparison(
            records[0].class_names, records[0].name, records[0].iou, [(r.name, r.iou, None) for r in records[1:]]
        ),
    }
    return _with_images(contents, records[:MAX_NETWORKS], open_dataset, output, budget)


def report_sweep(folder: Path, open_dataset: OpenDataset, output: Path | None = None, budget: float = THOROUGH) -> Path:
    """Write the page of a sweep, by default into its folder: its settings compared by seed, baseline against best.

    Raises: as ``report_run``, and as ``segdcn.sweep.results.collect``; ValueError for a sweep without a finished run.
    """
    results = collect(folder)
    finished = [(row, run) for row in results.rows for run in row.runs if run.state == "finished"]
    if not finished:
        raise ValueError(f"{shown(folder)} has no finished run yet: segdcn-sweep status {shown(folder)} tells how far it is")
    records, colours = [], []
    for number, row in enumerate(results.rows):
        for run in row.runs:
            if run.state == "finished":
                seed = "" if run.job.seed is None else f", seed {run.job.seed}"
                records.append(_named(read_run(folder / run.job.folder), f"{tables.readable(row.label)}{seed}"))
                colours.append(number)
    _check_comparable(records)
    contents = _comparison_of(records, colours, [tables.readable(row.label) for row in results.rows])
    contents |= {
        "title": results.name,
        "kind": "a sweep",
        "subtitle": results.command,
        "comparison": _sweep_table(results),
        "class_comparison": _sweep_classes(results, records[0]),
        "notes": [*contents["notes"], *results.warnings],
    }
    pair = _baseline_and_best(results)
    by_folder = {record.folder: record for record in records}
    looked_at = [by_folder[folder / run.job.folder] for run in pair] if pair else records[:1]
    return _with_images(contents, looked_at, open_dataset, output or folder / FILE, budget)


# --- the parts ---------------------------------------------------------------------------------------------------------


def _open(records: Sequence[RunRecord], open_dataset: OpenDataset) -> tuple[list[Subject], list[str]]:
    """The runs with networks and data, or none of them and why."""
    try:
        return [open_subject(record, open_dataset) for record in records], []
    except (ValueError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        return [], [f"Images, viewer and offsets are left out: {reason}. A data set that was moved is found by --data ROOT."]


def _looked_at(subjects: list[Subject], budget: float) -> dict[str, Any]:
    chosen = chosen_images(subjects)
    if not chosen:
        return {"gallery": None}
    found = {"gallery": gallery(subjects, chosen), "viewer": viewer(subjects, chosen, budget)}
    studies = [(subject, offset_study(subject, STUDIED_IMAGES)) for subject in subjects]
    measured = [(subject.record.name, *study) for subject, study in studies if study is not None]
    if measured:
        found["dilations"] = [tables.dilations(study, name, text) for name, study, text in measured]
        found["histograms"] = [
            {"chart": chart}
            for name, study, _ in measured
            if (chart := _histogram(study, f"Offset lengths of {name}, pixels of the layer’s map")) is not None
        ]
    return found


def _with_images(
    contents: dict[str, Any], records: Sequence[RunRecord], open_dataset: OpenDataset, output: Path, budget: float
) -> Path:
    subjects, why_not = _open(records, open_dataset)
    contents["notes"] += why_not
    if subjects:
        contents |= _looked_at(subjects, budget)
    if contents.get("gallery"):
        counted = all(record.counts is not None for record in records)
        names = " and ".join(record.name for record in records[:2])
        contents["gallery"] |= {
            "heading": "Where they disagree most" if counted and len(records) > 1 else "Images",
            "lead": (
                f"The images whose own mean IoU differs most between {names}. " if counted and len(records) > 1 else ""
            )
            + "Move the line in a picture to see what lies under it.",
        }
    return _write(contents, output)


def _write(contents: dict[str, Any], output: Path) -> Path:
    sections = (
        ("comparison", "Comparison", "comparison"),
        ("viewer", "Viewer", "viewer"),
        ("images", "Images", "gallery"),
        ("classes", "Classes", "classes"),
        ("classes", "Classes", "class_comparison"),
        ("offsets", "Offsets", "dilations"),
        ("training", "Training", "charts"),
        ("provenance", "Provenance", "provenance"),
    )
    contents["sections"] = [(anchor, label) for anchor, label, key in sections if contents.get(key)]
    write_text(output, render(contents))
    return output


def _named(record: RunRecord, name: str) -> RunRecord:
    from dataclasses import replace

    return replace(record, name=name)


def _check_comparable(records: Sequence[RunRecord]) -> None:
    first = records[0]
    for record in records[1:]:
        if set(record.iou) != set(first.iou):
            raise ValueError(
                f"{shown(first.folder)} and {shown(record.folder)} cannot be compared: their classes differ"
                f" ({len(first.iou)} and {len(record.iou)}); give runs on one data set"
            )


def _comparison_of(
    records: Sequence[RunRecord], colours: Sequence[int], labels: Sequence[str] | None = None
) -> dict[str, Any]:
    """Charts, tables and provenance of several runs; runs of one setting share its colour and its label."""

    def lines(key: str) -> list[Series]:
        return [
            Series(labels[colour] if labels else record.name, _epoch_numbers(record.epochs), record.epochs[key], colour)
            for record, colour in zip(records, colours, strict=True)
            if key in record.epochs
        ]

    split = records[0].split
    charts = [
        line_chart("Mean IoU on val, %", [_in_percent(one) for one in lines(f"{split}/miou")]),
        line_chart("Validation loss", lines(f"{split}/loss")),
        line_chart("Training loss", lines("train/loss")),
        line_chart("Learning rate of the head", lines("lr/head")),
    ]
    epochs = max((len(_epoch_numbers(record.epochs)) for record in records), default=0)
    cells = [
        [str(number + 1), *(_cell(record.epochs.get(f"{split}/miou", ()), number, 100, 2) for record in records)]
        for number in range(epochs)
    ]
    return {
        "charts": [_one_label_each(chart) for chart in charts if chart is not None],
        "epoch_tables": [
            {"title": "Mean IoU of each epoch, %", "head": ["epoch", *(r.name for r in records)], "rows": cells}
        ]
        if cells
        else [],
        "provenance": [(record.name, tables.provenance(record)) for record in records],
        "notes": list(dict.fromkeys(f"{record.name}: {note}" for record in records for note in record.notes)),
    }


def _one_label_each(chart: Chart) -> Chart:
    from dataclasses import replace

    return replace(chart, series=tuple({one.label: one for one in chart.series}.values()))


def _in_percent(series: Series) -> Series:
    from dataclasses import replace

    return replace(series, y=[100 * value for value in series.y])


def _epoch_numbers(epochs: Mapping[str, Sequence[float]]) -> list[float]:
    return [number + 1 for number in epochs.get("epoch", ())]


def _run_charts(epochs: Mapping[str, Sequence[float]], split: str) -> list[Chart]:
    """The curves of one run."""
    x = _epoch_numbers(epochs)

    def lines(keys: Sequence[tuple[str, str]], factor: float = 1.0, first: int = 0) -> list[Series]:
        there = [(key, label) for key, label in keys if key in epochs]
        return [
            Series(label, x, [factor * value for value in epochs[key]], first + number)
            for number, (key, label) in enumerate(there)
        ]

    rates = [(key, key[3:]) for key in epochs if key.startswith("lr/") and not key.endswith("no_decay")]
    means = [(key, key[7:-5].removeprefix("backbone.")) for key in epochs if key.startswith("offset/") and key.endswith("/mean")]
    upper = [(key[:-5] + "/p95", f"{label}, 95 %") for key, label in means]
    outside = [(key[:-5] + "/outside", label) for key, label in means]
    dashed = [Series(one.label, one.x, one.y, one.colour, dashed=True) for one in lines(upper)]
    charts = [
        line_chart("Loss", lines([("train/loss", "training"), (f"{split}/loss", "validation")])),
        line_chart(
            "Mean IoU and pixel accuracy on val, %",
            lines([(f"{split}/miou", "mean IoU"), (f"{split}/pixel_accuracy", "pixel accuracy")], 100),
        ),
        line_chart("Learning rate", lines(rates)),
        line_chart("Offset length in pixels of the layer’s map: mean, and 95th percentile (dashed)", lines(means) + dashed),
        line_chart("Samples outside the map, %", lines(outside, 100)),
    ]
    return [chart for chart in charts if chart is not None]


def _epoch_table(title: str, epochs: Mapping[str, Sequence[float]], split: str) -> list[dict[str, Any]]:
    columns = [("train/loss", 1, 4), (f"{split}/loss", 1, 4), (f"{split}/miou", 100, 2)]
    columns += [(f"{split}/pixel_accuracy", 100, 2)]
    columns += [(key, 1, 6) for key in epochs if key.startswith("lr/") and not key.endswith("no_decay")]
    columns += [(key, 100 if key.endswith("outside") else 1, 3) for key in epochs if key.startswith("offset/")]
    columns = [column for column in columns if column[0] in epochs]
    if not columns:
        return []
    numbers = _epoch_numbers(epochs)
    head = [f"{key}, %" if factor == 100 else key for key, factor, _ in columns]
    rows = [
        [f"{number:.0f}", *(_cell(epochs[key], index, factor, digits) for key, factor, digits in columns)]
        for index, number in enumerate(numbers)
    ]
    return [{"title": title, "head": ["epoch", *head], "rows": rows}]


def _cell(values: Sequence[float], index: int, factor: float, digits: int) -> str:
    known = index < len(values) and math.isfinite(values[index])
    return f"{factor * values[index]:.{digits}f}" if known else tables.NONE


def _histogram(study: Mapping[str, Any], title: str) -> Chart | None:
    series = []
    for number, layer in enumerate(study["layers"]):
        edges, counts = layer["histogram"]["edges"], layer["histogram"]["counts"]
        total = sum(counts) or 1
        centres = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        series.append(Series(str(layer["name"]), centres, [100 * count / total for count in counts], number))
    return line_chart(title, series, x_label="length", steps=True, unit="share, %")


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


# --- sweeps ------------------------------------------------------------------------------------------------------------


def _sweep_table(results: Results) -> dict[str, Any]:
    rows = []
    for row in results.rows:
        estimate, difference = row.estimate, row.difference
        rows.append(
            [
                tables.readable(row.label),
                f"{len(row.figures)} of {len(row.runs)}",
                _with_half(estimate, tables.percent),
                "baseline" if row.is_baseline else _with_half(difference, tables.signed),
                "" if difference is None or difference.p is None else f"{difference.p:.3f}",
                tables.large(row.median("parameters")),
                tables.large(row.median("flops")),
                tables.duration(row.median("training_seconds")),
            ]
        )
    head = f"setting|runs|{results.metric}, %|more than the baseline, by seed|p|parameters|FLOPs|training"
    return {
        "lead": f"{results.metric} over seeds; the difference to the baseline pairs runs of one seed.",
        "head": head.split("|"),
        "rows": rows,
        "notes": results.notes,
    }


def _with_half(estimate: Any, written: Any) -> str:
    if estimate is None:
        return tables.NONE
    half = "" if estimate.half is None else f" ± {tables.percent(estimate.half)}"
    return f"{written(estimate.mean)}{half}"


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
    from segdcn.sweep.plan import is_loss

    sign = -1 if is_loss(results.metric) else 1
    others = [row for row in results.rows if not row.is_baseline and row.estimate is not None]
    others.sort(key=lambda row: sign * row.estimate.mean if row.estimate else 0.0, reverse=True)
    base = {run.job.seed: run for run in results.baseline.runs if run.figure is not None}
    for row in others:
        for run in row.runs:
            if run.figure is not None and run.job.seed in base:
                return [base[run.job.seed], run]
    return []
