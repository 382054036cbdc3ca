"""The figures of a split as a table to read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from segdcn.drawing import console
from segdcn.drawing.numbers import percent
from segdcn.evaluation.evaluator import EvaluationResult

# key → heading of a column of figures per class or category
COLUMNS = {"iou": "IoU", "instance_iou": "iIoU"}


def print_figures(
    result: EvaluationResult, split: str, class_names: Sequence[str], conditions: Mapping[str, Any]
) -> None:
    """Print the table of IoU per class; of a split without labels (a benchmark's test split) a line that says so.

    result: figures under ``<split>/miou``, ``<split>/iou/<class>`` and so on.
    conditions: what they depend on: protocol, inference, and ``images_in_split`` where not all images were evaluated.
    """
    figures = result.figures
    if math.isnan(figures[f"{split}/miou"]):
        print(f"{split} split: {result.images} images without labels, so without figures")
        return
    images = counted_images(result.images, conditions)
    print(f"{split} split, {images}, protocol {conditions['protocol']}, {conditions['inference']}")
    console.show(_table(figures, split, class_names))


def counted_images(number: int, conditions: Mapping[str, Any]) -> str:
    """On how many images figures were counted, in words."""
    total = conditions.get("images_in_split") or number
    return f"{number} images" if total == number else f"only {number} of {total} images"


def _table(figures: Mapping[str, float], split: str, class_names: Sequence[str]) -> Table:
    columns = [key for key in COLUMNS if f"{split}/{key}/{class_names[0]}" in figures]
    table = console.table(["class", *(COLUMNS[key] for key in columns)])
    for name in class_names:
        console.row(table, [name, *(percent(figures[f"{split}/{key}/{name}"]) for key in columns)])
    prefix = f"{split}/category_iou/"
    categories = [key.removeprefix(prefix) for key in figures if key.startswith(prefix)]
    if categories:
        table.add_section()
        for name in categories:
            console.row(table, [name, *(percent(figures[f"{split}/category_{key}/{name}"]) for key in columns)])
        means = [percent(figures[f"{split}/category_{key.replace('iou', 'miou')}"]) for key in columns]
        console.row(table, ["mean of categories", *means], "bold")
    table.add_section()
    means = [percent(figures[f"{split}/{key.replace('iou', 'miou')}"]) for key in columns]
    low, high = (percent(figures[f"{split}/miou_{end}"]) for end in ("low", "high"))
    console.row(table, ["mean IoU, 95 % interval", f"{means[0]} ({low} to {high})", *means[1:]], "bold")
    console.row(table, ["boundary IoU", percent(figures[f"{split}/boundary_miou"])])
    console.row(table, ["pixel accuracy", percent(figures[f"{split}/pixel_accuracy"])])
    return table
