"""segdcn: semantic segmentation with deformable convolution on PyTorch Lightning and Hydra."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from segdcn.errors import MissingFileError, MissingPackageError, UserError

if TYPE_CHECKING:
    from segdcn.data.datamodule import SegmentationDataModule
    from segdcn.inference.predictor import Prediction, Predictor
    from segdcn.runs.checkpoint import load
    from segdcn.training.task import SegmentationTask

__version__ = "0.1.0"
__all__ = [
    "MissingFileError",
    "MissingPackageError",
    "Prediction",
    "Predictor",
    "SegmentationDataModule",
    "SegmentationTask",
    "UserError",
    "load",
]

_LAZY = {
    "Prediction": "segdcn.inference.predictor",
    "Predictor": "segdcn.inference.predictor",
    "SegmentationDataModule": "segdcn.data.datamodule",
    "SegmentationTask": "segdcn.training.task",
    "load": "segdcn.runs.checkpoint",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: `import segdcn` itself, and every command's --help, need not wait for torch.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
