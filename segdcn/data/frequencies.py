"""Weights for a loss, from how often each class is seen."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from segdcn.data.dataset import DataError, SegmentationDataset, spread_over
from segdcn.data.labels import AT_MOST, count_labels, label_of
from segdcn.errors import UserError

Rule = Literal["median_frequency", "inverse_sqrt_frequency"]
RULES: tuple[str, ...] = get_args(Rule)


def class_weights(dataset: SegmentationDataset, rule: Rule, masks: int | None = AT_MOST) -> list[float]:
    """One weight per class for a ``SegmentationLoss``, larger for rarer ones, counted in the labels of train.

    ``median_frequency`` (Eigen and Fergus 2015): the frequency of a class is its share of the pixels of those images
    that show it, its weight the median of all frequencies divided by its own.
    ``inverse_sqrt_frequency``: one over the root of its share of all labelled pixels, divided by the mean of these.
    Pixels labelled 255 count in neither.

    A class that is seen nowhere has no part in median and mean, and the largest weight of the others: where it is in
    labels that were not looked at, it is rarer than they are.

    masks: the most that are read, at equal distances; None is all. Images are not read where they are files.

    Raises: DataError, a split without a labelled pixel, or a mask that cannot be read; UserError, another rule.
    """
    if rule not in RULES:
        raise UserError(f"a rule for class weights is {' or '.join(RULES)}, got {rule!r}")
    samples, number = dataset.split("train"), len(dataset.class_names)
    pixels, of_images = np.zeros(number), np.zeros(number)  # of each class, and of the images that show it
    for index in spread_over(len(samples), masks):
        seen = count_labels(label_of(samples, index))[:number]
        pixels += seen
        of_images += np.where(seen > 0, seen.sum(), 0)
    present = pixels > 0
    if not present.any():
        raise DataError(f"{rule} needs labelled pixels, and the train split has none")
    weights = np.zeros(number)
    if rule == "median_frequency":
        frequencies = pixels[present] / of_images[present]
        weights[present] = np.median(frequencies) / frequencies
    else:
        inverse = (pixels[present] / pixels.sum()) ** -0.5
        weights[present] = inverse / inverse.mean()
    weights[~present] = weights.max()
    return [float(weight) for weight in weights]
