"""The embedded set of boxes: repeatable, disjoint splits, boxes that fit, and nothing but the outline tells a class."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from segdcn.detection.boxes import Boxes
from segdcn.detection.samples import BoxSample

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def drawn() -> list[BoxSample]:
    return list(Boxes(120).split("train"))


def same(one: BoxSample, other: BoxSample) -> bool:
    pairs = zip(one.objects, other.objects, strict=True)
    return np.array_equal(one.image, other.image) and all(np.array_equal(a, b) for a, b in pairs)


def test_the_seed_decides_the_images() -> None:
    first, again, other = (list(Boxes(3, 3, 3, seed=seed).split("train")) for seed in (5, 5, 6))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.image, b.image) for a in first for b in other)


def test_a_larger_split_begins_with_the_smaller_one_and_splits_do_not_depend_on_their_order(
    drawn: list[BoxSample],
) -> None:
    boxes = Boxes(4, 3, 2)
    for split, count in (("test", 2), ("val", 3), ("train", 4)):
        samples = boxes.split(split)
        assert len(samples) == count
        assert boxes.split(split) is samples  # drawn once
        assert [sample.name for sample in samples] == [f"{split}_{number:04d}" for number in range(count)]
    assert all(same(a, b) for a, b in zip(boxes.split("train"), drawn, strict=False))


def test_no_image_is_in_two_splits() -> None:
    boxes = Boxes(5, 5, 5)
    samples = [sample for split in SPLITS for sample in boxes.split(split)]
    # noise alone would make images differ; equal boxes would betray equal objects
    assert len({sample.image.tobytes() for sample in samples}) == 15
    assert len({sample.objects.boxes.tobytes() for sample in samples}) == 15


def test_samples_are_what_every_set_of_boxes_gives(drawn: list[BoxSample]) -> None:
    for image, objects, _ in drawn:
        assert (image.shape, image.dtype) == ((128, 128, 3), np.uint8)
        assert [values.dtype for values in objects] == [np.float32, np.int64, np.bool_, np.float64]
        assert 2 <= len(objects.labels) <= 5
        assert objects.boxes.shape == (len(objects.labels), 4)
        assert set(objects.labels) <= set(range(1, 6))
        assert not objects.ignored.any()
        width, height = (objects.boxes[:, 2:] - objects.boxes[:, :2]).T
        assert min(width.min(), height.min()) >= 8
        assert objects.boxes.min() >= 0
        assert objects.boxes.max() <= 128
        assert (objects.areas <= width * height).all()
        assert (objects.areas >= 60).all()
    assert len(Boxes.class_names) == len(Boxes.palette) == 5
    assert {len(objects.labels) for _, objects, _ in drawn} == {2, 3, 4, 5}


def test_boxes_and_areas_are_those_of_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without blur, grain, clutter and texture an object is the pixels of its one colour."""
    module = "segdcn.detection.boxes"
    monkeypatch.setattr(f"{module}.GRAIN", 0.0)
    monkeypatch.setattr(f"{module}.blotches", lambda rng, size: np.zeros((size, size, 3)))
    monkeypatch.setattr(f"{module}.texture", lambda rng, levels, size: np.full((size, size, 3), 120, np.float32))
    monkeypatch.setattr(f"{module}.draw_line", lambda rng, image: None)
    monkeypatch.setattr(f"{module}._decoy", lambda rng: np.zeros((128, 128), bool))
    monkeypatch.setattr("cv2.GaussianBlur", lambda image, size, sigma: image)
    for image, objects, _ in Boxes(20).split("train"):
        differs = (image != 120).any(axis=2)
        count, pieces = cv2.connectedComponents(differs.astype(np.uint8), connectivity=8)
        seen = set()
        for piece in range(1, count):
            rows, columns = np.nonzero(pieces == piece)
            seen.add((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, len(rows)))
        told = {(*box.astype(int).tolist(), int(a)) for box, a in zip(objects.boxes, objects.areas, strict=True)}
        assert seen == told


def test_classes_are_about_equally_frequent_and_of_one_size_and_colour(drawn: list[BoxSample]) -> None:
    labels = np.concatenate([sample.objects.labels for sample in drawn])
    counts = np.bincount(labels, minlength=6)[1:]
    assert counts.min() > 0.6 * counts.max()
    colours = np.array(
        [
            sample.image[int(y1) : int(y2), int(x1) : int(x2)].mean(axis=(0, 1))
            for sample in drawn
            for x1, y1, x2, y2 in sample.objects.boxes
        ]
    )
    for label in range(1, 6):
        error = colours.std(axis=0) / np.sqrt((labels == label).sum())
        assert (np.abs(colours[labels == label].mean(axis=0) - colours.mean(axis=0)) < 4 * error).all(), label


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="train, val, test, not 'validation'"):
        Boxes(1, 1, 1).split("validation")
    with pytest.raises(ValueError, match="must be at least 0"):
        Boxes(-1)
