"""Whether deformable convolution is right on a device: each backend beside torchvision's on the CPU in float64.

What the tests of the operators do more of, for a machine that has PyTorch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torchvision
from torch import Tensor

from segdcn.errors import first_line
from segdcn.ops import deform_conv2d
from segdcn.ops.checks import output_size
from segdcn.ops.deform_conv import Backend

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.03}
"""The largest difference that is right, as a share of the largest value; half precision as in the tests."""


class Case(NamedTuple):
    """One convolution; ``wild``: some offsets are NaN, infinite or far outside."""

    name: str
    channels: int = 32
    channels_out: int = 48
    size: tuple[int, int] = (19, 23)
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    offset_groups: int = 1
    masked: bool = False
    wild: bool = False

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.stride, "padding": self.dilation, "dilation": self.dilation}


CASES = (
    Case("plain"),
    Case("wild offsets, mask", masked=True, wild=True),
    Case("stride 2, dilation 2, two offset groups, mask", 64, 64, stride=2, dilation=2, offset_groups=2, masked=True),
    Case("2048 columns", 16, 16, (3, 2048)),
    Case("depthwise", 32, 32, groups=32),
    Case("four groups, 3x2", 32, 64, kernel=(3, 2), groups=4),
)


def working_backends(device: torch.device, backends: Sequence[str]) -> dict[str, str | None]:
    """Why each backend cannot be used on this device; None where it can."""
    found: dict[str, str | None] = {}
    for backend in backends:
        x, weight = torch.ones(1, 16, 4, 4, device=device), torch.ones(16, 16, 3, 3, device=device)
        try:
            deform_conv2d(x, torch.zeros(1, 18, 4, 4, device=device), weight, padding=1, backend=cast(Backend, backend))
            found[backend] = None
        except Exception as error:  # a package that is not there, a device that it does not know
            found[backend] = first_line(error)
    return found


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float]:
    """The tensor that differs most, and by which share of its largest value.

    One that is not finite is NaN, which is more than any other.
    """
    shares = {}
    for name, value in expected.items():
        difference = (found[name].to(value) - value).abs().max()
        share = float(difference.double() / value.abs().max())
        shares[name] = share if math.isfinite(share) else math.nan
    worst = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    return worst, shares[worst]


@contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """Whether float32 convolutions and matrix products may round what they multiply to TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def compare_backends(
    device: torch.device,
    backends: Sequence[str],
    cases: Sequence[Case] = CASES,
    dtypes: Sequence[torch.dtype] = tuple(TOLERANCES),
    compiler: str = "inductor",
) -> Iterator[dict[str, Any]]:
    """Rows of each dtype, case and backend, and at last of the first case compiled by torch.compile.

    Returns:
        rows with "case", "backend", "dtype", "compiled", "right" and either "difference", the largest one of the
        output or a gradient as a share of its largest value, and "of", which of them that is, or "error"; "refused" in
        the place of these where the operator takes no such arguments.
    """
    for dtype in dtypes:
        for case in cases:
            expected = _reference(case, dtype)
            for backend in backends:
                yield _row(case, backend, dtype, expected, device, deform_conv2d)
    for dtype in (torch.float32, torch.bfloat16):
        for backend in backends:
            torch.compiler.reset()
            compiled = torch.compile(deform_conv2d, fullgraph=True, backend=compiler)
            row = _row(cases[0], backend, dtype, _reference(cases[0], dtype), device, compiled)
            yield row | {"compiled": True}


def _row(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    expected: dict[str, Tensor],
    device: torch.device,
    function: Callable[..., Tensor],
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "backend": backend, "dtype": str(dtype)[6:], "compiled": False}
    try:
        with tensor_float_32(False):
            given = {name: tensor.to(device) for name, tensor in _tensors(case, dtype).items()}
            found = _with_gradients(function, given, backend=cast(Backend, backend), **case.geometry)
    except ValueError as error:  # a dtype that the backend does not have
        return row | {"refused": first_line(error)}
    except Exception as error:
        return row | {"right": False, "error": first_line(error)}
    worst, difference = largest_difference(found, expected)
    return row | {"right": difference < TOLERANCES[dtype], "difference": difference, "of": worst}


def _tensors(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Input, offset, weight, bias and mask; offsets of up to three pixels, exact also in half precision's float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    out = output_size(case.size, case.kernel, *case.geometry.values())
    points = math.prod(case.kernel) * case.offset_groups
    shape = (2, 2 * points, *out)
    whole = torch.randint(-3, 3, shape, generator=generator)
    offset = whole + 0.05 + 0.9 * torch.rand(shape, dtype=torch.float64, generator=generator)
    if case.wild:
        for number, value in enumerate((math.nan, math.inf, -math.inf, 1e6)):
            offset[:, :, number::7, number::5] = value
    features = {
        "input": normal(2, case.channels, *case.size),
        "weight": normal(case.channels_out, case.channels // case.groups, *case.kernel),
        "bias": normal(case.channels_out),
    }
    places = {"offset": offset} | ({"mask": normal(2, points, *out).sigmoid()} if case.masked else {})
    exact = torch.promote_types(dtype, torch.float32)
    return {name: t.to(dtype) for name, t in features.items()} | {name: t.to(exact) for name, t in places.items()}


def _reference(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """torchvision's, of the values as ``dtype`` rounds them; wild offsets are ones that lie outside."""
    tensors = {name: tensor.double() for name, tensor in _tensors(case, dtype).items()}
    tensors["offset"] = torch.where(tensors["offset"].abs() < 1e5, tensors["offset"], -1e5)
    return _with_gradients(torchvision.ops.deform_conv2d, tensors, **case.geometry)


def _with_gradients(function: Callable[..., Tensor], tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output and the gradient of each argument, for one fixed random loss."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    output = function(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    loss = torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), loss)
    return {"output": output.detach()} | dict(zip(leaves, gradients, strict=True))
