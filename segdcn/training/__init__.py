"""Training as Lightning modules, callbacks and losses."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segdcn.training.checkpointing import AtomicCheckpoints, Checkpoint
    from segdcn.training.figures import FiguresFile, MetricsFile
    from segdcn.training.losses import SegmentationLoss
    from segdcn.training.offset_health import OffsetHealth
    from segdcn.training.pictures import Panels
    from segdcn.training.progress import EpochLines
    from segdcn.training.signals import StopOnSignal
    from segdcn.training.task import SegmentationTask

__all__ = [
    "AtomicCheckpoints",
    "Checkpoint",
    "EpochLines",
    "FiguresFile",
    "MetricsFile",
    "OffsetHealth",
    "Panels",
    "SegmentationLoss",
    "SegmentationTask",
    "StopOnSignal",
]

_LAZY = {
    "AtomicCheckpoints": "checkpointing",
    "Checkpoint": "checkpointing",
    "EpochLines": "progress",
    "FiguresFile": "figures",
    "MetricsFile": "figures",
    "OffsetHealth": "offset_health",
    "Panels": "pictures",
    "SegmentationLoss": "losses",
    "SegmentationTask": "task",
    "StopOnSignal": "signals",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: every command asks this package which process it is, and its --help need not wait.
    if name in _LAZY:
        return getattr(import_module(f"segdcn.training.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
