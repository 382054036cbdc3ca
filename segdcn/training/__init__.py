"""Training as Lightning modules, callbacks and losses."""

from segdcn.training.averaging import AveragedWeights
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
    "AveragedWeights",
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
