"""The embedded set of boxes: generated in code from a seed, no files, no download.

The five kinds of objects of `segdcn.data.shapes`, smaller and apart from each other, in larger images. None is brighter
or darker than what is around it by rule: each takes its colour at some distance from what it covers, and so do decoys,
bars and triangles without a box, so that a detector has to know outlines to find objects as well as to name them.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from segdcn.data.shapes import Generated, Shapes, blotches, draw_line, silhouette, texture, warped_plane
from segdcn.detection.box_files import Row, objects_of
from segdcn.detection.samples import BoxSample, DetectionDataset

SIZE = 128
OBJECTS = (2, 5)  # of an image

# As in shapes: changing one of these changes what every figure on this data set means.
RADIUS = (12.0, 34.0)  # of an object, in pixels
CONTRAST = (60.0, 140.0)  # distance of its colour from that of what it covers
LEAST_SIDE, LEAST_AREA = 8, 60  # of what is seen of it, in pixels
GRAIN = 8.0
TRIES = 8  # to place an object apart from the others


class Boxes(Generated[BoxSample], DetectionDataset):
    """Images of 128x128 pixels with two to five objects, none of which touches another, over texture and clutter.

    A box is the extent of an object's pixels, and its area their number. Drawn in some 12 ms each, see
    `segdcn.data.shapes.Generated`.
    """

    name = "boxes"
    class_names: Sequence[str] = Shapes.class_names[1:]
    palette: Sequence[tuple[int, int, int]] = Shapes.palette[1:]

    def _draw(self, rng: np.random.Generator, name: str) -> BoxSample:
        image = texture(rng, (40.0, 210.0), SIZE)
        for _ in range(rng.integers(1, 4)):
            _recolour(rng, image, _decoy(rng))
        taken = np.zeros((SIZE, SIZE), bool)
        found: list[Row] = []
        tries, wanted = 0, rng.integers(OBJECTS[0], OBJECTS[1] + 1)
        while len(found) < wanted and (len(found) < OBJECTS[0] or tries < TRIES * wanted):
            tries += 1
            label = int(rng.integers(1, len(self.class_names) + 1))
            plane = warped_plane(rng, SIZE, RADIUS, margin=0.1, stretch=0.5, cells=7)
            inside, (x, y, width, height, area) = _largest_piece(silhouette(label, *plane))
            if area < LEAST_AREA or min(width, height) < LEAST_SIDE or taken[inside].any():
                continue
            _recolour(rng, image, inside)
            taken[cv2.dilate(inside.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0] = True
            found.append(((x, y, x + width, y + height), label, False, area))
        for _ in range(rng.integers(2, 6)):
            draw_line(rng, image)
        noisy = cv2.GaussianBlur(image, (3, 3), 0.6) + rng.normal(0, GRAIN, image.shape)
        return BoxSample(noisy.clip(0, 255).astype(np.uint8), objects_of(found), name)


def _largest_piece(inside: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], tuple[int, ...]]:
    """Of what the warp or the border has torn apart the largest piece; its left, top, width, height and area."""
    _, pieces, statistics, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8), connectivity=8)
    areas = statistics[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0  # what is outside
    largest = int(areas.argmax())
    return (pieces == largest) & inside, (*statistics[largest, :4].tolist(), int(areas[largest]))


def _decoy(rng: np.random.Generator) -> NDArray[np.bool_]:
    """The pixels of a warped triangle or bar."""
    u, v = warped_plane(rng, SIZE, (0.8 * RADIUS[0], 0.8 * RADIUS[1]), margin=0, stretch=0, cells=7)
    if rng.random() < 0.5:
        return np.asarray((v > -0.5) & (v + 1.7 * np.abs(u) < 0.9))
    return np.asarray((np.abs(u) < 1) & (np.abs(v) < 0.3))


def _recolour(rng: np.random.Generator, image: NDArray[np.float32], inside: NDArray[np.bool_]) -> None:
    """Give the pixels inside a colour at some distance from the mean of those that are there."""
    if not inside.any():
        return
    there = image[inside].mean(axis=0)
    way = rng.normal(0, 1, 3)
    way *= rng.uniform(*CONTRAST) / np.linalg.norm(way)
    colour = np.where((there + way < 15) | (there + way > 240), there - way, there + way)
    image[inside] = (colour + blotches(rng, SIZE))[inside]
