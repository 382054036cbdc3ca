"""From predictions to figures: pixel counts, metrics, protocols, intervals."""

from segdcn.evaluation.bootstrap import bootstrap_difference, bootstrap_iou, bootstrap_miou
from segdcn.evaluation.evaluator import EvaluationResult, Evaluator
from segdcn.evaluation.metrics import BoundaryIoU, SegmentationMetrics
from segdcn.evaluation.protocols import get_protocol

__all__ = [
    "BoundaryIoU",
    "EvaluationResult",
    "Evaluator",
    "SegmentationMetrics",
    "bootstrap_difference",
    "bootstrap_iou",
    "bootstrap_miou",
    "get_protocol",
]
