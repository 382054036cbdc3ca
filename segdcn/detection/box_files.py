"""Images with boxes that files tell, whatever the format of these is; read when indexed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from segdcn.data.dataset import printable, read_image
from segdcn.detection.samples import BoxSample, Objects
from segdcn.errors import UserError

Row = tuple[tuple[float, ...], int, bool, float]  # of an object: its box, label, whether it is ignored, area


class Written(NamedTuple):
    """The objects of an image as a file tells them.

    objects: boxes may be degenerate, or reach beyond the image; an area is NaN where the file tells none.
    least_side: of a box that is one, in pixels.
    names: of each object, to find it in the file.
    size: (H, W) of the image, or None where the file does not tell it.
    """

    objects: Objects
    least_side: float
    names: Sequence[str]
    source: Path
    size: tuple[int, int] | None


class ImageWithBoxes(NamedTuple):
    """One image file, its name as a sample, and what reads its objects."""

    image: Path
    name: str
    read: Callable[[], Written]


class BoxFiles(Sequence[BoxSample]):
    """Image files with boxes, read when indexed.

    Boxes are clipped to their image; a degenerate one, or one that lies outside, is left out, since no detector can
    learn it and none should end a training. `read` tells them.
    """

    def __init__(self, images: Sequence[ImageWithBoxes]) -> None:
        self.images = list(images)

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> BoxSample: ...

    @overload
    def __getitem__(self, index: slice) -> BoxFiles: ...

    def __getitem__(self, index: int | slice) -> BoxSample | BoxFiles:
        return BoxFiles(self.images[index]) if isinstance(index, slice) else self.read(index)[0]

    def read(self, index: int) -> tuple[BoxSample, list[str]]:
        """A sample, and what is odd about its boxes in a line each.

        Raises: DataError, one line, where the image or its boxes cannot be read.
        """
        path, name, read = self.images[index]
        image, written = read_image(path), read()
        height, width = image.shape[:2]
        objects, odd = _within(written, height, width)
        if written.size not in (None, (height, width)):
            told = "{1}x{0}".format(*written.size)
            odd.insert(
                0, f"{written.source} is of an image of {told} pixels (width x height), {path} has {width}x{height}"
            )
        return BoxSample(image, objects, printable(name)), [printable(line) for line in odd]


def _within(written: Written, height: int, width: int) -> tuple[Objects, list[str]]:
    """The objects that an image of this size can have, and a line for each box that is another in the file."""
    boxes, labels, ignored, areas = written.objects
    clipped = boxes.clip(0, np.array([width, height, width, height], np.float32))
    sides = clipped[:, 2:] - clipped[:, :2]
    least = written.least_side - 1e-3  # what 32 bits make of a side of just so many pixels
    kept = (sides >= least).all(axis=1)
    beyond = (np.abs(boxes - clipped) >= 1).any(axis=1)  # less is rounding
    odd = []
    for number in np.flatnonzero(~kept | beyond).tolist():
        degenerate = (boxes[number, 2:] - boxes[number, :2] < least).any()
        what = "is degenerate" if degenerate else f"reaches beyond the image ({width}x{height}, width x height)"
        outcome = "is clipped" if kept[number] else "is left out"
        odd.append(f"{written.source}: {written.names[number]} {what} and {outcome}")
    areas = np.where(np.isnan(areas), sides.prod(axis=1), areas)
    return Objects(clipped[kept], labels[kept], ignored[kept], areas[kept]), odd


def objects_of(rows: Sequence[Row]) -> Objects:
    """The objects of an image as arrays."""
    boxes, labels, ignored, areas = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(ignored, bool),
        np.array(areas, np.float64),
    )


def checked_class_names(class_names: Sequence[object]) -> tuple[str, ...]:
    """Class names as texts, without the background; UserError unless they are different ones, and any."""
    names = () if isinstance(class_names, str) else tuple(map(str, class_names))
    if not names or len(set(names)) != len(names) or not all(names):
        raise UserError(
            f"class_names must be different names, without a background, as in [cat,dog], got {class_names}"
        )
    return names


def several(found: Sequence[str]) -> str:
    """The first three of some faults of a file, on one line."""
    return "; ".join(found[:3]) + (f"; and {len(found) - 3:,} more" if len(found) > 3 else "")
