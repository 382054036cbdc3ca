"""VOC's figures against a slow loop and published numbers, COCO's against pycocotools on the same things as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_found import CLASSES, chosen, some_found, some_images

from segdcn.detection import average_precision as module
from segdcn.detection.average_precision import (
    average_precision,
    coco_figures,
    mean_of_classes,
    paired_difference,
    rank,
    voc_figures,
)
from segdcn.detection.found import Found
from segdcn.detection.samples import Detections, Objects
from segdcn.errors import MissingPackageError

# Boxes x, y, width, height of https://github.com/rafaelpadilla/Object-Detection-Metrics, samples/sample_2: for each
# image its objects, then its detections with a score in per cent before each.
SAMPLE = [
    ("25 16 38 56 / 129 123 41 62", "88 5 67 31 48 / 70 119 111 40 67 / 80 124 9 49 67"),
    ("123 11 43 55 / 38 132 59 45", "71 64 111 64 58 / 54 26 140 60 47 / 74 19 18 43 35"),
    (
        "16 14 35 48 / 123 30 49 44 / 99 139 47 47",
        "18 109 15 77 39 / 67 86 63 46 45 / 38 160 62 36 53 / 91 105 131 47 47 / 44 18 148 40 44",
    ),
    ("53 42 40 52 / 154 43 31 34", "35 83 28 28 26 / 78 28 68 42 67 / 45 87 89 25 39 / 14 10 155 60 26"),
    ("59 31 44 51 / 48 128 34 52", "62 50 38 28 46 / 44 95 11 53 28 / 95 29 131 72 29 / 23 29 163 72 29"),
    ("36 89 52 76 / 62 58 44 67", "45 43 48 74 38 / 84 17 155 29 35 / 43 95 110 25 42"),
    ("28 31 55 63 / 58 67 50 58", "48 16 20 101 88 / 95 33 116 37 49"),
]


def ap(found: Found, protocol: str, threshold: float) -> np.ndarray:
    return average_precision(rank(found, [threshold])[0], protocol)[:, 0]


def slow_ap(found: Found, protocol: str, threshold: float) -> list[float]:
    """As voc_eval.py counts whole pixels, corners included and numbered from 1."""
    return [_slow_ap_of_class(found, label, protocol, threshold) for label in range(1, len(found.class_names) + 1)]


def _slow_ap_of_class(found: Found, label: int, protocol: str, threshold: float) -> float:
    rows, truths, number = [], [], 0
    for image, (detections, objects) in enumerate(zip(found.detections, found.objects, strict=True)):
        rows += [
            (score, image, (x1 + 1, y1 + 1, x2, y2))
            for (x1, y1, x2, y2), score, one in zip(*(part.tolist() for part in detections), strict=True)
            if one == label
        ]
        truths.append(
            [
                {"box": (x1 + 1, y1 + 1, x2, y2), "difficult": hard, "taken": False}
                for (x1, y1, x2, y2), one, hard, _ in zip(*(part.tolist() for part in objects), strict=True)
                if one == label
            ]
        )
        number += sum(not truth["difficult"] for truth in truths[-1])
    if number == 0:
        return math.nan
    right = wrong = 0
    curve = []
    for _, image, box in sorted(rows, key=lambda row: -row[0]):
        most, best = -math.inf, None
        for truth in truths[image]:
            iou = inclusive_iou(box, truth["box"])
            if iou > most:
                most, best = iou, truth
        if best is None or most <= threshold:
            wrong += 1
        elif best["difficult"]:
            continue
        elif best["taken"]:
            wrong += 1
        else:
            best["taken"] = True
            right += 1
        curve.append((right / number, right / (right + wrong)))
    if protocol == "voc07":
        levels = np.arange(0, 1.1, 0.1).tolist()
        return sum(max([p for r, p in curve if r >= level], default=0) for level in levels) / 11
    area, last = 0.0, 0.0
    for place, (recall, _) in enumerate(curve):
        area += (recall - last) * max(p for _, p in curve[place:])
        last = recall
    return area


def inclusive_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    both = max(width, 0) * max(height, 0)
    return both / (sum((c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)) - both)


def slow_map(found: Found, protocol: str, threshold: float) -> float:
    known = [one for one in slow_ap(found, protocol, threshold) if not math.isnan(one)]
    return sum(known) / len(known) if known else math.nan


def one_image(detections: list[tuple[float, ...]], objects: list[tuple[float, ...]], hard: int = -1) -> Found:
    """Detections (x1, y1, x2, y2, score) and objects (x1, y1, x2, y2) of a cat; object ``hard`` is difficult."""
    boxes, rows = np.array(objects, np.float32), np.array(detections, np.float32).reshape(-1, 5)
    found = Detections(rows[:, :4], rows[:, 4], np.ones(len(rows), np.int64))
    truth = Objects(boxes, np.ones(len(boxes), np.int64), np.arange(len(boxes)) == hard, np.ones(len(boxes)))
    return Found(["a"], CLASSES, [found], [truth])


@given(some_found(), st.sampled_from(["voc07", "voc"]))
def test_voc_against_a_slow_loop(found: Found, protocol: str) -> None:
    thresholds = [0.3, 0.5, 0.7]
    for threshold, rankings in zip(thresholds, rank(found, thresholds), strict=True):
        expected = slow_ap(found, protocol, threshold)
        values = average_precision(rankings, protocol)[:, 0]
        assert values.tolist() == pytest.approx(expected, rel=1e-12, abs=0, nan_ok=True)


@pytest.mark.parametrize("protocol", ["voc07", "voc"])
def test_voc_against_a_slow_loop_on_more_images(protocol: str) -> None:
    found = some_images(60, grid=1)
    for threshold in (0.5, 0.7):
        assert ap(found, protocol, threshold).tolist() == pytest.approx(slow_ap(found, protocol, threshold), rel=1e-12)


def test_voc_gives_published_figures() -> None:
    """Corners x + w are inclusive there. It takes IoU >= threshold; no IoU is 0.3 here."""
    detections, objects = [], []
    for truth, found in SAMPLE:
        boxes = np.array([row.split() for row in truth.split("/")], np.float32)
        rows = np.array([row.split() for row in found.split("/")], np.float32)
        scores, rows = rows[:, 0] / 100, rows[:, 1:]
        for one in (boxes, rows):
            one[:, 2:] += one[:, :2] + 1
        detections.append(Detections(rows, scores, np.ones(len(rows), np.int64)))
        objects.append(Objects(boxes, *(np.full(len(boxes), value) for value in (1, False, 1.0))))
    found = Found([str(n) for n in range(7)], ["object"], detections, objects)
    assert sum(len(one.labels) for one in detections) == 24
    assert sum(len(one.labels) for one in objects) == 15
    assert ap(found, "voc07", 0.3).item() == pytest.approx(0.2684, abs=0.5e-4)
    assert ap(found, "voc", 0.3).item() == pytest.approx(0.2457, abs=0.5e-4)


def test_an_overlap_of_just_the_threshold_is_none() -> None:
    found = one_image([(0, 0, 10, 5, 0.9)], [(0, 0, 10, 10)])
    assert ap(found, "voc", 0.5)[0] == 0
    assert ap(found, "voc", 0.49)[0] == 1


def test_a_second_detection_of_an_object_is_wrong_though_another_is_free() -> None:
    objects = [(0, 0, 10, 10), (2, 0, 12, 10)]
    twice = one_image([(0, 0, 10, 10, 0.9), (0, 0, 10, 9, 0.8), (2, 0, 12, 10, 0.7)], objects)
    assert ap(twice, "voc", 0.5)[0] == pytest.approx((1 + 2 / 3) / 2)
    assert ap(twice, "voc07", 0.5)[0] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_difficult_objects_are_neither_found_nor_missed() -> None:
    detections, objects = [(20, 0, 30, 10, 0.9), (20, 0, 30, 9, 0.8), (0, 0, 10, 10, 0.7)], [(0, 0, 10, 10)]
    assert ap(one_image(detections, [*objects, (20, 0, 30, 10)], hard=1), "voc", 0.5)[0] == 1
    assert ap(one_image([], [*objects, (20, 0, 30, 10)], hard=1), "voc", 0.5)[0] == 0


def test_of_objects_that_are_overlapped_alike_the_first_is_meant() -> None:
    twins = [(0, 0, 10, 10), (0, 0, 10, 10)]
    assert ap(one_image([(0, 0, 10, 9, 0.9)], twins, hard=0), "voc", 0.5)[0] == 0
    assert ap(one_image([(0, 0, 10, 9, 0.9)], twins, hard=1), "voc", 0.5)[0] == 1


def test_classes_without_objects_are_left_out() -> None:
    found = some_images(20)
    objects = [
        one._replace(ignored=one.ignored | (one.labels == 2), labels=np.where(one.labels == 3, 1, one.labels))
        for one in found.objects
    ]
    some = Found(found.names, CLASSES, found.detections, objects)
    values = ap(some, "voc", 0.5)
    assert np.isnan(values).tolist() == [False, True, True]
    assert mean_of_classes(values[:, None]) == [values[0]]


def test_equal_scores_keep_the_order_of_the_image() -> None:
    right, wrong = (0, 0, 10, 10, 0.5), (50, 50, 60, 60, 0.5)
    assert ap(one_image([right, wrong], [(0, 0, 10, 10)]), "voc", 0.5)[0] == 1
    assert ap(one_image([wrong, right], [(0, 0, 10, 10)]), "voc", 0.5)[0] == 0.5


@given(some_found(ties=False, least=1), st.sampled_from(["voc07", "voc"]), st.data())
def test_weights_are_as_if_images_were_there_as_often(found: Found, protocol: str, data: st.DataObject) -> None:
    images = len(found.names)
    rows = st.lists(st.integers(0, 3), min_size=images, max_size=images)
    weights = np.array([[1] * images, *data.draw(st.lists(rows, max_size=3))], np.float32).T
    values = average_precision(rank(found, [0.5])[0], protocol, weights)
    assert values[:, 0].tolist() == pytest.approx(ap(found, protocol, 0.5).tolist(), rel=1e-14, abs=0, nan_ok=True)
    for times, column in zip(weights.T, values.T, strict=True):
        expected = slow_ap(chosen(found, np.repeat(np.arange(images), times.astype(int))), protocol, 0.5)
        assert column.tolist() == pytest.approx(expected, rel=1e-12, abs=0, nan_ok=True)


def drawn(found: Found, protocol: str, threshold: float, seed: int) -> np.ndarray:
    random, images = np.random.default_rng(seed), len(found.names)
    draws = [np.sort(random.integers(images, size=images)) for _ in range(module.RESAMPLES)]
    return np.array([slow_map(chosen(found, draw), protocol, threshold) for draw in draws])


@pytest.mark.parametrize("protocol", ["voc07", "voc"])
def test_intervals_against_a_slow_loop(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 100)
    one, two = some_images(8, grid=1), some_images(8, seed=1, grid=1)
    figures = voc_figures(one, protocol, seed=3)
    for name, threshold in (("map50", 0.5), ("map70", 0.7)):
        ends = np.nanquantile(drawn(one, protocol, threshold, 3), [0.025, 0.975])
        assert [figures[f"{name}_low"], figures[f"{name}_high"]] == pytest.approx(ends.tolist(), rel=1e-12)
        assert figures[f"{name}_low"] < figures[name] == pytest.approx(slow_map(one, protocol, threshold), rel=1e-12)
        assert [figures[f"{name.replace('m', '', 1)}/{one}"] for one in CLASSES] == pytest.approx(
            slow_ap(one, protocol, threshold), rel=1e-12
        )
    other = Found(two.names, CLASSES, one.detections, two.objects)  # worse detections of the same truth
    difference = drawn(two, protocol, 0.7, 5) - drawn(other, protocol, 0.7, 5)
    ends, _ = paired_difference(two, other, protocol, 0.7, seed=5)
    assert ends == pytest.approx(np.nanquantile(difference, [0.025, 0.975]).tolist(), rel=1e-12)
    assert 0 < ends[0] < ends[1]
    assert paired_difference(two, two, protocol).mean == (0, 0)
    # of one class alone, which the mean is of then
    alone, base = (
        Found(
            two.names,
            CLASSES,
            [Detections(*(part[one.labels == 1] for part in one)) for one in found.detections],
            [Objects(*(part[one.labels == 1] for part in one)) for one in found.objects],
        )
        for found in (two, other)
    )
    single = paired_difference(alone, base, protocol, 0.7)
    assert single.classes[0] == single.mean
    assert np.isnan(single.classes[1:]).all()


def test_differences_are_of_the_same_images() -> None:
    found = some_images(6)
    for other in (chosen(found, range(5)), chosen(found, [1, 0, 2, 3, 4, 5]), some_images(6, seed=1)):
        with pytest.raises(ValueError, match="same images are compared"):
            paired_difference(found, other)
    with pytest.raises(ValueError, match="voc07 or voc, not by coco"):
        paired_difference(found, found, "coco")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("images", [0, 3])
def test_without_objects_there_are_no_figures(images: int) -> None:
    found = some_images(images)
    none = Found(found.names, CLASSES, found.detections, [Objects(*(part[:0] for part in o)) for o in found.objects])
    for figures in (voc_figures(none, "voc07"), voc_figures(none, "voc"), coco_figures(none)):
        assert all(math.isnan(value) for value in figures.values())
    assert np.isnan(paired_difference(none, none).mean).all()


def as_json(found: Found, folder: Path) -> tuple[str, str]:
    truth = {"images": [{"id": n} for n in range(len(found.names))], "annotations": [], "info": {}}
    truth["categories"] = [{"id": label + 1, "name": name} for label, name in enumerate(found.class_names)]
    results = []
    for image, (detections, objects) in enumerate(zip(found.detections, found.objects, strict=True)):
        for (x1, y1, x2, y2), label, crowd, area in zip(*(part.tolist() for part in objects), strict=True):
            about = {"id": len(truth["annotations"]) + 1, "image_id": image, "category_id": label}
            about |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": int(crowd)}
            truth["annotations"].append(about)
        for (x1, y1, x2, y2), score, label in zip(*(part.tolist() for part in detections), strict=True):
            about = {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            results.append(about)
    files = folder / "truth.json", folder / "results.json"
    for file, content in zip(files, (truth, results), strict=True):
        file.write_text(json.dumps(content))
    return str(files[0]), str(files[1])


@pytest.mark.parametrize("grid", [0.25, 1e-6])
def test_coco_is_what_pycocotools_finds_in_json_files(grid: float, tmp_path: Path) -> None:
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    found = some_images(40, grid=grid)
    truth, results = as_json(found, tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        ground = coco.COCO(truth)
        expected = cocoeval.COCOeval(ground, ground.loadRes(results), "bbox")
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
    figures = coco_figures(found)
    names = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
    names += ["mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"]
    assert [figures[name] for name in names] == pytest.approx(expected.stats.tolist(), rel=0, abs=1e-9)
    assert len({figures[f"map_{size}"] for size in ("small", "medium", "large")} - {0, 1}) == 3
    for label, name in enumerate(CLASSES, 1):
        expected.params.catIds = [label]
        with contextlib.redirect_stdout(io.StringIO()):
            expected.evaluate()
            expected.accumulate()
            expected.summarize()
        assert figures[f"ap/{name}"] == pytest.approx(expected.stats[0], rel=0, abs=1e-9)
    assert set(figures) == {*names, *(f"ap/{name}" for name in CLASSES)}


def test_coco_without_detections_is_zero(capsys: pytest.CaptureFixture[str]) -> None:
    found = some_images(10)
    none = Found(found.names, CLASSES, [Detections(*(part[:0] for part in d)) for d in found.detections], found.objects)
    figures = coco_figures(none)
    assert figures["map"] == figures["mar_100"] == figures["ap/cat"] == 0
    assert capsys.readouterr().out == ""


def test_coco_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(MissingPackageError, match=r"pip install \"segdcn\[coco\]\"$"):
        coco_figures(some_images(1))
