"""The training loss. Legend: N batch, K classes, H x W pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from segdcn.data.frequencies import RULES
from segdcn.errors import MissingPackageError, UserError

Region = Literal["dice", "lovasz"]
_REGIONS: dict[str, str] = {"dice": "DiceLoss", "lovasz": "LovaszLoss"}


class SegmentationLoss(nn.Module):
    """Cross-entropy per labelled pixel, averaged over the labelled pixels of the batch.

    Computed in float32 even when the logits come from an autocast region in half precision.
    A batch without a labelled pixel gives 0 and zero gradients, never NaN.

    In training mode in several processes (an initialised ``torch.distributed``) the mean is over the labelled pixels
    of all processes, and each of them returns the same number. Its gradient is this process's part, times the number
    of processes: ``DistributedDataParallel``, which averages, then steps as one process with the whole batch would.
    In evaluation mode the loss is this process's own, and so is the loss of regions always.

    Args:
        ignore_index: label of pixels that do not count.
        class_weights: one factor per class; the mean is divided by the weights of the pixels that count.
            ``segdcn.data.class_weights`` computes some.
        label_smoothing: share of the target spread evenly over all classes, 0 <= value < 1.
        ohem_fraction: online hard example mining: keep only this share of the labelled pixels, those with
            the largest loss, but at least one (Shrivastava et al. 2016, per pixel). Several processes each
            choose among their own pixels.
        ohem_threshold: keep the labelled pixels whose true class has less than this probability, 0.7 for example;
            where they are fewer than ``ohem_fraction`` (None: than one pixel) keep that share (mmsegmentation's
            ``OHEMPixelSampler``, whose least is a number of pixels).
        region: a loss of regions that is added: ``dice`` (Milletari et al. 2016) or ``lovasz`` (Lovász-Softmax, Berman
            et al. 2018), segmentation-models-pytorch's, from the extra ``losses``. Both see all labelled pixels of the
            batch, and of the other options ``ignore_index`` alone. A class that is not among them adds 0 to Dice's mean
            and has no part in Lovász's.
        region_weight: its factor.

    Shape: logits (N, K, H, W), label int64 (N, H, W) -> scalar.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ohem_fraction: float | None = None,
        ohem_threshold: float | None = None,
        region: Region | None = None,
        region_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise UserError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        if ohem_fraction is not None and not 0.0 < ohem_fraction <= 1.0:
            raise UserError(f"ohem_fraction must be above 0 and at most 1 (null: all pixels), got {ohem_fraction}")
        if ohem_threshold is not None and not 0.0 < ohem_threshold < 1.0:
            raise UserError(
                f"ohem_threshold must be a probability above 0 and below 1 (null: none), got {ohem_threshold}"
            )
        if region is not None and region not in _REGIONS:
            raise UserError(f"region must be {', '.join(_REGIONS)} or null, got {region!r}")
        if not 0.0 <= region_weight < float("inf"):
            raise UserError(f"region_weight must be finite and not negative, got {region_weight}")
        if isinstance(class_weights, str):
            raise UserError(
                f"class_weights must be one number a class, {', '.join(RULES)} or null, got {class_weights!r}"
                " (in Python the rules are segdcn.data.class_weights)"
            )
        if class_weights is not None and not (
            all(0.0 <= weight < float("inf") for weight in class_weights) and any(class_weights)
        ):
            raise UserError(f"class_weights must be finite, not negative and not all 0, got {list(class_weights)}")
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.ohem_fraction, self.ohem_threshold = ohem_fraction, ohem_threshold
        self.region_loss = None if region is None else _region_loss(region, ignore_index)
        self.region_weight = region_weight
        weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
        # Not persistent: the weights are a setting, and a checkpoint must load under other settings.
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        self._check_shapes(logits, label)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)

        # No reduction: torch's own mean is NaN without labelled pixels and not deterministic on CUDA.
        def cross_entropy(scores: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
            """(N, H, W), 0 where ignored."""
            return F.cross_entropy(
                scores, label, weight, ignore_index=self.ignore_index, reduction="none", label_smoothing=smoothing
            )

        valid = label != self.ignore_index
        pixel_weights = valid.to(logits.dtype)
        if weights is not None:
            pixel_weights = torch.where(valid, weights[label.where(valid, 0)], 0)
        if self.label_smoothing:
            pixel_losses = cross_entropy(logits, weights, self.label_smoothing)
            surprise = pixel_losses if self.ohem_threshold is None else cross_entropy(logits.detach())
        else:
            surprise = cross_entropy(logits)
            pixel_losses = surprise if weights is None else surprise * pixel_weights

        if self.ohem_fraction is not None or self.ohem_threshold is not None:
            kept = self._hardest(pixel_losses.detach(), surprise.detach(), valid)
            pixel_losses, pixel_weights = pixel_losses * kept, pixel_weights * kept
        loss = self._mean(pixel_losses.sum(), pixel_weights.sum())
        if self.region_loss is not None and valid.any():  # without one Lovász is no number
            loss = loss + self.region_weight * self.region_loss(logits, label)
        return loss

    def _mean(self, total_loss: Tensor, total_weight: Tensor) -> Tensor:
        if self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return _mean_over_processes(total_loss, total_weight)
        return total_loss / total_weight.where(total_weight > 0, 1)

    def _hardest(self, pixel_losses: Tensor, surprise: Tensor, valid: Tensor) -> Tensor:
        """Which of the labelled pixels to keep, bool (N, H, W).

        surprise: minus the logarithm of the true class's probability, for the threshold.
        """
        count = int(valid.sum())
        least = min(count, max(1, round((self.ohem_fraction or 0.0) * count)))
        if self.ohem_threshold is not None:
            hard = (surprise > -math.log(self.ohem_threshold)) & valid
            if hard.sum() >= least:
                return hard
        chosen = torch.zeros_like(valid).flatten()
        candidates = pixel_losses.flatten().masked_fill(~valid.flatten(), -1)  # losses are not negative
        return chosen.index_fill_(0, candidates.topk(least, sorted=False).indices, True).view_as(valid)

    def _check_shapes(self, logits: Tensor, label: Tensor) -> None:
        if logits.ndim != 4 or label.shape != (len(logits), *logits.shape[2:]):
            raise UserError(
                "the loss needs logits (N, K, H, W) and a label (N, H, W) of the same size,"
                f" got {tuple(logits.shape)} and {tuple(label.shape)}"
            )
        if self.class_weights is not None and len(self.class_weights) != logits.shape[1]:
            raise UserError(
                f"class_weights has {len(self.class_weights)} values, but the network predicts"
                f" {logits.shape[1]} classes: give one weight per class"
            )


def _region_loss(name: Region, ignore_index: int) -> nn.Module:
    try:
        from segmentation_models_pytorch import losses
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f'region={name} needs segmentation-models-pytorch, which is not installed here: pip install -e ".[losses]"'
        ) from error
    loss: nn.Module = getattr(losses, _REGIONS[name])("multiclass", ignore_index=ignore_index)
    return loss


def _mean_over_processes(loss: Tensor, weight: Tensor) -> Tensor:
    """The quotient of two scalars' sums over all processes; the gradient is that of ``loss``, times their number."""
    sums = torch.stack((loss.detach(), weight))
    dist.all_reduce(sums)
    total_weight = sums[1].where(sums[1] > 0, 1)
    own = loss * (dist.get_world_size() / total_weight)
    return own - own.detach() + sums[0] / total_weight
