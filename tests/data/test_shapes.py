"""The embedded data set: repeatable, disjoint splits, and nothing but the outline tells a class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest

from segdcn.data.dataset import Sample
from segdcn.data.shapes import Shapes

SPLITS = ("train", "val", "test")


class Drawn:
    """The whole data set at its default size, with the initial state of every random stream it was drawn from."""

    def __init__(self) -> None:
        self.streams: list[tuple[int, int]] = []
        make = np.random.default_rng

        def recorded(seed: Any = None) -> np.random.Generator:
            rng = make(seed)
            state = rng.bit_generator.state["state"]
            self.streams.append((state["state"], state["inc"]))
            return rng

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.random, "default_rng", recorded)
            shapes = Shapes()
            self.splits = {name: list(shapes.split(name)) for name in SPLITS}

    def __iter__(self) -> Iterator[Sample]:
        return (sample for split in self.splits.values() for sample in split)


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return Drawn()


def same(one: Sample, other: Sample) -> bool:
    return np.array_equal(one.image, other.image) and np.array_equal(one.label, other.label)


def test_the_seed_decides_the_images() -> None:
    first, again, other = (list(Shapes(3, 3, 3, seed=seed).split("train")) for seed in (5, 5, 6))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.image, b.image) for a in first for b in other)


@pytest.mark.parametrize("split", SPLITS)
def test_a_larger_split_begins_with_the_smaller_one(split: str, drawn: Drawn) -> None:
    few = Shapes(4, 3, 2, seed=0).split(split)
    assert len(few) == {"train": 4, "val": 3, "test": 2}[split]
    for small, large in zip(few, drawn.splits[split], strict=False):
        assert small.name == large.name
        assert same(small, large)


def test_splits_do_not_depend_on_the_order_of_their_drawing(drawn: Drawn) -> None:
    shapes = Shapes(2, 2, 2)
    for split in reversed(SPLITS):
        assert same(shapes.split(split)[0], drawn.splits[split][0])


def test_no_image_is_drawn_twice(drawn: Drawn) -> None:
    samples = list(drawn)
    assert [len(split) for split in drawn.splits.values()] == [1600, 400, 400]
    # noise alone would make images differ; equal labels would betray equal objects
    for things in (
        {s.image.tobytes() for s in samples},
        {s.label.tobytes() for s in samples},
        {s.name for s in samples},
    ):
        assert len(things) == 2400
    # and the reason: every image has a random stream of its own
    assert len(drawn.streams) == len(set(drawn.streams)) == 2400


def test_samples_are_what_every_data_set_gives(drawn: Drawn) -> None:
    for sample in drawn:
        assert sample.image.shape == (96, 96, 3)
        assert sample.label.shape == (96, 96)
        assert sample.image.dtype == sample.label.dtype == np.uint8
    assert {sample.name.split("_")[0] for sample in drawn} == set(SPLITS)


def test_six_classes_have_names_and_colours() -> None:
    shapes = Shapes()
    assert len(shapes.class_names) == len(set(shapes.class_names)) == 6
    assert len(shapes.palette) == len(set(shapes.palette)) == 6
    assert all(len(colour) == 3 and 0 <= min(colour) <= max(colour) <= 255 for colour in shapes.palette)


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_is_frequent_enough_to_learn_and_to_measure(split: str, drawn: Drawn) -> None:
    pixels = np.bincount(np.concatenate([s.label.ravel() for s in drawn.splits[split]]), minlength=6)
    assert len(pixels) == 6  # no other label, 255 included
    share = pixels / pixels.sum()
    assert 0.5 < share[0] < 0.95
    assert share[1:].min() > 0.01
    assert share[1:].max() < 4 * share[1:].min()
    images = np.array([sum(kind in s.label for s in drawn.splits[split]) for kind in range(6)])
    assert images.min() > 0.1 * len(drawn.splits[split])
    assert all(0 in s.label and s.label.any() for s in drawn.splits[split])


def test_colour_and_contrast_do_not_tell_the_class(drawn: Drawn) -> None:
    """Statistics of the objects' inner pixels have one mean over all classes, up to four standard errors."""
    statistics: dict[int, list[list[float]]] = {kind: [] for kind in range(1, 6)}
    for sample in drawn.splits["train"][:400]:
        for kind in np.unique(sample.label[sample.label > 0]).tolist():
            # two pixels from the edge, which is blurred: a long outline would darken thin objects
            inner = cv2.erode((sample.label == kind).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
            if inner.sum() >= 30:
                colours = sample.image[inner].astype(float)
                statistics[kind].append([*colours.mean(0), colours.mean(), np.ptp(colours.mean(0))])
    everything = np.concatenate([np.array(values) for values in statistics.values()])
    for kind, values in statistics.items():
        assert len(values) >= 50
        standard_error = everything.std(0) / np.sqrt(len(values))
        assert (np.abs(np.mean(values, 0) - everything.mean(0)) < 4 * standard_error).all(), kind


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="train, val, test, not 'validation'"):
        Shapes(1, 1, 1).split("validation")


def test_an_image_is_drawn_when_it_is_read_and_then_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[Any] = []
    make = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: streams.append(seed) or make(seed))
    val = Shapes(seed=7).split("val")
    assert (len(val), streams) == (400, [])
    assert val[-1] is val[399]
    assert [sample.name for sample in val[3:5]] == ["val_0003", "val_0004"]
    assert streams == [(7, 1, 399), (7, 1, 3), (7, 1, 4)]
    with pytest.raises(IndexError):
        val[400]
