"""Boxes in PASCAL VOC's form: corners, difficult objects, lists of several years, and files that are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from handmade_boxes import painted, voc_folder, voc_object, write_voc
from numpy.typing import NDArray
from running import real_bccd

from segdcn.data.dataset import DataError
from segdcn.data.voc import VOC
from segdcn.detection.voc_boxes import VocBoxes


def extents(image: NDArray[np.uint8]) -> list[tuple[int, ...]]:
    """The box of the pixels of each colour but black, in the order of red."""
    found = []
    for red in sorted({*image[..., 0].ravel().tolist()} - {0}):
        inside = image[..., 0] == red
        rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
        found.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return found


def one(tmp_path: Path, *objects: str, **options: object) -> VocBoxes:
    """A data set of one image, 40 wide and 30 high, in train and in val."""
    write_voc(tmp_path, "a", np.zeros((30, 40, 3), np.uint8), objects)
    voc_folder(tmp_path, train=["a"], val=["a"])
    return VocBoxes(tmp_path, train="train", val="val", **{"class_names": ["cat", "dog"], **options})  # type: ignore[arg-type]


def refused(dataset: VocBoxes, pattern: str) -> None:
    with pytest.raises(DataError, match=pattern) as error:
        dataset.split("train")[0]
    assert "\n" not in str(error.value)


def test_a_box_is_the_extent_of_its_pixels(tmp_path: Path) -> None:
    """The corners count pixels from 1, and the last one is inside: the whole image is 1, 1, W, H."""
    for name, boxes in {"a": [(1, 1, 40, 30)], "b": [(3, 5, 4, 9), (17, 2, 30, 30)], "c": []}.items():
        objects = [voc_object("cat", *corners) for corners in boxes]
        # PNG keeps the very colours
        write_voc(tmp_path, name, painted(30, 40, boxes), objects, suffix=".png")
    voc_folder(tmp_path, train=["a", "b"], val=["c"])
    dataset = VocBoxes(tmp_path, train=["train"], val=["val"])
    assert dataset.class_names == ("cat",)
    for sample in dataset.split("train"):
        assert [tuple(box) for box in sample.objects.boxes.astype(int)] == extents(sample.image)
        width, height = (sample.objects.boxes[:, 2:] - sample.objects.boxes[:, :2]).T
        np.testing.assert_array_equal(sample.objects.areas, width * height)
    assert dataset.split("train")[0].objects.boxes.tolist() == [[0, 0, 40, 30]]
    (empty,) = dataset.split("val")
    assert empty.objects.boxes.shape == (0, 4)
    assert [values.dtype for values in empty.objects] == [np.float32, np.int64, np.bool_, np.float64]


def test_difficult_objects_are_ignored_and_parts_passed_over(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    dataset = one(
        tmp_path,
        voc_object("dog", 1, 1, 5, 5, difficult=1),
        voc_object("cat", 2, 2, 9, 9, difficult=0, inside=part).replace(">0</difficult>", ">False</difficult>"),
        voc_object(" dog ", 3.5, 3, 9, 8).replace("<difficult>0</difficult>", ""),
    )
    objects = dataset.split("train")[0].objects
    assert objects.ignored.tolist() == [True, False, False]
    assert objects.labels.tolist() == [2, 1, 2]
    assert objects.boxes[2].tolist() == [2.5, 2, 9, 8]  # VOC 2012 has such fractions
    assert len(dataset.palette) == len(dataset.class_names) == 2


def test_degenerate_boxes_are_left_out_and_what_lies_outside_is_clipped(tmp_path: Path) -> None:
    dataset = one(
        tmp_path,
        voc_object("cat", 7, 8, 7, 8),
        voc_object("cat", 9, 9, 3, 12),
        voc_object("dog", 0, 5, 45, 20),
        voc_object("dog", 41, 5, 60, 20),
        voc_object("dog", 2, 3, 10, 11),
    )
    sample, odd = dataset.split("train").read(0)
    assert sample.objects.boxes.tolist() == [[0, 4, 40, 20], [1, 2, 10, 11]]
    assert sample.objects.areas.tolist() == [40 * 16, 81]
    file = tmp_path / "Annotations" / "a.xml"
    beyond = "reaches beyond the image (40x30, width x height)"
    assert odd == [
        f"{file}: object 1 (cat, 7 8 7 8) is degenerate and is left out",
        f"{file}: object 2 (cat, 9 9 3 12) is degenerate and is left out",
        f"{file}: object 3 (dog, 0 5 45 20) {beyond} and is clipped",
        f"{file}: object 4 (dog, 41 5 60 20) {beyond} and is left out",
    ]


def test_an_image_of_another_size_than_its_file_tells_is_odd(tmp_path: Path) -> None:
    write_voc(tmp_path, "a", np.zeros((30, 40, 3), np.uint8), [voc_object("cat", 1, 1, 5, 5)], size=(40, 30))
    voc_folder(tmp_path, train=["a"])
    _, odd = VocBoxes(tmp_path, train="train").split("train").read(0)
    assert [line.partition(" is of ")[2].split(",")[0] for line in odd] == ["an image of 30x40 pixels (width x height)"]


@pytest.mark.parametrize("below", ["", "VOCdevkit"])
def test_years_are_joined_in_the_order_of_their_lists(tmp_path: Path, below: str) -> None:
    for year, names in (("VOC2007", ["000005", "000001"]), ("VOC2012", ["2008_000002"])):
        for name in names:
            write_voc(
                tmp_path / below / year, name, np.zeros((9, 9, 3), np.uint8), [voc_object("tvmonitor", 1, 1, 5, 5)]
            )
        voc_folder(tmp_path / below / year, trainval=names, test=names[:1])
    dataset = VocBoxes(tmp_path, ["VOC2007/trainval", "VOC2012/trainval"], ["VOC2007/test"])
    assert [sample.name for sample in dataset.split("train")] == ["000005", "000001", "2008_000002"]
    assert dataset.class_names == VOC.class_names[1:]
    assert tuple(dataset.palette) == VOC.palette[1:]
    assert dataset.splits == ("train", "val")
    (sample,) = dataset.split("val")
    assert sample.objects.labels.tolist() == [20]
    with pytest.raises(ValueError, match=r"no split 'test', only train, val: give dataset\.test"):
        dataset.split("test")
    with pytest.raises(FileNotFoundError, match=r"ImageSets.Main.train\.txt does not exist: dataset\.root must be"):
        VocBoxes(tmp_path, "VOC2007/train")


def test_the_list_finds_the_image_whatever_the_file_calls_it(tmp_path: Path) -> None:
    objects = [voc_object("cat", 1, 1, 5, 5)]
    write_voc(tmp_path, "my cat.v2", np.full((9, 9, 3), 7, np.uint8), objects, suffix=".jpeg", filename="other.jpg")
    voc_folder(tmp_path, train=["my cat.v2"])
    (sample,) = VocBoxes(tmp_path, train="train").split("train")
    assert (sample.name, sample.image.shape) == ("my cat.v2", (9, 9, 3))


def test_listed_files_that_are_missing_are_named_at_once(tmp_path: Path) -> None:
    for name in "ab":
        write_voc(tmp_path, name, np.zeros((9, 9, 3), np.uint8), [voc_object("cat", 1, 1, 5, 5)])
    voc_folder(tmp_path, train=["a", "b", "c"], val=[])
    (tmp_path / "Annotations" / "b.xml").unlink()
    dataset = VocBoxes(tmp_path, train="train", val="val")
    with pytest.raises(FileNotFoundError) as error:
        dataset.split("train")
    for part in ("1 file(s) (c)", "JPEGImages and 2 file(s) (b, c)", "Annotations: unpack"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"val\.txt names no image"):
        dataset.split("val")


BOMB = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "aaaaaaaaaa"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;">]>
<annotation><object><name>&y;</name></object></annotation>"""


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"<annotation><object>", r"a\.xml is no XML that can be read: no element found"),
        (b"", "no XML that can be read"),
        (b"\xff\xd8\xff\xe0", "no XML that can be read"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "no XML that can be read"),
        (BOMB.encode(), "has a DOCTYPE, which no annotation needs"),
        (BOMB.encode("utf-16"), "has a DOCTYPE"),  # in which no search of the bytes finds the word
    ],
)
def test_a_file_that_is_no_plain_xml_is_refused(tmp_path: Path, content: bytes, pattern: str) -> None:
    dataset = one(tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_bytes(content)
    refused(dataset, pattern)


@pytest.mark.parametrize(
    ("objects", "pattern"),
    [
        (
            [voc_object("cat", 1, 1, 5, 5), voc_object("cow", 1, 2, 5, 5), voc_object("", 3, 3, 5, 5)],
            r"a\.xml: object 2 \(cow, 1 2 5 5\) is of no class: dataset\.class_names has cat, dog; object 3 ",
        ),
        ([voc_object("cat", "1", "", "nan", "x")], r"object 1 .* has no xmin, ymin, xmax, ymax that are numbers"),
        (["<object><name>cat</name></object>"], "object 1 .*nothing.* that are numbers"),
    ],
)
def test_objects_that_cannot_be_are_told_in_one_line(tmp_path: Path, objects: Sequence[str], pattern: str) -> None:
    refused(one(tmp_path, *objects), pattern)


def test_classes_of_ones_own(tmp_path: Path) -> None:
    dataset = one(tmp_path, voc_object("dog", 1, 1, 5, 5), voc_object("cat", 1, 1, 5, 5), class_names=None)
    assert dataset.class_names == ("cat", "dog")
    for names in (["cat", "cat"], [], "cat"):
        with pytest.raises(ValueError, match="class_names must be different names, without a background"):
            VocBoxes(tmp_path, "train", class_names=names)
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation/>")
    with pytest.raises(DataError, match=r"names an object: give dataset\.class_names"):
        VocBoxes(tmp_path, "train").split("train")


def test_blood_cells() -> None:
    dataset = VocBoxes(real_bccd(), train="train", val="val")
    assert dataset.class_names == ("Platelets", "RBC", "WBC")
    train, val = dataset.split("train"), dataset.split("val")
    assert (len(train), len(val)) == (205, 87)
    sample = next(sample for sample in train if sample.name == "BloodImage_00001")
    assert sample.image.shape == (480, 640, 3)
    assert sample.objects.boxes[sample.objects.labels == 3].tolist() == [[67, 314, 286, 480]]
