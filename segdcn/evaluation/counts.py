"""The pixel counts that a split's figures come from, so that they can be looked at and compared later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """What was counted on N images with K classes.

    names: of the images, in the order of the split.
    class_names: K names.
    images: int64 (N, 3, K), each image's correct, true and predicted pixels of each class.
    confusion: int64 (K, K) over all images, rows truth and columns prediction.
    """

    names: Sequence[str]
    class_names: Sequence[str]
    images: Tensor
    confusion: Tensor

    @property
    def miou_of_images(self) -> Tensor:
        """Each image's own mIoU over the classes that it holds or is given, float64 (N,); NaN without a label.

        To find images that are worth looking at: the mean of these is no figure of the split.
        """
        correct, truth, predicted = self.images.double().unbind(dim=1)
        miou = (correct / (truth + predicted - correct)).nanmean(dim=1)
        return miou.where(truth.sum(dim=1) > 0, torch.nan)
