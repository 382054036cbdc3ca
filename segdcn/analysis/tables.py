"""The figures of an analysis as tables: rows of cells, the first row their headings."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from segdcn.analysis.offset_study import SIZES as OBJECT_SIZES

Rows = list[list[str]]
SIZES = (*OBJECT_SIZES, "background")


def dilation_rows(study: Mapping[str, Any]) -> Rows:
    """Effective dilations in the form of the paper's Table 2: the last layer first, mean ± std over filters."""
    rows = [["layer", "dilation", *SIZES]]
    for layer in reversed(study["layers"]):
        found = layer["effective_dilation"]
        rows.append([_name(layer), _dilation(layer), *(_mean(found[group]) for group in SIZES)])
    return rows


def length_rows(study: Mapping[str, Any]) -> Rows:
    """How long the offsets of each layer are, the last layer first, and the share of samples that read nothing."""
    rows = [["layer", "mean", "95 % below", "longest", "outside"]]
    for layer in reversed(study["layers"]):
        lengths = [f"{layer['length'][key]:.2f}" for key in ("mean", "p95", "max")]
        rows.append([_name(layer), *lengths, f"{100 * layer['outside']:.1f} %"])
    return rows


def class_rows(study: Mapping[str, Any]) -> Rows:
    """Effective dilations by the class under the filter's centre: a row per class, the last layer first."""
    layers = study["layers"][::-1]
    rows = [["class", *(_name(layer) for layer in layers)]]
    return rows + [[name, *(_mean(layer["by_class"][name]) for layer in layers)] for name in layers[0]["by_class"]]


def cost_rows(cost: Mapping[str, Any]) -> Rows:
    """Parameters, FLOPs, time and memory in the form of the paper's Table 4."""
    rows = [["network", "parameters, M", "GFLOPs", "ms an image", "MB"]]
    for name in ("plain", "deformable"):
        if name in cost:
            figures = cost[name]
            flops = "-" if figures["flops"] is None else f"{figures['flops'] / 1e9:.3f}"
            memory = "-" if figures["megabytes"] is None else f"{figures['megabytes']:.0f}"
            millions = f"{figures['parameters'] / 1e6:.3f}"
            rows.append([name, millions, flops, f"{figures['milliseconds']:.1f}", memory])
    return rows


def markdown(rows: Rows) -> str:
    """A table for a page of documentation."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def dilation_csv(study: Mapping[str, Any]) -> str:
    """The figures of ``dilation_rows``, unrounded, and how many filters each is of."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    groups: Sequence[str] = list(study["layers"][0]["effective_dilation"])
    parts = ("mean", "std", "cells")
    writer.writerow(["layer", "dilation", *(f"{group}_{part}" for group in groups for part in parts)])
    for layer in reversed(study["layers"]):
        found = layer["effective_dilation"]
        writer.writerow([layer["name"], _dilation(layer), *(found[group][part] for group in groups for part in parts)])
    return text.getvalue()


def _name(layer: Mapping[str, Any]) -> str:
    return str(layer["name"]).removeprefix("backbone.")


def _dilation(layer: Mapping[str, Any]) -> str:
    down, right = layer["dilation"]
    return str(down) if down == right else f"{down}x{right}"


def _mean(figures: Mapping[str, Any]) -> str:
    return "-" if figures["mean"] is None else f"{figures['mean']:.2f} ± {figures['std']:.2f}"
