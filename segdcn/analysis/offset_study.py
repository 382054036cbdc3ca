"""What the offsets of a network do over a data set: effective dilation by object size and class, lengths, losses.

Legend: K classes, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segdcn.analysis.effective_dilation import effective_dilation
from segdcn.analysis.layers import LayerCall, record
from segdcn.analysis.objects import box_sides, box_under, cell_centres, object_boxes
from segdcn.data.dataset import IGNORE_INDEX, Sample, SegmentationDataset
from segdcn.errors import UserError
from segdcn.inference.predictor import Predictor

SIZES = ("small", "medium", "large")
BIN = 0.01  # pixels: lengths are counted so finely, and shown in BARS wider bins
LONGEST = 2**14  # bins; longer offsets are counted in the last one
BARS = 50

Floats = NDArray[np.float64]


def study_offsets(
    predictor: Predictor,
    samples: Iterable[Sample],
    object_classes: Sequence[str],
    object_sizes: Sequence[float] | None = None,
    instances: Iterable[NDArray[Any]] | None = None,
) -> dict[str, Any]:
    """Follow ``record``'s layers over all samples, one image at a time; sums are kept, not maps.

    A filter (a cell of the layer's output, once for each offset group) counts for the object whose box its centre
    lies in, else for the background. What lies in no box but is labelled as an object (a crowd, a speck) or not
    labelled at all (255) is neither, and counts under "all" alone; a class is the label at the centre.

    Args:
        predictor: with any network; plain ones are followed as well.
        object_classes: those of its K classes that are objects.
        object_sizes: the sides in pixels, such as (96, 224) in the paper, below which an object is small and above
            which it is large; None takes those that part these objects into thirds.
        instances: the instance map of each sample, see ``object_boxes``.

    Returns:
        plain values for a JSON file: "images", "objects" (the rule, its thresholds, how many of each size) and
        "layers", in network order. Lengths and dilations are in pixels of the layer's input map, whose pixel is
        "map_pixel" image pixels; "outside" is the share of samples that read nothing; std is over filters. A mean of
        nothing is None.

    Raises:
        ValueError: unknown classes, sizes that do not grow, no sample, or offsets that are not finite.
    Source: Dai et al. 2017, section 4.2 and table 2.
    """
    class_names = predictor.class_names
    check_objects(class_names, object_classes, object_sizes)
    countable = [class_names.index(name) for name in object_classes]
    layers: dict[str, _LayerSums] = {}
    sides: list[Floats] = []
    for sample, numbered in zip(samples, repeat(None) if instances is None else instances, strict=False):
        boxes = object_boxes(sample.label, countable, numbered)
        sides.append(box_sides(boxes))
        for call in record(predictor.network, predictor.batch(sample.image)):
            sums = layers.setdefault(call.name, _LayerSums(call, len(class_names)))
            sums.add(call, sample.label, boxes, countable)
    if not sides:
        raise UserError("there is no image to study")
    every = np.concatenate(sides)
    thresholds = _thirds(every) if object_sizes is None else [float(side) for side in object_sizes]
    size = np.zeros(len(every), np.int64)
    if thresholds:
        size = 1 - (every < thresholds[0]).astype(np.int64) + (every > thresholds[1])
    longest = max(_quantile(sums.lengths, 0.999) for sums in layers.values())
    return {
        "images": len(sides),
        "objects": {
            "classes": list(object_classes),
            "rule": "side of the square of the bounding box's area, in image pixels; "
            + ("thirds of the objects of these images" if object_sizes is None else "thresholds as given"),
            "thresholds": thresholds,
            "counts": {name: int((size == k).sum()) for k, name in enumerate(SIZES)},
        },
        "layers": [sums.describe(class_names, size, max(1.0, longest)) for sums in layers.values()],
    }


def study_split(
    predictor: Predictor,
    dataset: SegmentationDataset,
    split: str,
    samples: Sequence[Sample],
    places: Sequence[int],
    object_classes: Sequence[str] | None = None,
    object_sizes: Sequence[float] | None = None,
    progress: Callable[[Iterable[Sample]], Iterable[Sample]] = iter,
) -> dict[str, Any]:
    """``study_offsets`` of some images of a split, with what its data set knows of objects.

    samples: of the split; places: those of them that are studied, which are read one at a time.
    object_classes: None is the data set's ``object_classes``, or else all its classes but "background".
    progress: goes through the images as they are studied, such as rich's ``track``.
    """
    if object_classes is None:
        others = [name for name in dataset.class_names if name != "background"]
        object_classes = getattr(dataset, "object_classes", others)
    instances = getattr(dataset, "instances", None)
    maps = None if instances is None else instances(split)
    return study_offsets(
        predictor,
        progress(samples[place] for place in places),
        list(object_classes),
        object_sizes,
        None if maps is None else (maps[place] for place in places),
    )


def check_objects(
    class_names: Sequence[str], object_classes: Sequence[str], object_sizes: Sequence[float] | None
) -> None:
    """Raises: UserError for unknown classes, and sizes that do not grow."""
    if isinstance(object_classes, str) or not isinstance(object_classes, Sequence):
        raise UserError(f"objects must be a list of classes, such as [car,bus], got {object_classes}")
    unknown = [name for name in object_classes if name not in class_names]
    if unknown:
        raise UserError(f"objects: there is no class {unknown[0]!r}, only {', '.join(class_names)}")
    if object_sizes is not None and (
        isinstance(object_sizes, str)
        or not isinstance(object_sizes, Sequence)
        or len(object_sizes) != 2
        or not all(isinstance(side, int | float) for side in object_sizes)
        or not 0 < object_sizes[0] <= object_sizes[1]
    ):
        raise UserError(f"object_sizes must be two sides in pixels that grow, such as [96,224], got {object_sizes}")


class _LayerSums:
    """Sums over all calls of one layer; rows of three are count, sum and sum of squares of effective dilations."""

    def __init__(self, call: LayerCall, num_classes: int) -> None:
        self.call = call
        self.map_pixel = 0.0
        self.by_object: list[Floats] = []  # (objects of an image, 3), image after image
        self.by_class = np.zeros((num_classes, 3))
        self.background, self.all = np.zeros(3), np.zeros(3)
        self.lengths = np.zeros(LONGEST, np.int64)
        self.length_sum = self.longest = 0.0
        self.outside = 0

    def add(self, call: LayerCall, label: NDArray[Any], boxes: NDArray[np.int64], countable: Sequence[int]) -> None:
        if not torch.isfinite(call.offset).all():
            raise UserError(f"the offsets of layer {call.name} are not finite: the network has not been trained well")
        length = call.offset_lengths().flatten().double()
        self.lengths += torch.bincount((length / BIN).long().clamp(max=LONGEST - 1), minlength=LONGEST).numpy()
        self.length_sum += float(length.sum())
        self.longest = max(self.longest, float(length.max()))
        self.outside += int(call.outside().sum())
        # a map's sides are rounded up, so that the largest ratio is the stride
        ratios = [image / cells for image, cells in zip(label.shape, call.input_size, strict=True)]
        self.map_pixel = max(self.map_pixel, *ratios)

        rows, columns = (cell_centres(*sides) for sides in zip(call.output_size, label.shape, strict=True))
        owner, labelled = box_under(boxes, rows, columns), label[np.ix_(rows, columns)]
        background = (owner < 0) & (labelled != IGNORE_INDEX) & ~np.isin(labelled, countable)
        by_object = np.zeros((len(boxes), 3))
        for dilation in effective_dilation(call)[0].double().numpy():  # of each offset group
            by_object += _sums(dilation, owner, owner >= 0, len(boxes))
            self.by_class += _sums(dilation, labelled, labelled != IGNORE_INDEX, len(self.by_class))
            self.background += _sums(dilation, np.zeros_like(owner), background, 1)[0]
            self.all += _sums(dilation, np.zeros_like(owner), np.ones_like(background), 1)[0]
        self.by_object.append(by_object)

    def describe(self, class_names: Sequence[str], size: NDArray[np.int64], longest: float) -> dict[str, Any]:
        """``size``: 0, 1 or 2 for each object; ``longest``: where the histogram ends."""
        samples = int(self.lengths.sum())
        by_object = np.concatenate(self.by_object)
        wide = math.ceil(longest / BIN / BARS)  # fine bins in a bar
        bars = np.add.reduceat(self.lengths, np.arange(0, LONGEST, wide))[:BARS]
        sums = {name: by_object[size == k].sum(axis=0) for k, name in enumerate(SIZES)}
        sums |= {"background": self.background, "all": self.all}
        return {
            "name": self.call.name,
            "deformable": self.call.deformable,
            "dilation": list(self.call.dilation),
            "map_pixel": round(self.map_pixel),
            "outside": self.outside / samples,
            "length": {
                "mean": self.length_sum / samples,
                "p95": min(_quantile(self.lengths, 0.95), self.longest),
                "max": self.longest,
            },
            "histogram": {
                "edges": [round(number * wide * BIN, 2) for number in range(len(bars) + 1)],
                "counts": bars.tolist(),
                "beyond": samples - int(bars.sum()),
            },
            "effective_dilation": {name: _moments(of) for name, of in sums.items()},
            "by_class": {name: _moments(of) for name, of in zip(class_names, self.by_class, strict=True)},
        }


def _sums(values: Floats, group: NDArray[Any], chosen: NDArray[np.bool_], groups: int) -> Floats:
    """Count, sum and sum of squares of the chosen values of each group: (groups, 3)."""
    v, g = values[chosen], group[chosen].astype(np.int64)
    sums = [np.bincount(g, weights=w, minlength=groups) for w in (np.ones_like(v), v, v * v)]
    return np.stack(sums, axis=1).astype(np.float64)


def _moments(sums: Floats) -> dict[str, Any]:
    count, total, squares = sums.tolist()
    if not count:
        return {"mean": None, "std": None, "cells": 0}
    mean = total / count
    return {"mean": mean, "std": math.sqrt(max(0.0, squares / count - mean * mean)), "cells": int(count)}


def _thirds(sides: Floats) -> list[float]:
    """The sides of the largest but one third's first and last object, so that each third has as many, ties apart."""
    if not len(sides):
        return []
    ordered = np.sort(sides)
    return [float(ordered[len(ordered) // 3]), float(ordered[len(ordered) - 1 - len(ordered) // 3])]


def _quantile(counts: NDArray[np.int64], share: float) -> float:
    """Upper end of the fine bin that holds the quantile; 0 where all lengths are in the first bin."""
    number = int(np.searchsorted(np.cumsum(counts), share * counts.sum()))
    return round((number + 1) * BIN, 2) if number else 0.0
