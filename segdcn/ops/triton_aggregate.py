"""Deformable aggregation in Triton: what DCNv3 and DCNv4 have in the place of a convolution, see aggregate.py.

A bag is a position with a group of channels. Bags lie in memory one after the other, in the result, the offsets and the
masks, so that a program holds a tile of BM bags by BL of their channels and needs to know no group. Coordinates and
sums are float32. The gradient by the input is added up by atomics, in any order.

The kernels' sizes: bags, rows and columns of the output map, height and width of the input map, groups with their
channels, offset_scale.
"""

# no "from __future__ import annotations": torch.library reads the annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdcn.ops.triton_sampling import (
    add,
    bag_tile,
    bilinear,
    corners,
    locate,
    read,
    slope_x,
    slope_y,
    triton_op,
    wrap_triton,
)

MAP_SIZES = ["bags", "rows", "columns", "height", "width"]  # a kernel is not compiled anew for multiples of 16


@triton.jit
def _sample(dy, dx, factor, b, b_valid, k, rows, columns, height, width, groups, channels, offset_scale,
            KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr,
            PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, REMOVE_CENTER: tl.constexpr):  # fmt: skip
    """What one kernel point of bags b reads, and the factor on it, which is zero outside the map."""
    if REMOVE_CENTER:
        k = tl.where(k >= KW // 2 * KH + KH // 2, k + 1, k)
    position = b // groups
    middle_y = DY * (KH - 1) // 2
    middle_x = DX * (KW - 1) // 2
    y = position // columns % rows * SY - PY + middle_y + (k % KH * DY - middle_y + dy) * offset_scale
    x = position % columns * SX - PX + middle_x + (k // KH * DX - middle_x + dx) * offset_scale
    top, left, down, right, inside = locate(y, x, b_valid, height, width)
    image = (position // (rows * columns)).to(tl.int64)
    cell, v00, v01, v10, v11 = corners(image, top, left, inside, height, width, groups * channels)
    return cell + b % groups * channels, v00, v01, v10, v11, down, right, inside, tl.where(inside, factor, 0.0)


@triton.jit(do_not_specialize=MAP_SIZES)
def _forward(x_ptr, offset_ptr, mask_ptr, out_ptr, bags, rows, columns, height, width, groups, channels, offset_scale,
             KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr,
             PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, REMOVE_CENTER: tl.constexpr,
             BM: tl.constexpr, BL: tl.constexpr):  # fmt: skip
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BL + tl.arange(0, BL)
    b_valid = b < bags
    c_valid = c < channels
    sums = tl.zeros((BM, BL), tl.float32)
    for k in range(KH * KW - REMOVE_CENTER):
        point = b.to(tl.int64) * (KH * KW - REMOVE_CENTER) + k
        dx = tl.load(offset_ptr + 2 * point, mask=b_valid, other=0.0)
        dy = tl.load(offset_ptr + 2 * point + 1, mask=b_valid, other=0.0)
        factor = tl.load(mask_ptr + point, mask=b_valid, other=0.0)
        cell, v00, v01, v10, v11, down, right, inside, factor = _sample(
            dy, dx, factor, b, b_valid, k, rows, columns, height, width, groups, channels, offset_scale,
            KH, KW, SY, SX, PY, PX, DY, DX, REMOVE_CENTER)  # fmt: skip
        a00, a01, a10, a11 = read(x_ptr, cell, c, c_valid, width, groups * channels, v00, v01, v10, v11)
        sums += bilinear(a00, a01, a10, a11, down, right) * factor[:, None]
    tl.store(out_ptr + b.to(tl.int64)[:, None] * channels + c[None, :], sums.to(out_ptr.dtype.element_ty),
             mask=b_valid[:, None] & c_valid[None, :])  # fmt: skip


@triton.jit(do_not_specialize=MAP_SIZES)
def _backward(x_ptr, offset_ptr, mask_ptr, grad_ptr, by_x_ptr, by_offset_ptr, by_mask_ptr, bags, rows, columns, height,
              width, groups, channels, offset_scale, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr,
              SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
              REMOVE_CENTER: tl.constexpr, FOR_INPUT: tl.constexpr, FOR_POINTS: tl.constexpr,
              BM: tl.constexpr, BL: tl.constexpr):  # fmt: skip
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    b_valid = b < bags
    grad_row = grad_ptr + b.to(tl.int64) * channels
    for k in range(KH * KW - REMOVE_CENTER):
        point = b.to(tl.int64) * (KH * KW - REMOVE_CENTER) + k
        dx = tl.load(offset_ptr + 2 * point, mask=b_valid, other=0.0)
        dy = tl.load(offset_ptr + 2 * point + 1, mask=b_valid, other=0.0)
        factor = tl.load(mask_ptr + point, mask=b_valid, other=0.0)
        cell, v00, v01, v10, v11, down, right, inside, factor = _sample(
            dy, dx, factor, b, b_valid, k, rows, columns, height, width, groups, channels, offset_scale,
            KH, KW, SY, SX, PY, PX, DY, DX, REMOVE_CENTER)  # fmt: skip
        by_y = tl.zeros((BM,), tl.float32)
        by_x = tl.zeros((BM,), tl.float32)
        by_mask = tl.zeros((BM,), tl.float32)
        for first in range(0, channels, BL):
            c = first + tl.arange(0, BL)
            c_valid = c < channels
            grad = tl.load(grad_row[:, None] + c[None, :], mask=b_valid[:, None] & c_valid[None, :], other=0.0)
            grad = grad.to(tl.float32)
            if FOR_POINTS:
                a00, a01, a10, a11 = read(x_ptr, cell, c, c_valid, width, groups * channels, v00, v01, v10, v11)
                by_y += tl.sum(grad * slope_y(a00, a01, a10, a11, right), 1)
                by_x += tl.sum(grad * slope_x(a00, a01, a10, a11, down), 1)
                by_mask += tl.sum(grad * bilinear(a00, a01, a10, a11, down, right), 1)
            if FOR_INPUT:
                add(by_x_ptr, grad * factor[:, None], down, right,
                    cell, c, c_valid, width, groups * channels, v00, v01, v10, v11)  # fmt: skip
        if FOR_POINTS:
            scale = factor * offset_scale
            tl.store(by_offset_ptr + 2 * point, tl.where(inside, by_x * scale, 0.0), mask=b_valid)
            tl.store(by_offset_ptr + 2 * point + 1, tl.where(inside, by_y * scale, 0.0), mask=b_valid)
            tl.store(by_mask_ptr + point, tl.where(inside, by_mask, 0.0), mask=b_valid)


@triton_op("segdcn::triton_aggregate", mutates_args=())
def triton_aggregate(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    offset_scale: float,
    remove_center: bool,
) -> Tensor:
    """Deformable aggregation; arguments and result as ``segdcn.ops.deform_aggregate``, which checks them."""
    arguments = (kernel, stride, padding, dilation, offset_scale, remove_center)
    tensors, sizes, settings = _arguments(input, offset, mask, *arguments)
    bags, channels = sizes[0], sizes[6]
    output = input.new_empty(*offset.shape[:3], input.shape[3])

    def grid(tile: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(bags, tile["BM"]), triton.cdiv(channels, tile["BL"])

    if bags:
        wrap_triton(_forward)[grid](*tensors, output, *sizes, offset_scale, **settings)
    return output


@triton_aggregate.register_fake
def _(input: Tensor, offset: Tensor, *_: Any) -> Tensor:
    return input.new_empty(*offset.shape[:3], input.shape[3])


@triton_op("segdcn::triton_aggregate_backward", mutates_args=())
def triton_aggregate_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    offset_scale: float,
    remove_center: bool,
    for_input: bool,
    for_points: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by input, and for points by offset and mask, of their shapes; zeros where one is not asked for."""
    arguments = (kernel, stride, padding, dilation, offset_scale, remove_center)
    tensors, sizes, settings = _arguments(input, offset, mask, *arguments)
    bags = sizes[0]
    by_input, by_offset, by_mask = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors)

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(bags, tile["BM"]),)

    if bags:
        wrap_triton(_backward)[grid](
            *tensors, grad.contiguous(), by_input, by_offset, by_mask, *sizes, offset_scale, **settings,
            FOR_INPUT=for_input, FOR_POINTS=for_points)  # fmt: skip
    return by_input.to(input.dtype), by_offset.to(offset.dtype), by_mask.to(mask.dtype)


@triton_aggregate_backward.register_fake
def _(grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return input.new_empty(input.shape), offset.new_empty(offset.shape), mask.new_empty(mask.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, mask, *ctx.settings = inputs
    ctx.save_for_backward(input, offset, mask)


def _formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = for_input, for_offset, for_mask = ctx.needs_input_grad[:3]
    gradients = triton_aggregate_backward(grad, *ctx.saved_tensors, *ctx.settings, for_input, for_offset or for_mask)
    return *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)), *(None for _ in ctx.settings)


triton_aggregate.register_autograd(_formula, setup_context=_save)


def _arguments(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    offset_scale: float,
    remove_center: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[int], dict[str, Any]]:
    """What both kernels take: the tensors that are read, the sizes but for the scale, and the settings."""
    n, height, width, total = input.shape
    rows, columns = offset.shape[1:3]
    groups = mask.shape[3] // (kernel[0] * kernel[1] - remove_center)
    channels = total // groups
    names = ("KH", "KW", "SY", "SX", "PY", "PX", "DY", "DX")
    settings: dict[str, Any] = dict(zip(names, (*kernel, *stride, *padding, *dilation), strict=True))
    settings |= {"REMOVE_CENTER": remove_center, **bag_tile(channels)}
    sizes = [n * rows * columns * groups, rows, columns, height, width, groups, channels]
    return (input.contiguous(), offset.float().contiguous(), mask.float().contiguous()), sizes, settings
