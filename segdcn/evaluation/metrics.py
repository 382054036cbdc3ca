"""Segmentation metrics from one confusion matrix. Legend: N batch, K classes, H x W pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


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
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    confusion_matrix: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        # The matrix may change without an update (merged, summed over processes), so results are not cached.
        super().__init__(compute_with_cache=False)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        empty = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confusion_matrix", empty, dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """Always true: an empty matrix is a proper state, not worth torchmetrics' warning."""
        return True

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            prediction: predicted classes, any integer type (N, H, W), 0..K-1 everywhere.
            label: true classes, any integer type (N, H, W), 0..K-1 or ``ignore_index``.

        Raises:
            ValueError: shapes differ, values are not integers, or a value is out of range.
        """
        if prediction.shape != label.shape or label.ndim != 3:
            raise ValueError(
                "metrics need a prediction and a label (N, H, W) of the same size,"
                f" got {tuple(prediction.shape)} and {tuple(label.shape)}"
            )
        for name, values in (("prediction", prediction), ("label", label)):
            if values.is_floating_point():
                raise ValueError(f"{name} must hold integer class numbers, got {values.dtype}: take the argmax first")
        if label.numel() == 0:
            return

        prediction, label = prediction.long(), label.long()
        valid = label != self.ignore_index
        self._check_range("prediction", prediction)
        self._check_range("label", label.where(valid, 0))

        # One number per (truth, prediction) pair; ignored pixels go to an extra bin at the end.
        pair = torch.where(valid, label * self.num_classes + prediction, self.num_classes**2)
        counts = pair.flatten().bincount(minlength=self.num_classes**2 + 1)
        self.confusion_matrix += counts[:-1].view(self.num_classes, self.num_classes)

    def _check_range(self, name: str, values: Tensor) -> None:
        for value in torch.stack(values.aminmax()).tolist():
            if not 0 <= value < self.num_classes:
                raise ValueError(
                    f"{name} holds the value {value}, but there are {self.num_classes} classes"
                    f" (0 to {self.num_classes - 1}; {self.ignore_index} is ignored in labels)"
                )

    def compute(self) -> dict[str, Tensor]:
        """All results on the CPU, float64; NaN where there was nothing to count.

        Returns:
            "miou" (mean of the defined IoUs), "iou" (K,), "pixel_accuracy", "mean_accuracy" (mean recall of
            the classes in the truth), "frequency_weighted_iou" (weighted by the class's share of the truth).
        """
        confusion = self.confusion_matrix.cpu().double()  # some accelerators have no float64
        correct, truth, predicted = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
        total = confusion.sum()
        iou = correct / (truth + predicted - correct)
        return {
            "miou": iou.nanmean(),
            "iou": iou,
            "pixel_accuracy": correct.sum() / total,
            "mean_accuracy": (correct / truth).nanmean(),
            "frequency_weighted_iou": (truth * iou).nansum() / total,
        }
