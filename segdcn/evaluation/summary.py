"""A split's figures as a table to read and as metrics.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from segdcn.run_folder import write_json


def summarize(
    figures: Mapping[str, float], split: str, class_names: Sequence[str], checkpoint: str, seed: int, path: Path
) -> None:
    """Print the table of IoU per class and write ``figures`` with their protocol to ``path`` as one flat object.

    figures: as logged, fractions in 0..1 under ``<split>/miou``, ``<split>/iou/<class>`` and so on.
    """
    table = Table("class", "IoU", title=f"{split} split")
    table.columns[1].justify = "right"
    for name in class_names:
        table.add_row(name, _percent(figures[f"{split}/iou/{name}"]))
    table.add_section()
    table.add_row("mean IoU", _percent(figures[f"{split}/miou"]), style="bold")
    table.add_row("pixel accuracy", _percent(figures[f"{split}/pixel_accuracy"]))
    Console().print(table)
    protocol = {"split": split, "checkpoint": checkpoint, "inference": "whole image, single scale", "seed": seed}
    write_json(path, {**{key: float(value) for key, value in figures.items()}, **protocol})


def _percent(fraction: float) -> str:
    """In percent; a class that is absent from truth and prediction has no IoU."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:.2f}"
