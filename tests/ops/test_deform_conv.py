"""Deformable convolution against torchvision, nn.Conv2d and answers worked out by hand."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from segdcn.ops import DeformConv2d, deform_conv2d, gather_conv
from segdcn.ops.deform_conv import Backend

BACKENDS: tuple[Backend, ...] = ("gather", "torchvision", "grid_sample")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
HALVES = (torch.bfloat16, torch.float16)


def on_a_gpu(test: Callable[..., None]) -> Any:
    """Marks a test that needs a CUDA device."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


class Case(NamedTuple):
    """Sizes of one convolution; tensors() fills them."""

    channels: int
    channels_out: int
    size: tuple[int, int]
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    n: int = 2

    @property
    def geometry(self) -> dict[str, tuple[int, int]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """Random input, weight, bias and mask; offsets of up to three pixels that never hit an integer."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        out = [
            (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i]
            + 1
            for i in (0, 1)
        ]
        points = math.prod(self.kernel_size) * self.offset_groups
        shape = (self.n, 2 * points, *out)
        whole = torch.randint(-3, 3, shape, generator=generator)
        fraction = 0.05 + 0.9 * torch.rand(shape, dtype=torch.float64, generator=generator)
        tensors = {
            "input": normal(self.n, self.channels, *self.size),
            "offset": whole + fraction,
            "weight": normal(self.channels_out, self.channels // self.groups, *self.kernel_size),
            "bias": normal(self.channels_out),
            "mask": normal(self.n, points, *out).sigmoid(),
        }
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups, offset_groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels = math.lcm(groups, offset_groups) * draw(st.integers(1, 2))
    if draw(st.booleans()):  # depthwise
        groups = channels
    pairs = [draw(st.tuples(st.integers(low, high), st.integers(low, high))) for low, high in ((1, 3), (1, 2), (0, 2))]
    kernel_size, stride, padding = pairs
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    height = dilation[0] * (kernel_size[0] - 1) + draw(st.integers(1, 4))
    width = max(height, dilation[1] * (kernel_size[1] - 1)) + draw(st.integers(1, 4))
    size = draw(st.sampled_from([(height, width), (width + dilation[0] * 2, height + dilation[1] * 2)]))
    channels_out = groups * draw(st.integers(1, 2))
    return Case(channels, channels_out, size, kernel_size, stride, padding, dilation, groups, offset_groups)


def with_gradients(function: Callable[..., Tensor], tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output and the gradient of every argument, for one fixed random loss."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    output = function(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output))
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@settings(max_examples=40)
@given(case=cases(), backend=st.sampled_from(BACKENDS), masked=st.booleans(), seed=st.integers(0, 999))
def test_value_and_gradients_equal_torchvision(
    dtype: torch.dtype, tolerance: float, case: Case, backend: Backend, masked: bool, seed: int
) -> None:
    tensors = case.tensors(dtype, seed)
    if not masked:
        del tensors["mask"]
    ours = with_gradients(deform_conv2d, tensors, backend=backend, **case.geometry)
    expected = with_gradients(torchvision.ops.deform_conv2d, tensors, **case.geometry)
    assert ours.keys() == expected.keys() == {"output", *tensors}
    for name, value in expected.items():
        atol = tolerance * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@every_backend
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 3, (3, 4), (2, 2), offset_groups=2, n=1),
        Case(4, 4, (4, 3), (2, 1), padding=(1, 0), groups=4, n=1),
        Case(4, 2, (3, 5), (1, 2), stride=(2, 1), groups=2, n=1),
    ],
    ids=["two offset groups", "depthwise", "grouped"],
)
def test_gradients_equal_finite_differences(backend: Backend, case: Case) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}

    def function(*values: Tensor) -> Tensor:
        return deform_conv2d(**dict(zip(tensors, values, strict=True)), backend=backend, **case.geometry)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("tile_bytes", [1, 300, 10**9])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_size_of_a_tile_does_not_matter(groups: int, tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4, 4, (5, 8), (3, 2), padding=(1, 1), groups=groups, offset_groups=2)
    expected = with_gradients(deform_conv2d, case.tensors(), backend="torchvision", **case.geometry)
    monkeypatch.setattr(gather_conv, "TILE_BYTES", tile_bytes)
    for name, value in with_gradients(deform_conv2d, case.tensors(), backend="gather", **case.geometry).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("wanted", [("input",), ("weight",), ("offset",), ("mask",), ("input", "mask"), ("bias",)])
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(wanted: tuple[str, ...]) -> None:
    case = Case(4, 6, (5, 8), (3, 2), padding=(1, 1), offset_groups=2)
    tensors = case.tensors()
    expected = with_gradients(deform_conv2d, tensors, backend="gather", **case.geometry)
    leaves = {name: tensor.requires_grad_(name in wanted) for name, tensor in case.tensors().items()}
    output = deform_conv2d(**leaves, backend="gather", **case.geometry)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=torch.float64, generator=generator))
    for name, leaf in leaves.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


@every_backend
@settings(max_examples=20)
@given(case=cases())
def test_zero_offsets_give_a_plain_convolution(backend: Backend, case: Case) -> None:
    tensors = case.tensors()
    x, weight, bias = tensors["input"], tensors["weight"], tensors["bias"]
    zero = torch.zeros_like(tensors["offset"])
    plain = F.conv2d(x, weight, bias, groups=case.groups, **case.geometry)
    torch.testing.assert_close(deform_conv2d(x, zero, weight, bias, backend=backend, **case.geometry), plain)
    half = torch.full_like(tensors["mask"], 0.5)
    halved = deform_conv2d(x, zero, weight, None, mask=half, backend=backend, **case.geometry)
    torch.testing.assert_close(halved, (plain - bias.view(-1, 1, 1)) / 2)


# Answers known from the definition


@every_backend
def test_a_step_to_the_right_moves_the_picture_to_the_left(backend: Backend) -> None:
    x, weight = torch.zeros(1, 1, 5, 6), torch.zeros(1, 1, 3, 3)
    x[0, 0, 2, 3] = weight[0, 0, 1, 1] = 1
    offset = torch.zeros(1, 18, 5, 6)
    offset[:, 9] = 1  # dx of the centre
    expected = torch.zeros(1, 1, 5, 6)
    expected[0, 0, 2, 2] = 1
    assert torch.equal(deform_conv2d(x, offset, weight, padding=1, backend=backend), expected)


@every_backend
@pytest.mark.parametrize(
    ("dy", "dx", "value"),
    [
        (1.25, 1.5, 7.5),
        (-0.5, 0, 0.5),
        (-1, 0, 0),
        (2.5, 3, 6),
        (2.5, 3.5, 3),
        (3, 3, 0),
        (-0.5, -0.5, 0.25),
    ],
)
def test_values_fade_over_one_pixel_at_the_border(backend: Backend, dy: float, dx: float, value: float) -> None:
    x = torch.arange(1.0, 13).view(1, 1, 3, 4)
    offset = torch.zeros(1, 2, 3, 4)
    offset[0, :, 0, 0] = torch.tensor([dy, dx])
    assert deform_conv2d(x, offset, torch.ones(1, 1, 1, 1), backend=backend)[0, 0, 0, 0] == value


@every_backend
def test_derivative_at_an_integer_is_the_one_towards_plus(backend: Backend) -> None:
    squares = torch.tensor([0.0, 1, 4, 9, 16])
    for row in (squares.view(1, 1, 1, 5), squares.view(1, 1, 5, 1)):
        offset = torch.zeros(1, 2, *row.shape[2:], requires_grad=True)
        deform_conv2d(row, offset, torch.ones(1, 1, 1, 1), backend=backend).flatten()[2].backward()
        assert offset.grad is not None
        along = 0 if row.shape[2] == 5 else 1
        assert offset.grad[0, along].flatten()[2] == 9 - 4
        assert offset.grad.count_nonzero() <= 2  # across, the step leaves the single row: 0 - 4
        assert offset.grad[0, 1 - along].flatten()[2] == -4


@every_backend
def test_far_outside_there_is_neither_value_nor_gradient(backend: Backend) -> None:
    tensors = Case(4, 3, (5, 7), padding=(1, 1)).tensors() | {"offset": torch.full((2, 18, 5, 7), 1000.0).double()}
    del tensors["bias"]
    result = with_gradients(deform_conv2d, tensors, padding=1, backend=backend)
    assert all(not value.any() for value in result.values())


@pytest.mark.parametrize("feature", [math.nan, math.inf])
def test_what_the_map_holds_does_not_reach_a_sample_outside(feature: float) -> None:
    x, weight = torch.full((1, 2, 3, 4), feature), torch.ones(1, 2, 3, 3)
    offset = torch.full((1, 18, 3, 4), -1000.0)
    offset[:, 0] = math.nan
    assert not deform_conv2d(x, offset, weight, padding=1, backend="gather").any()


@every_backend
def test_a_mirrored_problem_has_the_mirrored_result(backend: Backend) -> None:
    case = Case(4, 3, (6, 9), (3, 2), padding=(1, 1), dilation=(1, 2), offset_groups=2)
    tensors = case.tensors()
    n, _, out_h, out_w = tensors["offset"].shape
    kernel_h, kernel_w = case.kernel_size
    offset = tensors["offset"].view(n, 2, kernel_h, kernel_w, 2, out_h, out_w).flip(3, 6)
    offset = offset * torch.tensor([1.0, -1.0]).view(2, 1, 1)
    mask = tensors["mask"].view(n, 2, kernel_h, kernel_w, out_h, out_w).flip(3, 5)
    mirrored = {
        "input": tensors["input"].flip(3),
        "weight": tensors["weight"].flip(3),
        "bias": tensors["bias"],
        "offset": offset.reshape(tensors["offset"].shape),
        "mask": mask.reshape(tensors["mask"].shape),
    }
    output = deform_conv2d(**tensors, backend=backend, **case.geometry)
    torch.testing.assert_close(deform_conv2d(**mirrored, backend=backend, **case.geometry), output.flip(3))


# Input that is unusual or wrong

WILD_OFFSETS = """
import math, sys, torch
from segdcn.ops import deform_conv2d
backend = sys.argv[1]
torch.manual_seed(0)
x, w = torch.randn(2, 4, 5, 7), torch.randn(3, 4, 3, 3)
for bad in (math.nan, math.inf, -math.inf, 1e6, -1e6, 1e30, -1e30):
    for position in ((0, 0, 0, 0), (1, 9, 2, 3), (0, 17, 4, 6)):  # dy of the first point, dx of the centre and the last
        image, channel, i, j = position
        offset = torch.rand(2, 18, 5, 7) * 0.9 + 0.05
        muted = torch.ones(2, 9, 5, 7)
        muted[image, channel // 2, i, j] = 0  # a sample that contributes zero is a sample with mask zero
        expected = deform_conv2d(x, offset, w, padding=1, mask=muted, backend=backend)
        offset[position] = bad
        leaves = [t.clone().requires_grad_() for t in (x, offset, w, torch.ones(2, 9, 5, 7))]
        output = deform_conv2d(*leaves[:3], padding=1, mask=leaves[3], backend=backend)
        output.square().sum().backward()
        assert torch.allclose(output, expected, atol=1e-5), (bad, position)
        assert all(t.grad.isfinite().all() for t in leaves), (bad, position)
        assert leaves[1].grad[position] == 0, (bad, position)
for bad in (math.nan, math.inf, -math.inf):
    for dtype in (torch.float32, torch.float16):
        wide, one = torch.ones(1, 1, 1, 12345, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
        offset = torch.zeros(1, 2, 1, 12345, dtype=dtype)
        offset[:, 1] = bad
        assert not deform_conv2d(wide, offset, one, backend=backend).any(), (bad, dtype)
"""


@every_backend
def test_wild_offsets_contribute_nothing_and_gradients_stay_finite(backend: Backend) -> None:
    # In a process of its own: a NaN offset can end torchvision's.
    process = subprocess.run(
        [sys.executable, "-c", WILD_OFFSETS, backend], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, f"exit {process.returncode}: {process.stderr}"


def test_nothing_but_wild_offsets_from_a_layer_leaves_its_bias() -> None:
    layer = DeformConv2d(4, 3, 3, padding=1, modulated=True)
    nn.init.constant_(layer.offset.bias, math.nan)
    nn.init.zeros_(layer.offset.bias[18:])
    assert layer.bias is not None
    torch.testing.assert_close(layer(torch.randn(2, 4, 5, 7)), layer.bias.view(1, 3, 1, 1).expand(2, 3, 5, 7))


@every_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": (4, 5, 7)}, r"input, offset and weight must have 4 dimensions, got \(4, 5, 7\)"),
        ({"input": (2, 6, 5, 7)}, "weight expects 4 channels per group, which do not divide input's 6"),
        ({"input": (2, 4, 5, 1)}, "input of .* is smaller than the kernel"),
        ({"input": (2, 0, 5, 7)}, "weight expects 4 channels per group, which do not divide input's 0"),
        ({"weight": (3, 0, 3, 2)}, "weight expects 0 channels per group, which do not divide input's 4"),
        ({"weight": (3, 4, 0, 2)}, "weight must have a kernel of 1 x 1 or more, got 0 x 2"),
        ({"weight": (3, 2, 3, 2)}, "weight has 3 output channels, which its 2 groups do not divide"),
        ({"offset": (2, 18, 5, 6)}, r"offset must have 2 \* 6 channels per offset group.*got 18"),
        ({"offset": (2, 36, 5, 6)}, "offset must have .* the groups dividing 4 input channels, got 36"),
        ({"offset": (1, 12, 5, 6)}, r"offset must be \(2, 12, 5, 6\), got \(1, 12, 5, 6\)"),
        ({"offset": (2, 12, 6, 5)}, r"offset must be \(2, 12, 5, 6\), got \(2, 12, 6, 5\)"),
        ({"mask": (2, 12, 5, 6)}, r"mask must be \(2, 6, 5, 6\), got \(2, 12, 5, 6\)"),
        ({"mask": (2, 6, 6, 5)}, r"mask must be \(2, 6, 5, 6\), got \(2, 6, 6, 5\)"),
        ({"bias": (1,)}, r"bias must be \(3,\), got \(1,\)"),
    ],
)
def test_a_wrong_shape_is_told_by_the_argument_s_name(
    backend: Backend, change: dict[str, tuple[int, ...]], message: str
) -> None:
    shapes = {
        "input": (2, 4, 5, 7),
        "offset": (2, 12, 5, 6),
        "weight": (3, 4, 3, 2),
        "bias": (3,),
        "mask": (2, 6, 5, 6),
    }
    right = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert deform_conv2d(**right, padding=(1, 0), backend=backend).shape == (2, 3, 5, 6)
    wrong = right | {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        deform_conv2d(**wrong, padding=(1, 0), backend=backend)


@every_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.int64}, "input must be floating point, got torch.int64"),
        ({"weight": torch.float64}, "weight must have input's dtype torch.float32, got torch.float64"),
        ({"bias": torch.float16}, "bias must have input's dtype torch.float32, got torch.float16"),
        ({"offset": torch.int32}, "offset must be floating point, got torch.int32"),
        ({"mask": torch.bool}, "mask must be floating point, got torch.bool"),
        ({"offset": "meta"}, "offset must be on input's device cpu, got meta"),
        ({"weight": "meta"}, "weight must be on input's device cpu, got meta"),
    ],
)
def test_a_wrong_dtype_or_device_is_told_by_the_argument_s_name(
    backend: Backend, change: dict[str, torch.dtype | str], message: str
) -> None:
    tensors = Case(4, 3, (5, 7)).tensors(torch.float32)
    tensors |= {name: tensors[name].to(to) for name, to in change.items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        deform_conv2d(**tensors, backend=backend)


@every_backend
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"stride": 0}, r"stride must be 1 or more, got \(0, 0\)"),
        ({"padding": (0, -1)}, r"padding must be 0 or more, got \(0, -1\)"),
        ({"dilation": (0, 1)}, r"dilation must be 1 or more, got \(0, 1\)"),
    ],
)
def test_a_wrong_setting_is_told_by_its_name(backend: Backend, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        deform_conv2d(**Case(4, 3, (5, 7)).tensors(), backend=backend, **setting)


@pytest.mark.parametrize(
    ("device", "groups", "dtype", "operator"),
    [
        ("cpu", 1, torch.float32, "segdcn::gather_conv2d"),
        ("cuda", 1, torch.float32, "torchvision::deform_conv2d"),
        ("cuda", 4, torch.float32, "segdcn::gather_conv2d"),
        ("cuda", 4, torch.bfloat16, "segdcn::gather_conv2d"),
        ("cuda", 4, torch.float16, "torchvision::deform_conv2d"),  # never timed
    ],
)
def test_auto_is_what_was_faster(device: str, groups: int, dtype: torch.dtype, operator: str) -> None:
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            called.append(function.name())
            return function(*arguments, **(options or {}))

    with FakeTensorMode(), Recorder():
        input, weight = torch.empty(1, 4, 5, 5, device=device), torch.empty(4, 4 // groups, 3, 3, device=device)
        deform_conv2d(input.to(dtype), torch.empty(1, 18, 3, 3, device=device), weight.to(dtype))
    assert operator in called


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(
        ValueError, match="backend must be auto, gather, torchvision, grid_sample or triton, got 'cuda'"
    ):
        deform_conv2d(
            torch.zeros(1, 1, 2, 3),
            torch.zeros(1, 2, 2, 3),
            torch.zeros(1, 1, 1, 1),
            backend="cuda",
        )


@every_backend
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_memory_layout_does_not_matter(backend: Backend, groups: int) -> None:
    case = Case(4, 4, (5, 8), (3, 2), padding=(1, 1), groups=groups, offset_groups=2)
    tensors = case.tensors()
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
        lambda t: torch.stack((t, -t), dim=-1)[..., 0],
        lambda t: t[:, :1].expand_as(t),
    ]
    for layout in layouts:
        strided = {name: layout(tensor) if tensor.ndim == 4 else tensor for name, tensor in tensors.items()}
        packed = {name: tensor.contiguous() for name, tensor in strided.items()}
        ours = with_gradients(deform_conv2d, strided, backend=backend, **case.geometry)
        expected = with_gradients(deform_conv2d, packed, backend=backend, **case.geometry)
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value)


# Nothing to do: no images, no channels in, no channels out


@st.composite
def empty_cases(draw: st.DrawFn) -> Case:
    """A convolution of which at least one of the numbers is 0."""
    case = draw(cases())
    no_images, none_in, none_out = draw(st.sampled_from([c for c in itertools.product((0, 1), repeat=3) if any(c)]))
    case = case._replace(n=0) if no_images else case
    case = case._replace(channels_out=0) if none_out else case
    return case._replace(channels=0, groups=1) if none_in else case


def empty_definition(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None, **geometry: Any
) -> Tensor:
    """torchvision's operator where it takes the sizes; without channels the sums are empty, and only the bias stays."""
    if input.shape[1]:
        return torchvision.ops.deform_conv2d(input, offset, weight, bias, mask=mask, **geometry)
    zeros = sum(0 * tensor.sum() for tensor in (input, offset, weight, mask) if tensor is not None)
    return bias.view(-1, 1, 1).expand(len(input), -1, *offset.shape[2:]) + zeros


@settings(max_examples=60)
@given(
    case=empty_cases(), backend=st.sampled_from(BACKENDS), masked=st.booleans(), half=st.sampled_from([None, *HALVES])
)
def test_nothing_to_do_has_a_value_and_gradients_all_the_same(
    case: Case, backend: Backend, masked: bool, half: torch.dtype | None
) -> None:
    tensors = case.tensors(torch.float32)
    if not masked:
        del tensors["mask"]
    if not case.channels:
        tensors["offset"].fill_(math.nan)  # which nothing reads
    expected = with_gradients(empty_definition, tensors | {"offset": tensors["offset"].nan_to_num()}, **case.geometry)
    if half is not None:
        tensors = {name: tensor.to(half) for name, tensor in tensors.items()}
    result = with_gradients(deform_conv2d, tensors, backend=backend, **case.geometry)
    assert result.keys() == expected.keys() == {"output", *tensors}
    tolerance = 1e-5 if half is None else 0.2  # the bias's gradient is a sum of many halves
    for name, value in expected.items():
        assert result[name].dtype == (half or torch.float32)
        torch.testing.assert_close(result[name].float(), value, rtol=tolerance, atol=tolerance)
    if not case.n and case.channels and case.channels_out:  # the one that PyTorch's own convolution takes
        plain = {name: tensors[name].float() for name in ("input", "weight", "bias")}
        of_plain = with_gradients(functools.partial(F.conv2d, groups=case.groups), plain, **case.geometry)
        for name, value in of_plain.items():
            assert torch.equal(result[name].float(), value), name


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    ("backend", "n", "channels", "channels_out"),
    [*((backend, 0, 4, 6) for backend in BACKENDS), ("gather", 2, 0, 6), ("gather", 2, 4, 0), ("gather", 2, 0, 0)],
)
def test_a_layer_with_nothing_to_do_trains_compiles_and_is_exported(
    backend: Backend, modulated: bool, n: int, channels: int, channels_out: int
) -> None:
    layer = DeformConv2d(channels, channels_out, 3, padding=1, modulated=modulated, backend=backend)
    x = torch.randn(n, channels, 5, 7)
    expected = (
        torch.zeros(n, channels_out, 5, 7) if channels_out == 0 else layer.bias.view(-1, 1, 1).expand(n, -1, 5, 7)
    )
    torch.compiler.reset()  # one function is compiled anew for each layer, which has a limit
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (layer, compiled, torch.export.export(layer, (x,)).module()):
        assert torch.equal(run(x), expected)
    for run in (layer, compiled):
        layer.zero_grad()
        run(x).sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.shape == parameter.shape
            assert name == "bias" or not parameter.grad.any()
        assert (layer.bias.grad == n * 5 * 7).all()


@every_backend
@pytest.mark.parametrize("size", [(0, 7), (5, 0), (0, 0)])
def test_a_map_without_a_pixel_is_refused(backend: Backend, size: tuple[int, int]) -> None:
    offset, weight = torch.zeros(2, 18, size[0] + 2, size[1] + 2), torch.zeros(3, 4, 3, 3)
    with pytest.raises(ValueError, match=r"^input must have at least one pixel"):
        deform_conv2d(torch.zeros(2, 4, *size), offset, weight, padding=2, backend=backend)


@every_backend
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_result_is_the_same(backend: Backend, context: Callable[[], Any]) -> None:
    case = Case(4, 6, (5, 7), padding=(1, 1), offset_groups=2)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    with context():
        output = deform_conv2d(**tensors, backend=backend, **case.geometry)
    assert not output.requires_grad
    torch.testing.assert_close(output, deform_conv2d(**tensors, backend=backend, **case.geometry).detach())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_that_the_convolution_library_returns_does_not_matter(
    layout: torch.memory_format, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the CPU's library returns channels last for channels last, cuDNN may return either
    case = Case(4, 4, (5, 8), (3, 2), padding=(1, 1), groups=groups, offset_groups=2)
    expected = with_gradients(deform_conv2d, case.tensors(), backend="torchvision", **case.geometry)
    forward, backward = F.conv2d, torch.ops.aten.convolution_backward

    def laid_out(tensor: Tensor | None) -> Tensor | None:
        return (
            None
            if tensor is None
            else torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=layout).copy_(tensor)
        )

    monkeypatch.setattr(F, "conv2d", lambda *a, **k: laid_out(forward(*a, **k)))
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", lambda *a: tuple(map(laid_out, backward(*a))))
    for name, value in with_gradients(deform_conv2d, case.tensors(), backend="gather", **case.geometry).items():
        torch.testing.assert_close(value, expected[name])


# On a GPU


@on_a_gpu
@every_backend
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu_values_and_gradients_are_those_of_the_cpu(backend: Backend, groups: int, masked: bool) -> None:
    case = Case(4, 4, (5, 8), (3, 2), padding=(1, 1), groups=groups, offset_groups=2)
    tensors = case.tensors()
    if not masked:
        del tensors["mask"]
    expected = with_gradients(deform_conv2d, tensors, backend=backend, **case.geometry)
    tensors = {name: tensor.cuda() for name, tensor in tensors.items()}
    for name, value in with_gradients(deform_conv2d, tensors, backend=backend, **case.geometry).items():
        torch.testing.assert_close(value.cpu(), expected[name])


@on_a_gpu
@every_backend
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_on_a_gpu_half_precision_stays_close_to_float32(backend: Backend, dtype: torch.dtype, groups: int) -> None:
    case = Case(8, 8, (9, 50), (3, 2), padding=(1, 1), groups=groups, offset_groups=2)
    tensors = case.tensors(torch.float32)
    features = ("input", "weight", "bias", "mask")
    half = {name: tensor.to(dtype) if name in features else tensor for name, tensor in tensors.items()}
    expected = with_gradients(deform_conv2d, {name: tensor.float() for name, tensor in half.items()}, **case.geometry)
    on_gpu = {name: tensor.cuda() for name, tensor in half.items()}
    result = with_gradients(deform_conv2d, on_gpu, backend=backend, **case.geometry)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name].dtype == (dtype if name == "output" else half[name].dtype)
        difference = (result[name].cpu().float() - value).abs().max()
        assert difference < 0.03 * value.abs().max(), name


@on_a_gpu
def test_on_a_gpu_float16_gradients_do_not_overflow_where_float32_ones_would_not() -> None:
    # a scaled loss: each product of a gradient and a feature is beyond float16, their sum over channels is not
    x = torch.full((1, 2, 1, 4), 200.0, dtype=torch.float16, device="cuda")
    weight = torch.tensor([[1.0], [-1.0]], dtype=torch.float16, device="cuda").view(1, 2, 1, 1)
    offset = torch.full((1, 2, 1, 4), 0.25, device="cuda", requires_grad=True)
    deform_conv2d(x, offset, weight, backend="gather").backward(torch.full((1, 1, 1, 4), 1e4, device="cuda").half())
    assert offset.grad is not None
    assert offset.grad.isfinite().all()


@on_a_gpu
@every_backend
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("modulated", [False, True])
def test_on_a_gpu_a_layer_trains_under_autocast(backend: Backend, dtype: torch.dtype, modulated: bool) -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(8, 6, 3, padding=1, modulated=modulated, offset_groups=2, backend=backend).cuda()
    nn.init.normal_(layer.offset.weight, std=0.1)
    x = torch.randn(2, 8, 9, 11, device="cuda")
    with torch.autocast("cuda", dtype):
        output = layer(x)
    assert output.dtype == dtype
    assert (output.float() - layer(x)).abs().mean() < 0.02
    output.float().square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@on_a_gpu
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("n", "channels", "channels_out"), [(0, 4, 6), (2, 0, 6), (2, 4, 0), (0, 0, 0)])
def test_on_a_gpu_nothing_to_do_has_gradients_too(
    backend: Backend, dtype: torch.dtype, n: int, channels: int, channels_out: int
) -> None:
    tensors = Case(channels, channels_out, (5, 7), n=n).tensors(dtype)
    result = with_gradients(deform_conv2d, {name: tensor.cuda() for name, tensor in tensors.items()}, backend=backend)
    assert result["output"].shape == (n, channels_out, 3, 5)
    for name, tensor in tensors.items():
        assert result[name].shape == tensor.shape
        assert name == "bias" or not result[name].any()


# Half precision


@every_backend
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_reads_the_right_column_of_a_wide_map(backend: Backend, dtype: torch.dtype) -> None:
    width = 5001
    column = torch.arange(width)
    x = (column % 7).to(dtype).view(1, 1, 1, width)
    offset = torch.zeros(1, 2, 1, width, dtype=dtype)
    offset[:, 1] = 2
    output = deform_conv2d(x, offset, torch.ones(1, 1, 1, 1, dtype=dtype), backend=backend)
    assert output.dtype == dtype
    # neighbouring columns differ by 1 or 6; grid_sample's own coordinates are off by some 1e-7 of the width
    torch.testing.assert_close(output.flatten()[:-2], ((column + 2) % 7).to(dtype)[:-2], rtol=0, atol=0.02)


@every_backend
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bfloat16_autocast_stays_close_to_float32(backend: Backend, groups: int) -> None:
    case = Case(4, 4, (5, 4200), (3, 2), padding=(1, 1), groups=groups, offset_groups=2, n=1)
    tensors = case.tensors(torch.float32)
    expected = with_gradients(deform_conv2d, tensors, backend=backend, **case.geometry)
    # what a network hands over under autocast: features and offsets of an autocast convolution
    half = {name: tensor.bfloat16() if name in ("input", "mask") else tensor for name, tensor in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        result = with_gradients(deform_conv2d, half, backend=backend, **case.geometry)
    assert result["output"].dtype == torch.bfloat16
    for name, value in expected.items():
        difference = (result[name].float() - value).abs().max()
        assert difference < 0.03 * value.abs().max(), name


def test_layer_trains_under_bfloat16_autocast() -> None:
    torch.manual_seed(0)
    layer, x = DeformConv2d(4, 6, 3, padding=1, modulated=True), torch.randn(2, 4, 5, 7)
    nn.init.normal_(layer.offset.weight, std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert (output.float() - layer(x)).abs().mean() < 0.02
    output.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_backend
def test_under_autocast_a_layer_reads_the_right_column_of_a_wide_map(backend: Backend) -> None:
    columns, shift = torch.arange(2048), 3
    # a place in two numbers that bfloat16 holds exactly; one number would not do
    x = torch.stack((columns // 64, columns % 64)).float().view(1, 2, 1, 2048)
    layer = DeformConv2d(2, 2, 1, bias=False, backend=backend)
    nn.init.dirac_(layer.weight)
    layer.offset.bias = nn.Parameter(torch.tensor([0.0, shift]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    high, low = output[0, :, 0].float()
    read = (64 * high + low)[:-shift] - shift
    assert (read - columns[:-shift]).abs().max() < 0.5
    # a coordinate that is rounded as the features are lies whole pixels away
    rounded = (columns.bfloat16() + shift).float() - shift
    assert (rounded - columns).abs().max() >= 4


# The layer

CONVOLUTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "strided": {"stride": (2, 1)},
    "dilated": {"dilation": 2, "padding": (2, 3)},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4},
    "not square": {"kernel_size": (1, 3), "padding": (0, 1)},
}


def convolution(name: str, channels_out: int = 8) -> nn.Conv2d:
    torch.manual_seed(0)
    options: dict[str, Any] = {"kernel_size": 3, "padding": 1} | CONVOLUTIONS[name]
    return nn.Conv2d(4, channels_out, **options)


@pytest.mark.parametrize("offset_groups", [1, 2])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_converted_convolution_computes_the_same(name: str, modulated: bool, offset_groups: int) -> None:
    conv, x = convolution(name, channels_out=4), torch.randn(2, 4, 9, 12)
    layer = DeformConv2d.from_conv(conv, modulated=modulated, offset_groups=offset_groups)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_new_layer_starts_as_its_own_plain_convolution(name: str) -> None:
    conv, x = convolution(name), torch.randn(2, 4, 9, 12)
    options: dict[str, Any] = {"kernel_size": 3, "padding": 1} | CONVOLUTIONS[name]
    layer = DeformConv2d(4, 8, **options)
    conv.load_state_dict({key: value for key, value in layer.state_dict().items() if not key.startswith("offset.")})
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


def test_conversion_keeps_mode_dtype_and_frozen_weights() -> None:
    conv = convolution("plain").eval().double().requires_grad_(False)
    layer = DeformConv2d.from_conv(conv)
    assert not layer.training
    assert not layer.offset.training
    assert not layer.weight.requires_grad
    assert layer(torch.randn(1, 4, 5, 7).double()).dtype == torch.float64


def test_the_branch_predicts_rows_first_then_columns() -> None:
    layer, x = DeformConv2d.from_conv(convolution("no bias")), torch.randn(2, 4, 9, 11)
    for first, dims in ((0, (0, 0, 0, 1)), (1, (0, 1, 0, 0))):
        nn.init.zeros_(layer.offset.bias)
        nn.init.ones_(layer.offset.bias[first::2])
        moved = F.pad(x, dims)[:, :, -9:, -11:]
        expected = F.conv2d(moved, layer.weight, padding=1)
        torch.testing.assert_close(layer(x)[:, :, 1:-2, 1:-2], expected[:, :, 1:-2, 1:-2])


def test_the_mask_is_twice_the_sigmoid_of_its_logit() -> None:
    conv, x = convolution("no bias"), torch.randn(2, 4, 5, 7)
    layer = DeformConv2d.from_conv(conv, modulated=True, offset_groups=2)
    for logit in (-1.5, 0.7):
        nn.init.constant_(layer.offset.bias[36:], logit)
        torch.testing.assert_close(layer(x), 2 / (1 + math.exp(-logit)) * conv(x), rtol=1e-5, atol=1e-5)


def test_untrained_branch_gets_a_gradient() -> None:
    layer = DeformConv2d(4, 6, 3, padding=1, modulated=True, offset_groups=2)
    layer(torch.randn(2, 4, 5, 7)).square().sum().backward()
    assert layer.offset.weight.grad is not None
    assert (layer.offset.weight.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
    ],
    ids=["same", "reflect", "circular", "replicate"],
)
def test_other_padding_than_zeros_in_pixels_is_refused(conv: nn.Conv2d) -> None:
    word = "same" if conv.padding == "same" else conv.padding_mode
    with pytest.raises(ValueError, match=f"only zero padding given in pixels.*{word}"):
        DeformConv2d.from_conv(conv)


@pytest.mark.parametrize("offset_groups", [0, 3, 8])
def test_offset_groups_that_do_not_divide_the_channels_are_refused(offset_groups: int) -> None:
    with pytest.raises(ValueError, match=f"offset_groups must divide the 4 input channels, got {offset_groups}"):
        DeformConv2d(4, 4, 3, offset_groups=offset_groups)


def trained_layer() -> DeformConv2d:
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, (3, 2), padding=1, modulated=True, offset_groups=2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def test_state_survives_a_file_of_plain_tensors() -> None:
    layer, x, file = trained_layer(), torch.randn(2, 4, 5, 7), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = DeformConv2d(4, 6, (3, 2), padding=1, modulated=True, offset_groups=2)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))


def test_a_copy_is_equal_and_independent() -> None:
    layer, x = trained_layer(), torch.randn(2, 4, 5, 7)
    before = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(layer(x), before)
    assert not twin(x).any()


def test_repr_tells_how_the_layer_convolves_and_deforms() -> None:
    layer = DeformConv2d(4, 8, (3, 2), 2, 1, (1, 2), 4, False, modulated=True, offset_groups=2)
    first, second, third = repr(layer).splitlines()[:3]
    assert first == "DeformConv2d("
    assert second.split(", ", 2)[:2] == ["  4", "8"]
    for part in (
        "kernel_size=(3, 2)",
        "stride=(2, 2)",
        "padding=(1, 1)",
        "dilation=(1, 2)",
        "groups=4",
        "bias=False",
        "modulated=True",
        "offset_groups=2",
    ):
        assert part in second
    assert third.startswith("  (offset): Conv2d(4, 36,")
    assert "backend" not in second
    assert "backend='torchvision'" in repr(DeformConv2d(4, 8, 3, backend="torchvision"))


@every_backend
@pytest.mark.parametrize("modulated", [False, True])
def test_a_compiled_layer_trains_as_one_graph(backend: Backend, modulated: bool) -> None:
    case = Case(4, 6, (5, 7), padding=(1, 1), offset_groups=2)
    tensors = case.tensors(torch.float32)
    if not modulated:
        del tensors["mask"]

    def compiled(**arguments: Tensor) -> Tensor:
        # "aot_eager": the graph and its backward as torch.compile makes them, without a C++ compiler
        function = torch.compile(deform_conv2d, fullgraph=True, backend="aot_eager")
        return function(**arguments, backend=backend, **case.geometry)

    expected = with_gradients(deform_conv2d, tensors, backend=backend, **case.geometry)
    for name, value in with_gradients(compiled, tensors).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gather_operator_keeps_the_rules_of_custom_operators(masked: bool) -> None:
    # schema, autograd, fake tensors of the right sizes and strides: what torch.compile relies on
    tensors = {name: tensor.requires_grad_() for name, tensor in Case(4, 6, (5, 7), offset_groups=2).tensors().items()}
    arguments = [tensors[name] for name in ("input", "offset", "weight")] + [tensors["mask"] if masked else None]
    geometry = [[1, 1], [0, 0], [1, 1]]
    torch.library.opcheck(gather_conv.gather_conv2d, (*arguments, *geometry))
    grad = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    plain = [None if tensor is None else tensor.detach() for tensor in arguments]
    torch.library.opcheck(gather_conv.gather_conv2d_backward, (grad, *plain, *geometry, [True] * 4))


def test_an_exported_layer_keeps_torchvisions_operator() -> None:
    layer, x = trained_layer().eval(), torch.randn(2, 4, 5, 7)
    height, width = torch.export.Dim("height", min=4), torch.export.Dim("width", min=4)
    program = torch.export.export(layer, (x,), dynamic_shapes=({2: height, 3: width},))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count("torchvision.deform_conv2d.default") == 1
    larger = torch.randn(2, 4, 8, 11)
    torch.testing.assert_close(program.module()(larger), layer(larger), rtol=1e-5, atol=1e-5)


def test_an_exported_grid_sample_layer_has_common_operators_only() -> None:
    layer, x = trained_layer().eval(), torch.randn(2, 4, 5, 7)
    layer.backend = "grid_sample"
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=4)}
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.grid_sampler.default" in called
    assert not {name for name in called if name.startswith(("torchvision.", "segdcn."))}
    other = torch.randn(3, 4, 8, 11)
    torch.testing.assert_close(program.module()(other), layer(other), rtol=1e-5, atol=1e-5)
