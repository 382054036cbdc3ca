"""A network as a file of torch.export. Legend: N batch, K classes, H x W pixels."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from segdcn.interchange.graph import Deformation, quietly, traced
from segdcn.interchange.verification import Runner


def program_bytes(network: nn.Module, metadata: Mapping[str, str], deform: Deformation = "standard") -> bytes:
    """A network as a file of torch.export.save, with ``metadata`` as its extra file metadata.json.

    It needs torch to run, and torchvision (imported before it is loaded) where it has deformable layers of the
    standard kind. Images need sides of a pixel more than the output stride.

    Raises: ValueError, one line, for a network that cannot be exported.
    """
    content = io.BytesIO()
    with quietly():
        program = traced(network, deform)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # which holds paths of this machine
        program.example_inputs = None
        torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata, indent=2)})
    return content.getvalue()


def open_program(path: Path) -> Runner:
    """A torch.export program under PyTorch."""
    with quietly():
        return torch.export.load(path).module()
