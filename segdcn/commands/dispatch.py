"""Which part of the commands a data set needs, or a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from segdcn.errors import UserError


def kind_of(dataset: Any, config: Mapping[str, Any] | None = None) -> Any:
    """What the commands do with a data set: the module ``detection`` for one of boxes, else ``segmentation``.

    config: of a run on it.

    Raises: UserError, one line: a detector where there are label maps, or the other way round.
    """
    from segdcn.detection.samples import DetectionDataset

    boxes, name = isinstance(dataset, DetectionDataset), type(dataset).__name__
    if config is not None and of_boxes(config) != boxes:
        raise UserError(
            f"{name} has boxes, which need a detector: choose model=faster_rcnn, rfcn or class_aware_rpn"
            if boxes
            else f"the model is a detector, but {name} has label maps: choose dataset=boxes, voc_boxes or coco_boxes"
        )
    if boxes:
        from segdcn.commands import detection

        return detection
    from segdcn.commands import segmentation

    return segmentation


def of_boxes(config: Mapping[str, Any]) -> bool:
    """Whether a run's config is of a detector."""
    task = config.get("task")
    return isinstance(task, Mapping) and str(task.get("_target_")).startswith("segdcn.detection.")
