"""A split's figures as a table to read and as metrics.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from segdcn.evaluation.counts import COUNTS_FILE, write_counts
from segdcn.evaluation.evaluator import EvaluationResult
from segdcn.run_folder import write_json

# key → heading of a column of figures per class or category
COLUMNS = {"iou": "IoU", "instance_iou": "iIoU"}


def summarize(
    result: EvaluationResult, split: str, class_names: Sequence[str], facts: Mapping[str, Any], path: Path
) -> None:
    """Print the table of IoU per class; write figures and ``facts`` to ``path`` as one flat object, counts beside it.

    Of a split without labels (a benchmark's test split) there are no figures to print and no counts.

    result: figures under ``<split>/miou``, ``<split>/iou/<class>`` and so on.
    facts: what the figures depend on: protocol, inference, checkpoint, seed.
    """
    figures = result.figures
    if math.isnan(figures[f"{split}/miou"]):
        print(f"{split} split: {result.images} images without labels, so without figures")
        figures = {}
    else:
        print(f"{split} split, {result.images} images, protocol {facts['protocol']}, {facts['inference']}")
        Console().print(_table(figures, split, class_names))
        write_counts(path.with_name(COUNTS_FILE), result.counts)
    write_json(path, {**figures, "split": split, "images": result.images, **facts})


def _table(figures: Mapping[str, float], split: str, class_names: Sequence[str]) -> Table:
    columns = [key for key in COLUMNS if f"{split}/{key}/{class_names[0]}" in figures]
    table = Table("class")
    for key in columns:
        table.add_column(COLUMNS[key], justify="right")
    for name in class_names:
        table.add_row(name, *(_percent(figures[f"{split}/{key}/{name}"]) for key in columns))
    prefix = f"{split}/category_iou/"
    categories = [key.removeprefix(prefix) for key in figures if key.startswith(prefix)]
    if categories:
        table.add_section()
        for name in categories:
            table.add_row(name, *(_percent(figures[f"{split}/category_{key}/{name}"]) for key in columns))
        means = [_percent(figures[f"{split}/category_{key.replace('iou', 'miou')}"]) for key in columns]
        table.add_row("mean of categories", *means, style="bold")
    table.add_section()
    means = [_percent(figures[f"{split}/{key.replace('iou', 'miou')}"]) for key in columns]
    low, high = (_percent(figures[f"{split}/miou_{end}"]) for end in ("low", "high"))
    table.add_row("mean IoU, 95 % interval", f"{means[0]} ({low} to {high})", *means[1:], style="bold")
    table.add_row("boundary IoU", _percent(figures[f"{split}/boundary_miou"]))
    table.add_row("pixel accuracy", _percent(figures[f"{split}/pixel_accuracy"]))
    return table


def _percent(fraction: float) -> str:
    """In percent; a class that is absent from truth and prediction has no IoU."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"
