"""From a trained network to predictions: windows, scales, photographs of any size."""

from segdcn.inference.windows import Inference

__all__ = ["Inference"]
