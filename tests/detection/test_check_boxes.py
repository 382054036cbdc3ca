"""segdcn-data check of a data set of boxes: what is wrong is named by file and box, and what is there is counted."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from checking import check, row
from handmade_boxes import voc_folder, voc_object, write_coco, write_voc
from PIL import Image
from rich.console import Console
from running import real_bccd

from segdcn.detection.check import examples, read_splits
from segdcn.detection.voc_boxes import VocBoxes


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where check.png is drawn."""
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    return folder


def notes(out: str) -> list[str]:
    return [line.removeprefix("note: ") for line in out.splitlines() if line.startswith("note: ")]


def noise(number: int, height: int = 100, width: int = 200) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def voc(root: Path, images: dict[str, list[str]]) -> tuple[str, ...]:
    """A folder of "train/a" and so on with their objects; what to type for it."""
    lists: dict[str, list[str]] = {}
    for number, (place, objects) in enumerate(images.items()):
        split, name = place.split("/")
        lists.setdefault(split, []).append(name)
        write_voc(root, name, noise(number), objects)
    voc_folder(root, **lists)
    return "dataset=voc_boxes", f"dataset.root={root}", *(f"dataset.{split}={split}" for split in ("train", "val"))


def test_objects_are_counted_by_class_split_and_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = voc(
        tmp_path,
        {
            # widths times heights around 32^2 = 1024 and 96^2 = 9216
            "train/a": [
                voc_object("cat", 1, 1, 32, 32),
                voc_object("cat", 1, 1, 31, 33),
                voc_object("dog", 1, 1, 96, 96),
            ],
            "train/b": [voc_object("dog", 1, 1, 96, 95), voc_object("dog", 1, 1, 200, 100, difficult=1)],
            "train/c": [],
            "val/d": [voc_object("cat", 1, 1, 200, 100)],
        },
    )
    status, out, errors = check(capsys, *options)
    assert (status, errors) == (0, [])
    assert row(out, "train")[1:] == ["3", "0", "4", "1", "1", "2", "1"]
    assert row(out, "val")[1:] == ["1", "0", "1", "0", "0", "0", "1"]
    assert row(out, "cat")[1:] == ["2", "1", "1", "1"]
    assert row(out, "dog")[1:] == ["2", "2", "0", "0"]
    assert notes(out) == ["val has no object of dog"]
    assert out.splitlines()[-2:] == ["4 images, 0 problem(s)", "check.png shows each class in an image"]


def test_every_bad_file_is_named_and_what_is_left_out_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = voc_object("cat", 2, 3, 40, 60)
    options = voc(
        tmp_path,
        {
            "train/a": [good, voc_object("cat", 5, 5, 5, 9), voc_object("dog", 190, 90, 230, 120)],
            "train/b": [good],
            "train/c": [good, voc_object("cow", 5, 5, 50, 90)],
            "train/d": [good],
            "val/e": [good],
        },
    )
    xml, jpeg = tmp_path / "Annotations", tmp_path / "JPEGImages"
    (xml / "b.xml").write_text("<annotation>")
    (jpeg / "d.jpg").write_bytes((jpeg / "d.jpg").read_bytes()[:-400])
    shutil.copy(jpeg / "a.jpg", jpeg / "e.jpg")
    status, out, errors = check(capsys, *options, "dataset.class_names=[cat,dog]")
    assert status == 1
    for error, pattern in zip(
        errors,
        [
            r"train: .*b\.xml is no XML that can be read",
            r"train: .*c\.xml: object 2 \(cow, 5 5 50 90\) is of no class",
            r"train: .*d\.jpg .*truncated",
            r"train and val share images of the same content: 1 file\(s\) \(a = e\)",
        ],
        strict=True,
    ):
        assert re.search(pattern, error), (pattern, error)
    assert row(out, "train")[1:4] == ["4", "3", "2"]
    assert notes(out) == [
        f"train: {xml / 'a.xml'}: object 2 (cat, 5 5 5 9) is degenerate and is left out",
        f"train: {xml / 'a.xml'}: object 3 (dog, 190 90 230 120) reaches beyond the image (200x100, width x height) and"
        " is clipped",
        "val has no object of dog",
    ]


def test_what_would_stop_a_training_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, difficult = voc_object("cat", 2, 3, 40, 60), voc_object("cat", 2, 3, 40, 60, difficult=1)
    options = voc(tmp_path, {"train/a": [difficult], "val/b": [good], "val/c": [good]})
    (tmp_path / "Annotations" / "c.xml").unlink()
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    status, out, errors = check(capsys, *options)
    assert (status, row(out, "train")[4]) == (1, "1")
    assert out.splitlines()[-1] == "1 images, 2 problem(s)"  # and no picture, without an object
    for error, pattern in zip(
        errors,
        [
            r"'val' cannot be used: 1 file\(s\) \(b\) .*JPEGImages and 1 file\(s\) \(c\) .*Annotations: unpack",
            "'train' has no object but 1 that are ignored",
        ],
        strict=True,
    ):
        assert re.search(pattern, error), (pattern, error)


def test_many_odd_boxes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, point = voc_object("cat", 2, 3, 40, 60), voc_object("cat", 5, 5, 5, 5)
    out = check(capsys, *voc(tmp_path, {"train/a": [good, *[point] * 33], "val/b": [good]}))[1]
    assert len(notes(out)) == 21
    assert notes(out)[-1] == "train: 13 more of such boxes"


def test_coco_and_the_embedded_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = {"category_id": 3, "bbox": [1, 2, 30, 20], "area": 300.0}
    write_coco(tmp_path, "train2017", {1: "a.png"}, {3: "cat"}, [{"id": 5, "image_id": 1, **box}])
    write_coco(tmp_path, "val2017", {2: "b.png"}, {3: "cat"}, [{"id": 6, "image_id": 2, "iscrowd": 1, **box}])
    status, out, errors = check(capsys, "dataset=coco_boxes", f"dataset.root={tmp_path}")
    assert row(out, "train")[1:] == ["1", "0", "1", "0", "1", "0", "0"]
    assert (status, len(errors)) == (1, 1)
    assert "'val' has no object but 1 that are ignored" in errors[0]
    few = [f"dataset.{split}_images=12" for split in ("train", "val", "test")]
    status, out, errors = check(capsys, "dataset=boxes", *few)
    assert (status, errors, notes(out)) == (0, [], [])
    assert row(out, "test")[1:3] == ["12", "0"]


def test_own_data_set_that_breaks_its_contract_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong_boxes.py").write_text(
        """
import numpy as np
from segdcn.detection.samples import BoxSample, DetectionDataset, Objects

class Wrong(DetectionDataset):
    class_names, palette, splits = ("a",), ((9, 9, 9),), ("train", "val")

    def split(self, name):
        rows = {"t0": [1, 2, 3, 4], "t1": [5, 5, 5, 9], "t2": [-1, 2, 9, 31], "t3": [1, 2, 3, 4], "t4": [1, 2, 3, 4]}
        return [sample(one, box) for one, box in rows.items()] if name == "train" else [sample("v0 of val", rows["t0"])]

def sample(name, box):
    objects = Objects(np.array([box], np.float32), np.array([1]), np.zeros(1, bool), np.ones(1))
    if name == "t3":
        objects = objects._replace(labels=np.array([2]))
    if name == "t4":
        objects = objects._replace(boxes=objects.boxes.astype(int))
    return BoxSample(np.zeros((30, 40, 3), np.uint8) + len(name), objects, name)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    status, _, errors = check(capsys, "dataset=shapes", "~dataset", "+dataset._target_=wrong_boxes.Wrong")
    assert status == 1
    parts = [
        "t1: box 0 (5 5 5 9) is degenerate",
        "t2: box 0 (-1 2 9 31) reaches beyond the image (40x30",
        "t3: box 0 (1 2 3 4) has label 2: labels are 1..1",
        "t4: boxes, labels, ignored and areas must be float32 (1, 4), int64 (1,)",
    ]
    for error, part in zip(errors, parts, strict=True):
        assert part in error


def test_the_picture_shows_each_class_within_its_box(tmp_path: Path) -> None:
    voc(
        tmp_path,
        {
            "train/a": [voc_object("cat", 1, 1, 200, 100), voc_object("cat", 11, 21, 110, 70)],  # all, and a quarter
            "train/b": [voc_object("cat", 1, 1, 20, 20), voc_object("dog", 3, 3, 52, 52, difficult=1)],
            "val/c": [voc_object("dog", 191, 91, 200, 100)],
        },
    )
    dataset = VocBoxes(tmp_path, "train", "val")
    cat, dog = examples(dataset, read_splits(dataset, 0, Console(quiet=True)))
    assert (cat.title, cat.source) == ("1 cat", "train: a, 100x50 pixels, 25.0 %")
    expected = np.zeros((100, 200), bool)
    expected[20:70, 10:110] = True
    np.testing.assert_array_equal(cat.inside, expected)
    assert (dog.title, dog.source) == ("2 dog", "val: c, 10x10 pixels, 0.5 %")
    with Image.open(tmp_path / "JPEGImages" / "c.jpg") as image:
        np.testing.assert_array_equal(dog.image, np.asarray(image))


def test_blood_cells(capsys: pytest.CaptureFixture[str]) -> None:
    root = real_bccd()
    status, out, errors = check(
        capsys, "dataset=voc_boxes", f"dataset.root={root}", "dataset.train=train", "dataset.val=val"
    )
    assert (status, errors) == (0, [])
    assert row(out, "train")[1:4] == ["205", "0", "2,804"]
    assert row(out, "val")[1:4] == ["87", "0", "1,137"]
    # as published, each a point where a cell should be
    train, val = notes(out)
    assert train.endswith("BloodImage_00343.xml: object 4 (RBC, 181 329 181 329) is degenerate and is left out")
    assert val.endswith("BloodImage_00338.xml: object 13 (RBC, 504 337 504 337) is degenerate and is left out")
