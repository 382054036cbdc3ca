"""Which object lies under a cell of a feature map. Legend: M objects, H x W pixels.

The paper's rule, for data sets of masks: an object is its bounding box in the image, its size the area of the box,
and a filter belongs to the box under its centre. Boxes are what the paper sorts by, and its filters learn from what
is around an object as well; where they overlap, the smallest wins.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Integers = NDArray[np.int64]

SPECK = 16  # pixels: a smaller piece of a label map is a slip of the brush, not an object


def object_boxes(label: Array, classes: Collection[int], instances: Array | None = None) -> Integers:
    """The bounding boxes of an image's objects: (M, 4) of top, left, bottom, right, the last two exclusive.

    Args:
        label: integers (H, W).
        classes: the labels that are objects.
        instances: integers (H, W), a number per object and 0 for none; its class is what most of its pixels are
            labelled. None takes each 8-connected piece of a class of at least 16 pixels as an object: two that touch
            are one then, and one that is cut in two counts twice.
    """
    boxes: list[Sequence[int]] = []
    if instances is None:
        for k in sorted(classes):
            _, _, stats, _ = cv2.connectedComponentsWithStats((label == k).astype(np.uint8), connectivity=8)
            for left, top, width, height, pixels in stats[1:].tolist():
                if pixels >= SPECK:
                    boxes.append((top, left, top + height, left + width))
    else:
        rows, columns = np.nonzero(instances)
        numbers = instances[rows, columns]
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=0))
        for members in np.split(order, starts[1:]) if len(order) else ():
            y, x = rows[members], columns[members]
            if int(np.bincount(label[y, x]).argmax()) in classes:
                boxes.append((y.min(), x.min(), y.max() + 1, x.max() + 1))
    return np.array(boxes, np.int64).reshape(-1, 4)


def box_sides(boxes: Integers) -> NDArray[np.float64]:
    """(M, 4) -> (M,), the side of the square of a box's area, in pixels."""
    return np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def box_under(boxes: Integers, rows: Integers, columns: Integers) -> Integers:
    """The number of the smallest box at each crossing of some rows and columns of the image; -1 where there is none.

    Shape: (M, 4), (R,), (C,) -> (R, C).
    """
    owner = np.full((len(rows), len(columns)), -1)
    for number in np.argsort(-box_sides(boxes), kind="stable"):
        top, left, bottom, right = boxes[number]
        inside = np.ix_((rows >= top) & (rows < bottom), (columns >= left) & (columns < right))
        owner[inside] = number
    return owner


def cell_centres(cells: int, pixels: int) -> Integers:
    """The image pixel nearest to each cell's centre, for a map of ``cells`` cells over ``pixels`` pixels: (cells,)."""
    centres = (np.arange(cells) + 0.5) * (pixels / cells) - 0.5
    nearest: Integers = np.rint(centres).clip(0, pixels - 1).astype(np.int64)
    return nearest
