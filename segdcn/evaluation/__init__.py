"""Evaluation of segmentation networks."""

from segdcn.evaluation.metrics import SegmentationMetrics

__all__ = ["SegmentationMetrics"]
