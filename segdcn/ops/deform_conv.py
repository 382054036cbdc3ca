"""Deformable convolution: the function with its backends, and the layer with its own offset branch.

Legend: N batch, C channels, H x W input map, Ho x Wo output map, K = kh * kw kernel points, G offset groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
import torchvision
from torch import Tensor, nn

from segdcn.ops.checks import (
    IntPair,
    autocast_dtype,
    check_least,
    check_map,
    check_tensors,
    check_triton,
    convolve,
    output_size,
    two,
    without_channels,
)
from segdcn.ops.gather_conv import gather_conv2d
from segdcn.ops.grid_sample_conv import grid_sample_conv2d

Backend = Literal["auto", "gather", "torchvision", "grid_sample", "triton"]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    mask: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Convolution whose kernel points are moved by ``offset``; signature and results as torchvision's.

    Shape: input (N, C, H, W), offset (N, 2GK, Ho, Wo) in pixels of the input map, interleaved (dy, dx), row-major
    over the kernel, group slowest; weight (C_out, C / groups, kh, kw); mask (N, GK, Ho, Wo), a factor on each
    sample -> (N, C_out, Ho, Wo). N, C and C_out may be 0: then the result is the bias or empty, gradients are zeros.
    A sample that is not finite or lies a pixel or more outside the map contributes zero and gets a zero gradient.

    Half precision: coordinates are float32 at least, features stay as they are; give offset and mask in float32
    where they are to be exact, since a bfloat16 offset of 100 pixels is already rounded to half a pixel. Under
    autocast input, weight and bias are cast as a convolution's are. ``torchvision`` and ``grid_sample`` compute in
    float32, ``triton`` keeps offset and mask in float32.

    backend: ``gather`` is plain PyTorch (see gather_conv.py), ``torchvision`` the compiled kernel, ``auto`` the
    faster one of the two for the device, and torchvision's while a graph is exported; ``grid_sample`` is slower, for
    graphs of common operators only (see grid_sample_conv.py). ``triton`` is for a GPU with the package triton, not for
    float64, and compiles at its first call (see triton_conv.py).

    Raises: ValueError that names the argument when a shape, dtype or device does not fit, before any kernel runs.
    Source: Dai et al. 2017, section 2.1; mask: Zhu et al. 2019, section 3.2.
    """
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    stride, padding, dilation = two(stride), two(padding), two(dilation)
    check_tensors(input, {"weight": weight, "bias": bias}, {"offset": offset, "mask": mask})
    _check_shapes(input, offset, weight, bias, stride, padding, dilation, mask)
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be auto, gather, torchvision, grid_sample or triton, got {backend!r}")
    if 0 in weight.shape[:2]:
        return without_channels(input, weight, bias, offset.shape[2:], offset, *([] if mask is None else [mask]))
    if backend == "auto":
        backend = "gather" if _gather_is_faster(input, weight) else "torchvision"
    if backend == "torchvision":
        return _torchvision(input, offset, weight, bias, stride, padding, dilation, mask)
    convolve: Callable[..., Any] = gather_conv2d if backend == "gather" else grid_sample_conv2d
    if backend == "triton":
        check_triton(input)
        from segdcn.ops.triton_conv import triton_conv2d  # not every machine has Triton, and it takes long to import

        convolve = triton_conv2d
    output: Tensor = convolve(input, offset, weight, mask, stride, padding, dilation)
    return output if bias is None else output + bias.view(-1, 1, 1)


def _gather_is_faster(input: Tensor, weight: Tensor) -> bool:
    """On a CPU 3 to 6 times, with backward 8 to 15, depthwise 11 and 28 (segdcn-benchmark; docs/operators.md).

    On an NVIDIA H100 (26 November 2026, docs/gpu.md) torchvision's kernel is, but for depthwise convolutions, of which
    it multiplies each channel by itself: with backward 1.0 to 1.6 times in float32, 1.4 to 2.1 in bfloat16. triton's,
    which was never timed there, has to be asked for. A graph that is exported keeps the operator that ONNX has a node
    for.
    """
    if torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting():
        return False
    depthwise_on_gpu = input.is_cuda and weight.shape[1] == 1 and input.dtype in (torch.float32, torch.bfloat16)
    return input.device.type == "cpu" or depthwise_on_gpu


def _torchvision(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """torchvision's kernel, in float32 or float64: on a CPU it has none for bfloat16."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    # A NaN offset ends the process in the CPU kernel; this far outside any map it contributes zero. (nan_to_num would
    # do, but becomes eight nodes of an ONNX graph.)
    offset = offset.to(dtype)
    offset = torch.where(offset.abs() < 1e9, offset, -1e9)
    x, w, b, m = (None if t is None else t.to(dtype) for t in (input, weight, bias, mask))
    output: Tensor = torchvision.ops.deform_conv2d(x, offset, w, b, stride, padding, dilation, m)
    return output.to(input.dtype)


def _check_shapes(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> None:
    if input.ndim != 4 or weight.ndim != 4 or offset.ndim != 4:
        raise ValueError(
            "input, offset and weight must have 4 dimensions, "
            f"got {tuple(input.shape)}, {tuple(offset.shape)} and {tuple(weight.shape)}"
        )
    check_map(input)
    check_least(stride=(stride, 1), padding=(padding, 0), dilation=(dilation, 1))
    n, channels = input.shape[:2]
    per_group, kernel = weight.shape[1], weight.shape[2:]
    if 0 in kernel:
        raise ValueError(f"weight must have a kernel of 1 x 1 or more, got {kernel[0]} x {kernel[1]}")
    points = kernel[0] * kernel[1]
    out = output_size(input.shape[2:], kernel, stride, padding, dilation)
    if min(out) < 1:
        raise ValueError(f"input of {tuple(input.shape[2:])} pixels, padding included, is smaller than the kernel")
    groups = channels // per_group if per_group else 1
    if groups == 0 or groups * per_group != channels:
        raise ValueError(f"weight expects {per_group} channels per group, which do not divide input's {channels}")
    if weight.shape[0] % groups != 0:
        raise ValueError(f"weight has {weight.shape[0]} output channels, which its {groups} groups do not divide")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    offset_groups = offset.shape[1] // (2 * points)
    if offset_groups == 0 or offset.shape[1] != 2 * points * offset_groups or channels % offset_groups != 0:
        raise ValueError(
            f"offset must have 2 * {points} channels per offset group, the groups dividing {channels} input channels, "
            f"got {offset.shape[1]}"
        )
    if offset.shape[0] != n or list(offset.shape[2:]) != out:
        raise ValueError(f"offset must be ({n}, {offset.shape[1]}, {out[0]}, {out[1]}), got {tuple(offset.shape)}")
    if mask is not None and tuple(mask.shape) != (n, points * offset_groups, out[0], out[1]):
        raise ValueError(f"mask must be ({n}, {points * offset_groups}, {out[0]}, {out[1]}), got {tuple(mask.shape)}")


class DeformConv2d(nn.Module):
    """Convolution with a branch that moves its kernel points: a drop-in for ``nn.Conv2d``.

    ``offset`` predicts, from the same input, two offsets per kernel point, in input pixels, ordered (dy, dx), and
    with ``modulated`` one mask logit z per point, mask = 2 * sigmoid(z). It starts at zero, so an untrained layer
    equals the plain convolution, whatever follows it.

    backend: as in ``deform_conv2d``; an attribute that may be changed at any time.

    Shape: (N, C_in, H, W) -> (N, C_out, Ho, Wo), as ``nn.Conv2d``.
    Source: Dai et al. 2017, section 2.1; modulated: Zhu et al. 2019, section 3.2, with the factor 2 of the
    authors' example network, which keeps a pretrained network's function at the start.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        modulated: bool = False,
        offset_groups: int = 1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        plain = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self._take_over(plain, modulated, offset_groups, backend)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, modulated: bool = False, offset_groups: int = 1, backend: Backend = "auto"
    ) -> DeformConv2d:
        """A deformable layer that computes the same function as ``conv`` and keeps its parameters."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_over(conv, modulated, offset_groups, backend)
        return layer.train(conv.training)

    def _take_over(self, conv: nn.Conv2d, modulated: bool, offset_groups: int, backend: Backend) -> None:
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                f"only zero padding given in pixels can be deformed, got padding={conv.padding!r} "
                f"with padding_mode={conv.padding_mode!r}"
            )
        if offset_groups < 1 or conv.in_channels % offset_groups != 0:
            raise ValueError(f"offset_groups must divide the {conv.in_channels} input channels, got {offset_groups}")
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = two(cast(IntPair, conv.kernel_size)), two(cast(IntPair, conv.stride))
        self.padding, self.dilation = two(cast(IntPair, conv.padding)), two(cast(IntPair, conv.dilation))
        self.groups, self.modulated, self.offset_groups = conv.groups, modulated, offset_groups
        self.backend: Backend = backend
        self.weight = conv.weight
        self.register_parameter("bias", cast(nn.Parameter | None, conv.bias))
        points = self.kernel_size[0] * self.kernel_size[1] * offset_groups
        self.offset = nn.Conv2d(
            conv.in_channels,
            points * (3 if modulated else 2),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(cast(nn.Parameter, self.offset.bias))

    def split_branch(self, predicted: Tensor) -> tuple[Tensor, Tensor | None]:
        """The branch's output (N, 2GK or 3GK, Ho, Wo) as offset (N, 2GK, ...) and mask (N, GK, ...) or None."""
        if not self.modulated:
            return predicted, None
        points = predicted.shape[1] // 3
        offset, logit = predicted.split_with_sizes((2 * points, points), dim=1)
        return offset, 2 * logit.sigmoid()

    def forward(self, input: Tensor) -> Tensor:
        """Predict where to sample from ``input``, then convolve it there."""
        offset, mask = self.split_branch(convolve(self.offset, input))
        settings = (self.stride, self.padding, self.dilation)
        return deform_conv2d(input, offset, self.weight, self.bias, *settings, mask, backend=self.backend)

    def extra_repr(self) -> str:
        """As ``nn.Conv2d`` prints itself, and how it deforms."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}, dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        text += f", modulated={self.modulated}, offset_groups={self.offset_groups}"
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"
