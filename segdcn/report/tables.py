"""The figures of runs as a page shows them: text and numbers, no markup. Legend: K classes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from segdcn.evaluation import bootstrap_difference, bootstrap_iou, get_protocol
from segdcn.evaluation.counts import Counts
from segdcn.report.charts import Chart
from segdcn.report.records import RunRecord
from segdcn.runs.files import shown

# Dai et al. 2017, Table 2: R-FCN with three deformable layers of dilation 2, ResNet-101, VOC 2007 test
PAPER_DILATIONS = (
    ("res5c", ("5.3 ± 3.3", "5.8 ± 3.5", "8.4 ± 4.5", "6.2 ± 3.0")),
    ("res5b", ("2.5 ± 1.3", "3.1 ± 1.5", "5.1 ± 2.5", "3.2 ± 1.2")),
    ("res5a", ("2.2 ± 1.2", "2.9 ± 1.3", "4.2 ± 1.6", "3.1 ± 1.1")),
)
SIZES = ("small", "medium", "large", "background")
NONE = "–"


class Tile(NamedTuple):
    """A figure of the summary, with what it depends on."""

    label: str
    value: str
    detail: str = ""


class ClassRow(NamedTuple):
    """A class's IoU in percent with the ends of its interval; None where it does not exist."""

    name: str
    colour: tuple[int, int, int]
    iou: float | None
    low: float | None
    high: float | None
    share: float | None


def percent(fraction: float | None, digits: int = 2) -> str:
    """In percent, without the sign; a dash for a figure that does not exist."""
    return NONE if fraction is None or math.isnan(fraction) else f"{100 * fraction:.{digits}f}"


def signed(fraction: float | None, digits: int = 2) -> str:
    """A difference in percentage points, with its sign."""
    return NONE if fraction is None or math.isnan(fraction) else f"{100 * fraction:+.{digits}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def large(number: float | None) -> str:
    """A count with three digits that matter: 544 k, 2.53 M, 180 M, 7.31 G."""
    if number is None:
        return NONE
    for limit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            value = number / limit
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f}{letter}"
    return f"{number:.0f}"


def network_of(record: RunRecord) -> str:
    """The network in words, from the config; empty where there is none."""
    model = record.config.get("model")
    if not isinstance(model, Mapping):
        return ""
    target = str(model.get("_target_"))
    if not target.endswith(".build_deeplab"):  # of a user's own
        return target
    deform = model.get("deform")
    deform = deform if isinstance(deform, Mapping) else {}
    count = deform.get("layers")
    kind = "modulated deformable" if deform.get("modulated") else "deformable"
    layers = "" if count is None else f", {count} {kind} layer{'' if count == 1 else 's'}"
    dilation = model.get("fixed_dilation")
    fixed = f", last layers of dilation {dilation}" if dilation else ""
    parts = f"{model.get('backbone', 'backbone unknown')}, {model.get('head', 'unknown')} head"
    return f"{parts}, output stride {model.get('output_stride', 'unknown')}{layers}{fixed}"


def tiles(record: RunRecord) -> list[Tile]:
    """The summary of one run."""
    metrics, found = record.metrics, []
    low, high = record.figure("miou_low"), record.figure("miou_high")
    interval = f"95 % interval {percent(low, 1)} to {percent(high, 1)}" if low is not None else ""
    found.append(Tile("Mean IoU, %", percent(record.figure("miou")), interval))
    published = record.config.get("paper_miou")
    if isinstance(published, int | float):
        found.append(Tile("Published, %", f"{published:.2f}", "for this setting"))
    found.append(Tile("Boundary mean IoU, %", percent(record.figure("boundary_miou")), "bands along the outlines"))
    found.append(Tile("Pixel accuracy, %", percent(record.figure("pixel_accuracy")), _images(record)))
    steps = [int(value) for value in record.epochs.get("step", ()) if math.isfinite(value)]
    trained = f"{len(steps)} epoch{'' if len(steps) == 1 else 's'}, {steps[-1]} steps" if steps else ""
    found.append(Tile("Training", duration(metrics.get("training_seconds")), trained))
    size = str(metrics.get("flops_input") or "").strip("[]").replace(",", "×")
    cost = f"{large(metrics.get('flops'))} FLOPs" + (f" at {size}" if size else "")
    found.append(Tile("Parameters", large(metrics.get("parameters")), cost))
    return found


def provenance(record: RunRecord) -> list[tuple[str, str]]:
    """What the figures depend on; rows that nothing is known of are left out."""
    metrics, about = record.metrics, record.environment
    git = about.get("git") if isinstance(about.get("git"), Mapping) else None
    commit = "installed package, commit unknown" if about and not git else ""
    if git:
        commit = f"{git.get('commit')}" + (", with changes that were not committed" if git.get("dirty") else "")
    packages = about.get("packages")
    versions = ", ".join(f"{name} {version}" for name, version in (packages or {}).items())
    device = about.get("device")
    count = about.get("devices") or 0
    seconds = metrics.get("seconds_per_image")
    rows = [
        ("Protocol", _joined(metrics.get("protocol"), metrics.get("protocol_rule"))),
        ("Inference", _joined(metrics.get("inference"), f"{1e3 * seconds:.3g} ms per image" if seconds else None)),
        ("Counted on", _images(record)),
        ("Network", network_of(record)),
        ("Checkpoint", _joined(metrics.get("checkpoint"), _hash(record))),
        ("Seed", record.seed),
        ("Commit", commit),
        ("Device", _joined(f"{count} × {device}" if count else device, _threads(about.get("threads")))),
        ("Versions", _joined(f"Python {about['python']}" if "python" in about else None, versions)),
        ("Command", about.get("command")),
        ("Run folder", shown(record.folder)),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "") and (about or name != "Device")]


def _threads(count: Any) -> str:
    return "" if count is None else f"{count} thread{'' if count == 1 else 's'}"


def _hash(record: RunRecord) -> str | None:
    return f"sha256 {record.checkpoint_hash}" if record.checkpoint_hash else "the file is not there (any more)"


def _images(record: RunRecord) -> str:
    count, total = record.metrics.get("images"), record.metrics.get("images_in_split")
    of = f" of {total}" if total not in (None, count) else ""
    return f"{count}{of} {record.split} images" if count is not None else ""


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part not in (None, ""))


def classes(record: RunRecord, palette: Sequence[Sequence[int]]) -> list[ClassRow]:
    """A row per class, the highest IoU first, classes without one last; intervals and shares only from counts."""
    names, iou = record.class_names, record.iou
    intervals: list[tuple[float | None, float | None]] = [(None, None)] * len(names)
    shares: list[float | None] = [None] * len(names)
    if record.counts is not None and len(record.counts.names):
        found = bootstrap_iou(record.counts.images)
        intervals = [(_finite(low), _finite(high)) for low, high in found.tolist()]
        truth = record.counts.confusion.sum(dim=1).double()
        shares = [_finite(value) for value in (truth / truth.sum()).tolist()]
    rows = [
        ClassRow(name, _colour(palette, index), iou.get(name), *intervals[index], shares[index])
        for index, name in enumerate(names)
    ]
    return sorted(rows, key=lambda row: -1.0 if row.iou is None else row.iou, reverse=True)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _colour(palette: Sequence[Sequence[int]], index: int) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in palette[index]) if index < len(palette) else (128, 128, 128)
    return red, green, blue


class Confusion(NamedTuple):
    """How the pixels of each true class were predicted, as shares of the row; a row without pixels is None."""

    names: list[str]
    rows: list[list[float] | None]
    words: list[str]


def confusion(counts: Counts, most: int = 4) -> Confusion:
    """The confusion matrix normalised by truth, and its largest confusions in words."""
    matrix = counts.confusion.double()
    totals = matrix.sum(dim=1, keepdim=True)
    shares = matrix / totals
    names = list(counts.class_names)
    wrong = shares.masked_fill(torch.eye(len(names), dtype=torch.bool), 0).nan_to_num(0.0)
    order = wrong.flatten().argsort(descending=True, stable=True)[:most].tolist()
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
        cells = [_spread(layer["effective_dilation"].get(size)) for size in SIZES]
        name, dilation = str(layer["name"]).removeprefix("backbone."), layer["dilation"]
        rows.append((name, "×".join(map(str, dict.fromkeys(dilation))), cells, percent(layer.get("outside"))))
    thresholds = study["objects"]["thresholds"]
    small, big = (round(float(value)) for value in thresholds) if thresholds else (0, 0)
    text = f"Small objects have boxes below {small}² image pixels, large ones above {big}²." if big else "No objects."
    return Dilations(run, f"{measured}. {text}", rows, chart)


def _spread(cell: Mapping[str, Any] | None) -> str:
    if not cell or cell.get("mean") is None:
        return NONE
    return f"{cell['mean']:.2f} ± {cell['std']:.2f}"


class ComparedRun(NamedTuple):
    """A row of the comparison of runs; difference and interval are of the mean IoU, to the first run."""

    name: str
    miou: str
    difference: str
    interval: str
    pixel_accuracy: str
    boundary: str
    parameters: str
    flops: str
    training: str
    seed: str


def compared_runs(records: Sequence[RunRecord]) -> list[ComparedRun]:
    """One row per run, the first as the baseline."""
    first, rows = records[0], []
    for record in records:
        miou, base = record.figure("miou"), first.figure("miou")
        difference = interval = ""
        if record is not first:
            difference = signed(miou - base) if miou is not None and base is not None else NONE
            interval = paired_interval(record, first) or "not the same images, or not counted"
        metrics = record.metrics
        rows.append(
            ComparedRun(
                record.name,
                percent(miou),
                difference or "baseline",
                interval,
                percent(record.figure("pixel_accuracy")),
                percent(record.figure("boundary_miou")),
                large(metrics.get("parameters")),
                large(metrics.get("flops")),
                duration(metrics.get("training_seconds")),
                str(record.seed),
            )
        )
    return rows


def same_images(one: RunRecord, other: RunRecord) -> bool:
    """Whether both counted the same images in the same way."""
    if one.counts is None or other.counts is None:
        return False
    alike = all(one.metrics.get(key) == other.metrics.get(key) for key in ("split", "protocol"))
    truths = one.counts.images.shape == other.counts.images.shape and bool(
        (one.counts.images[:, 1] == other.counts.images[:, 1]).all()
    )
    return alike and truths and list(one.counts.names) == list(other.counts.names)


def paired_interval(record: RunRecord, first: RunRecord) -> str | None:
    """The 95 % interval of the difference in mean IoU, by a bootstrap that draws the same images for both."""
    if record.counts is None or first.counts is None or not same_images(record, first):
        return None
    protocol = get_protocol(str(record.metrics.get("protocol", "native")), len(record.class_names))
    absent_is_zero = protocol.absent_is_zero
    low, high = bootstrap_difference(record.counts.images, first.counts.images, absent_is_zero=absent_is_zero)
    return f"{signed(low)} to {signed(high)}"


# not what makes a run another one, and places on a machine
_TOLD_ELSEWHERE = ("output_dir", "resume", "launcher", "sweep", "callbacks", "logger", "hydra", "name", "report")
MOST_TOLD = 3


def unique_names(records: Sequence[RunRecord]) -> list[str]:
    """Names that tell the runs of a page apart: by the config's values that differ, where these are few."""
    configs = [_flat(record.config) for record in records]
    keys = [
        key
        for key in dict.fromkeys(key for config in configs for key in config)
        if len({repr(config.get(key)) for config in configs}) > 1
    ]
    if 0 < len(keys) <= MOST_TOLD:
        found = [
            ", ".join([record.name, *(f"{readable(key)}={config.get(key)}" for key in keys)])
            for record, config in zip(records, configs, strict=True)
        ]
    else:
        names = [record.name for record in records]
        found = [
            record.name if names.count(record.name) == 1 else f"{record.name} {record.folder.resolve().name}"
            for record in records
        ]
    return [name if found.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(found, start=1)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value, without what tells nothing about the training and what repeats another key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if not prefix and key in _TOLD_ELSEWHERE:
            continue
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif not (isinstance(value, str) and value.startswith("${")):
            found[f"{prefix}{key}"] = value
    return found


def readable(override: str) -> str:
    """``model.deform.layers=3`` without what goes without saying."""
    return re.sub(r"^\+?(?:model|experiment|dataset)\.", "", override)
