"""A network as a file for other programs: ONNX or a torch.export program, opened again and compared with PyTorch.

Either takes normalised images, float32 (N, 3, H, W), of any batch and size, and gives logits, float32 (N, K, H, W).
The packages of ``pip install -e ".[onnx]"`` are imported when a function needs them.

Legend: N batch, K classes, H x W pixels.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from segdcn import MissingPackageError, UserError, first_line
from segdcn.models import DeepLab, deformable_layers
from segdcn.ops.deform_conv import Backend

Deformation = Literal["standard", "grid_sample"]
"""Of what a deformable layer is made: ONNX's DeformConv (torchvision's operator), or GridSample and a convolution."""

Runner: TypeAlias = Callable[[Tensor], Tensor]
"""images -> logits, both on the CPU."""

FIRST_OPSET = 19  # where DeformConv was defined
_BACKENDS: Mapping[Deformation, Backend] = {"standard": "torchvision", "grid_sample": "grid_sample"}


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
    with _quietly():
        try:
            program = torch.onnx.export(
                _trace(network, deform),
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


def program_bytes(network: nn.Module, metadata: Mapping[str, str], deform: Deformation = "standard") -> bytes:
    """A network as a file of torch.export.save, with ``metadata`` as its extra file metadata.json.

    It needs torch to run, and torchvision (imported before it is loaded) where it has deformable layers of the
    standard kind. Images need sides of a pixel more than the output stride.

    Raises: ValueError, one line, for a network that cannot be exported.
    """
    content = io.BytesIO()
    with _quietly():
        program = _trace(network, deform)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # which holds paths of this machine
        program.example_inputs = None
        torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata, indent=2)})
    return content.getvalue()


def _trace(network: nn.Module, deform: Deformation) -> ExportedProgram:
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


def open_program(path: Path) -> Runner:
    """A torch.export program under PyTorch."""
    with _quietly():
        return torch.export.load(path).module()


@dataclass
class Agreement:
    """How far the logits and labels of two runs over the same images are apart.

    size, batch: of the images. span: lowest and highest logit of the reference. difference: the largest absolute one
    of a logit. differing: pixels of another label, of ``pixels``.
    """

    size: tuple[int, int]
    batch: int
    span: tuple[float, float]
    difference: float
    differing: int
    pixels: int

    @property
    def relative(self) -> float:
        """The largest difference as a share of the span; NaN where a logit is not finite."""
        return self.difference / max(self.span[1] - self.span[0], 1e-30)


def compare(reference: Runner, other: Runner, batches: Iterable[Tensor]) -> list[Agreement]:
    """Run both over batches of images (N, 3, H, W).

    Raises: ValueError, one line, where one of them cannot do with a batch, or they differ in shape.
    """
    found = []
    for images in batches:
        try:
            with torch.inference_mode():
                expected, logits = reference(images), other(images)
        except Exception as error:  # each runtime has kinds of its own
            raise UserError(f"images {tuple(images.shape)} cannot be run: {first_line(error)}") from error
        if logits.shape != expected.shape:
            raise UserError(f"{tuple(images.shape)} gives {tuple(logits.shape)} instead of {tuple(expected.shape)}")
        labels = expected.argmax(dim=1)
        found.append(
            Agreement(
                (images.shape[2], images.shape[3]),
                len(images),
                (float(expected.min()), float(expected.max())),
                float((logits - expected).abs().max()),
                int((logits.argmax(dim=1) != labels).sum()),
                labels.numel(),
            )
        )
    return found


def require_packages(*names: str) -> None:
    """Raises: ImportError, one line that says what to install."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f'ONNX needs {" and ".join(missing)}, not installed here: pip install -e ".[onnx]"')


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporters speak of their own deprecations and of fallbacks that the comparison judges."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
