"""The figures of one run as a page shows them: text and numbers, no markup. Legend: K classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from segdcn.analysis.tables import SIZES
from segdcn.drawing.numbers import NONE, duration, large, percent
from segdcn.evaluation import bootstrap_iou
from segdcn.evaluation.counts import Counts
from segdcn.report.charts import Chart
from segdcn.report.runs import PageRun
from segdcn.runs.files import shown
from segdcn.runs.record import RunRecord

# Dai et al. 2017, Table 2: R-FCN with three deformable layers of dilation 2, ResNet-101, VOC 2007 test
PAPER_DILATIONS = (
    ("res5c", ("5.3 ± 3.3", "5.8 ± 3.5", "8.4 ± 4.5", "6.2 ± 3.0")),
    ("res5b", ("2.5 ± 1.3", "3.1 ± 1.5", "5.1 ± 2.5", "3.2 ± 1.2")),
    ("res5a", ("2.2 ± 1.2", "2.9 ± 1.3", "4.2 ± 1.6", "3.1 ± 1.1")),
)
Colour = tuple[int, int, int]
GREY = (128, 128, 128)


class Tile(NamedTuple):
    """A figure of the summary, with what it depends on."""

    label: str
    value: str
    detail: str = ""


class ClassRow(NamedTuple):
    """A class's figure, such as IoU, with the ends of its interval; None where it does not exist."""

    name: str
    colour: Colour
    figure: float | None
    low: float | None
    high: float | None
    share: float | None


def network_of(record: RunRecord) -> str:
    """The network in words, from the config; empty where there is none."""
    model = record.config.get("model")
    if not isinstance(model, Mapping):
        return ""
    target = str(model.get("_target_"))
    if not {"backbone", "head"} <= model.keys():  # of a user's own
        return target
    deform = model.get("deform")
    deform = deform if isinstance(deform, Mapping) else {}
    count = deform.get("layers")
    kind = "modulated deformable" if deform.get("modulated") else "deformable"
    layers = "" if count is None else f", {count} {kind} layer{'' if count == 1 else 's'}"
    layers += f" and {deform['head_layers']} of the head" if deform.get("head_layers") else ""
    dilation = model.get("fixed_dilation")
    fixed = f", last layers of dilation {dilation}" if dilation else ""
    parts = f"{model.get('backbone', 'backbone unknown')}, {model.get('head', 'unknown')} head"
    pooling = f", pooling {model['pooling']}" if "pooling" in model else ""
    return f"{parts}, output stride {model.get('output_stride', 'unknown')}{pooling}{layers}{fixed}"


def tiles(record: RunRecord) -> list[Tile]:
    """The summary of one run."""
    found = []
    low, high = record.figure("miou_low"), record.figure("miou_high")
    interval = f"95 % interval {percent(low, 1)} to {percent(high, 1)}" if low is not None else ""
    found.append(Tile("Mean IoU, %", percent(record.figure("miou")), interval))
    if record.published is not None:
        found.append(Tile("Published, %", percent(record.published), "for this setting"))
    found.append(Tile("Boundary mean IoU, %", percent(record.figure("boundary_miou")), "bands along the outlines"))
    found.append(Tile("Pixel accuracy, %", percent(record.figure("pixel_accuracy")), images_of(record)))
    return [*found, *cost_tiles(record)]


def cost_tiles(record: RunRecord) -> list[Tile]:
    """What the run took: its time, and the network's parameters and operations."""
    found = []
    steps = [int(value) for value in record.epochs.get("step", ()) if math.isfinite(value)]
    trained = f"{len(steps)} epoch{'' if len(steps) == 1 else 's'}, {steps[-1]} steps" if steps else ""
    found.append(Tile("Training", duration(record.number("training_seconds")), trained))
    size = str(record.metrics.get("flops_input") or "").strip("[]").replace(",", "×")
    flops = record.number("flops")
    cost = "" if flops is None and not size else f"{large(flops)} FLOPs" + (f" at {size}" if size else "")
    found.append(Tile("Parameters", large(record.number("parameters")), cost))
    return found


def provenance(record: RunRecord) -> list[tuple[str, str]]:
    """What the figures depend on; rows that nothing is known of are left out."""
    metrics, environment = record.metrics, record.environment
    packages = environment.get("packages")
    versions = ", ".join(f"{name} {version}" for name, version in (packages or {}).items())
    seconds = record.number("seconds_per_image")
    rows = [
        ("Protocol", _joined(metrics.get("protocol"), metrics.get("protocol_rule"))),
        ("Inference", _joined(metrics.get("inference"), f"{1e3 * seconds:.3g} ms per image" if seconds else None)),
        ("Counted on", images_of(record)),
        ("Network", network_of(record)),
        ("Checkpoint", _joined(metrics.get("checkpoint"), _hash(record))),
        ("Seed", record.seed),
        ("Commit", record.commit),
        ("Device", record.hardware),
        ("Versions", _joined(f"Python {environment['python']}" if "python" in environment else None, versions)),
        ("Command", environment.get("command")),
        ("Run folder", shown(record.folder)),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _hash(record: RunRecord) -> str | None:
    return f"sha256 {record.checkpoint_hash}" if record.checkpoint_hash else "the file is not there (any more)"


def images_of(record: RunRecord) -> str:
    """On how many images its figures were counted, in words."""
    count, total = record.metrics.get("images"), record.metrics.get("images_in_split")
    of = f" of {total}" if total not in (None, count) else ""
    return f"{count}{of} {record.split} images" if count is not None else ""


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part not in (None, ""))


def classes(run: PageRun, colours: Mapping[str, Colour]) -> dict[str, Any] | None:
    """A row per class, the highest IoU first, classes without one last; intervals and shares only from counts."""
    iou = run.record.iou
    if not iou:
        return None
    if run.counts is None or not len(run.counts.names):
        return class_table("IoU", iou, colours)
    truth = run.counts.confusion.sum(dim=1).double()
    return class_table("IoU", iou, colours, bootstrap_iou(run.counts.images).tolist(), (truth / truth.sum()).tolist())


def class_table(
    called: str,
    figures: Mapping[str, float | None],
    colours: Mapping[str, Colour],
    intervals: Sequence[Sequence[float]] = (),
    shares: Sequence[float] = (),
) -> dict[str, Any]:
    """A row per class, the highest figure first, classes without one last.

    intervals, shares: of each class, NaN where there is none; empty where they are not known.
    """
    rows = [
        ClassRow(name, colours.get(name, GREY), figure, finite(low), finite(high), finite(share))
        for (name, figure), (low, high), share in zip(
            figures.items(),
            intervals or [(math.nan, math.nan)] * len(figures),
            shares or [math.nan] * len(figures),
            strict=True,
        )
    ]
    rows.sort(key=lambda row: -1.0 if row.figure is None else row.figure, reverse=True)
    return {"figure": called, "rows": rows, "intervals": bool(intervals)}


def finite(value: float) -> float | None:
    """None for what does not exist."""
    return value if math.isfinite(value) else None


class Confusion(NamedTuple):
    """How the pixels of each true class were predicted, as shares of the row; a row without pixels is None."""

    names: list[str]
    rows: list[list[float] | None]
    words: list[str]


def confusion(counts: Counts) -> Confusion:
    """The confusion matrix normalised by truth, and its four largest confusions in words."""
    matrix = counts.confusion.double()
    totals = matrix.sum(dim=1, keepdim=True)
    shares = matrix / totals
    names = list(counts.class_names)
    wrong = shares.masked_fill(torch.eye(len(names), dtype=torch.bool), 0).nan_to_num(0.0)
    order = wrong.flatten().argsort(descending=True, stable=True)[:4].tolist()
    words = [
        f"{percent(float(wrong[row, column]), 1)} % of the pixels of {names[row]} are taken for {names[column]}"
        for row, column in (divmod(place, len(names)) for place in order)
        if wrong[row, column] > 0
    ]
    rows = [None if total == 0 else row for row, total in zip(shares.tolist(), totals[:, 0].tolist(), strict=True)]
    return Confusion(names, rows, words)


class Dilations(NamedTuple):
    """The paper's Table 2 for one network: layers, last first, by size of the object; ``text`` tells what was seen."""

    run: str
    text: str
    rows: list[tuple[str, str, list[str], str]]
    chart: Chart | None


def dilations(study: Mapping[str, Any], run: str, measured: str, chart: Chart | None) -> Dilations:
    """The table of one network.

    study: what ``study_offsets`` found; measured: on which images, in words; chart: of the offset lengths.
    """
    rows = []
    for layer in reversed(study["layers"]):
        cells = [_spread(layer["effective_dilation"][size]) for size in SIZES]
        name, dilation = str(layer["name"]).removeprefix("backbone."), layer["dilation"]
        rows.append((name, "×".join(map(str, dict.fromkeys(dilation))), cells, percent(layer["outside"])))
    thresholds = study["objects"]["thresholds"]
    small, big = (round(float(value)) for value in thresholds) if thresholds else (0, 0)
    text = f"Small objects have boxes below {small}² image pixels, large ones above {big}²." if big else "No objects."
    return Dilations(run, f"{measured}. {text}", rows, chart)


def _spread(cell: Mapping[str, Any]) -> str:
    return NONE if cell["mean"] is None else f"{cell['mean']:.2f} ± {cell['std']:.2f}"
