"""A network as an ONNX model, and the model under onnxruntime.

It takes normalised images, float32 (N, 3, H, W), of any batch and size, and gives logits, float32 (N, K, H, W). The
packages of ``pip install -e ".[onnx]"`` are imported when a function needs them.

Legend: N batch, K classes, H x W pixels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segdcn.errors import MissingPackageError, UserError, first_line
from segdcn.interchange.graph import Deformation, quietly, traced
from segdcn.interchange.verification import Runner

FIRST_OPSET = 19  # where DeformConv was defined


def onnx_bytes(
    network: nn.Module, metadata: Mapping[str, str], deform: Deformation = "standard", opset: int = FIRST_OPSET
) -> bytes:
    """A network as an ONNX model with input ``image`` and output ``logits``; ``metadata`` becomes its metadata_props.

    Raises: ValueError, one line; a network that cannot be exported, an opset that cannot be written.
    """
    require_packages("onnx", "onnxscript")
    import onnx

    if not isinstance(opset, int) or opset < FIRST_OPSET:
        raise UserError(f"opset must be {FIRST_OPSET} or more, where ONNX has a deformable convolution; got {opset}")
    with quietly():
        try:
            program = torch.onnx.export(
                traced(network, deform),
                dynamo=True,
                opset_version=opset,
                input_names=["image"],
                output_names=["logits"],
                verbose=False,
            )
        except UserError:
            raise
        except Exception as error:  # of many kinds, by what a network of a user's own is made of
            raise UserError(f"the network cannot be written as ONNX: {first_line(error)}") from error
        assert program is not None  # None is for the exporter's other modes
        model = program.model_proto
    written = next(entry.version for entry in model.opset_import if not entry.domain)
    if written != opset:
        raise UserError(f"opset={opset} cannot be written by the installed onnxscript, only {written}")
    _clean(model)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _clean(model: Any) -> None:
    """Readable names of the free dimensions; no paths of the machine that wrote the model."""
    graph = model.graph
    for value in (*graph.input, *graph.output):
        for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
            value.type.tensor_type.shape.dim[axis].dim_param = name
    del graph.value_info[:]  # in terms of the old names; runtimes infer it
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]


def open_onnx(path: Path) -> Runner:
    """An ONNX model under onnxruntime, on as many CPU threads as PyTorch has.

    Raises: ValueError, one line, where this onnxruntime lacks one of its operators.
    """
    require_packages("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a class of its own for each kind
        raise UserError(
            f"onnxruntime {onnxruntime.__version__} cannot run the model ({first_line(error)}): DeformConv needs 1.25"
            " or newer, which needs Python 3.11; deform=grid_sample does without"
        ) from error
    return lambda images: torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])


def require_packages(*names: str) -> None:
    """Raises: ImportError, one line that says what to install."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f'ONNX needs {" and ".join(missing)}, not installed here: pip install -e ".[onnx]"')
