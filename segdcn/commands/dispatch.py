"""Which part of the commands a data set needs, or a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def kind_of(dataset: Any) -> Any:
    """What the commands do with a data set: the module ``detection`` for one of boxes, else ``segmentation``."""
    from segdcn.detection.samples import DetectionDataset

    if isinstance(dataset, DetectionDataset):
        from segdcn.commands import detection

        return detection
    from segdcn.commands import segmentation

    return segmentation


def of_boxes(config: Mapping[str, Any]) -> bool:
    """Whether a run's config is of a detector."""
    task = config.get("task")
    return isinstance(task, Mapping) and str(task.get("_target_")).startswith("segdcn.detection.")
