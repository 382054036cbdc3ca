"""Masks that are pictures: which class each colour is, and the labels that such a mask's pixels have."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from segdcn.data.dataset import (
    IGNORE_INDEX,
    Array,
    Color,
    MaskColoursError,
    checked_names,
    lines_of,
    read_colours,
)
from segdcn.errors import UserError

LABELMAP = "labelmap.txt"  # as CVAT writes it
IGNORED = ("void", "ignore", "unlabeled", "unlabelled")  # names, in any case, of colours that are no class
BLENDED = 0.1  # the largest share of a mask's pixels that may lie between the colours: borders, no class forgotten
_BEYOND = 512  # in a table: further than the tolerance from every colour


class ColourTable:
    """Reads the file of a mask of colours as labels, uint8 (H, W): ``table(path)``.

    Args:
        labels: the label of each colour, 255 where it is ignored.
        source: what says so, for errors.
        tolerance: 0 takes the very colours; else each pixel takes the nearest one whose red, green and blue are all
            within so many of 255, and is ignored where none is.

    Raises:
        ValueError: a tolerance that is none.
        MaskColoursError: when called, for a mask with other colours; with a tolerance, with more than a tenth of them.
    """

    def __init__(self, labels: Mapping[Color, int], source: str, tolerance: int = 0) -> None:
        if type(tolerance) is not int or not 0 <= tolerance <= 255:
            raise UserError(f"colour_tolerance must be 0 to 255, got {tolerance}")
        self.labels, self.source, self.tolerance = dict(labels), source, tolerance

    def __call__(self, path: Path) -> Array:
        # a fourth byte beside the three makes each pixel one number
        packed = cv2.cvtColor(read_colours(path, lossy=self.tolerance > 0), cv2.COLOR_RGB2RGBA).view("<u4")[..., 0]
        packed &= 0xFFFFFF
        table = _table(tuple(self.labels.items()), self.tolerance)
        found = table.take(packed)
        if self.tolerance and not found.all():
            unseen = np.unique(packed[found == 0])
            table[unseen] = self._nearest(unseen)
            found = table.take(packed)
        wrong = found == (_BEYOND if self.tolerance else 0)
        if np.count_nonzero(wrong) > (BLENDED * wrong.size if self.tolerance else 0):
            raise MaskColoursError(f"{path} {self._what_is_wrong(path, packed[wrong])}")
        found -= 1
        return found.astype(np.uint8)

    def _nearest(self, packed: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
        """What a table holds for these colours, (N,)."""
        values = np.empty(len(packed), np.uint16)
        known = np.array(list(self.labels), np.int16)
        of_known = np.array(list(self.labels.values()), np.uint16) + 1
        for start in range(0, len(packed), 1 << 14):  # some at a time: N x K distances
            colours = _unpacked(packed[start : start + (1 << 14)]).astype(np.int16)
            distances = np.abs(colours[:, None] - known).max(axis=2)
            near = np.where(distances.min(axis=1) <= self.tolerance, of_known[distances.argmin(axis=1)], _BEYOND)
            values[start : start + (1 << 14)] = near
        return values

    def _what_is_wrong(self, path: Path, packed: npt.NDArray[np.uint32]) -> str:
        colours, pixels = np.unique(packed, return_counts=True)
        with Image.open(path) as image:
            one_channel = image.mode in ("1", "L")
        order = np.argsort(-pixels, kind="stable")[:3]
        some = "; ".join(
            f"{','.join(map(str, colour))} ({count:,} pixel{'' if count == 1 else 's'})"
            for colour, count in zip(_unpacked(colours[order]).tolist(), pixels[order].tolist(), strict=True)
        ) + ("; ..." if len(colours) > 3 else "")
        if one_channel:
            return (
                f"has one channel, with greys that {self.source} does not name: {some}. If these are class numbers, do"
                f" without {self.source}, else name them there"
            )
        if self.tolerance:
            return (
                f"holds colours further than dataset.colour_tolerance={self.tolerance} from all that {self.source}"
                f" names, in more than a tenth of its pixels: {some}. Name what is missing there, or allow"
                " more"
            )
        smooth = ", or save the mask without smoothing (dataset.colour_tolerance=20 takes the nearest colour)"
        return (
            f"holds {'a colour' if len(colours) == 1 else f'{len(colours):,} colours'} that {self.source} does not"
            f" name: {some}. Name {'it' if len(colours) == 1 else 'them'} there ({IGNORED[0]} is ignored)"
            f"{smooth if len(colours) > 3 else ''}"
        )


@functools.lru_cache(maxsize=2)
def _table(labels: tuple[tuple[Color, int], ...], tolerance: int) -> npt.NDArray[np.uint16]:
    """For each packed colour its label + 1, or 0 where it is none (with a tolerance: where it was not seen yet).

    32 MiB of addresses, of which only the few pages are memory that colours lie in.
    """
    table = np.zeros(1 << 24, np.uint16)
    for (red, green, blue), label in labels:
        table[red | green << 8 | blue << 16] = label + 1
    return table


def _unpacked(packed: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Red, green and blue, (N, 3)."""
    return np.stack([packed & 255, packed >> 8 & 255, packed >> 16 & 255], axis=-1)


def read_labelmap(path: Path) -> dict[str, Color]:
    """The colour of each name in a file whose lines are NAME:RED,GREEN,BLUE, as CVAT writes them beside masks.

    More fields (CVAT's parts and actions) and lines that begin with # are passed over.

    Raises: UserError, one line, with file and line number.
    """
    colours: dict[str, Color] = {}
    for number, line in lines_of(path):
        if line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        values = rest.partition(":")[0].split(",")
        where = f"{path} line {number}"
        if not name.strip() or len(values) != 3 or not all(re.fullmatch(r"\s*\d{1,9}\s*", value) for value in values):
            raise UserError(f"{where} is {line!r}: expected NAME:RED,GREEN,BLUE, such as cat:128,0,0")
        if name.strip() in colours:
            raise UserError(f"{where} names {name.strip()} again: keep one of the lines")
        red, green, blue = map(int, values)
        colours[name.strip()] = _checked(where, name.strip(), (red, green, blue), colours)
    return colours


def checked_colours(given: Mapping[Any, Sequence[int]]) -> dict[str, Color]:
    """The setting ``dataset.colours`` with names as texts; UserError where it is wrong."""
    colours: dict[str, Color] = {}
    for name, colour in given.items():
        plain = isinstance(colour, Sequence) and not isinstance(colour, str)
        if not (plain and len(colour) == 3 and all(type(value) is int for value in colour)):
            raise UserError(f"dataset.colours: {name} must be a colour [RED,GREEN,BLUE], got {colour}")
        red, green, blue = colour
        colours[str(name)] = _checked("dataset.colours", str(name), (red, green, blue), colours)
    return colours


def _checked(where: str, name: str, colour: Color, before: Mapping[str, Color]) -> Color:
    if not all(0 <= value <= 255 for value in colour):
        raise UserError(f"{where}: the colour of {name} must be three numbers 0..255, got {','.join(map(str, colour))}")
    for other, taken in before.items():
        if taken == colour:
            raise UserError(f"{where}: {name} has the colour {','.join(map(str, colour))} of {other}: give it its own")
    return colour


def classes_of(colours: Mapping[str, Color], source: str) -> tuple[str, ...]:
    """The names that are classes: all but ``IGNORED``.

    Raises: UserError where they are less than two.
    """
    names = [name for name in colours if name.lower() not in IGNORED]
    if not names:
        raise UserError(f"{source} names no class: give each its colour, as NAME:RED,GREEN,BLUE")
    try:
        return checked_names(names)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def labels_of(colours: Mapping[str, Color], class_names: Sequence[str], source: str) -> dict[Color, int]:
    """The label of each colour; those of names that are no class are ignored.

    Raises: UserError for a class without a colour.
    """
    if missing := [name for name in class_names if name not in colours]:
        raise UserError(
            f"{source} has no colour of {', '.join(missing)}, which the class names hold: it has {', '.join(colours)}"
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    return {colour: numbers.get(name, IGNORE_INDEX) for name, colour in colours.items()}
