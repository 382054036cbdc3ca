"""Data sets, and the batches made of them: files -> (image, label) -> augmentation -> batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from segdcn.data.ade20k import ADE20K
from segdcn.data.camvid import CamVid
from segdcn.data.cityscapes import Cityscapes
from segdcn.data.dataset import Sample
from segdcn.data.folder import ImageFolder
from segdcn.data.frequencies import class_weights
from segdcn.data.shapes import Shapes
from segdcn.data.voc import VOC

if TYPE_CHECKING:
    from segdcn.data.datamodule import SegmentationDataModule

__all__ = [
    "ADE20K",
    "VOC",
    "CamVid",
    "Cityscapes",
    "ImageFolder",
    "Sample",
    "SegmentationDataModule",
    "Shapes",
    "class_weights",
]


def __getattr__(name: str) -> Any:
    # Imported when asked for: who only reads files need not wait seconds for Lightning and albumentations.
    if name == "SegmentationDataModule":
        return import_module("segdcn.data.datamodule").SegmentationDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
