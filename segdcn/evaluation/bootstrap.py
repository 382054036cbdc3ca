"""How figures would vary with other images of the same kind: the percentile bootstrap over images (Efron 1979).

It says nothing about another training. Counts are int64 (N, 3, K), see ``ImageCounts``: of N images the correct, true
and predicted pixels of each of K classes. Each resample draws N of the N images with replacement; equal seeds give
equal draws, hence equal intervals, and pairs where two networks saw the same images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from segdcn.errors import UserError
from segdcn.evaluation.metrics import mean_iou

RESAMPLES = 1000
LEVEL = 0.95


def bootstrap_miou(counts: Tensor, seed: int = 0, absent_is_zero: bool = False) -> tuple[float, float]:
    """Ends of the mIoU's interval; NaN without a labelled pixel.

    A class that a resample lacks is absent from that resample's mean: with few images the interval of rare classes is
    coarse.
    """
    low, high = interval(mean_iou(_resampled(counts, seed), absent_is_zero)).tolist()
    return low, high


def bootstrap_iou(counts: Tensor, seed: int = 0) -> Tensor:
    """Ends of each class's interval, float64 (K, 2); NaN for a class that neither truth nor prediction holds."""
    return interval(_resampled(counts, seed)).movedim(0, 1)


def bootstrap_difference(
    counts: Tensor, other: Tensor, seed: int = 0, absent_is_zero: bool = False
) -> tuple[float, float]:
    """Ends of the interval of mIoU(``counts``) - mIoU(``other``) of two networks on the same images, in the same order.

    Raises: ValueError where images or classes differ in number.
    """
    if counts.shape != other.shape:
        raise UserError(f"counts of the same images and classes are compared, got {counts.shape} and {other.shape}")
    one, two = (mean_iou(_resampled(each, seed), absent_is_zero) for each in (counts, other))
    low, high = interval(one - two).tolist()
    return low, high


def _resampled(counts: Tensor, seed: int) -> Tensor:
    """IoU of each class in each resample, float64 (R, K), NaN where it is absent; no resample without a pixel."""
    images, _, classes = counts.shape
    if images == 0 or not counts[:, 1].any():
        return torch.full((1, classes), math.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    flat = counts.reshape(images, -1).double()
    found = []
    for start in range(0, RESAMPLES, 100):  # 100 at a time, so that memory stays small for many images
        drawn = torch.randint(images, (min(100, RESAMPLES - start), images), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        correct, truth, predicted = (times @ flat).view(-1, 3, classes).unbind(dim=1)
        found.append(correct / (truth + predicted - correct))
    return torch.cat(found)


def interval(values: Tensor) -> Tensor:
    """Ends of the 95 % interval of resampled values, along their first axis; one that is NaN is left out."""
    tail = (1 - LEVEL) / 2
    return values.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
