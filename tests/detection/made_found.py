"""Detections and objects on a coarse grid, so that equal scores and IoUs of exactly 1/2 are common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from segdcn.detection.found import Found
from segdcn.detection.samples import Detections, Objects

CLASSES = ["cat", "dog", "bird"]


def some_boxes(draw: st.DrawFn, most: int) -> np.ndarray:
    corners = st.tuples(*[st.integers(0, 4)] * 2, *[st.integers(1, 4)] * 2)
    boxes = np.array(draw(st.lists(corners, max_size=most)), np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


@st.composite
def some_detections(draw: st.DrawFn, ties: bool = True) -> Detections:
    """Without ties no two scores of the image are equal; those of different images may be."""
    boxes = some_boxes(draw, 6)
    levels = st.lists(st.integers(0, 9), min_size=len(boxes), max_size=len(boxes), unique=not ties)
    scores = np.array(draw(levels), np.float32) / 10
    labels = draw(st.lists(st.integers(1, 3), min_size=len(boxes), max_size=len(boxes)))
    return Detections(boxes, scores, np.array(labels, np.int64))


@st.composite
def some_objects(draw: st.DrawFn) -> Objects:
    boxes = some_boxes(draw, 4)
    labels = draw(st.lists(st.integers(1, 3), min_size=len(boxes), max_size=len(boxes)))
    ignored = draw(st.lists(st.sampled_from([False, False, True]), min_size=len(boxes), max_size=len(boxes)))
    areas = draw(st.lists(st.floats(0, 20000), min_size=len(boxes), max_size=len(boxes)))
    return Objects(boxes, np.array(labels, np.int64), np.array(ignored, np.bool_), np.array(areas, np.float64))


@st.composite
def some_found(draw: st.DrawFn, ties: bool = True, least: int = 0) -> Found:
    images = draw(st.lists(st.tuples(some_detections(ties), some_objects()), min_size=least, max_size=5))
    return Found([f"i{n}" for n in range(len(images))], CLASSES, [one for one, _ in images], [one for _, one in images])


def some_images(images: int, seed: int = 0, grid: float = 0.25) -> Found:
    """As a detector finds them: near the objects, with some misses and some too many."""
    random = np.random.default_rng(seed)
    detections, objects = [], []
    for _ in range(images):
        number = random.integers(0, 6)
        corners, sides = random.uniform(0, 200, (number, 2)), random.uniform(8, 200, (number, 2))
        boxes = np.hstack((corners, corners + sides)) // grid * grid
        labels, ignored = random.integers(1, 4, number), random.random(number) < 0.15
        objects.append(
            Objects(boxes.astype(np.float32), labels, ignored, sides.prod(axis=1) * random.uniform(0.4, 1, number))
        )
        shifts = random.normal(0, 0.08, (2 * number, 4)) * np.repeat(np.tile(sides, 2), 2, axis=0)
        near = np.repeat(boxes, 2, axis=0) + shifts // grid * grid
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        found = np.where(random.random(2 * number) < 0.8, np.repeat(labels, 2), random.integers(1, 4, 2 * number))
        scores = np.sort(random.random(2 * number).astype(np.float32))[::-1].copy()
        detections.append(Detections(near.astype(np.float32), scores, found))
    return Found([f"i{n}" for n in range(images)], CLASSES, detections, objects)


def chosen(found: Found, places: Sequence[int]) -> Found:
    """The images at these places, as often as they are named."""
    parts = ([part[place] for place in places] for part in (found.names, found.detections, found.objects))
    names, detections, objects = parts
    return Found(names, found.class_names, detections, objects)
