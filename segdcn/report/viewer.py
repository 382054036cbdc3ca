"""What the viewer of a page needs of each image: where each layer samples, and receptive fields of a few pixels.

The page follows the taps itself, for any pixel that is clicked, as ``segdcn.analysis.trace`` does. Receptive fields
take a run of the network each, so they are made here for a grid of pixels.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor, nn

from segdcn.analysis import LayerCall, chain, effective_receptive_field, last_layers, record
from segdcn.models.cost import network_cost
from segdcn.report import pictures

DEPTH = 3  # 9, 81, 729 points
FIELD_RUNS = 3  # a receptive field is a run forward and about two backward
# a grid of fewer pixels than MIN_FIELDS shows nothing
MIN_FIELDS, MAX_FIELDS = 6, 49


def fields_per_image(network: nn.Module, size: tuple[int, int], maps: int, budget: float) -> int:
    """How many receptive fields each of ``maps`` pairs of an image and a network gets; 0 where they cost too much.

    budget: floating point operations of all of them.
    """
    flops = network_cost(network, size)["flops"]
    if flops is None:
        return 0
    affordable = int(budget / (FIELD_RUNS * flops * max(1, maps)))
    return min(affordable, MAX_FIELDS) if affordable >= MIN_FIELDS else 0


def pixel_grid(size: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """At most ``count`` pixels (row, column) in the centres of equal cells that are about as wide as high."""
    height, width = size
    rows = max(1, min(count, height, round(math.sqrt(count * height / width))))
    columns = max(1, min(count // rows, width))
    return [
        (int((row + 0.5) * height / rows), int((column + 0.5) * width / columns))
        for row in range(rows)
        for column in range(columns)
    ]


def view(network: nn.Module, image: Tensor, fields: int, start: tuple[int, int]) -> dict[str, Any]:
    """A network on an image, for the viewer: ``layers`` (last first) and ``fields`` (None without).

    Args:
        network: in evaluation mode.
        image: (1, 3, H, W), normalised.
        fields: how many receptive fields: of the pixel ``start``, and of a grid.
    """
    size = (image.shape[2], image.shape[3])
    calls = record(network, image, last_layers(network, DEPTH))
    atlas = None
    if fields:
        pixels = [start, *pixel_grid(size, fields - 1)]
        found = effective_receptive_field(network, image, pixels).numpy()
        atlas = {**pictures.field_atlas(found), "pixels": pixels}
    return {"layers": [_layer(call) for call in chain(calls[-DEPTH:])], "fields": atlas}


def _layer(call: LayerCall) -> dict[str, Any]:
    return {
        "name": call.name,
        "input": list(call.input_size),
        "output": list(call.output_size),
        "kernel": list(call.kernel_size),
        "stride": list(call.stride),
        "padding": list(call.padding),
        "dilation": list(call.dilation),
        "groups": call.taps.shape[1],
        # (K, 2, Ho, Wo), little-endian float32, of the first offset group; the page knows the regular grid itself
        "taps": _base64(call.taps[0, 0]) if call.deformable else None,
    }


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.to(torch.float32).contiguous().numpy().astype("<f4").tobytes()).decode("ascii")
