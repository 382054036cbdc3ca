"""segdcn-report's page of a detector's run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import nn

from segdcn.detection.average_precision import average_precision, class_intervals, mean_of_classes, rank
from segdcn.detection.datamodule import as_image
from segdcn.detection.found import FOUND_FILE, Found, read_found
from segdcn.detection.pictures import SHOWN_SCORE, bins_tile, moved_bins, outlined
from segdcn.detection.samples import DetectionDataset
from segdcn.drawing.numbers import percent
from segdcn.errors import UserError
from segdcn.report import curves, pictures, tables
from segdcn.report.images import best_median_worst
from segdcn.report.page import Page
from segdcn.report.tables import ClassRow, Tile, finite
from segdcn.runs.record import RunRecord

MEANS = {"map": "mAP", "map50": "mAP@0.5", "map70": "mAP@0.7", "map_50": "mAP@0.5", "map_75": "mAP@0.75"}
"""The figures of a page, and what they are called."""


def run_page(record: RunRecord, dataset: DetectionDataset | None, network: nn.Module | None) -> Page:
    """The page of one run.

    dataset: what was counted on; None leaves its images out.
    network: of the checkpoint; None leaves out where its bins lie.
    """
    page = Page(record.name, "a training run", f"{tables.network_of(record)}, seed {record.seed}")
    shares = {name: called for name, called in MEANS.items() if record.figure(name) is not None}
    page.add(
        tiles=lambda: [*_tiles(record, shares), *tables.cost_tiles(record)],
        charts=lambda: curves.run_charts(record.epochs, record.split, shares),
        epoch_tables=lambda: curves.epoch_table(record.epochs, record.split, shares),
        provenance=lambda: [("What these figures depend on", tables.provenance(record))],
    )
    found = page.attempt("detections", lambda: read_found(record.folder / FOUND_FILE))
    page.add(classes=lambda: _classes(record, found, dataset))
    if found is not None and dataset is not None:
        page.add(gallery=lambda: _gallery(record, found, dataset, network))
    return page


def _tiles(record: RunRecord, shares: dict[str, str]) -> list[Tile]:
    found = []
    for name, called in shares.items():
        low, high = record.figure(f"{name}_low"), record.figure(f"{name}_high")
        interval = f"95 % interval {percent(low, 1)} to {percent(high, 1)}" if low is not None else ""
        found.append(Tile(f"{called}, %", percent(record.figure(name)), interval or tables.images_of(record)))
    return found


def _classes(record: RunRecord, found: Found | None, dataset: DetectionDataset | None) -> dict[str, Any] | None:
    """A row per class by AP at the strictest threshold, with its share of the objects."""
    kinds = [kind for kind in ("ap", "ap50", "ap70") if any(f"{record.split}/{kind}/" in key for key in record.metrics)]
    if not kinds:
        return None
    start = f"{record.split}/{kinds[-1]}/"
    names = [key.removeprefix(start) for key in record.metrics if key.startswith(start)]
    colours = dict(zip(dataset.class_names, dataset.palette, strict=True)) if dataset is not None else {}
    counts = np.zeros(len(names))
    if found is not None:
        labels = np.concatenate([each.labels for each in found.objects]) if found.objects else np.zeros(0, int)
        counts = np.bincount(labels - 1, minlength=len(names)).astype(float)
    total = counts.sum() or math.nan
    protocol, intervals = str(record.metrics.get("protocol")), [(math.nan, math.nan)] * len(names)
    with_intervals = found is not None and kinds[-1] == "ap70"
    if found is not None and with_intervals:
        intervals = class_intervals(found, protocol, 0.7)
    rows = [
        ClassRow(
            name,
            colours.get(name, tables.GREY),
            record.number(start + name),
            finite(low),
            finite(high),
            finite(share),
        )
        for name, (low, high), share in zip(names, intervals, (counts / total).tolist(), strict=True)
    ]
    rows.sort(key=lambda row: -1.0 if row.iou is None else row.iou, reverse=True)
    return {"figure": MEANS[f"m{kinds[-1]}"].replace("mAP", "AP"), "rows": rows, "intervals": with_intervals}


def ap_of_images(found: Found) -> list[float]:
    """Each image's own mAP at an IoU of 0.5, to find images that are worth looking at; NaN without an object."""
    figures = []
    for name, detections, objects in zip(found.names, found.detections, found.objects, strict=True):
        (rankings,) = rank(Found([name], found.class_names, [detections], [objects]), [0.5])
        figures.append(mean_of_classes(average_precision(rankings, "voc")).item())
    return figures


def _gallery(record: RunRecord, found: Found, dataset: DetectionDataset, network: nn.Module | None) -> dict[str, Any]:
    """Best, median and worst image: the photograph, what was found, and the truth."""
    samples = dataset.split(record.split)
    figures = ap_of_images(found)
    shown, present, with_bins = [], set[int](), False
    for why, index in best_median_worst(figures).items():
        sample, every = samples[index], found.detections[index]
        if sample.name != found.names[index]:
            raise UserError(f"the data at hand are not the {record.split} images that were counted")
        detections = every.of_score(SHOWN_SCORE)
        truth = outlined(sample.image, sample.objects.boxes, sample.objects.labels, dataset.palette)
        with_scores = [f"{score:.2f}" for score in detections.scores]
        seen = outlined(sample.image, detections.boxes, detections.labels, dataset.palette, with_scores)
        layers = [
            ("photo", outlined(sample.image, [], [], dataset.palette), f"Photograph {sample.name}"),
            ("found", seen, f"{len(detections.scores)} detections in {sample.name}"),
            ("truth", truth, f"{len(sample.objects.labels)} objects of {sample.name}"),
        ]
        if moved := moved_bins(network, as_image(sample.image), every):
            layers.append(("bins", bins_tile(sample.image, moved), f"Where bins of regions in {sample.name} lie"))
            with_bins = True
        detail = f"mAP@0.5 of the image {percent(figures[index], 1)} %"
        made = [{"key": key, "url": pictures.photograph(picture), "alt": alt} for key, picture, alt in layers]
        shown.append({"name": sample.name, "why": why, "detail": detail, "layers": made})
        present |= {*sample.objects.labels.tolist(), *detections.labels.tolist()}
    return {
        "heading": "Best, median and worst images",
        "lead": f"By the image's own mAP@0.5; detections of a score of {SHOWN_SCORE:g} or more. Move the line in a"
        " picture to see what lies under it.",
        "layers": [
            ("photo", "photograph"),
            ("found", "detections"),
            ("truth", "truth"),
            *([("bins", "bins")] if with_bins else ()),
        ],
        "sides": [("left", "found"), ("right", "truth")],
        "images": shown,
        "legend": [(dataset.class_names[label - 1], tuple(dataset.palette[label - 1])) for label in sorted(present)],
        "pixelated": False,
    }
