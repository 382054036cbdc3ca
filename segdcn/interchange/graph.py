"""The graph of a network for images of any batch and size, as torch.export sees it. Legend: N batch, H x W pixels."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from segdcn.errors import UserError, first_line
from segdcn.models import DeepLab, deformable_layers
from segdcn.ops.deform_conv import Backend

Deformation = Literal["standard", "grid_sample"]
"""Of what a deformable layer is made: ONNX's DeformConv (torchvision's operator), or GridSample and a convolution."""


_BACKENDS: Mapping[Deformation, Backend] = {"standard": "torchvision", "grid_sample": "grid_sample"}


def traced(network: nn.Module, deform: Deformation) -> ExportedProgram:
    """The network's graph, of free batch, height and width."""
    layers = deformable_layers(network).values()
    before = [layer.backend for layer in layers]
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    for layer in layers:
        layer.backend = _BACKENDS[deform]
    try:
        # only shapes pass through; two cells of every map at least, as one would be taken for a constant
        # torch 2.7 takes a hook of the outermost module (see giving_logits) for a second graph
        whole = network if isinstance(network, DeepLab) else nn.Sequential(network)
        return torch.export.export(
            whole.eval(),
            (torch.zeros(2, 3, 96, 128, device=device),),
            dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},),
        )
    except Exception as error:  # of many kinds, by what in the network depends on sizes or values
        raise UserError(f"the network cannot be exported for images of any size: {first_line(error)}") from error
    finally:
        for layer, backend in zip(layers, before, strict=True):
            layer.backend = backend


@contextmanager
def quietly() -> Iterator[None]:
    """The exporters speak of their own deprecations and of fallbacks that the comparison judges."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
