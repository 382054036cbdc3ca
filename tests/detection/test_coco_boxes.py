"""Boxes in COCO's form: ids with gaps, crowds, areas, what is left out, and JSON that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade_boxes import write_coco
from PIL import Image

from segdcn.data.dataset import DataError
from segdcn.detection.coco_boxes import CocoBoxes, read_ids

CATEGORIES = {90: "toothbrush", 1: "person", 13: "stop sign"}


def annotation(number: int, image: int, category: int, *bbox: float, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), "iscrowd": 0, **more}


def miniature(root: Path, *annotations: dict[str, Any], **changed: Any) -> Path:
    """Two images of 40x30 pixels in train, ids 581 and 9, and one in val."""
    write_coco(root, "train2017", {581: "b.png", 9: "a.png"}, CATEGORIES, annotations, **changed)
    write_coco(root, "val2017", {7: "v.png"}, CATEGORIES, [annotation(1, 7, 13, 1, 2, 3, 4)])
    return root


def test_categories_become_labels_without_gaps_and_back(tmp_path: Path) -> None:
    root = miniature(
        tmp_path,
        annotation(30, 9, 90, 1, 2, 3, 4, area=5.5),
        annotation(31, 9, 1, 10.5, 2.25, 20, 7, area=88.0, iscrowd=1),
        annotation(29, 581, 13, 0, 0, 40, 30),
    )
    dataset = CocoBoxes(root)
    assert dataset.splits == ("train", "val")
    assert dataset.class_names == ("person", "stop sign", "toothbrush")
    ids = read_ids(root / "annotations" / "instances_train2017.json")
    assert ids.images == {"b.png": 581, "a.png": 9}
    assert ids.categories == {"person": 1, "stop sign": 13, "toothbrush": 90}
    assert len(dataset.palette) == 3
    train = dataset.split("train")
    assert [sample.name for sample in train] == ["b", "a"]
    one, other = (sample.objects for sample in train)
    named = [dataset.class_names[label - 1] for label in (*one.labels, *other.labels)]
    assert [ids.categories[name] for name in named] == [13, 90, 1]
    # x, y, width and height become corners; an area that the file does not tell is the box's
    assert other.boxes.tolist() == [[1, 2, 4, 6], [10.5, 2.25, 30.5, 9.25]]
    assert other.areas.tolist() == [5.5, 88.0]
    assert other.ignored.tolist() == [False, True]
    assert one.areas.tolist() == [1200]
    assert [values.dtype for values in other] == [np.float32, np.int64, np.bool_, np.float64]


def test_a_box_is_what_it_is_painted_at(tmp_path: Path) -> None:
    root = miniature(tmp_path, annotation(1, 9, 1, 5, 7, 11, 3))
    image = np.zeros((30, 40, 3), np.uint8)
    for y in range(7, 10):
        for x in range(5, 16):
            image[y, x] = 255
    Image.fromarray(image).save(root / "train2017" / "a.png")
    sample = CocoBoxes(root).split("train")[1]
    left, top, right, bottom = sample.objects.boxes[0].astype(int)
    inside = np.zeros((30, 40), bool)
    inside[top:bottom, left:right] = True
    np.testing.assert_array_equal(inside, sample.image[..., 0] > 0)


def test_boxes_are_clipped_and_those_of_less_than_a_pixel_are_left_out(tmp_path: Path) -> None:
    root = miniature(
        tmp_path,
        annotation(1, 9, 1, 30, 20, 15, 15, area=7.0),
        annotation(2, 9, 1, 5, 5, 0.5, 9),
        annotation(3, 9, 1, 39.5, 5, 30, 9),
        annotation(4, 9, 90, 0.3, 4, 1, 1),
        annotation(5, 9, 13, -0.2, 4, 40.4, 9),
        annotation(6, 9, 13, 5, 5, -3, 9),
    )
    sample, odd = CocoBoxes(root).split("train").read(1)
    np.testing.assert_allclose(sample.objects.boxes, [[30, 20, 40, 30], [0.3, 4, 1.3, 5], [0, 4, 40, 13]])
    assert sample.objects.areas[0] == 7
    file = root / "annotations" / "instances_train2017.json"
    beyond = "reaches beyond the image (40x30, width x height)"
    assert odd == [
        f"{file}: annotation 1 (person, 30 20 15 15) {beyond} and is clipped",
        f"{file}: annotation 2 (person, 5 5 0.5 9) is degenerate and is left out",
        f"{file}: annotation 3 (person, 39.5 5 30 9) {beyond} and is left out",
        f"{file}: annotation 6 (stop sign, 5 5 -3 9) is degenerate and is left out",
    ]


def test_images_without_objects_stay(tmp_path: Path) -> None:
    train = CocoBoxes(miniature(tmp_path)).split("train")
    assert [sample.objects.boxes.shape for sample in train] == [(0, 4), (0, 4)]
    assert len(train[:1]) == 1


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("{", r"instances_train2017\.json is no JSON that can be read"),
        ("[1]", "is no COCO JSON, which has lists of categories"),
        ('{"images": [], "annotations": []}', "is no COCO JSON.*KeyError 'categories'"),
        ('{"images": [3], "annotations": [], "categories": []}', "is no COCO JSON"),
        ('{"images": [], "annotations": [7], "categories": []}', "is no COCO JSON"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "is no COCO JSON.*file_name"),
        ("[" * 100_000, "is no JSON that can be read"),
        (
            '{"images": [{"id": 1, "file_name": "../../secret.png"}], "annotations": [], "categories": []}',
            r"secret\.png lies outside of",
        ),
        ('{"images": [{"id": 1, "file_name": "/secret.png"}], "annotations": [], "categories": []}', "lies outside of"),
    ],
)
def test_a_file_that_is_no_cocos_is_refused(tmp_path: Path, content: str, pattern: str) -> None:
    root = miniature(tmp_path)
    (root / "annotations" / "instances_train2017.json").write_text(content)
    dataset = CocoBoxes(root)
    assert len(dataset.split("val")) == 1
    with pytest.raises(DataError, match=pattern) as error:
        dataset.split("train")
    assert "\n" not in str(error.value)


def test_annotations_that_cannot_be_are_told_in_one_line(tmp_path: Path) -> None:
    wrong = [
        annotation(1, 9, 2, 1, 1, 5, 5),  # no such category
        annotation(2, 8, 1, 1, 1, 5, 5),  # no such image
        annotation(3, 9, 1, 1, 1, 5),
        annotation(4, 9, 1, 1, 1, 5, float("inf")),
        annotation(5, 9, 1, 1, 1, 5, 5, area="much"),
        annotation(6, 9, [1], 1, 1, 5, 5),  # type: ignore[arg-type]
        annotation(7, 9, 1, 1, 1, 5, 5),
    ]
    with pytest.raises(DataError) as error:
        CocoBoxes(miniature(tmp_path, *wrong)).split("train")
    assert re.findall(r"annotation (\d)", str(error.value)) == ["1", "2", "3"]
    assert str(error.value).endswith("; and 3 more")


def test_two_of_one_id_or_name_and_other_categories_are_refused(tmp_path: Path) -> None:
    root = miniature(tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for key, entry in (("categories", {"id": 5, "name": "person"}), ("images", {"id": 9, "file_name": "a.png"})):
        file.write_text(json.dumps({**content, key: [*content[key], entry]}))
        with pytest.raises(DataError, match=f"of its {key} two are the same"):
            CocoBoxes(root).split("train")
    file.write_text(json.dumps({**content, "categories": content["categories"][1:]}))
    with pytest.raises(DataError, match=r"train2017\.json has other categories than the file of val"):
        CocoBoxes(root).split("train")


def test_missing_files_are_named(tmp_path: Path) -> None:
    root = miniature(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"instances_test\.json does not exist: dataset\.root must hold"):
        CocoBoxes(root, test="test")
    with pytest.raises(ValueError, match="no split 'val', only train"):
        CocoBoxes(root, val=None).split("val")
    (root / "train2017" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 file\(s\) \(b\.png\) of .*train2017\.json missing in .*train2017"):
        CocoBoxes(root).split("train")
