"""DetectionTask: the LightningModule of a detector. Images → losses of its parts, or detections → average precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from segdcn.data.dataset import voc_palette
from segdcn.detection.datamodule import DetectionDataModule, as_image
from segdcn.detection.evaluator import DetectionEvaluator
from segdcn.detection.found import FOUND_FILE, write_found
from segdcn.detection.pictures import bins_picture, boxes_picture, moved_bins
from segdcn.detection.samples import BoxSample, Detections
from segdcn.errors import UserError
from segdcn.ops import DeformPSRoIPool, DeformRoIPool
from segdcn.runs.checkpoint import GROUPS
from segdcn.runs.files import write_json
from segdcn.training.base import Task
from segdcn.training.optim import ADAMW, parameter_groups, poly

Batch = Mapping[str, Sequence[Any]]
"""See ``datamodule.Item``."""


class DetectionTask(Task):
    """Trains and evaluates a detector of torchvision's kind, such as ``build_detector`` makes.

    network: see ``build_detector``.
    class_names: C names, the label of the first is 1.
    optimizer, schedule, seed, description, monitor: see ``Task``.
    backbone_lr_mult: learning rate of the backbone's layers, as a factor.
    offset_lr_mult: of the offset branches of deformable convolutions.
    pool_offset_lr_mult: of the fully connected ones of deformable pooling.
    field_offset_lr_mult: of the offset fields of deformable position-sensitive pooling.
    reduce_lr_mult: of the 1x1 convolution on the last stage.
    protocol: how detections are counted, see ``DetectionEvaluator``.
    result: of the last validation or test, with full precision.
    """

    files = ("metrics.json", FOUND_FILE)

    def __init__(
        self,
        network: nn.Module,
        class_names: Sequence[str],
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] = ADAMW,
        schedule: Callable[..., LRScheduler] = poly,
        backbone_lr_mult: float = 1.0,
        offset_lr_mult: float = 0.1,
        pool_offset_lr_mult: float = 0.01,
        field_offset_lr_mult: float = 1.0,
        reduce_lr_mult: float = 1.0,
        protocol: str = "voc07",
        seed: int = 0,
        description: dict[str, Any] | None = None,
        monitor: str = "val/map50",
    ) -> None:
        names = [str(name) for name in class_names]
        evaluator = DetectionEvaluator(names, protocol)
        if monitor.partition("/")[2] not in (known := evaluator.means):
            raise UserError(
                f"task.monitor={monitor} is no figure of task.protocol={protocol}: it has"
                f" {', '.join(f'val/{name}' for name in known)}"
            )
        super().__init__(network, evaluator, monitor, optimizer, schedule, seed=seed, description=description)
        self.class_names = names
        self.backbone_lr_mult, self.offset_lr_mult = backbone_lr_mult, offset_lr_mult
        self.pool_offset_lr_mult, self.field_offset_lr_mult = pool_offset_lr_mult, field_offset_lr_mult
        self.reduce_lr_mult = reduce_lr_mult

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.outputs(batch)
        loss: Tensor = torch.stack(list(losses.values())).sum()
        self.log_loss(loss, batch_idx, len(batch["image"]))
        return loss

    def outputs(self, batch: Batch) -> Any:
        """Losses by name in training, else detections."""
        return self.network(batch["image"], batch["target"] if self.training else None)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See ``optim.parameter_groups``; the offset branches of pooling and the 1x1 convolution are further roles."""
        parts: dict[str, list[nn.Module | None]] = {"pool_offset": [], "field_offset": [], "reduce": []}
        for name, module in self.network.named_modules():
            if isinstance(module, DeformRoIPool):
                parts["pool_offset"].append(module.branch)
            elif isinstance(module, DeformPSRoIPool):
                parts["field_offset"] += [module.offset, module.mask]
            elif name == "backbone.reduce":
                parts["reduce"].append(module)
        mults = (self.pool_offset_lr_mult, self.field_offset_lr_mult, self.reduce_lr_mult)
        others = [
            (role, mult, [parameter for part in found if part is not None for parameter in part.parameters()])
            for (role, found), mult in zip(parts.items(), mults, strict=True)
        ]
        return parameter_groups(self.network, self.backbone_lr_mult, self.offset_lr_mult, others=others)

    # --- evaluation -------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch) -> None:
        """Detect and count; images of one size together.

        An image that shares a batch with a larger one is padded to its size, which gives other detections.
        """
        started, images = time.perf_counter(), batch["image"]
        found: dict[int, Detections] = {}
        for size in dict.fromkeys(image.shape for image in images):
            places = [place for place, image in enumerate(images) if image.shape == size]
            detected = self.network([images[place] for place in places])
            found |= {place: as_detections(each) for place, each in zip(places, detected, strict=True)}
        seconds = time.perf_counter() - started
        detections = [found[place] for place in range(len(images))]
        self.evaluator.update(batch["index"], batch["name"], detections, batch["objects"], seconds)

    def write_figures(self, split: str, conditions: Mapping[str, Any], folder: Path) -> None:
        """metrics.json, and found.npz: all that was found."""
        write_found(folder / FOUND_FILE, self.result.found)
        figures = {**self.result.figures, "split": split, "images": self.result.images, **conditions}
        write_json(folder / "metrics.json", figures)

    @torch.no_grad()
    def pictures(self, sample: BoxSample, data: DetectionDataModule) -> Iterator[tuple[str, Image]]:
        """Truth and detections of an image; of deformable pooling also where the bins of some regions lie."""
        image = as_image(sample.image).to(self.device)
        found = as_detections(self.network([image])[0])
        yield "", boxes_picture(sample, found, self.class_names, data.dataset.palette)
        if moved := moved_bins(self.network, image, found):
            yield "_bins", bins_picture(sample.image, moved, self.class_names, sample.name)

    def own_description(self) -> dict[str, Any]:
        """Of a training from Python nothing is known but the classes."""
        palette = [list(colour) for colour in voc_palette(len(self.class_names) + 1)[1:]]
        groups: dict[str, Any] = {group: {} for group in GROUPS}
        return {"config": {}, "groups": groups, "class_names": self.class_names, "palette": palette}


def as_detections(found: Mapping[str, Tensor]) -> Detections:
    """What a detector gives for an image, on the CPU."""
    boxes, scores, labels = (found[key].detach().cpu() for key in ("boxes", "scores", "labels"))
    return Detections(boxes.float().numpy(), scores.float().numpy(), labels.numpy())
