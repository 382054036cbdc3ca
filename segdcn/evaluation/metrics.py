"""Segmentation metrics from pixel counts. Legend: N images, K classes, H x W pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from segdcn.errors import UserError


def count_pairs(prediction: Tensor, label: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """How often each (truth, prediction) pair of classes occurs, as one ``bincount``.

    Args:
        prediction: predicted classes, any integer type (N, H, W), 0..K-1 everywhere.
        label: true classes, any integer type (N, H, W), 0..K-1 or ``ignore_index``, whose pixels do not count.

    Returns:
        int64 (K, K), rows truth and columns prediction.

    Raises:
        ValueError: shapes differ, values are not integers, or a value is out of range.
    """
    if prediction.shape != label.shape or label.ndim != 3:
        raise UserError(
            "metrics need a prediction and a label (N, H, W) of the same size,"
            f" got {tuple(prediction.shape)} and {tuple(label.shape)}"
        )
    for name, values in (("prediction", prediction), ("label", label)):
        if values.is_floating_point():
            raise UserError(f"{name} must hold integer class numbers, got {values.dtype}: take the argmax first")
    if label.numel() == 0:
        return torch.zeros(num_classes, num_classes, dtype=torch.int64, device=label.device)

    def out_of_range(name: str, value: int) -> ValueError:
        return ValueError(
            f"{name} holds the value {value}, but there are {num_classes} classes"
            f" (0 to {num_classes - 1}; {ignore_index} is ignored in labels)"
        )

    if 0 <= ignore_index < 256:
        # Ignored pixels are counted in a row of their own, which costs less than masking them.
        ignored = ignore_index
    else:
        ignored = num_classes
        if label.eq(num_classes).any():
            raise out_of_range("label", num_classes)
        label = label.where(label != ignore_index, num_classes)
    rows = max(num_classes, ignored + 1)
    for name, values, end in (("prediction", prediction, num_classes), ("label", label, rows)):
        for value in torch.stack(values.aminmax()).tolist():
            if not 0 <= value < end:
                raise out_of_range(name, value)

    # Memory traffic is what costs here, so the numbers are as narrow as they can be.
    narrow = torch.int16 if rows * num_classes <= torch.iinfo(torch.int16).max else torch.int32
    pair = label.to(narrow, copy=True).mul_(num_classes).add_(prediction.to(narrow))
    counts = pair.flatten().bincount(minlength=rows * num_classes).view(rows, num_classes)
    counts[ignored] = 0
    if rows > num_classes and counts[num_classes:].any():
        raise out_of_range("label", num_classes + int(counts[num_classes:].any(dim=1).nonzero()[0]))
    return counts[:num_classes]


def mean_iou(iou: Tensor, absent_is_zero: bool = False) -> Tensor:
    """Mean over the last axis of IoUs in which absent classes are NaN, left out or counted as 0."""
    return iou.nan_to_num(0.0).mean(dim=-1) if absent_is_zero else iou.nanmean(dim=-1)


class SegmentationMetrics(Metric):
    """IoU per class, mIoU and pixel accuracies of a whole data set, never averaged over images or batches.

    The only state is a confusion matrix of pixel counts, int64 (K, K), rows truth and columns prediction;
    matrices of batches, half-sets and processes add up. All results are fractions in 0..1.

    A class that is neither in the truth nor in the predictions has no IoU: it is NaN in "iou" and left out of
    "miou", as in the Cityscapes evaluator. A class that is only predicted counts with IoU 0. Pixels whose
    truth is ``ignore_index`` count nowhere.

    Args:
        num_classes: K, labels are 0..K-1.
        ignore_index: label of pixels that do not count.
        absent_is_zero: an absent class counts as 0 in "miou" (the rule of the DCN authors' code).
        categories: groups of classes; a pixel is right for its category when any class of it is predicted, as
            in the Cityscapes evaluator.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    confusion_matrix: Tensor

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        absent_is_zero: bool = False,
        categories: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        # The matrix may change without an update (merged, summed over processes), so results are not cached.
        super().__init__(compute_with_cache=False)
        if num_classes < 2:
            raise UserError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.absent_is_zero = absent_is_zero
        self.categories = dict(categories or {})
        empty = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confusion_matrix", empty, dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """Always true: an empty matrix is a proper state, not worth torchmetrics' warning."""
        return True

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of a batch; arguments and errors are those of ``count_pairs``."""
        self.add(count_pairs(prediction, label, self.num_classes, self.ignore_index))

    def add(self, counts: Tensor) -> None:
        """Add pixels that ``count_pairs`` has counted, int64 (K, K)."""
        self.confusion_matrix += counts

    def compute(self) -> dict[str, Tensor]:
        """All results on the CPU, float64 but for the counts; NaN where there was nothing to count.

        Returns:
            "miou" (mean of the defined IoUs), "iou" (K,), "pixel_accuracy", "mean_accuracy" (mean recall of
            the classes in the truth), "frequency_weighted_iou" (weighted by the class's share of the truth);
            with categories "category_miou" and "category_iou" (number of categories,); "confusion_matrix", int64
            (K, K), whose pixels all of these are computed from.
        """
        confusion = self.confusion_matrix.cpu().double()  # some accelerators have no float64
        correct, truth, predicted = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
        total = confusion.sum()
        iou = correct / (truth + predicted - correct)
        result = {
            # without any pixel there is no figure, whatever the rule says of absent classes
            "miou": mean_iou(iou, self.absent_is_zero and bool(total > 0)),
            "iou": iou,
            "pixel_accuracy": correct.sum() / total,
            "mean_accuracy": (correct / truth).nanmean(),
            "frequency_weighted_iou": (truth * iou).nansum() / total,
            "confusion_matrix": self.confusion_matrix.cpu().clone(),
        }
        if self.categories:
            category_iou = []
            for classes in map(list, self.categories.values()):
                both = confusion[classes][:, classes].sum()
                category_iou.append(both / (truth[classes].sum() + predicted[classes].sum() - both))
            result["category_iou"] = torch.stack(category_iou)
            result["category_miou"] = result["category_iou"].nanmean()
        return result


class BoundaryIoU(Metric):
    """IoU of the bands along the classes' outlines (Cheng et al., Boundary IoU, CVPR 2021, equation 3).

    The band of a class is its pixels that lie within d of another class or of the image's border, in the maximum
    norm as in the authors' code; d is 2 % of the image's diagonal, at least 1 pixel. As for mIoU, intersections
    and unions are summed over the data set before they are divided (the paper's own figures are of instances).
    Ignored pixels end a class like any other region, and count in no band.

    State: the two sums, int64 (K,) each.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    intersection: Tensor
    union: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, distance: float = 0.02) -> None:
        super().__init__(compute_with_cache=False)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.distance = distance
        for name in ("intersection", "union"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    update_called = SegmentationMetrics.update_called

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch of integer maps (N, H, W), as ``SegmentationMetrics`` takes them."""
        distance = max(1, round(self.distance * math.hypot(*label.shape[1:])))
        counted = label != self.ignore_index
        # a byte per pixel is much faster, where it holds all labels
        fits = self.num_classes < 256 and 0 <= self.ignore_index < 256
        prediction, label = (values.to(torch.uint8 if fits else torch.int16) for values in (prediction, label))
        truth_band = _outline(label, distance).logical_and_(counted)
        predicted_band = _outline(prediction, distance).logical_and_(counted)
        hit = self._count(label, truth_band & predicted_band & (prediction == label))
        self.intersection += hit
        self.union += self._count(label, truth_band) + self._count(prediction, predicted_band) - hit

    def _count(self, classes: Tensor, band: Tensor) -> Tensor:
        """Pixels of each class within a band; int64 (K,)."""
        # a bin more for what lies outside it: picking pixels by a mask takes ten times as long
        counts = classes.masked_fill(~band, self.num_classes).flatten().bincount(minlength=self.num_classes + 1)
        return counts[: self.num_classes]

    def compute(self) -> dict[str, Tensor]:
        """Float64 on the CPU: "boundary_iou" (K,), NaN for absent classes, and its mean "boundary_miou"."""
        iou = self.intersection.cpu().double() / self.union.cpu().double()
        return {"boundary_iou": iou, "boundary_miou": iou.nanmean()}


def _outline(label: Tensor, distance: int) -> Tensor:
    """Pixels of maps (N, H, W) with another value, or the outside, within ``distance`` of them; bool (N, H, W)."""
    outline = torch.ones_like(label, dtype=torch.bool)  # as near to the border as that, all are
    height, width = (side - 2 * distance for side in label.shape[1:])
    if height > 0 and width > 0:
        highest = _running(torch.maximum, label, 2 * distance + 1)
        lowest = _running(torch.minimum, label, 2 * distance + 1)
        outline[:, distance : distance + height, distance : distance + width] = highest != lowest
    return outline


def _running(extreme: Callable[[Tensor, Tensor], Tensor], values: Tensor, window: int) -> Tensor:
    """Maximum or minimum over all window x window squares; (N, H, W) -> (N, H - window + 1, W - window + 1)."""
    for axis in (1, 2):
        span = 1  # of pixels that each value stands for; doubled, then made up to the window
        while span < window:
            step = min(span, window - span)
            length = values.shape[axis] - step
            values = extreme(values.narrow(axis, 0, length), values.narrow(axis, step, length))
            span += step
    return values


class ImageCounts(Metric):
    """Each image's own share of the IoUs, kept apart: correct, true and predicted pixels of each class.

    These three sums are all that an IoU takes from a confusion matrix, so N images cost 3NK numbers, not NK².
    Results are in the order of the images' indices, the same for any number of processes.
    """

    full_state_update = False

    index: list[Tensor]
    counts: list[Tensor]

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)
        self.add_state("index", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")

    update_called = SegmentationMetrics.update_called

    def update(self, index: int, confusion: Tensor) -> None:
        """Keep one image's confusion matrix (K, K); an index below 0 is that of padding, which is no image."""
        counts = torch.stack((confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)))
        # padding is dropped only in compute: gathering needs something from each process
        self.index.append(torch.tensor([index], device=confusion.device))
        self.counts.append(counts[None])

    def compute(self) -> Tensor:
        """int64 (N, 3, K) on the CPU: correct, true, predicted pixels; without any image (0, 3, 0)."""
        if not len(self.index):
            return torch.zeros(0, 3, 0, dtype=torch.int64)
        index, counts = dim_zero_cat(self.index).cpu(), dim_zero_cat(self.counts).cpu()
        order = index.argsort(stable=True)
        return counts[order[index[order] >= 0]]
