from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import make_cityscapes, make_voc
from PIL import Image

from segdcn.analysis.objects import box_sides, box_under, cell_centres, object_boxes
from segdcn.data import VOC, Cityscapes


def test_pieces_of_a_label_map_are_objects() -> None:
    label = np.zeros((40, 60), np.uint8)
    label[2:8, 3:13] = 1
    label[8:14, 13:20] = 1  # touches at a corner: one piece
    label[20:24, 30:40] = 2
    label[20:24, 40:50] = 3  # touches, but of another class
    label[30:33, 0:5] = 1  # a speck of 15 pixels
    label[36:40, 0:4] = 1  # 16 pixels
    label[30:, 50:] = 255
    boxes = object_boxes(label, [1, 2])
    assert boxes.tolist() == [[2, 3, 14, 20], [36, 0, 40, 4], [20, 30, 24, 40]]
    assert box_sides(boxes).tolist() == [math.sqrt(12 * 17), 4, math.sqrt(40)]
    for nothing in (object_boxes(label, []), object_boxes(label, [9]), object_boxes(np.full((4, 5), 255), [1])):
        assert nothing.shape == (0, 4)


def test_instance_maps_tell_objects_apart() -> None:
    label = np.zeros((20, 30), np.uint8)
    label[5:15, 5:25] = 2
    label[0, 0] = 1
    instances = np.zeros((20, 30), np.int32)
    instances[5:15, 5:15] = 26001
    instances[5:15, 15:25] = 26000
    instances[4, 15] = 26000  # a pixel that is labelled otherwise: most decide
    instances[0, 0] = 7
    assert object_boxes(label, [2], instances).tolist() == [[4, 15, 15, 25], [5, 5, 15, 15]]
    assert object_boxes(label, [1], instances).tolist() == [[0, 0, 1, 1]]
    assert object_boxes(label, [2], np.zeros_like(instances)).shape == (0, 4)


coordinates = st.tuples(st.integers(0, 11), st.integers(0, 11), st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=50)
@given(boxes=st.lists(coordinates, max_size=6), cells=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_the_smallest_box_under_a_centre_wins(boxes: list[tuple[int, int, int, int]], cells: tuple[int, int]) -> None:
    array = np.array([(y, x, y + h, x + w) for y, x, h, w in boxes], np.int64).reshape(-1, 4)
    rows, columns = cell_centres(cells[0], 13), cell_centres(cells[1], 17)
    found = box_under(array, rows, columns)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            there = [n for n, (t, l, b, r) in enumerate(array) if t <= row < b and l <= column < r]  # noqa: E741
            if not there:
                assert found[i, j] == -1
            else:
                areas = {n: (array[n][2] - array[n][0]) * (array[n][3] - array[n][1]) for n in there}
                assert found[i, j] in there
                assert areas[int(found[i, j])] == min(areas.values())


def test_centres_of_cells() -> None:
    assert cell_centres(4, 4).tolist() == [0, 1, 2, 3]
    assert cell_centres(3, 12).tolist() == [2, 6, 10]  # 1.5, 5.5 and 9.5, half to even
    assert cell_centres(2, 31).tolist() == [7, 23]
    assert cell_centres(1, 1).tolist() == [0]


def test_voc_has_instances_where_all_of_its_images_do(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    voc = VOC(root)
    assert voc.instances("val") is None
    folder = root / "VOCdevkit" / "VOC2012" / "SegmentationObject"
    folder.mkdir()
    samples = voc.split("val")
    for number, sample in enumerate(samples):
        objects = np.zeros_like(sample.label)
        objects[3:9, 4:9], objects[10:20, 30:40], objects[0] = 1, 2, 255
        assert voc.instances("val") is None
        Image.fromarray(objects).save(folder / f"{sample.name}.png")
        assert len(samples) == 2, number
    maps = voc.instances("val")
    assert maps is not None
    assert len(maps) == 2
    for sample, numbered in zip(samples, maps, strict=True):
        assert numbered.shape == sample.label.shape
        assert np.unique(numbered).tolist() == [0, 1, 2]  # 255 is nobody's
        assert (numbered == 2).sum() == 100
    (folder / f"{samples[0].name}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"SegmentationObject.* cannot be read as an image"):
        maps[0]


def test_cityscapes_counts_what_is_told_apart(tmp_path: Path) -> None:
    city = Cityscapes(make_cityscapes(tmp_path))
    maps = city.instances("val")
    assert maps is not None
    for sample, numbered, file in zip(city.split("val"), maps, maps.files, strict=True):
        stored = np.asarray(Image.open(file)).astype(int)
        assert (numbered == np.where(stored >= 1000, stored, 0)).all()
        classes = [city.class_names.index(name) for name in city.object_classes]
        expected = []
        for number in sorted(set(stored[stored >= 1000].tolist())):
            if number // 1000 in city.label_ids:  # not a caravan, which is ignored
                y, x = np.nonzero(stored == number)
                expected.append([y.min(), x.min(), y.max() + 1, x.max() + 1])
        assert object_boxes(sample.label, classes, numbered).tolist() == expected
        assert expected
    assert len(city.object_classes) == 8
