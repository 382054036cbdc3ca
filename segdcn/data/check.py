"""Read every file of a data set and say what would go wrong in a training; `segdcn-data check` prints it."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple, Protocol

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
    """What was found in one split, whatever its labels are."""

    split: str
    samples: int = 0
    read: int = 0
    unusable: str = ""  # why the whole split is
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # image content -> sample name
    names: set[str] = field(default_factory=set)
    dark: list[str] = field(default_factory=list)  # names of nearly black images
    typical: dict[int, tuple[float, int]] = field(default_factory=dict)  # label -> share and number of the image for it

    def show(self, label: int, share: float, number: int) -> None:
        """Remember an image that shows a label, if none shows it better."""
        seen = (share, number)
        self.typical[label] = min(self.typical.get(label, seen), seen, key=_atypical)


class Splits(Protocol):
    """What is asked of a data set, whatever its labels are."""

    @property
    def splits(self) -> Sequence[str]:
        """Names of the splits that are there."""
        ...

    def split(self, name: str) -> Sequence[Any]:
        """The samples of one split."""
        ...


def split_names(dataset: Splits) -> list[str]:
    """Train and val, which a training needs, and the others that are there."""
    return list(dict.fromkeys([*NEEDED, *dataset.splits]))


Look = Callable[[Sequence[Any], int], tuple[Array, str, Any]]  # at one of the samples: image, name, what was found


def read_samples(
    dataset: Splits, report: SplitReport, look: Look, workers: int, console: Console
) -> Iterator[tuple[int, Any]]:
    """Read all samples of a split into its report, and yield what was found in each that could be, with its number.

    look: raises DataError where a sample cannot be used.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            samples = dataset.split(report.split)
        except (OSError, ValueError) as error:
            report.unusable = str(error)
        report.notes += [str(warning.message) for warning in caught]
    if report.unusable:
        return
    report.samples = len(samples)
    if not samples:
        report.errors.append(f"split {report.split!r} is empty")
    loader = DataLoader(_Examined(samples, look), batch_size=None, collate_fn=_as_it_is, num_workers=workers)
    progress = track(loader, Text(report.split).markup, len(samples), console=console)
    for number, item in enumerate(progress):
        if isinstance(item, str):
            report.errors.append(f"{report.split}: {item}")
            continue
        sample_name, digest, dark, found = item
        report.read += 1
        report.names.add(sample_name)
        report.dark += [sample_name] if dark else []
        report.digests[digest] = sample_name
        yield number, found


class _Examined(Dataset[Any]):
    def __init__(self, samples: Sequence[Any], look: Look) -> None:
        self.samples, self.look = samples, look

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, str, bool, Any] | str:
        """Name, content hash, whether it is nearly black, what was found; or what is wrong with a sample."""
        try:
            image, name, found = self.look(self.samples, index)
        except DataError as error:
            return str(error)
        except Exception as error:  # of a data set of the user's own: the other samples are looked at all the same
            return f"sample {index} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
        digest = hashlib.blake2b(str(image.shape).encode() + image.tobytes(), digest_size=16).hexdigest()
        return name, digest, is_dark(image), found


def _as_it_is(item: Any) -> Any:
    return item


def checked_image(image: Array, name: str) -> Array:
    """The image of a sample; DataError where it is none."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DataError(f"{name}: the image must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    return image


@dataclass
class LabelReport(SplitReport):
    """The same with pixels and images per label 0..255, over the samples that could be read."""

    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    images: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))

    @property
    def labels(self) -> SplitLabels:
        return SplitLabels(self.split, self.read, self.samples, self.pixels)


def read_splits(dataset: SegmentationDataset, workers: int, console: Console) -> list[LabelReport]:
    """Read all samples of all splits in `workers` processes (0: in this one), as training does; shows its progress."""
    reports = [LabelReport(name) for name in split_names(dataset)]
    look = functools.partial(_pixels, len(dataset.class_names))
    for report in reports:
        for number, pixels in read_samples(dataset, report, look, workers, console):
            report.pixels += pixels
            report.images += pixels > 0
            for label in np.flatnonzero(pixels).tolist():
                report.show(label, float(pixels[label] / pixels.sum()), number)
    return reports


def _pixels(num_classes: int, samples: Sequence[Sample], index: int) -> tuple[Array, str, NDArray[np.int64]]:
    """A sample's image, its name, and its pixels per label."""
    image, label, name = samples[index]
    checked_image(image, name)
    if label.dtype != np.uint8 or label.shape != image.shape[:2]:
        raise DataError(
            f"{name}: the label must be uint8 {image.shape[:2]} like its image, got {label.dtype} {label.shape}"
        )
    pixels = count_labels(label)
    wrong = np.flatnonzero(pixels[num_classes:IGNORE_INDEX]) + num_classes
    if len(wrong):
        raise DataError(f"{name} holds label {wrong[0]}: labels are 0..{num_classes - 1} and {IGNORE_INDEX} (ignored)")
    return image, name, pixels


def _atypical(shown: tuple[float, int]) -> float:
    """How far an image's share of a class is from that which shows it best."""
    return abs(shown[0] - SHOWN_SHARE)


def showing(reports: Sequence[SplitReport], label: int) -> SplitReport | None:
    """The split that has the image which shows a label best; None where none shows it."""
    return min(
        (report for report in reports if label in report.typical),
        key=lambda report: _atypical(report.typical[label]),
        default=None,
    )


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


def examples(dataset: SegmentationDataset, reports: Sequence[LabelReport]) -> Iterator[Example]:
    """An image for each class that was seen, and for what is ignored, of all that were read."""
    samples = functools.cache(dataset.split)  # which lists the files anew
    for label, name in [*enumerate(dataset.class_names), (IGNORE_INDEX, "ignored")]:
        best = showing(reports, label)
        if best is None:
            continue
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


def unreadable(reports: Sequence[SplitReport]) -> list[str]:
    """The splits that cannot be used, and the samples."""
    found = []
    for report in reports:
        splits = [repr(one.split) for one in reports if one.unusable == report.unusable]
        if report.unusable and splits[0] == repr(report.split):  # what is wrong with several is told once
            found.append(f"split{'s'[: len(splits) - 1]} {' and '.join(splits)} cannot be used: {report.unusable}")
        found += report.errors
    return found


def shared_images(reports: Sequence[SplitReport]) -> list[str]:
    """Images that are in two splits, by their content."""
    found = []
    for one, other in combinations(reports, 2):
        if common := sorted(one.digests.keys() & other.digests.keys()):
            pairs = [f"{one.digests[digest]} = {other.digests[digest]}" for digest in common]
            found.append(f"{one.split} and {other.split} share images of the same content: {few(pairs)}")
    return found


def image_notes(reports: Sequence[SplitReport]) -> list[str]:
    """Splits that are nearly black, and images of one name in two."""
    found = []
    for report in reports:
        if report.dark and len(report.dark) >= MANY_DARK * report.read:
            how_many = f"{report.split}: {len(report.dark):,} of {report.read:,} images"
            found.append(dark_note(how_many, report.dark[0]))
    for one, other in combinations(reports, 2):
        if common := one.names & other.names:
            found.append(f"{one.split} and {other.split} have images of the same name: {few(common)}")
    return found


def problems(reports: Sequence[LabelReport], class_names: Sequence[str]) -> list[str]:
    """What must be mended before a training, one line each."""
    found = unreadable(reports)
    for report in reports:
        if report.split in NEEDED and report.read and not report.labels.labelled:
            found.append(f"split {report.split!r} has no labelled pixel: all are {IGNORE_INDEX} (ignored)")
    if wrong := white_objects([report.labels for report in reports], class_names):
        found.append(wrong)
    return [*found, *shared_images(reports)]


def notes(reports: Sequence[LabelReport], class_names: Sequence[str]) -> list[str]:
    """What a user may want to know although a training would run, one line each."""
    found = [note for report in reports for note in report.notes]
    labels = [report.labels for report in reports if report.split in NEEDED]
    found += label_notes([one for one in labels if one.labelled], class_names)  # of the others: problems
    return [*found, *image_notes(reports)]


def tables(reports: Sequence[LabelReport], class_names: Sequence[str]) -> Iterator[Table]:
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
