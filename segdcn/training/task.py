"""SegmentationTask: the LightningModule. Image → network → loss → metric; it never asks which network it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from segdcn.analysis import sampling_points
from segdcn.data.datamodule import SegmentationDataModule
from segdcn.data.dataset import IGNORE_INDEX, Sample, voc_palette
from segdcn.drawing.panels import central_pixels, comparison_panel, sampling_panel
from segdcn.evaluation import Evaluator
from segdcn.models import DeepLab, sampling_layers
from segdcn.models.contract import giving_logits
from segdcn.runs.checkpoint import GROUPS
from segdcn.runs.figures import COUNTS_FILE, write_figures
from segdcn.training.base import Task
from segdcn.training.losses import SegmentationLoss
from segdcn.training.optim import ADAMW, parameter_groups, poly

Batch = dict[str, Any]
"""{"image": float (N, 3, H, W), "label": int64 (N, H, W), "name": list of str}; evaluation adds "index" (N,)."""


class SegmentationTask(Task):
    """Trains and evaluates ``network``; everything it needs is passed in, nothing is looked up.

    network: image (N, 3, H, W) → logits (N, K, H, W), or a mapping of them under "out" alone. One that has a method
        ``training_logits(image)`` gives a list there: the logits, then those of auxiliary heads.
    class_names: K names.
    loss: logits, label → scalar; None is ``SegmentationLoss()``.
    optimizer: parameter groups → Optimizer.
    schedule: optimizer, total_steps (None where the training's length is not known) → LRScheduler, stepped per
        iteration.
    backbone_lr_mult, offset_lr_mult, layer_lr_decay: see ``parameter_groups``.
    auxiliary_weight: of each auxiliary head's loss.
    channels_last: whether the channels of a pixel lie side by side in memory, for which most convolutions are faster;
        sums are taken in another order, so that figures differ a little.
    compile: whether training steps go through ``torch.compile``, for which the first one waits. The network, its
        names and all evaluation stay as they are.
    seed: of the randomness within the network.
    description: plain values saved in each checkpoint, from which the commands rebuild the run; None is what is known
        here, which is enough for ``segdcn.load``.
    monitor: the figure of a validation by which a run is judged; more is better.
    evaluator: how validation and test predict and count; whole images at their own size unless one is set.
    result: of the last validation or test, with full precision (Lightning logs float32).

    Raises: UserError, one line: the network is no ``nn.Module``.
    """

    files = ("metrics.json", COUNTS_FILE)
    losses = ("val/loss",)

    def __init__(
        self,
        network: nn.Module,
        class_names: Sequence[str],
        loss: nn.Module | None = None,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] = ADAMW,
        schedule: Callable[..., LRScheduler] = poly,
        backbone_lr_mult: float = 1.0,
        offset_lr_mult: float = 0.1,
        layer_lr_decay: float = 1.0,
        auxiliary_weight: float = 0.4,
        channels_last: bool = False,
        compile: bool = False,
        seed: int = 0,
        description: dict[str, Any] | None = None,
        monitor: str = "val/miou",
    ) -> None:
        names = [str(name) for name in class_names]
        super().__init__(
            giving_logits(network), Evaluator(names), monitor, optimizer, schedule, seed=seed, description=description
        )
        self.channels_last = channels_last
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self._logits_of_training: Callable[[nn.Module, Tensor], list[Tensor]] = (
            torch.compile(_logits_of_training) if compile else _logits_of_training
        )
        self.loss = SegmentationLoss() if loss is None else loss
        self.class_names = names
        self.backbone_lr_mult = backbone_lr_mult
        self.offset_lr_mult = offset_lr_mult
        self.layer_lr_decay = layer_lr_decay
        self.auxiliary_weight = auxiliary_weight
        self.mean_loss = MeanMetric()

    # --- training ---------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, *auxiliary = self._logits_of_training(self.network, self._laid_out(batch["image"]))
        loss: Tensor = self.loss(logits, batch["label"])
        for each in auxiliary:
            loss = loss + self.auxiliary_weight * self.loss(each, batch["label"])
        self.log_loss(loss, batch_idx, len(logits))
        return loss

    def outputs(self, batch: Batch) -> Tensor:
        """The logits of a batch."""
        logits: Tensor = self.network(batch["image"])
        return logits

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See ``optim.parameter_groups``."""
        return parameter_groups(self.network, self.backbone_lr_mult, self.offset_lr_mult, self.layer_lr_decay)

    def _laid_out(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image

    # --- evaluation -------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch) -> None:
        """Predict and count a batch, and its loss."""
        logits, label = self.evaluator.update(self.network, {**batch, "image": self._laid_out(batch["image"])})
        # image by image, weighted by labelled pixels: a loss that weighs or chooses pixels depends on what it is given
        # together, and the figure must not depend on how many images a batch holds
        for n in range(len(label)):
            truth = label[n : n + 1]
            labelled = (truth != IGNORE_INDEX).sum()
            self.mean_loss.update(self.loss(logits[n : n + 1], truth), weight=labelled)

    def figures_beside(self) -> dict[str, float]:
        """The loss, over the labelled pixels of the whole split."""
        loss = float(self.mean_loss.compute())
        self.mean_loss.reset()
        return {"loss": loss}

    def write_figures(self, split: str, conditions: Mapping[str, Any], folder: Path) -> None:
        """metrics.json and counts.npz, see ``runs.figures``."""
        write_figures(self.result, split, conditions, folder)

    def pictures(self, sample: Sample, data: SegmentationDataModule) -> Iterator[tuple[str, Image]]:
        """Input, truth, prediction and errors of an image.

        Of a network with layers that sample where they predict also where they do, for one pixel of each of the three
        most frequent classes. Predicted as for the figures (windows, scales, mirror images), at the image's own size
        whatever the protocol.
        """
        image = data.eval_transform(sample.image, sample.label)[0][None].to(self.device)
        prediction = self.evaluator.logits(self.network, image).argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
        names, palette = [str(one) for one in data.dataset.class_names], data.dataset.palette
        yield "", comparison_panel(sample.image, sample.label, prediction, names, palette, sample.name)
        if sampling_layers(self.network):
            # an image without a label: where it is looked at then, the network says
            pixels = central_pixels(sample.label) or central_pixels(prediction)
            points = sampling_points(self.network, image, pixels)
            pairs = [(pixel, depths[-1].numpy()) for pixel, depths in zip(pixels, points, strict=True)]
            yield "_sampling", sampling_panel(sample.image, pairs, sample.name)

    # --- checkpoint -------------------------------------------------------------------------------------------

    def own_description(self) -> dict[str, Any]:
        """For ``segdcn.load``: the network's settings where they are known, and what prepares and colours images."""
        palette: Sequence[Sequence[int]] = voc_palette(len(self.class_names))
        groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        if isinstance(self.network, DeepLab) and self.network.settings is not None:
            groups["model"] = {**self.network.settings}
            del groups["model"]["num_classes"]  # class_names say it
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SegmentationDataModule):
            palette, transform = data.dataset.palette, data.eval_transform
            bits = getattr(data.dataset, "bits", None)  # of ours; of a user's own data set it may mean anything
            groups["dataset"] = {"bits": bits} if isinstance(bits, int) else {}
            groups["datamodule"] = {"mean": [*map(float, transform.mean)], "std": [*map(float, transform.std)]}
        return {
            "config": {},
            "groups": groups,
            "class_names": self.class_names,
            "palette": [[int(value) for value in colour] for colour in palette],
        }


def _logits_of_training(network: nn.Module, image: Tensor) -> list[Tensor]:
    of_training: Any = getattr(network, "training_logits", None)
    return [network(image)] if of_training is None else of_training(image)
