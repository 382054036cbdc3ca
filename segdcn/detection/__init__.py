"""Detectors with deformable layers and deformable RoI pooling: a guest, of which only the commands know."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segdcn.detection.boxes import Boxes
    from segdcn.detection.coco_boxes import CocoBoxes
    from segdcn.detection.datamodule import DetectionDataModule
    from segdcn.detection.networks import build_detector
    from segdcn.detection.task import DetectionTask
    from segdcn.detection.voc_boxes import VocBoxes

__all__ = ["Boxes", "CocoBoxes", "DetectionDataModule", "DetectionTask", "VocBoxes", "build_detector"]

_FILES = {
    "Boxes": "boxes",
    "CocoBoxes": "coco_boxes",
    "DetectionDataModule": "datamodule",
    "DetectionTask": "task",
    "VocBoxes": "voc_boxes",
    "build_detector": "networks",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: who only reads files need not wait seconds for torch and Lightning.
    if name in _FILES:
        return getattr(import_module(f"segdcn.detection.{_FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
