"""What is said of labels before a training, and how little is read for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from running import call

from segdcn import MissingFileError
from segdcn.commands.data import main as check
from segdcn.data import ImageFolder, labels
from segdcn.data.dataset import DataError, Sample
from segdcn.data.labels import labels_before_training, read_some_labels

Masks = Sequence[NDArray[np.uint8]]


def make(root: Path, train: Masks, val: Masks) -> Path:
    """A folder data set of these masks; its images cannot be read, and need not be."""
    for split, masks in (("train", train), ("val", val)):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for number, mask in enumerate(masks):
            (root / split / "images" / f"{number:03d}.png").write_bytes(b"no picture")
            Image.fromarray(mask).save(root / split / "masks" / f"{number:03d}.png")
    return root


def of(*numbers: int) -> NDArray[np.uint8]:
    return np.tile(np.array(numbers, np.uint8), (2, 1))


def test_good_labels_are_not_spoken_of(tmp_path: Path) -> None:
    root = make(tmp_path, [of(0, 1, 255), of(1, 2)], [of(0, 1, 2)])
    assert labels_before_training(ImageFolder(root, ["a", "b", "c"])) == []


def test_objects_drawn_as_255_are_an_error_that_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make(tmp_path / "data", [of(0, 255), of(255, 0)], [of(0, 255)])
    message = (
        r"^train masks hold 0 and 255 alone, and 255 is ignored: 'cat' would have no pixel .*\(2 train images\)"
        r".*'dataset.mapping=\{255:1\}'"
    )
    with pytest.raises(DataError, match=message):
        labels_before_training(ImageFolder(root, ["background", "cat"]))
    assert labels_before_training(ImageFolder(root, ["background", "cat"], mapping={255: 1})) == []
    # three classes may well be learned with the rest
    notes = labels_before_training(ImageFolder(root, ["background", "cat", "dog"]))
    assert notes == [
        "train has no pixel of cat, dog: seen in none of 2 train images",
        "val has no pixel of cat, dog: seen in none of 1 val image",
    ]
    # the same, by the command, where all can be read
    for path in root.glob("*/images/*.png"):
        Image.fromarray(np.random.default_rng(len(path.parts)).integers(0, 256, (2, 2, 3), np.uint8)).save(path)
    options = ("check", "workers=0", "picture=null", "dataset=folder", f"dataset.root={root}")
    options += ("dataset.class_names=[background,cat]",)
    assert call(check, *options) == 1
    assert "error: train masks hold 0 and 255 alone" in capsys.readouterr().err
    call(check, *options, "dataset.mapping={255:1}")
    shown = capsys.readouterr()
    assert "255 alone" not in shown.err
    assert "has no pixel" not in shown.out


def test_what_is_odd_is_one_line_each(tmp_path: Path) -> None:
    root = make(tmp_path, [of(0, 255, 255), of(255, 255, 1)], [of(255, 255), of(255, 255)])
    assert labels_before_training(ImageFolder(root, ["a", "b"])) == [
        "train has 66.7 % ignored pixels (255) in 2 train images",
        "val has no labelled pixel: all are 255 (ignored) in 2 val images",
    ]


def test_what_cannot_be_read_and_what_is_not_there_is_no_business_of_this(tmp_path: Path) -> None:
    root = make(tmp_path, [of(0, 1), of(0, 9)], [])
    (root / "train" / "masks" / "000.png").write_bytes(b"no mask")
    (root / "val" / "images").rmdir()
    found = read_some_labels(ImageFolder(root, ["a", "b"]), "train")
    assert (found.read, found.total, found.pixels.sum()) == (0, 2, 0)
    assert labels_before_training(ImageFolder(root, ["a", "b"])) == []


class Counting:
    """Samples of a data set of the user's own, without files; the second class is in one of them."""

    class_names, splits = ("a", "b"), ("train",)
    palette = ((0, 0, 0), (9, 9, 9))

    def __init__(self, size: int, rare: int) -> None:
        self.size, self.rare, self.asked = size, rare, []

    def split(self, name: str) -> Counting:
        if name != "train":
            raise MissingFileError(name)
        return self

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        label = np.full((4, 4), int(index == self.rare), np.uint8)
        return Sample(np.zeros((4, 4, 3), np.uint8), label, str(index))


def test_looking_ends_as_soon_as_every_class_was_seen() -> None:
    nowhere = Counting(400, -1)
    assert read_some_labels(nowhere, "train").read == 400
    order = nowhere.asked
    assert sorted(order) == list(range(400))
    first = sorted(order[: labels.AT_LEAST])
    assert max(np.diff([0, *first, 400])) < 60  # of every part of the split
    for place, read in ((0, labels.AT_LEAST), (labels.AT_LEAST - 1, labels.AT_LEAST), (200, 201)):
        rare = Counting(400, order[place])
        found = read_some_labels(rare, "train")
        assert rare.asked == order[:read]
        assert (found.read, found.total, found.pixels[:2].tolist()) == (read, 400, [16 * (read - 1), 16])


def test_a_class_that_is_nowhere_does_not_hold_up_a_training_for_long() -> None:
    absent = Counting(5 * labels.AT_MOST, -1)
    assert labels_before_training(absent) == [
        "train has no pixel of b: seen in none of 1,000 train images looked at, of 5,000"
    ]
    assert len(absent.asked) == labels.AT_MOST
