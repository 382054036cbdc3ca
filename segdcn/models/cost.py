"""What a network costs: parameters and floating point operations, found without computing anything.

Legend: N batch, C channels, Ho x Wo output map, K = kh * kw kernel points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segdcn.models.shapes import run_on_shapes


def network_cost(network: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """Parameters, and FLOPs for one image of ``size`` pixels (height, width), as flat values for metrics.json.

    Returns:
        ``parameters``: how many numbers are learned, an auxiliary head's among them.
        ``flops``: see ``count_flops``; None for a network whose computation depends on the values of the image, so
        that it cannot be followed without them.
        ``flops_input``: the size, written as on the command line.
    """
    try:
        flops: int | None = count_flops(network, size)
    except Exception:  # of a network of a user's own, which may want the values for anything
        flops = None
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": parameters, "flops": flops, "flops_input": f"[{size[0]},{size[1]}]"}


def count_flops(network: nn.Module, size: tuple[int, int]) -> int:
    """Floating point operations of ``network`` in evaluation mode for one RGB image (1, 3, height, width).

    A multiply-add counts as 2. Matrix products and convolutions are counted, by PyTorch's FlopCounterMode, which
    leaves out biases, normalisation, activations and resizing. A deformable layer is its offset branch, an
    ordinary convolution, and ``deformable_flops``; an aggregation (DCNv3, DCNv4) is the sampling alone, 2 * 4 for each
    sample of each channel.

    Only shapes pass through the network, see ``run_on_shapes``.

    Raises: whatever the network raises where its computation depends on values.
    """
    formulas = {
        torch.ops.segdcn.gather_conv2d: _gather_flops,
        torch.ops.torchvision.deform_conv2d: _torchvision_flops,
        torch.ops.segdcn.deform_aggregate: _aggregate_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run_on_shapes(network, (1, 3, *size))
    return int(counter.get_total_flops())


def deformable_flops(input: Sequence[int], weight: Sequence[int], offset: Sequence[int]) -> int:
    """FLOPs of a deformable convolution without its offset branch, from the shapes of its arguments.

    ``2 N Ho Wo K C_in C_out / groups``, as of the plain convolution, and for the sampling ``2 N Ho Wo K C_in * 4``:
    each of the K values of each input channel at each position is a weighted sum of four map cells. What is done
    once per kernel point for all channels of an offset group (coordinates, the four weights, the mask's factor) is
    left out.
    """
    samples = offset[0] * math.prod(offset[2:]) * math.prod(weight[2:])  # N * Ho * Wo * K
    return 2 * samples * (weight[0] * weight[1] + 4 * input[1])


# FlopCounterMode calls these with each argument of the operator, a tensor's shape for the tensor.
def _gather_flops(input: Sequence[int], offset: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return deformable_flops(input, weight, offset)


def _torchvision_flops(input: Sequence[int], weight: Sequence[int], offset: Sequence[int], *_: Any, **__: Any) -> int:
    return deformable_flops(input, weight, offset)


def _aggregate_flops(
    input: Sequence[int], offset: Sequence[int], mask: Sequence[int], kernel: Sequence[int], *settings: Any, **_: Any
) -> int:
    taps = math.prod(kernel) - bool(settings[-1])  # remove_center
    return 8 * math.prod(offset[:3]) * taps * input[3]
