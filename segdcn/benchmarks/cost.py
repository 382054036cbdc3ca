"""What deformable layers cost, beside the same network without them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from segdcn.benchmarks.stopwatch import interleaved, peak_megabytes
from segdcn.models import deformable_layers, plain_twin
from segdcn.models.cost import network_cost


def compare_cost(network: nn.Module, image: Tensor, repeats: int) -> dict[str, Any]:
    """Parameters, FLOPs, time and memory of one image, plain against deformable: the paper's Table 4.

    The plain network is the deformable one with each deformable layer replaced by its convolution; of a network
    without deformable layers there is only one.

    Args:
        network: in evaluation mode.
        image: (1, 3, H, W), on the network's device.
        repeats: timed runs of each, in turn; the first, untimed ones warm up.

    Returns:
        plain values: "size" (H, W), "repeats", "device", "threads", and under "plain" and "deformable" each
        "parameters", "flops" (a multiply-add is 2), "milliseconds" (median) and "megabytes" (peak above what was
        held; None where the system does not tell).
    """
    networks = {"plain": network}
    if deformable_layers(network):
        networks = {"plain": plain_twin(network), "deformable": network}
    size = (image.shape[2], image.shape[3])
    calls: dict[str, Callable[[], object]] = {name: partial(one, image) for name, one in networks.items()}
    with torch.inference_mode():
        times = interleaved(calls, repeats, image.device)
        memory = {name: peak_megabytes(call, image.device) for name, call in calls.items()}
    figures: dict[str, Any] = {
        "size": list(size),
        "repeats": repeats,
        "device": str(image.device),
        "threads": torch.get_num_threads(),
    }
    for name, one in networks.items():
        cost = network_cost(one, size)
        figures[name] = {
            "parameters": cost["parameters"],
            "flops": cost["flops"],
            "milliseconds": times[name],
            "megabytes": None if math.isnan(memory[name]) else memory[name],
        }
    return figures
