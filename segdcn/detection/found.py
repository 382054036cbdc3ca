"""What was found on a split, beside its truth: kept as found.npz, so that it can be looked at and compared later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from segdcn.detection.samples import Detections, Objects
from segdcn.errors import UserError
from segdcn.runs.figures import find_kept, read_arrays, write_arrays
from segdcn.runs.record import RunRecord

FOUND_FILE = "found.npz"  # beside metrics.json

NO_DETECTIONS = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
NO_OBJECTS = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros(0))

Boxes = TypeVar("Boxes", Detections, Objects)


@dataclass(frozen=True)
class Found:
    """What was found on N images with C classes.

    names: of the images, in the order of the split.
    class_names: C names; the label of the first is 1.
    detections, objects: of each image.

    Raises: ValueError where an image lacks one of these, or a label is none of 1..C.
    """

    names: Sequence[str]
    class_names: Sequence[str]
    detections: Sequence[Detections]
    objects: Sequence[Objects]

    def __post_init__(self) -> None:
        images, classes = len(self.names), len(self.class_names)
        if not images == len(self.detections) == len(self.objects):
            raise UserError(
                f"{images} names, detections of {len(self.detections)}, objects of {len(self.objects)} images"
            )
        for labels in (joined(NO_DETECTIONS, self.detections).labels, joined(NO_OBJECTS, self.objects).labels):
            if labels.size and not 1 <= labels.min() <= labels.max() <= classes:
                raise UserError(f"labels from {labels.min()} to {labels.max()}, but the classes are 1 to {classes}")


def joined(none: Boxes, parts: Sequence[Boxes]) -> Boxes:
    """The boxes of all images one after the other; ``none`` gives the types."""
    columns = zip(none, *parts, strict=True)
    return type(none)(*(np.concatenate(column).astype(column[0].dtype, copy=False) for column in columns))


def image_numbers(parts: Sequence[Detections] | Sequence[Objects]) -> NDArray[np.int64]:
    """The number of its image, 0..N-1, for each of the boxes that ``joined`` joins."""
    return np.repeat(np.arange(len(parts)), np.array([len(part.labels) for part in parts], dtype=np.int64))


def write_found(path: Path, found: Found) -> None:
    """Write ``found``, see ``write_arrays``: all images' values one after the other, and how many each has."""
    arrays: dict[str, NDArray[Any]] = {}
    for kind, parts, every in (
        ("detections", found.detections, joined(NO_DETECTIONS, found.detections)),
        ("objects", found.objects, joined(NO_OBJECTS, found.objects)),
    ):
        arrays[kind] = np.bincount(image_numbers(parts), minlength=len(parts))
        arrays |= {f"{kind}_{field}": values for field, values in every._asdict().items()}
    write_arrays(path, found, **arrays)


def read_found(path: Path) -> Found:
    """Read a found.npz; raises as ``read_arrays``."""
    return read_arrays(path, "detections", _found)


def find_found(run: RunRecord) -> Found:
    """See ``find_kept``."""
    return find_kept(run, FOUND_FILE, read_found, "the detections in single images were not kept")


def _found(arrays: Mapping[str, NDArray[Any]]) -> Found:
    names, class_names = arrays["names"].tolist(), arrays["class_names"].tolist()
    detections, objects = _parted(arrays, "detections", NO_DETECTIONS), _parted(arrays, "objects", NO_OBJECTS)
    return Found(names, class_names, detections, objects)


def _parted(arrays: Mapping[str, NDArray[Any]], kind: str, none: Boxes) -> list[Boxes]:
    """The inverse of ``joined``."""
    counts, make = arrays[kind].astype(np.int64), type(none)
    if counts.ndim != 1 or (counts < 0).any():
        raise UserError(f"{kind} are numbers of boxes, one of each image")
    columns = []
    for field in none._fields:
        like: NDArray[Any] = getattr(none, field)
        columns.append(arrays[f"{kind}_{field}"].astype(like.dtype))
        if columns[-1].shape != (counts.sum(), *like.shape[1:]):
            raise UserError(f"{counts.sum()} {kind}, but {field} of shape {columns[-1].shape}")
    ends: list[int] = counts.cumsum().tolist()
    return [make(*(column[start:end] for column in columns)) for start, end in pairwise([0, *ends])]
