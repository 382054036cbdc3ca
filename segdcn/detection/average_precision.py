"""Average precision as PASCAL VOC and COCO count it, and how VOC's would vary with other images.

Legend beside samples.py's: N images, C classes, D detections, R resamples.

VOC is counted as by py-faster-rcnn's lib/datasets/voc_eval.py, which the authors of deformable convolution have too;
their scores and boxes went through text files, rounded to 3 and 1 decimals, which is not repeated here. COCO is counted
by pycocotools itself: torchmetrics' MeanAveragePrecision is up to 6e-4 away from it with crowds, and rounds to float32.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import embedding_bag

from segdcn.detection.found import NO_DETECTIONS, NO_OBJECTS, Found, image_numbers, joined
from segdcn.detection.samples import Objects
from segdcn.errors import MissingPackageError, UserError
from segdcn.evaluation.bootstrap import RESAMPLES, interval

_VOC = (
    "a detection belongs to the object of its class that it overlaps most, and is right where that IoU > threshold and"
    " no better one has the object; difficult objects are neither found nor missed; a class without objects has no AP"
)
RULES = {
    "voc07": f"PASCAL VOC 2007, mean of the best precision at recalls 0, 0.1 to 1: {_VOC}",
    "voc": f"PASCAL VOC 2010 and later, area under the monotone envelope of precision over recall: {_VOC}",
    "coco": "COCO bounding boxes as pycocotools counts them, IoU 0.50:0.05:0.95, 101 recalls, 100 detections an image",
}
"""Each protocol in words, for metrics.json."""

THRESHOLDS = {"map50": 0.5, "map70": 0.7}
"""The figures of VOC's protocols, and from which IoU on they count a detection: the paper's."""

_COCO_STATS = [f"map{which}" for which in ("", "_50", "_75", "_small", "_medium", "_large")]
_COCO_STATS += [f"mar{which}" for which in ("_1", "_10", "_100", "_small", "_medium", "_large")]

MEANS = {"voc07": list(THRESHOLDS), "voc": list(THRESHOLDS), "coco": _COCO_STATS}
"""The figures of each protocol over all classes."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Singles = NDArray[np.float32]


class Ranking(NamedTuple):
    """What the AP of one class depends on, at one threshold.

    right: int64, the images of the right detections, the best first.
    wrong: int64, those of the wrong ones that are better than the last right one.
    starts: int64, for each right one the first of ``wrong`` after the right one before it.
    objects: float32 (N,), how many objects of each image count.
    """

    right: Integers
    wrong: Integers
    starts: Integers
    objects: Singles


def rank(found: Found, thresholds: Sequence[float]) -> list[list[Ranking]]:
    """Tell right from wrong detections, at each threshold and of each class.

    Detections with equal scores stay in the order of the split, and in an image in that of its detections.
    """
    detections, objects = joined(NO_DETECTIONS, found.detections), joined(NO_OBJECTS, found.objects)
    order = np.lexsort((-detections.scores, detections.labels))  # which is stable
    image, place = image_numbers(found.detections)[order], image_numbers(found.objects)
    labels = np.arange(1, len(found.class_names) + 1)
    overlap, owner = _match(detections.boxes[order], image, detections.labels[order], objects, place)
    starts, ends = (np.searchsorted(detections.labels[order], labels, side) for side in ("left", "right"))
    counted = np.zeros((len(labels), len(found.names)), np.float32)
    np.add.at(counted, (objects.labels - 1, place), ~objects.ignored)

    rankings: list[list[Ranking]] = []
    for threshold in thresholds:
        claims = np.flatnonzero(overlap > threshold)
        ignored, right = np.zeros((2, len(image)), np.bool_)
        ignored[claims] = objects.ignored[owner[claims]]
        right[claims[np.unique(owner[claims], return_index=True)[1]]] = True  # the first of each object
        rankings.append([])
        for start, end, of_images in zip(starts, ends, counted, strict=True):
            kept = start + np.flatnonzero(~ignored[start:end])
            hit = right[kept]
            better = np.flatnonzero(hit) - np.arange(hit.sum())  # wrong ones that are better
            wrong = image[kept[~hit]][: better[-1] if len(better) else 0]
            rankings[-1].append(Ranking(image[kept[hit]], wrong, np.append(0, better)[: len(better)], of_images))
    return rankings


def _match(
    boxes: Singles, image: Integers, labels: Integers, objects: Objects, place: Integers
) -> tuple[Floats, Integers]:
    """Each detection's IoU with the object of its class and image that it overlaps most, the first of equals; and that
    object. Without overlap they are 0 and -1. ``place``: the image of each object.
    """
    # an image's objects of a class lie side by side in `group`
    classes = 1 + max(labels.max(initial=0), objects.labels.max(initial=0))
    key = place * classes + objects.labels
    group = key.argsort(kind="stable")
    candidate, end = (np.searchsorted(key[group], image * classes + labels, side) for side in ("left", "right"))
    boxes, truth = boxes.astype(np.float64), objects.boxes[group].astype(np.float64)
    overlap, owner = np.zeros(len(image)), np.full(len(image), -1)
    rows = np.arange(len(image))
    while len(rows := rows[candidate[rows] < end[rows]]):  # as often as an image has objects of one class
        one, two = boxes[rows], truth[candidate[rows]]
        shared = (np.minimum(one[:, 2:], two[:, 2:]) - np.maximum(one[:, :2], two[:, :2])).clip(0).prod(axis=1)
        union = sum((box[:, 2:] - box[:, :2]).prod(axis=1) for box in (one, two)) - shared
        iou = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        better = iou > overlap[rows]
        overlap[rows[better]], owner[rows[better]] = iou[better], group[candidate[rows[better]]]
        candidate[rows] += 1
    return overlap, owner


def average_precision(rankings: Sequence[Ranking], protocol: str, weights: Singles | None = None) -> Floats:
    """AP of each class, 0..1, float64 (C, R); NaN without an object.

    protocol: "voc07" for 11 recalls, "voc" for the area.
    weights: how often each image counts, whole numbers (N, R); once, with R = 1, by default. It is as if the image
        were there as often, the copies of a detection being neighbours.
    """
    if weights is None:
        weights = np.ones((len(rankings[0].objects), 1), np.float32)
    return np.stack([_of_class(ranking, protocol, weights) for ranking in rankings])


def _of_class(ranking: Ranking, protocol: str, weights: Singles) -> Floats:
    """AP (R,) of one class. Precision is best just after a right detection, so it is computed there alone."""
    times = weights[ranking.right]
    right = times.cumsum(axis=0, dtype=np.float64)
    # sums over the wrong ones between two right ones, without a row of weights for each
    values, table, starts = (torch.from_numpy(one) for one in (ranking.wrong, weights, ranking.starts))
    wrong = embedding_bag(values, table, starts, mode="sum").numpy().cumsum(axis=0, dtype=np.float64)
    envelope = np.maximum.accumulate((right / (right + wrong).clip(1))[::-1])[::-1]
    objects = ranking.objects @ weights
    objects[objects == 0] = np.nan
    if protocol == "voc":
        return np.asarray((times * envelope).sum(axis=0) / objects)
    recall, column = right / objects, np.arange(len(objects))
    envelope = np.vstack((envelope, np.zeros_like(objects)))
    # these hold 0.30000000000000004, as voc_eval.py's do: 3 objects of 10 do not reach it
    best = [envelope[(recall < least).sum(axis=0), column] for least in np.arange(0, 1.1, 0.1)]
    return np.where(np.isnan(objects), np.nan, np.mean(best, axis=0))


def mean_of_classes(ap: Floats) -> Floats:
    """mAP (R,) of AP (C, R), over the classes that have one; NaN without any."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(ap, axis=0) / (~np.isnan(ap)).sum(axis=0))


def voc_figures(found: Found, protocol: str, seed: int = 0) -> dict[str, float]:
    """Fractions in 0..1: "map50", "map70", and per class "ap50/<class>", "ap70/<class>".

    "map50_low", "map50_high", "map70_low", "map70_high" are the ends of the 95 % bootstrap intervals over images.
    """
    figures: dict[str, float] = {}
    for name, rankings in zip(THRESHOLDS, rank(found, list(THRESHOLDS.values())), strict=True):
        ap = average_precision(rankings, protocol)
        figures[name] = mean_of_classes(ap).item()
        resampled = mean_of_classes(_resampled(rankings, protocol, seed))
        figures[f"{name}_low"], figures[f"{name}_high"] = _ends(resampled)
        of_classes = zip(found.class_names, ap[:, 0].tolist(), strict=True)
        figures |= {f"{name.removeprefix('m')}/{one}": value for one, value in of_classes}
    return figures


def class_intervals(found: Found, protocol: str, threshold: float, seed: int = 0) -> list[tuple[float, float]]:
    """Ends of the 95 % bootstrap interval over images of each class's AP, "voc07" or "voc"; NaN without an object."""
    return _of_each(_resampled(rank(found, [threshold])[0], protocol, seed))


class Difference(NamedTuple):
    """Ends of the 95 % bootstrap intervals over images of what one detector finds more than another, in AP.

    mean: of mAP.  classes: of each class; NaN without an object.
    """

    mean: tuple[float, float]
    classes: list[tuple[float, float]]


def paired_difference(
    found: Found, other: Found, protocol: str = "voc07", threshold: float = 0.5, seed: int = 0
) -> Difference:
    """What ``found`` has more than ``other`` on the same images; each resample draws the same for both.

    Raises: ValueError where images, classes or objects differ, or the protocol is not one of VOC's.
    """
    if protocol not in ("voc07", "voc"):
        raise UserError(f"mAP is compared by protocol voc07 or voc, not by {protocol}")
    given = ((each.names, each.class_names, *joined(NO_OBJECTS, each.objects)[:3]) for each in (found, other))
    if not all(np.array_equal(*pair) for pair in zip(*given, strict=True)):
        raise UserError("detections on the same images are compared: names, classes or objects differ here")
    one, two = (_resampled(rank(each, [threshold])[0], protocol, seed) for each in (found, other))
    return Difference(_ends(mean_of_classes(one) - mean_of_classes(two)), _of_each(one - two))


def _resampled(rankings: Sequence[Ranking], protocol: str, seed: int) -> Floats:
    """AP (C, R) of each resample; equal seeds draw equal images."""
    images, classes = len(rankings[0].objects), len(rankings)
    if not images:
        return np.full((classes, 1), np.nan)
    generator, found = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // 100):  # 100 at a time, so that their weights stay in the cache
        drawn = [np.bincount(generator.integers(images, size=images), minlength=images) for _ in range(100)]
        weights = np.stack(drawn, axis=1).astype(np.float32)
        found.append(average_precision(rankings, protocol, weights))
    return np.concatenate(found, axis=1)


def _ends(values: Floats) -> tuple[float, float]:
    low, high = interval(torch.from_numpy(values)).tolist()
    return low, high


def _of_each(values: Floats) -> list[tuple[float, float]]:
    return [_ends(row) for row in values]


def coco_figures(found: Found) -> dict[str, float]:
    """COCO's 12 figures, 0..1, and "ap/<class>" over all IoUs; NaN without an object. Ignored objects are crowds.

    "map", "map_50", "map_75", "map_small", "map_medium", "map_large"; "mar_1", "mar_10", "mar_100" (mean recall with as
    many detections an image), "mar_small", "mar_medium", "mar_large".

    Raises: ImportError, one line, without pycocotools.
    """
    _, coco_eval = import_pycocotools()
    detections, objects = joined(NO_DETECTIONS, found.detections), joined(NO_OBJECTS, found.objects)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress
        truth = _index(found, found.objects, objects, area=objects.areas, iscrowd=objects.ignored.astype(int))
        areas = (detections.boxes[:, 2:].astype(float) - detections.boxes[:, :2]).prod(axis=1)
        results = _index(found, found.detections, detections, area=areas, score=detections.scores)
        evaluation = coco_eval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = evaluation.eval["precision"][:, :, :, 0, 2].mean(axis=(0, 1))  # of any size, 100 detections
    names = [*_COCO_STATS, *(f"ap/{name}" for name in found.class_names)]
    values = [*evaluation.stats.tolist(), *per_class.tolist()]
    return {name: value if value >= 0 else np.nan for name, value in zip(names, values, strict=True)}


def _index(found: Found, parts: Sequence[Any], every: Any, **columns: NDArray[Any]) -> Any:
    """What ``COCO`` makes of a JSON file, of objects or of detections."""
    corners = every.boxes.astype(np.float64)
    columns |= {"bbox": np.hstack((corners[:, :2], corners[:, 2:] - corners[:, :2]))}
    columns |= {"category_id": every.labels, "image_id": image_numbers(parts)}
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    index = import_pycocotools()[0]()
    index.dataset = {
        "images": [{"id": number} for number in range(len(parts))],
        "categories": [{"id": label} for label in range(1, len(found.class_names) + 1)],
        # from 1: an id of 0 means unmatched
        "annotations": [{"id": number, **dict(zip(columns, row, strict=True))} for number, row in enumerate(rows, 1)],
    }
    index.createIndex()
    return index


def import_pycocotools() -> tuple[Any, Any]:
    """``COCO`` and ``COCOeval``; ImportError, one line, where the package is missing."""
    try:
        from pycocotools.coco import COCO  # type: ignore[import-untyped]
        from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingPackageError('protocol=coco needs pycocotools: pip install "segdcn[coco]"') from error
    return COCO, COCOeval
