"""What a network's deformable layers learned: where they sample, how far they dilate, what reaches a pixel."""

from segdcn.analysis.effective_dilation import effective_dilation
from segdcn.analysis.layers import LayerCall, aggregates, follow, last_layers, record
from segdcn.analysis.receptive_field import effective_receptive_field
from segdcn.analysis.sampling_points import chain, sampling_points, trace

__all__ = [
    "LayerCall",
    "aggregates",
    "chain",
    "effective_dilation",
    "effective_receptive_field",
    "follow",
    "last_layers",
    "record",
    "sampling_points",
    "trace",
]
