"""segdcn-report's pages of detectors: of one run, of several, of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from segdcn.detection.average_precision import (
    THRESHOLDS,
    Difference,
    average_precision,
    class_intervals,
    mean_of_classes,
    paired_difference,
    rank,
)
from segdcn.detection.datamodule import as_image
from segdcn.detection.found import NO_OBJECTS, Found, find_found, joined
from segdcn.detection.pictures import SHOWN_SCORE, bins_tile, moved_bins, outlined
from segdcn.detection.samples import DetectionDataset
from segdcn.drawing.numbers import percent
from segdcn.errors import UserError
from segdcn.report import comparison, curves, pages, pictures, tables
from segdcn.report.images import GALLERY_IMAGES, ImageOptions, best_median_worst, left_out, most_different
from segdcn.report.page import Page
from segdcn.report.runs import PageRun, kept_or_lacking, unique_names
from segdcn.report.tables import Colour, Tile
from segdcn.runs.checkpoint import read_checkpoint
from segdcn.runs.record import RunRecord
from segdcn.sweep.results import Results

MEANS = {"map": "mAP", "map50": "mAP@0.5", "map70": "mAP@0.7", "map_50": "mAP@0.5", "map_75": "mAP@0.75"}
"""The figures of a page, and what they are called."""


@dataclass(frozen=True)
class DetectorRun(PageRun):
    """A detector's run as a page shows it; ``found`` is None where it was not kept."""

    found: Found | None

    @property
    def protocol(self) -> str:
        return str(self.record.metrics.get("protocol"))


def _read(record: RunRecord, name: str | None = None) -> DetectorRun:
    found, lacking = kept_or_lacking(record, find_found, "intervals of classes and the choice of images")
    return DetectorRun(name or record.name, record, None, lacking, found)


def run_page(record: RunRecord, options: ImageOptions) -> Page:
    """The page of one run."""
    run, shares = _read(record), _shares([record])
    page = Page(record.name, "a training run", f"{tables.network_of(record)}, seed {record.seed}")
    if run.lacking:
        page.notes.append(run.lacking)
    colours = _add_gallery(page, [run], options)
    page.add(
        tiles=lambda: [*_tiles(record, shares), *tables.cost_tiles(record)],
        charts=lambda: curves.run_charts(record.epochs, record.split, shares),
        epoch_tables=lambda: curves.epoch_table(record.epochs, record.split, shares),
        provenance=lambda: [("What these figures depend on", tables.provenance(record))],
        classes=lambda: _classes(run, colours),
    )
    return page


def runs_page(records: Sequence[RunRecord], options: ImageOptions) -> Page:
    """The page that compares runs with the first of them.

    Raises: UserError, one line, for runs whose classes differ.
    """
    names, shares, kind = unique_names(records), _shares(records), _strictest(records)
    runs = [_read(record, name) for record, name in zip(records, names, strict=True)]
    page = pages.comparing_page(records)
    pages.add_training(page, runs, range(len(runs)), names, shares, kind)
    differences = page.attempt("intervals", lambda: _differences(runs)) or {}

    def interval(figure: str, run: PageRun) -> str:
        if figure not in THRESHOLDS:
            return ""
        found = differences.get((figure, run.name))
        return comparison.ends(*found.mean) if found else comparison.NOT_PAIRED

    colours = _add_gallery(page, runs[: pages.MAX_NETWORKS], options)
    page.add(
        comparison=lambda: comparison.runs_table(runs, shares, interval),
        class_comparison=lambda: comparison.runs_classes(
            runs, colours, kind, _called(kind), _class_intervals(runs, kind, differences)
        ),
    )
    return page


def sweep_page(results: Results, options: ImageOptions) -> Page:
    """The page of a sweep: its settings compared by seed, baseline against best.

    Raises: UserError, one line, for a sweep without a finished run, or whose runs' classes differ.
    """
    records = [run.record for run in results.runs]
    kind = _strictest(records)
    page = Page(results.name, "a sweep", results.command)
    runs, closely = pages.add_sweep(page, results, _read, _shares(records), kind)
    colours = _add_gallery(page, closely, options)
    names = list(runs[0].record.by_class(kind))
    page.add(
        comparison=lambda: comparison.sweep_table(results),
        class_comparison=lambda: comparison.sweep_classes(results, names, colours, kind, _called(kind)),
    )
    return page


# --- figures ----------------------------------------------------------------------------------------------------------


def _shares(records: Sequence[RunRecord]) -> dict[str, str]:
    """Those of ``MEANS`` that are there."""
    return {name: called for name, called in MEANS.items() if any(one.figure(name) is not None for one in records)}


def _strictest(records: Sequence[RunRecord]) -> str:
    """The figure of single classes that a page shows: AP at the strictest threshold."""
    return next((kind for kind in ("ap70", "ap50", "ap") if any(one.by_class(kind) for one in records)), "ap")


def _called(kind: str) -> str:
    return MEANS[f"m{kind}"].replace("mAP", "AP")


def _tiles(record: RunRecord, shares: Mapping[str, str]) -> list[Tile]:
    found = []
    for name, called in shares.items():
        low, high = record.figure(f"{name}_low"), record.figure(f"{name}_high")
        interval = f"95 % interval {percent(low, 1)} to {percent(high, 1)}" if low is not None else ""
        found.append(Tile(f"{called}, %", percent(record.figure(name)), interval or tables.images_of(record)))
    return found


def _classes(run: DetectorRun, colours: Mapping[str, Colour]) -> dict[str, Any] | None:
    """A row per class, with its share of the objects."""
    kind = _strictest([run.record])
    figures = run.record.by_class(kind)
    if not figures:
        return None
    shares: Sequence[float] = ()
    if run.found is not None:
        counts = np.bincount(joined(NO_OBJECTS, run.found.objects).labels - 1, minlength=len(figures))
        shares = (counts / (counts.sum() or math.nan)).tolist()
    return tables.class_table(_called(kind), figures, colours, _own_intervals(run, kind), shares)


def _own_intervals(run: DetectorRun, kind: str) -> list[tuple[float, float]]:
    """Of each class; none where there was nothing kept, or of COCO's figures."""
    threshold = THRESHOLDS.get(f"m{kind}")
    if run.found is None or threshold is None or not run.record.by_class(kind):
        return []
    return class_intervals(run.found, run.protocol, threshold)


def _differences(runs: Sequence[DetectorRun]) -> dict[tuple[str, str], Difference]:
    """Of a figure and a run's name the difference to the first run, where both counted the same images alike."""
    first, *others = runs
    differences = {}
    for run in others:
        if first.found is None or run.found is None or not comparison.counted_alike(run, first):
            continue
        for figure, threshold in THRESHOLDS.items():
            with suppress(UserError):  # other images, or COCO's figures
                differences[figure, run.name] = paired_difference(run.found, first.found, run.protocol, threshold)
    return differences


def _class_intervals(
    runs: Sequence[DetectorRun], kind: str, differences: Mapping[tuple[str, str], Difference]
) -> dict[str, list[str]]:
    """Of each class a text for each run: the interval of its AP, and that of the difference to the first run's."""
    texts: dict[str, list[str]] = {name: [] for run in runs for name in run.record.by_class(kind)}
    for run in runs if f"m{kind}" in THRESHOLDS else []:
        class_names = [] if run.found is None else run.found.class_names  # in an order of its own
        difference = differences.get((f"m{kind}", run.name))
        own = dict(zip(class_names, _own_intervals(run, kind), strict=False))
        changes = dict(zip(class_names, () if difference is None else difference.classes, strict=False))
        for name, found in texts.items():
            parts = []
            if name in own:
                low, high = own[name]
                parts.append(f"{percent(low, 1)} – {percent(high, 1)}")
            if name in changes:
                parts.append(f"difference {comparison.ends(*changes[name])}")
            found.append(", ".join(parts))
    return texts


# --- images -----------------------------------------------------------------------------------------------------------


def _add_gallery(page: Page, runs: Sequence[DetectorRun], options: ImageOptions) -> Mapping[str, Colour]:
    """Images of runs, where the first one's data set is at hand; returns the colour of each class."""
    try:
        checkpoint = read_checkpoint(runs[0].record.checkpoint, options.trust)
        dataset, network = options.open_dataset(checkpoint), checkpoint.module()
    except Exception as error:  # a data set of a user's own may raise anything
        page.notes.append(left_out("Images", error))
        return {}
    found = [run.found for run in runs if run.found is not None]
    if len(found) == len(runs):
        page.add(gallery=lambda: _gallery([run.name for run in runs], found, runs[0].record.split, dataset, network))
    return dict(zip(dataset.class_names, dataset.palette, strict=True))


def ap_of_images(found: Found) -> list[float]:
    """Each image's own mAP at an IoU of 0.5, to find images that are worth looking at; NaN without an object."""
    figures = []
    for name, detections, objects in zip(found.names, found.detections, found.objects, strict=True):
        (rankings,) = rank(Found([name], found.class_names, [detections], [objects]), [0.5])
        figures.append(mean_of_classes(average_precision(rankings, "voc")).item())
    return figures


def _gallery(
    names: Sequence[str], found: Sequence[Found], split: str, dataset: DetectionDataset, network: nn.Module
) -> dict[str, Any]:
    """The photograph, what was found, and the truth: of one run in its best, median and worst image, of several in
    those in which the first two differ most.
    """
    samples, single = dataset.split(split), len(found) == 1
    if any(list(each.names) != list(found[0].names) for each in found):
        raise UserError("the runs were not counted on the same images")
    figures = [ap_of_images(each) for each in found]
    if single:
        heading, why = "Best, median and worst images", "By the image's own mAP@0.5"
        chosen = list(best_median_worst(figures[0]).items())
        called = ["detections"]
    else:
        heading = "Where they disagree most"
        why = f"The images whose own mAP@0.5 differs most between {names[0]} and {names[1]}"
        chosen = [("most different", index) for index in most_different(figures[0], figures[1], GALLERY_IMAGES)]
        called = list(names)
    keys = [
        ("photo", "photograph"),
        *((f"found{number}", name) for number, name in enumerate(called)),
        ("truth", "truth"),
    ]
    shown, present = [], set[int]()
    for reason, index in chosen:
        sample = samples[index]
        if sample.name != found[0].names[index]:
            raise UserError(f"the data at hand are not the {split} images that were counted")
        image, objects = sample.image, sample.objects
        layers = [("photo", outlined(image, [], [], dataset.palette), f"Photograph {sample.name}")]
        for number, each in enumerate(found):
            seen = each.detections[index].of_score(SHOWN_SCORE)
            scores = [f"{score:.2f}" for score in seen.scores]
            picture = outlined(image, seen.boxes, seen.labels, dataset.palette, scores)
            layers.append((f"found{number}", picture, f"{called[number]}: {len(scores)} in {sample.name}"))
            present |= set(seen.labels.tolist())
        truth = outlined(image, objects.boxes, objects.labels, dataset.palette)
        layers.append(("truth", truth, f"{len(objects.labels)} objects of {sample.name}"))
        present |= set(objects.labels.tolist())
        if single and (moved := moved_bins(network, as_image(image), found[0].detections[index])):
            layers.append(("bins", bins_tile(image, moved), f"Where bins of regions in {sample.name} lie"))
        own = [f"{percent(each[index], 1)} %" for each in figures]
        detail = own[0] if single else ", ".join(f"{name} {figure}" for name, figure in zip(names, own, strict=True))
        made = [{"key": key, "url": pictures.photograph(picture), "alt": alt} for key, picture, alt in layers]
        shown.append({"name": sample.name, "why": reason, "detail": f"mAP@0.5 of the image: {detail}", "layers": made})
    if any(len(image["layers"]) > len(keys) for image in shown):
        keys.append(("bins", "bins"))
    return {
        "heading": heading,
        "lead": f"{why}; detections of a score of {SHOWN_SCORE:g} or more. Move the line in a picture to see what lies"
        " under it.",
        "layers": keys,
        "sides": [("left", "found0"), ("right", "truth" if single else "found1")],
        "images": shown,
        "legend": [(dataset.class_names[label - 1], tuple(dataset.palette[label - 1])) for label in sorted(present)],
        "pixelated": False,
    }
