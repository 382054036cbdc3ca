"""An evaluation of detections: what batches, order, padding and processes may not change."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from made_found import CLASSES, some_images
from test_found import assert_same
from torch import distributed
from torch.multiprocessing import spawn

from segdcn.detection.average_precision import RULES, coco_figures, voc_figures
from segdcn.detection.evaluator import DetectionEvaluator, DetectionResult
from segdcn.errors import MissingPackageError, UserError

FOUND = some_images(7)


def evaluated(batches: list[list[int]], protocol: str = "voc07") -> DetectionResult:
    """Batches of places; -1 is the first image again, as padding."""
    evaluator = DetectionEvaluator(CLASSES, protocol)
    for places in batches:
        parts = ([part[max(place, 0)] for place in places] for part in (FOUND.names, FOUND.detections, FOUND.objects))
        evaluator.update(places, *parts)
    return evaluator.compute()


@pytest.mark.parametrize("protocol", ["voc07", "voc", "coco"])
def test_order_padding_and_batch_size_change_no_figure(protocol: str) -> None:
    expected = coco_figures(FOUND) if protocol == "coco" else voc_figures(FOUND, protocol)
    for batches in ([[0, 1, 2, 3, 4, 5, 6]], [[3, -1], [6, 0], [5], [1, 2, 4, -1]]):
        result = evaluated(batches, protocol)
        assert result.figures == expected
        assert result.images == 7
        assert_same(result.found, FOUND)
    name = "map" if protocol == "coco" else "map50"
    assert 0 < expected[name] < 1


def evaluate_share(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    result = evaluated([[1, 3], [5, -1]] if rank else [[0, 2], [4, 6]])
    (folder / f"{rank}.json").write_text(json.dumps([result.figures, result.found.names]))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_same_figures_to_the_last_bit(tmp_path: Path) -> None:
    spawn(evaluate_share, (tmp_path,), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [voc_figures(FOUND, "voc07"), list(FOUND.names)]


def test_nothing_is_left_after_a_reset() -> None:
    evaluator = DetectionEvaluator(CLASSES)
    for images in (1, 2):
        evaluator.update(range(images), *(part[:images] for part in (FOUND.names, FOUND.detections, FOUND.objects)))
        assert evaluator.compute().images == images
        evaluator.reset()
    result = evaluator.compute()
    assert result.images == 0
    assert all(math.isnan(value) for value in result.figures.values())


def test_time_is_per_image_and_unknown_until_told() -> None:
    evaluator = DetectionEvaluator(CLASSES)
    for start, seconds in ((0, 1.5), (3, 0.5)):
        parts = (part[start : start + 3] for part in (FOUND.names, FOUND.detections, FOUND.objects))
        evaluator.update(torch.arange(start, start + 3), *parts, seconds=seconds)
    assert evaluator.compute().seconds_per_image == pytest.approx(2 / 6)
    assert math.isnan(evaluated([[0, 1]]).seconds_per_image)


def test_conditions_are_flat_and_told_as_a_segmentation_tells_them() -> None:
    told = DetectionEvaluator(CLASSES, "voc").describe()
    assert told == {"protocol": "voc", "protocol_rule": RULES["voc"]}
    assert "area under the monotone envelope" in told["protocol_rule"]


def test_labels_beyond_the_classes_are_refused() -> None:
    evaluator = DetectionEvaluator(CLASSES[:2])
    evaluator.update(range(7), FOUND.names, FOUND.detections, FOUND.objects)
    with pytest.raises(UserError, match=r"labels from 1 to 3, but the classes are 1 to 2$"):
        evaluator.compute()


def test_what_cannot_be_is_said_before_anything_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"unknown protocol voc12: choose voc07, voc, coco$"):
        DetectionEvaluator(CLASSES, "voc12")
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(MissingPackageError):
        DetectionEvaluator(CLASSES, "coco")
