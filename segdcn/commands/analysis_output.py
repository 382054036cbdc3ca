"""What an analysis leaves to look at: pictures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from segdcn.analysis import effective_receptive_field
from segdcn.analysis.pictures import field_picture, length_picture, sampling_picture
from segdcn.analysis.tables import class_rows, cost_rows, dilation_rows, length_rows
from segdcn.analysis.views import View
from segdcn.drawing import console
from segdcn.drawing.decoration import decoration
from segdcn.runs.files import write_bytes


def write_pictures(network: nn.Module, result: Mapping[str, Any], views: Sequence[View], folder: Path) -> None:
    """offset_lengths.png, and of each view sampling_N.png and receptive_field_N.png."""
    again = "the figures are there"
    if "layers" in result:
        with decoration("offset_lengths.png", again):
            write_bytes(folder / "offset_lengths.png", length_picture(result))
    for number, view in enumerate(views):
        image, name = view.sample.image, view.sample.name
        if view.layers:
            with decoration(f"sampling_{number}.png", again):
                picture = sampling_picture(image, view.pixels, view.points, view.regular, name)
                write_bytes(folder / f"sampling_{number}.png", picture)
        with decoration(f"receptive_field_{number}.png", again):
            fields = effective_receptive_field(network, view.tensor, view.pixels).numpy()
            last = [depths[-1] if depths else None for depths in view.points]
            picture = field_picture(image, view.pixels, fields, last, name)
            write_bytes(folder / f"receptive_field_{number}.png", picture)


def print_tables(result: Mapping[str, Any]) -> None:
    """The tables of what ``analysis.json`` holds."""
    again = "analysis.json holds its figures"
    if "layers" in result:
        parted = " and ".join(f"{side:.0f}" for side in result["objects"]["thresholds"])
        counts = ", ".join(f"{count} {name}" for name, count in result["objects"]["counts"].items())
        print(
            f"{result['split']} split, {result['images']} images; objects by the side of their boxes: {counts}", end=""
        )
        print(f" (from {parted} pixels)" if parted else "")
        for title, rows in (
            ("effective dilation by object size, in pixels of the layer's map", dilation_rows),
            ("effective dilation by class", class_rows),
            ("length of the offsets, in pixels of the layer's map", length_rows),
        ):
            with decoration(f"table of {title}", again):
                _print(title, rows(result))
    if "cost" in result:
        height, width = result["cost"]["size"]
        title = f"cost of one image of {width}x{height} pixels, {result['cost']['threads']} thread(s)"
        with decoration("table of the cost", again):
            _print(title, cost_rows(result["cost"]))


def _print(title: str, rows: list[list[str]]) -> None:
    table = console.table(rows[0], title)
    for row in rows[1:]:
        console.row(table, row)
    console.show(table)
