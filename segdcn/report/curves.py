"""The figures of each epoch as charts and tables, of one run and of several overlaid; offset lengths as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from segdcn.drawing.numbers import NONE, fixed
from segdcn.report.charts import Chart, Series, line_chart
from segdcn.report.runs import PageRun

Shares = Mapping[str, str]
"""Figures of a split that are fractions, and what they are called."""

OF_PIXELS: Shares = {"miou": "Mean IoU", "pixel_accuracy": "pixel accuracy"}
COMPARED: Shares = {"miou": "Mean IoU"}  # of several runs


def run_charts(epochs: Mapping[str, Sequence[float]], split: str, shares: Shares = OF_PIXELS) -> list[Chart]:
    """The curves of one run."""
    x = _epoch_numbers(epochs)

    def lines(keys: Sequence[tuple[str, str]], factor: float = 1.0) -> list[Series]:
        there = [(key, label) for key, label in keys if key in epochs]
        return [
            Series(label, x, [factor * value for value in epochs[key]], number)
            for number, (key, label) in enumerate(there)
        ]

    rates = [(key, key[3:]) for key in epochs if _is_rate(key)]
    means = [
        (key, key[7:-5].removeprefix("backbone."))
        for key in epochs
        if key.startswith("offset/") and key.endswith("/mean")
    ]
    upper = [(key[:-5] + "/p95", f"{label}, 95 %") for key, label in means]
    outside = [(key[:-5] + "/outside", label) for key, label in means]
    dashed = [Series(one.label, one.x, one.y, one.colour, dashed=True) for one in lines(upper)]
    charts = [
        line_chart("Loss", lines([("train/loss", "training"), (f"{split}/loss", "validation")])),
        line_chart(
            f"{' and '.join(shares.values())}, %",
            lines([(f"{split}/{key}", label) for key, label in shares.items()], 100),
        ),
        line_chart("Learning rate", lines(rates)),
        line_chart(
            "Offset length in pixels of the layer’s map: mean, and 95th percentile (dashed)", lines(means) + dashed
        ),
        line_chart("Samples outside the map, %", lines(outside, 100)),
    ]
    return [chart for chart in charts if chart is not None]


def _is_rate(key: str) -> bool:
    """Whether it is a role's learning rate, of which that without weight decay and that of a layer are fixed shares."""
    return key.startswith("lr/") and not key.endswith("no_decay") and "_layer" not in key


def epoch_table(epochs: Mapping[str, Sequence[float]], split: str, shares: Shares = OF_PIXELS) -> list[dict[str, Any]]:
    """What the curves show, as numbers; empty without epochs."""
    columns = [("train/loss", 1, 4), (f"{split}/loss", 1, 4), *((f"{split}/{key}", 100, 2) for key in shares)]
    columns += [(key, 1, 6) for key in epochs if _is_rate(key)]
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
    return [{"title": "Figures of each epoch", "head": ["epoch", *head], "rows": rows}]


def overlaid(
    runs: Sequence[PageRun], colours: Sequence[int], labels: Sequence[str], shares: Shares = COMPARED
) -> list[Chart]:
    """The curves of several runs; runs of one colour, an index of ``labels``, share its label."""
    records = [run.record for run in runs]

    def lines(key: str, factor: float = 1.0) -> list[Series]:
        return [
            Series(labels[colour], _epoch_numbers(one.epochs), [factor * value for value in one.epochs[key]], colour)
            for one, colour in zip(records, colours, strict=True)
            if key in one.epochs
        ]

    split = records[0].split
    charts = [
        *(line_chart(f"{label} on {split}, %", lines(f"{split}/{key}", 100)) for key, label in shares.items()),
        line_chart("Validation loss", lines(f"{split}/loss")),
        line_chart("Training loss", lines("train/loss")),
        line_chart("Learning rate of the head", lines("lr/head")),
    ]
    return [
        replace(chart, series=tuple({one.label: one for one in chart.series}.values()))
        for chart in charts
        if chart is not None
    ]


def overlaid_tables(runs: Sequence[PageRun], shares: Shares = COMPARED) -> list[dict[str, Any]]:
    """A figure in each epoch, a column per run; a table for each of the figures."""
    epochs = max(len(_epoch_numbers(run.record.epochs)) for run in runs)
    head, tables = ["epoch", *(run.name for run in runs)], []
    for key, label in shares.items():
        columns = [run.record.epochs.get(f"{run.record.split}/{key}", ()) for run in runs]
        rows = [[str(index + 1), *(_cell(column, index, 100, 2) for column in columns)] for index in range(epochs)]
        tables.append({"title": f"{label} of each epoch, %", "head": head, "rows": rows})
    return tables if epochs else []


def length_histogram(study: Mapping[str, Any]) -> Chart | None:
    """How long the offsets of each layer are, of what ``study_offsets`` found."""
    series = []
    for number, layer in enumerate(study["layers"]):
        edges, counts = layer["histogram"]["edges"], layer["histogram"]["counts"]
        total = sum(counts) or 1
        centres = [(low + high) / 2 for low, high in pairwise(edges)]
        series.append(
            Series(
                str(layer["name"]).removeprefix("backbone."), centres, [100 * count / total for count in counts], number
            )
        )
    return line_chart(
        "Offset lengths, pixels of the layer’s map", series, x_label="length", steps=True, unit="share, %"
    )


def _epoch_numbers(epochs: Mapping[str, Sequence[float]]) -> list[float]:
    return [number + 1 for number in epochs.get("epoch", ())]


def _cell(values: Sequence[float], index: int, factor: float, digits: int) -> str:
    return fixed(factor * values[index], digits) if index < len(values) else NONE
