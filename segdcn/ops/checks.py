"""What every operator asks of its arguments before any kernel runs, and its answer where there is nothing to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

IntPair = int | tuple[int, int]


def two(value: IntPair) -> tuple[int, int]:
    """One number for both axes, or one for each, as (vertical, horizontal)."""
    return cast(tuple[int, int], tuple(_pair(value)))


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast would give a convolution's features, or None where it leaves them alone."""
    device = input.device.type
    if input.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):  # meta has none
        return None
    return torch.get_autocast_dtype(device)


def check_tensors(
    input: Tensor, like_input: Mapping[str, Tensor | None], floating: Mapping[str, Tensor | None]
) -> None:
    """All on the device of ``input``, which is floating; the first mapping of its dtype, the second of any floating.

    Raises: ValueError that names the argument, what it got and what it expects.
    """
    if not input.is_floating_point():
        raise ValueError(f"input must be floating point, got {input.dtype}")
    for name, tensor in {**like_input, **floating}.items():
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on input's device {input.device}, got {tensor.device}")
        if name in like_input and tensor.dtype != input.dtype:
            raise ValueError(f"{name} must have input's dtype {input.dtype}, got {tensor.dtype}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_map(input: Tensor) -> None:
    """ValueError unless ``input`` is (N, C, H, W) with a pixel; N and C may be 0."""
    if input.ndim != 4:
        raise ValueError(f"input must be (N, C, H, W), got {tuple(input.shape)}")
    if 0 in input.shape[2:]:
        raise ValueError(f"input must have at least one pixel, got {tuple(input.shape)}")


def check_least(**settings: tuple[int | tuple[int, ...], int]) -> None:
    """ValueError that names the setting unless each value, given with its least one, is that or more on every axis."""
    for name, (value, least) in settings.items():
        if min(value if isinstance(value, tuple) else (value,)) < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")


def check_triton(input: Tensor) -> None:
    """ValueError unless a kernel of Triton can take ``input``."""
    try:
        from segdcn.ops.triton_sampling import INTERPRETED
    except ModuleNotFoundError as error:
        raise ValueError(f"backend triton needs the package triton, which PyTorch for CUDA brings: {error}") from error
    if not (input.is_cuda or INTERPRETED):
        raise ValueError(f"backend triton needs input on a CUDA device, got {input.device}; take another backend")
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"backend triton computes in float32 or half precision, got {input.dtype}; take another backend"
        )


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: IntPair, padding: IntPair, dilation: IntPair
) -> list[int]:
    """Rows and columns of a convolution's result, by those of its input and the kernel."""
    stride, padding, dilation = two(stride), two(padding), two(dilation)
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]


def without_channels(
    input: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], *others: Tensor
) -> Tensor:
    """A convolution whose sums are empty, to a map of ``size``: the bias alone; other gradients are zeros, not None."""
    output = input.new_zeros(input.shape[0], weight.shape[0], *size)
    for tensor in (input, weight, *others):
        output = output + tensor[..., :0].sum().to(output.dtype)  # 0, whatever the tensor holds
    return output if bias is None else output + bias.view(-1, 1, 1)


def convolve(layer: nn.Conv2d, input: Tensor) -> Tensor:
    """``layer(input)``, where it has no channels too: PyTorch refuses none out, and gives none out for none in."""
    if layer.in_channels and layer.out_channels:
        return cast(Tensor, layer(input))
    geometry = (cast(IntPair, layer.stride), cast(IntPair, layer.padding), cast(IntPair, layer.dilation))
    size = output_size(input.shape[2:], layer.kernel_size, *geometry)
    dtype = autocast_dtype(input) or input.dtype
    input, weight = input.to(dtype), layer.weight.to(dtype)
    return without_channels(input, weight, None if layer.bias is None else layer.bias.to(dtype), size)
