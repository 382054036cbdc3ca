"""What `segdcn-data check` says of a data set of boxes; `segdcn.data.check` is the same for masks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from segdcn.data.check import (
    Example,
    SplitReport,
    checked_image,
    image_notes,
    read_samples,
    shared_images,
    showing,
    split_names,
    unreadable,
)
from segdcn.data.dataset import Array, DataError
from segdcn.data.labels import NEEDED
from segdcn.detection.box_files import BoxFiles, several
from segdcn.detection.samples import BoxSample, DetectionDataset, Objects

SMALL, LARGE = 32**2, 96**2  # areas in pixels between which COCO calls an object medium
MOST_LINES = 20  # about boxes of one split


@dataclass
class BoxReport(SplitReport):
    """What was found in one split, over the samples that could be read.

    objects, images: (C + 1,), how many of each label, without those that are ignored.
    ignored: objects.
    sizes: (3,), how many of the objects are small, medium and large.
    odd: lines about boxes.
    """

    objects: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    images: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    ignored: int = 0
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))
    odd: list[str] = field(default_factory=list)


def read_splits(dataset: DetectionDataset, workers: int, console: Console) -> list[BoxReport]:
    """Read all samples of all splits in `workers` processes (0: in this one), as training does; shows its progress."""
    labels = len(dataset.class_names) + 1
    reports = [
        BoxReport(name, objects=np.zeros(labels, int), images=np.zeros(labels, int)) for name in split_names(dataset)
    ]
    for report in reports:
        for number, (objects, shares, odd) in read_samples(dataset, report, partial(_look, labels), workers, console):
            counted = ~objects.ignored
            of_label = np.bincount(objects.labels[counted], minlength=labels)
            report.objects += of_label
            report.images += of_label > 0
            report.ignored += int(objects.ignored.sum())
            report.sizes += np.bincount(np.digitize(objects.areas[counted], (SMALL, LARGE)), minlength=3)
            report.odd += odd
            for label, share in zip(objects.labels[counted].tolist(), shares[counted].tolist(), strict=True):
                report.show(label, share, number)
    return reports


def _look(
    labels: int, samples: Sequence[BoxSample], index: int
) -> tuple[Array, str, tuple[Objects, NDArray[np.float32], list[str]]]:
    """A sample's image, its name; its objects, their boxes' shares of the image, and what is odd about them."""
    (image, objects, name), odd = samples.read(index) if isinstance(samples, BoxFiles) else (samples[index], [])
    height, width = checked_image(image, name).shape[:2]
    if wrong := list(_faults(objects, labels, height, width)):
        raise DataError(f"{name}: {several(wrong)}")
    return image, name, (objects, _shares(objects, image), odd)


def _shares(objects: Objects, image: Array) -> NDArray[np.float32]:
    sides = (objects.boxes[:, 2:] - objects.boxes[:, :2]) / (image.shape[1], image.shape[0])
    return np.asarray(sides.prod(axis=1), np.float32)


def _faults(objects: Objects, labels: int, height: int, width: int) -> Iterator[str]:
    """How the objects of a sample break the contract of `Objects`."""
    count = len(objects.labels)
    wanted = [f"float32 {(count, 4)}", f"int64 {(count,)}", f"bool {(count,)}", f"float64 {(count,)}"]
    given = [f"{values.dtype} {values.shape}" for values in objects]
    if given != wanted:
        yield f"boxes, labels, ignored and areas must be {', '.join(wanted)}, got {', '.join(given)}"
        return
    for number, (box, label) in enumerate(zip(objects.boxes, objects.labels, strict=True)):
        corners = f"box {number} ({' '.join(f'{value:g}' for value in box)})"
        if not 1 <= label < labels:
            yield f"{corners} has label {label}: labels are 1..{labels - 1}"
        if not (box[2:] > box[:2]).all():
            yield f"{corners} is degenerate"
        elif box.min() < 0 or box[2] > width or box[3] > height:
            yield f"{corners} reaches beyond the image ({width}x{height}, width x height)"


def examples(dataset: DetectionDataset, reports: Sequence[BoxReport]) -> Iterator[Example]:
    """An object of each class that was seen, of all that were read: the pixels in its box."""
    samples = cache(dataset.split)  # which lists the files anew
    for label, class_name in enumerate(dataset.class_names, start=1):
        best = showing(reports, label)
        if best is None:
            continue
        share, number = best.typical[label]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told when they were read
            image, objects, name = samples(best.split)[number]
        others = (objects.labels != label) | objects.ignored
        box = objects.boxes[np.argmin(np.abs(_shares(objects, image) - share) + others)]
        left, top, right, bottom = (int(edge) for edge in (*np.floor(box[:2]), *np.ceil(box[2:])))
        inside = np.zeros(image.shape[:2], bool)
        inside[top:bottom, left:right] = True
        width, height = (box[2:] - box[:2]).tolist()
        yield Example(
            f"{label} {class_name}",
            f"{best.split}: {name}, {width:g}x{height:g} pixels, {100 * share:.1f} %",
            image,
            inside,
        )


def problems(reports: Sequence[BoxReport], class_names: Sequence[str]) -> list[str]:
    """What must be mended before a training, one line each."""
    found = unreadable(reports)
    for report in reports:
        if report.split in NEEDED and report.read and not report.objects.any():
            ignored = f" but {report.ignored:,} that are ignored" if report.ignored else ""
            found.append(f"split {report.split!r} has no object{ignored}: there is nothing to learn or to measure")
    return [*found, *shared_images(reports)]


def notes(reports: Sequence[BoxReport], class_names: Sequence[str]) -> list[str]:
    """What a user may want to know although a training would run, one line each."""
    found = []
    for report in reports:
        found += [*report.notes, *(f"{report.split}: {line}" for line in report.odd[:MOST_LINES])]
        if (more := len(report.odd) - MOST_LINES) > 0:
            found.append(f"{report.split}: {more:,} more of such boxes")
        absent = [name for name, count in zip(class_names, report.objects[1:], strict=True) if not count]
        if report.split in NEEDED and report.objects.any() and absent:
            found.append(f"{report.split} has no object of {', '.join(absent)}")
    return [*found, *image_notes(reports)]


def tables(reports: Sequence[BoxReport], class_names: Sequence[str]) -> Iterator[Table]:
    """Images and objects per split, by COCO's sizes, and each class's objects and the number of its images."""
    titles = ("images", "unusable", "objects", "ignored", "small", "medium", "large")
    summary = Table("split", *(Column(title, justify="right") for title in titles))
    classes = Table("class")
    for report in reports:
        unusable = len(report.errors) + bool(report.unusable)
        counts = (report.samples, unusable, report.objects.sum(), report.ignored, *report.sizes)
        summary.add_row(Text(report.split), *(f"{count:,}" for count in counts))
        classes.add_column(Text(f"{report.split}: objects"), justify="right")
        classes.add_column("images", justify="right")
    for label, name in enumerate(class_names, start=1):
        cells = [f"{counts[label]:,}" for report in reports for counts in (report.objects, report.images)]
        classes.add_row(Text(name), *cells)
    yield summary
    yield classes
