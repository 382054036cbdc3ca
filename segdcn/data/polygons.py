"""Shapes that were drawn by hand, as pixels: polygons, discs, run lengths. Legend: H x W pixels, N corners.

Points are (x, y), and the pixel in row r and column c covers c..c+1 by r..r+1. A pixel is of a shape where its centre
lies inside, nothing is smoothed; a centre on an edge is of the shape to its right or below alone, so that shapes which
share an edge neither overlap nor leave a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segdcn.errors import UserError

Points = NDArray[np.float64]  # (N, 2)
Size = tuple[int, int]  # height, width


class Patch(NamedTuple):
    """The pixels of a shape within an image.

    top, left: where ``inside`` begins.
    inside: bool (h, w).
    """

    top: int
    left: int
    inside: NDArray[np.bool_]


def polygon_pixels(polygons: Sequence[Points], size: Size) -> Patch:
    """What any of some polygons covers; where one crosses itself, even-odd decides. What lies outside is cut off.

    Source: the rule is that of the COCO API, which approximates it on a grid five times as fine.
    """
    corners = np.concatenate(polygons)
    (left, top), (right, bottom) = (
        np.clip(ends, 0, (size[1], size[0])).astype(int)
        for ends in (np.floor(corners.min(axis=0)), np.ceil(corners.max(axis=0)))
    )
    inside = np.zeros((bottom - top, right - left), np.bool_)
    for polygon in polygons:
        inside |= _even_odd(polygon, int(top), int(left), inside.shape)
    return Patch(int(top), int(left), inside)


def _even_odd(polygon: Points, top: int, left: int, shape: Size) -> NDArray[np.bool_]:
    """Pixels from which a ray to the left crosses the outline an odd number of times."""
    height, width = shape
    ends = np.stack([polygon, np.roll(polygon, -1, axis=0)], axis=1)  # (N, 2, 2)
    # from the upper end down: an edge that two polygons share is computed alike for both
    ends = np.take_along_axis(ends, ends[..., 1].argsort(axis=1, kind="stable")[..., None], axis=1)
    (x0, y0), (x1, y1) = ends[:, 0].T, ends[:, 1].T
    # the rows whose centres lie between its ends, the upper one included
    first, last = (np.clip(np.ceil(y - 0.5) - top, 0, height).astype(np.int64) for y in (y0, y1))
    count = last - first
    edge = np.repeat(np.arange(len(polygon)), count)
    row = np.arange(len(edge)) - np.repeat(count.cumsum() - count, count) + first[edge]
    x = x0[edge] + (row + top + 0.5 - y0[edge]) * ((x1 - x0)[edge] / (y1 - y0)[edge])
    column = np.clip(np.ceil(x - 0.5) - left, 0, width).astype(np.int64)  # the first whose centre is not left of it
    crossings = np.zeros(height * (width + 1), np.uint8)
    np.add.at(crossings, row * (width + 1) + column, 1)  # 256 is as even as 0
    odd = np.bitwise_xor.accumulate(crossings.reshape(height, width + 1) & 1, axis=1, dtype=np.uint8)
    return odd[:, :width].astype(np.bool_)


def disc_pixels(centre: Points, radius: float, size: Size) -> Patch:
    """A disc, its edge included; centre (2,)."""
    (left, top), (right, bottom) = (
        np.clip(ends, 0, (size[1], size[0])).astype(int)
        for ends in (np.floor(centre - radius), np.ceil(centre + radius))
    )
    y, x = np.ogrid[top:bottom, left:right]
    inside = np.hypot(x + 0.5 - centre[0], y + 0.5 - centre[1]) <= radius
    return Patch(int(top), int(left), inside)


def run_pixels(counts: NDArray[np.int64], size: Size) -> Patch:
    """COCO's run lengths: of pixels outside and inside in turn, column by column."""
    inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return Patch(0, 0, inside.reshape(size[1], size[0]).T)


def run_lengths(counts: Sequence[int] | str, size: Size) -> NDArray[np.int64]:
    """COCO's run lengths as numbers, of which the compressed kind is a text.

    Source: rleFrString of the COCO API: 5 bits a letter, the lowest first; from the fourth run on differences to the
    one before the last.

    Raises: UserError, the rest of a line, where they are none or not of ``size``.
    """
    runs: list[int] = []
    if isinstance(counts, str):
        value = shift = 0
        for letter in counts:
            bits = ord(letter) - 48
            if not 0 <= bits < 64 or shift > 50:
                raise UserError("has run lengths that cannot be read: they are damaged")
            value |= (bits & 31) << shift
            shift += 5
            if bits & 32:
                continue
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
        if shift:
            raise UserError("has run lengths that break off: they are damaged")
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        runs = counts
    else:
        raise UserError("has run lengths (counts) that are neither whole numbers nor a text")
    if any(run < 0 for run in runs):
        raise UserError("has run lengths below 0: they are damaged")
    if sum(runs) != size[0] * size[1]:
        raise UserError(f"has run lengths of {sum(runs):,} pixels in an image of {size[0] * size[1]:,}")
    return np.array(runs, np.int64)
