"""Read every file of a data set and say what would go wrong in a training; `segdcn-data check` prints it."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text
from torch.utils.data import DataLoader, Dataset

from segdcn.data.dataset import IGNORE_INDEX, Array, DataError, Sample, SegmentationDataset, dark_note, few, is_dark
from segdcn.data.labels import NEEDED, SplitLabels, count_labels, label_notes, white_objects

MANY_DARK = 0.95  # share of a split's images that are nearly black
SHOWN_SHARE = 0.25  # of an image that shows a class: much of it, and what is around it


@dataclass
class SplitReport:
    """What was found in one split; pixels and images count per label 0..255, over the samples that could be read."""

    split: str
    samples: int = 0
    read: int = 0
    unusable: str = ""  # why the whole split is
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # image content -> sample name
    names: set[str] = field(default_factory=set)
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    images: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    dark: list[str] = field(default_factory=list)  # names of nearly black images
    typical: dict[int, tuple[float, int]] = field(default_factory=dict)  # label -> share and number of the image for it

    @property
    def labels(self) -> SplitLabels:
        return SplitLabels(self.split, self.read, self.samples, self.pixels)


def read_splits(dataset: SegmentationDataset, workers: int, console: Console) -> list[SplitReport]:
    """Read all samples of all splits in `workers` processes (0: in this one), as training does; shows its progress."""
    reports = []
    for name in dict.fromkeys([*NEEDED, *dataset.splits]):
        report = SplitReport(name)
        reports.append(report)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                samples = dataset.split(name)
            except (OSError, ValueError) as error:
                report.unusable = str(error)
            report.notes += [str(warning.message) for warning in caught]
        if report.unusable:
            continue
        report.samples = len(samples)
        if not samples:
            report.errors.append(f"split {name!r} is empty")
        items = _Examined(samples, len(dataset.class_names))
        loader = DataLoader(items, batch_size=None, collate_fn=_as_it_is, num_workers=workers)
        progress = track(loader, Text(name).markup, len(samples), console=console)
        for number, found in enumerate(progress):
            if isinstance(found, str):
                report.errors.append(f"{name}: {found}")
                continue
            sample_name, digest, pixels, dark = found
            report.read += 1
            report.names.add(sample_name)
            report.dark += [sample_name] if dark else []
            report.digests[digest] = sample_name
            report.pixels += pixels
            report.images += pixels > 0
            for label in np.flatnonzero(pixels).tolist():
                seen = (float(pixels[label] / pixels.sum()), number)
                report.typical[label] = min(report.typical.get(label, seen), seen, key=_atypical)
    return reports


def _atypical(shown: tuple[float, int]) -> float:
    """How far an image's share of a class is from that which shows it best."""
    return abs(shown[0] - SHOWN_SHARE)


class Example(NamedTuple):
    """A class, or what is ignored, in an image where it covers much but not all.

    title: the label and its name.
    source: the image's split and name, and how much of it is of the class.
    image: uint8 (H, W, 3).
    inside: bool (H, W).
    """

    title: str
    source: str
    image: Array
    inside: NDArray[np.bool_]


def examples(dataset: SegmentationDataset, reports: Sequence[SplitReport]) -> Iterator[Example]:
    """An image for each class that was seen, and for what is ignored, of all that were read."""
    samples = functools.cache(dataset.split)  # which lists the files anew
    for label, name in [*enumerate(dataset.class_names), (IGNORE_INDEX, "ignored")]:
        showing = [report for report in reports if label in report.typical]
        if not showing:
            continue
        best = min(showing, key=lambda report: _atypical(report.typical[label]))
        (share, number), split = best.typical[label], best.split
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told when they were read
            image, mask, sample_name = samples(split)[number]
        inside = mask == label
        yield Example(
            f"{label} {name}",
            f"{split}: {sample_name}, {np.count_nonzero(inside):,} pixels, {100 * share:.1f} %",
            image,
            inside,
        )


class _Examined(Dataset[Any]):
    def __init__(self, samples: Sequence[Sample], num_classes: int) -> None:
        self.samples, self.num_classes = samples, num_classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, str, NDArray[np.int64], bool] | str:
        """Name, content hash, pixels per label, whether it is nearly black; or what is wrong with a sample."""
        try:
            image, label, name = self.samples[index]
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                return f"{name}: the image must be uint8 (H, W, 3), got {image.dtype} {image.shape}"
            if label.dtype != np.uint8 or label.shape != image.shape[:2]:
                return (
                    f"{name}: the label must be uint8 {image.shape[:2]} like its image, got {label.dtype} {label.shape}"
                )
        except DataError as error:
            return str(error)
        except Exception as error:  # of a data set of the user's own: the other samples are looked at all the same
            return f"sample {index} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
        pixels = count_labels(label)
        wrong = np.flatnonzero(pixels[self.num_classes : IGNORE_INDEX]) + self.num_classes
        if len(wrong):
            return f"{name} holds label {wrong[0]}: labels are 0..{self.num_classes - 1} and {IGNORE_INDEX} (ignored)"
        digest = hashlib.blake2b(str(image.shape).encode() + image.tobytes(), digest_size=16).hexdigest()
        return name, digest, pixels, is_dark(image)


def _as_it_is(item: Any) -> Any:
    return item


def problems(reports: Sequence[SplitReport], class_names: Sequence[str]) -> list[str]:
    """What must be mended before a training, one line each."""
    found = []
    for report in reports:
        splits = [repr(one.split) for one in reports if one.unusable == report.unusable]
        if report.unusable and splits[0] == repr(report.split):  # what is wrong with several is told once
            found.append(f"split{'s'[: len(splits) - 1]} {' and '.join(splits)} cannot be used: {report.unusable}")
        found += report.errors
    for report in reports:
        if report.split in NEEDED and report.read and not report.labels.labelled:
            found.append(f"split {report.split!r} has no labelled pixel: all are {IGNORE_INDEX} (ignored)")
    if wrong := white_objects([report.labels for report in reports], class_names):
        found.append(wrong)
    for one, other in combinations(reports, 2):
        if common := sorted(one.digests.keys() & other.digests.keys()):
            pairs = [f"{one.digests[digest]} = {other.digests[digest]}" for digest in common]
            found.append(f"{one.split} and {other.split} share images of the same content: {few(pairs)}")
    return found


def notes(reports: Sequence[SplitReport], class_names: Sequence[str]) -> list[str]:
    """What a user may want to know although a training would run, one line each."""
    found = [note for report in reports for note in report.notes]
    labels = [report.labels for report in reports if report.split in NEEDED]
    found += label_notes([one for one in labels if one.labelled], class_names)  # of the others: problems
    for report in reports:
        if report.dark and len(report.dark) >= MANY_DARK * report.read:
            how_many = f"{report.split}: {len(report.dark):,} of {report.read:,} images"
            found.append(dark_note(how_many, report.dark[0]))
    for one, other in combinations(reports, 2):
        if common := one.names & other.names:
            found.append(f"{one.split} and {other.split} have images of the same name: {few(common)}")
    return found


def tables(reports: Sequence[SplitReport], class_names: Sequence[str]) -> Iterator[Table]:
    """Images per split, and each class's share of the labelled pixels and the number of its images."""
    summary = Table("split", *(Column(title, justify="right") for title in ("images", "unusable", "ignored pixels")))
    classes = Table("class")
    for report in reports:
        total = int(report.pixels.sum())
        share = f"{100 * report.pixels[IGNORE_INDEX] / total:.2f} %" if total else "-"
        unusable = len(report.errors) + bool(report.unusable)
        summary.add_row(Text(report.split), f"{report.samples:,}", f"{unusable:,}", share)
        classes.add_column(Text(f"{report.split}: pixels"), justify="right")
        classes.add_column("images", justify="right")
    for k, name in enumerate(class_names):
        cells = []
        for report in reports:
            labelled = int(report.pixels[:IGNORE_INDEX].sum())
            cells += [f"{100 * report.pixels[k] / labelled:.2f} %" if labelled else "-", f"{report.images[k]:,}"]
        classes.add_row(Text(name), *cells)
    yield summary
    yield classes
