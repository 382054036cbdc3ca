"""A network run on shapes alone: nothing is computed, nothing in it changes. Legend: N images, H x W pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

import segdcn.ops  # noqa: F401  (registers segdcn::gather_conv2d)


def run_on_shapes(network: nn.Module, shape: tuple[int, int, int, int], training: bool = False) -> Any:
    """What a network gives for images of a shape (N, 3, H, W), as tensors without values (on the meta device).

    No values, no random numbers, no statistics.

    training: in training mode, in which some layers refuse what they take in evaluation.

    Raises: whatever the network raises; NotImplementedError or RuntimeError where its computation depends on values.
    """
    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in chain(network.named_parameters(), network.named_buffers())
    }
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    image = torch.empty(shape, dtype=dtype, device="meta")
    with in_mode(network, training), torch.no_grad():
        return torch.func.functional_call(network, tensors, (image,))


@contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """The network in training or evaluation mode; each of its modules is as before at the end."""
    modes = {module: module.training for module in network.modules()}
    if not (training and network.training):  # in a network that trains, parts that its author set to evaluation stay so
        network.train(training)
    try:
        yield
    finally:
        for module, before in modes.items():
            module.training = before
