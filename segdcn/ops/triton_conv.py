"""Deformable convolution in Triton: a matrix product whose left side is sampled tile by tile and never stored.

Channels are last, coordinates float32, products in the features' dtype and their sums in float32. A tile of input
channels lies within one group of the convolution and within one offset group: segments of channels divide both. A
depthwise convolution is no matrix product: its offset groups stand for groups, and each sample is multiplied by its
channel's factors.

The gradient by the input is added up by atomics, in any order. Where PyTorch is asked for deterministic algorithms
gather's backward takes its place.

Legend: N batch, C channels, H x W input map, Ho x Wo output map, P = N * Ho * Wo positions, K = kh * kw kernel points,
G offset groups. The kernels' sizes: positions, area = Ho * Wo, columns = Wo, height, width; groups with their inputs
and outputs, in channels; offset_groups; segment, in channels. BM positions, BN output and BK input channels are a tile.
"""

# no "from __future__ import annotations": torch.library reads the annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdcn.ops.gather_conv import gather_conv2d_backward
from segdcn.ops.triton_sampling import (
    INTERPRETED,
    add,
    bilinear,
    corners,
    locate,
    read,
    slope_x,
    slope_y,
    triton_op,
    wrap_triton,
)

MAP_SIZES = ["positions", "area", "columns", "height", "width"]
PROGRAMS = 1024  # of the gradient by the weights, at least: few of them share the positions out


def _tile(positions: int, outputs: int, inputs: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BM": positions, "BN": outputs, "BK": inputs}, num_warps=warps, num_stages=stages)


# few, and none left out by the shape (prune_configs_by): torch.compile would forget reset_to_zero with it
TILES = [
    _tile(64, 16, 16, 4, 2),  # groups of few channels
    _tile(64, 64, 32, 4, 2),
    _tile(128, 64, 32, 4, 2),
    _tile(64, 128, 32, 4, 3),
    _tile(128, 128, 32, 8, 2),
]


def _tuned(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """A kernel whose tiles are timed at the first call for each shape of the weights; the fastest one stays.

    It is not compiled anew for sizes of a map that are multiples of 16.
    """
    tune = triton.autotune(
        [_tile(16, 16, 16, 1, 1)] if INTERPRETED else TILES,
        key=["inputs", "outputs", "segment", "DEPTHWISE"],
        **options,
    )
    return lambda kernel: tune(triton.jit(kernel, do_not_specialize=MAP_SIZES))


# What depends on the sizes alone, then what depends on the offsets: a helper that loaded those itself would leave
# torch.compile, which looks for the tensors that a kernel writes to, with offset_ptr among them.


@triton.jit
def _where(p, tap, offset_group, area, offset_groups, TAPS: tl.constexpr):
    """The image of positions p, their number in it, and where the mask of a kernel point is; dy is at twice that."""
    image = (p // area).to(tl.int64)
    return image, p % area, ((image * offset_groups + offset_group) * TAPS + tap) * area


@triton.jit
def _sample(dy, dx, factor, image, q, tap, p_valid, columns, height, width, channels, KW: tl.constexpr,
            SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
            DY: tl.constexpr, DX: tl.constexpr):  # fmt: skip
    """What one kernel point reads, and the factor on it, which is zero outside the map."""
    y = q // columns * SY - PY + tap // KW * DY + dy
    x = q % columns * SX - PX + tap % KW * DX + dx
    top, left, down, right, inside = locate(y, x, p_valid, height, width)
    cell, v00, v01, v10, v11 = corners(image, top, left, inside, height, width, channels)
    return cell, v00, v01, v10, v11, down, right, inside, tl.where(inside, factor, 0.0)


@_tuned()
def _forward(x_ptr, offset_ptr, mask_ptr, weight_ptr, out_ptr, positions, area, columns, height, width, groups, inputs,
             outputs, offset_groups, segment, KW: tl.constexpr, TAPS: tl.constexpr, SY: tl.constexpr,
             SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
             MASKED: tl.constexpr, DEPTHWISE: tl.constexpr, PRECISION: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One program: BM positions by BN output channels of one group."""
    channels = groups * inputs
    total = groups * outputs
    blocks = tl.cdiv(outputs, BN)
    block = tl.program_id(0) % (groups * blocks)
    group = block // blocks
    p = tl.program_id(0) // (groups * blocks) * BM + tl.arange(0, BM)
    p_valid = p < positions
    in_group = block % blocks * BN + tl.arange(0, BN)
    o_valid = in_group < outputs
    o = group * outputs + in_group
    sums = tl.zeros((BM, BN), tl.float32)
    for tap in range(TAPS):
        for first in range(group * inputs, (group + 1) * inputs, segment):
            offset_group = first // (channels // offset_groups)
            image, q, point = _where(p, tap, offset_group, area, offset_groups, TAPS)
            dy = tl.load(offset_ptr + 2 * point + q, mask=p_valid, other=0.0)
            dx = tl.load(offset_ptr + 2 * point + area + q, mask=p_valid, other=0.0)
            factor = tl.load(mask_ptr + point + q, mask=p_valid, other=0.0) if MASKED else 1.0
            cell, v00, v01, v10, v11, down, right, inside, factor = _sample(
                dy, dx, factor, image, q, tap, p_valid, columns, height, width, channels,
                KW, SY, SX, PY, PX, DY, DX)  # fmt: skip
            if DEPTHWISE:
                c = first + in_group // (outputs // inputs)
                a00, a01, a10, a11 = read(x_ptr, cell, c, o_valid, width, channels, v00, v01, v10, v11)
                weight = tl.load(weight_ptr + tap * total + o, mask=o_valid, other=0.0).to(tl.float32)
                sums += bilinear(a00, a01, a10, a11, down, right) * factor[:, None] * weight[None, :]
            else:
                weight_row = weight_ptr + (tap * inputs - group * inputs) * total
                for k in range(0, segment, BK):
                    c = first + k + tl.arange(0, BK)
                    c_valid = k + tl.arange(0, BK) < segment
                    a00, a01, a10, a11 = read(x_ptr, cell, c, c_valid, width, channels, v00, v01, v10, v11)
                    sampled = bilinear(a00, a01, a10, a11, down, right) * factor[:, None]
                    weight = tl.load(weight_row + c[:, None] * total + o[None, :],
                                     mask=c_valid[:, None] & o_valid[None, :], other=0.0)  # fmt: skip
                    sums = tl.dot(sampled.to(weight.dtype), weight, sums, input_precision=PRECISION)
    tl.store(out_ptr + p.to(tl.int64)[:, None] * total + o[None, :], sums.to(out_ptr.dtype.element_ty),
             mask=p_valid[:, None] & o_valid[None, :])  # fmt: skip


@_tuned(reset_to_zero=["by_x_ptr"])
def _backward_data(x_ptr, offset_ptr, mask_ptr, weight_ptr, grad_ptr, by_x_ptr, by_offset_ptr, by_mask_ptr, positions,
                   area, columns, height, width, groups, inputs, outputs, offset_groups, segment, KW: tl.constexpr,
                   TAPS: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
                   DY: tl.constexpr, DX: tl.constexpr, MASKED: tl.constexpr, DEPTHWISE: tl.constexpr,
                   PRECISION: tl.constexpr, FOR_INPUT: tl.constexpr, FOR_POINTS: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One program: BM positions, one kernel point and one offset group."""
    channels = groups * inputs
    total = groups * outputs
    share = channels // offset_groups
    offset_group = tl.program_id(0) % offset_groups
    tap = tl.program_id(0) // offset_groups % TAPS
    p = tl.program_id(0) // (offset_groups * TAPS) * BM + tl.arange(0, BM)
    p_valid = p < positions
    image, q, point = _where(p, tap, offset_group, area, offset_groups, TAPS)
    dy = tl.load(offset_ptr + 2 * point + q, mask=p_valid, other=0.0)
    dx = tl.load(offset_ptr + 2 * point + area + q, mask=p_valid, other=0.0)
    factor = tl.load(mask_ptr + point + q, mask=p_valid, other=0.0) if MASKED else 1.0
    cell, v00, v01, v10, v11, down, right, inside, factor = _sample(
        dy, dx, factor, image, q, tap, p_valid, columns, height, width, channels,
        KW, SY, SX, PY, PX, DY, DX)  # fmt: skip
    grad_row = grad_ptr + p.to(tl.int64) * total
    by_y = tl.zeros((BM,), tl.float32)
    by_x = tl.zeros((BM,), tl.float32)
    by_mask = tl.zeros((BM,), tl.float32)
    for first in range(offset_group * share, (offset_group + 1) * share, segment):
        group = first // inputs
        for k in range(0, outputs if DEPTHWISE else segment, BK):
            if DEPTHWISE:
                c_valid = k + tl.arange(0, BK) < outputs
                c = first + (k + tl.arange(0, BK)) // (outputs // inputs)
                o = group * outputs + k + tl.arange(0, BK)
                grad = tl.load(grad_row[:, None] + o[None, :], mask=p_valid[:, None] & c_valid[None, :], other=0.0)
                weight = tl.load(weight_ptr + tap * total + o, mask=c_valid, other=0.0).to(tl.float32)
                by_sample = grad.to(tl.float32) * weight[None, :]
            else:
                c_valid = k + tl.arange(0, BK) < segment
                c = first + k + tl.arange(0, BK)
                weight_row = weight_ptr + (tap * inputs - group * inputs + c) * total
                by_sample = tl.zeros((BM, BK), tl.float32)
                for n in range(0, outputs, BN):
                    o_valid = n + tl.arange(0, BN) < outputs
                    o = group * outputs + n + tl.arange(0, BN)
                    grad = tl.load(grad_row[:, None] + o[None, :], mask=p_valid[:, None] & o_valid[None, :], other=0.0)
                    weight = tl.load(
                        weight_row[None, :] + o[:, None], mask=c_valid[None, :] & o_valid[:, None], other=0.0
                    )
                    by_sample = tl.dot(grad, weight, by_sample, input_precision=PRECISION)
            if FOR_POINTS:
                a00, a01, a10, a11 = read(x_ptr, cell, c, c_valid, width, channels, v00, v01, v10, v11)
                by_y += tl.sum(by_sample * slope_y(a00, a01, a10, a11, right), 1)
                by_x += tl.sum(by_sample * slope_x(a00, a01, a10, a11, down), 1)
                if MASKED:
                    by_mask += tl.sum(by_sample * bilinear(a00, a01, a10, a11, down, right), 1)
            if FOR_INPUT:
                add(by_x_ptr, by_sample * factor[:, None], down, right,
                    cell, c, c_valid, width, channels, v00, v01, v10, v11)  # fmt: skip
    if FOR_POINTS:
        tl.store(by_offset_ptr + 2 * point + q, tl.where(inside, by_y * factor, 0.0), mask=p_valid)
        tl.store(by_offset_ptr + 2 * point + area + q, tl.where(inside, by_x * factor, 0.0), mask=p_valid)
        if MASKED:
            tl.store(by_mask_ptr + point + q, tl.where(inside, by_mask, 0.0), mask=p_valid)


@_tuned()
def _backward_weight(x_ptr, offset_ptr, mask_ptr, grad_ptr, sums_ptr, positions, area, columns, height, width, groups,
                     inputs, outputs, offset_groups, segment, parts, KW: tl.constexpr, TAPS: tl.constexpr,
                     SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr,
                     DX: tl.constexpr, MASKED: tl.constexpr, DEPTHWISE: tl.constexpr, PRECISION: tl.constexpr,
                     BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One program: one kernel point, BK input by BN output channels of one group, every ``parts``-th tile of positions.

    Its sum goes to sums_ptr, (parts, kh, kw, C / groups of the convolution, C_out).
    """
    channels = groups * inputs
    total = groups * outputs
    out_blocks = tl.cdiv(outputs, BN)
    in_blocks = 1 if DEPTHWISE else tl.cdiv(segment, BK)
    block = tl.program_id(0) // out_blocks
    tap = block // (in_blocks * (channels // segment))
    first = block // in_blocks % (channels // segment) * segment
    group = first // inputs
    offset_group = first // (channels // offset_groups)
    in_group = tl.program_id(0) % out_blocks * BN + tl.arange(0, BN)
    o_valid = in_group < outputs
    o = group * outputs + in_group
    row = tl.program_id(1).to(tl.int64) * TAPS + tap
    if DEPTHWISE:
        c = first + in_group // (outputs // inputs)
        c_valid = o_valid
        sums = tl.zeros((BN,), tl.float32)
    else:
        in_segment = block % in_blocks * BK + tl.arange(0, BK)
        c = first + in_segment
        c_valid = in_segment < segment
        sums = tl.zeros((BK, BN), tl.float32)
    for begin in range(tl.program_id(1) * BM, positions, parts * BM):
        p = begin + tl.arange(0, BM)
        p_valid = p < positions
        image, q, point = _where(p, tap, offset_group, area, offset_groups, TAPS)
        dy = tl.load(offset_ptr + 2 * point + q, mask=p_valid, other=0.0)
        dx = tl.load(offset_ptr + 2 * point + area + q, mask=p_valid, other=0.0)
        factor = tl.load(mask_ptr + point + q, mask=p_valid, other=0.0) if MASKED else 1.0
        cell, v00, v01, v10, v11, down, right, inside, factor = _sample(
            dy, dx, factor, image, q, tap, p_valid, columns, height, width, channels,
            KW, SY, SX, PY, PX, DY, DX)  # fmt: skip
        a00, a01, a10, a11 = read(x_ptr, cell, c, c_valid, width, channels, v00, v01, v10, v11)
        sampled = bilinear(a00, a01, a10, a11, down, right) * factor[:, None]
        grad = tl.load(grad_ptr + p.to(tl.int64)[:, None] * total + o[None, :],
                       mask=p_valid[:, None] & o_valid[None, :], other=0.0)  # fmt: skip
        if DEPTHWISE:
            sums += tl.sum(sampled * grad.to(tl.float32), 0)
        else:
            sums = tl.dot(tl.trans(sampled.to(grad.dtype)), grad, sums, input_precision=PRECISION)
    if DEPTHWISE:
        tl.store(sums_ptr + row * total + o, sums, mask=o_valid)
    else:
        rows = row * inputs + c - group * inputs
        tl.store(sums_ptr + rows[:, None] * total + o[None, :], sums, mask=c_valid[:, None] & o_valid[None, :])


@triton_op("segdcn::triton_conv2d", mutates_args=())
def triton_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Deformable convolution; arguments and result as ``segdcn.ops.deform_conv2d``, which checks them."""
    tensors, sizes, settings = _arguments(input, offset, weight, mask, stride, padding, dilation)
    positions, groups, outputs = sizes["positions"], sizes["groups"], sizes["outputs"]
    output = input.new_empty(len(input), *offset.shape[2:], len(weight))

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(positions, tile["BM"]) * groups * triton.cdiv(outputs, tile["BN"]),)

    if positions:
        wrap_triton(_forward)[grid](*tensors, _by_tap(weight), output, *sizes.values(), **settings)
    return output.permute(0, 3, 1, 2)


@triton_conv2d.register_fake
def _(input: Tensor, offset: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty(input.shape[0], *offset.shape[2:], weight.shape[0]).permute(0, 3, 1, 2)


@triton_op("segdcn::triton_conv2d_backward_data", mutates_args=())
def triton_conv2d_backward_data(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    for_input: bool,
    for_points: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by input, and for points by offset and mask, of their shapes; zeros where one is not asked for."""
    tensors, sizes, settings = _arguments(input, offset, weight, mask, stride, padding, dilation)
    positions, taps, offset_groups = sizes["positions"], settings["TAPS"], sizes["offset_groups"]
    by_x, by_offset, by_mask = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors)
    grad = grad.permute(0, 2, 3, 1).contiguous()

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(positions, tile["BM"]) * taps * offset_groups,)

    if positions:
        wrap_triton(_backward_data)[grid](
            *tensors, _by_tap(weight), grad, by_x, by_offset, by_mask, *sizes.values(), **settings,
            FOR_INPUT=for_input, FOR_POINTS=for_points)  # fmt: skip
    by_input = by_x.to(input.dtype).permute(0, 3, 1, 2)
    return by_input, by_offset.to(offset.dtype), by_mask.new_empty(0) if mask is None else by_mask.to(mask.dtype)


@triton_conv2d_backward_data.register_fake
def _(
    grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, height, width = input.shape
    by_mask = offset.new_empty(0, dtype=torch.float32) if mask is None else mask.new_empty(mask.shape)
    by_input = input.new_empty(n, height, width, channels).permute(0, 3, 1, 2)
    return by_input, offset.new_empty(offset.shape), by_mask


@triton_op("segdcn::triton_conv2d_backward_weight", mutates_args=())
def triton_conv2d_backward_weight(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Gradient by weight; its sums over parts of the positions are added up by PyTorch, so that they are repeatable."""
    tensors, sizes, settings = _arguments(input, offset, weight, mask, stride, padding, dilation)
    taps, positions, segment, outputs = settings["TAPS"], sizes["positions"], sizes["segment"], sizes["outputs"]
    segments, depthwise = input.shape[1] // segment, settings["DEPTHWISE"]

    def blocks(tile: dict[str, int]) -> int:
        in_blocks: int = 1 if depthwise else triton.cdiv(segment, tile["BK"])
        count: int = taps * segments * in_blocks * triton.cdiv(outputs, tile["BN"])
        return count

    parts = min(triton.cdiv(PROGRAMS, blocks({"BN": 64, "BK": 64})), triton.cdiv(positions, 256))
    sums = weight.new_empty(parts, *weight.permute(2, 3, 1, 0).shape, dtype=torch.float32)
    grad = grad.permute(0, 2, 3, 1).contiguous()

    def grid(tile: dict[str, int]) -> tuple[int, int]:
        return blocks(tile), parts

    if positions:
        wrap_triton(_backward_weight)[grid](*tensors, grad, sums, *sizes.values(), parts, **settings)
    return sums.sum(0).permute(3, 2, 0, 1).to(weight.dtype).contiguous()


@triton_conv2d_backward_weight.register_fake
def _(grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = for_input, for_offset, for_weight, for_mask = ctx.needs_input_grad[:4]
    arguments = (grad, *ctx.saved_tensors, ctx.stride, ctx.padding, ctx.dilation)
    by_input = by_offset = by_weight = by_mask = None
    if for_input and torch.are_deterministic_algorithms_enabled():
        by_input, by_offset, _, by_mask = gather_conv2d_backward(*arguments, [True, for_offset, False, for_mask])
    elif for_input or for_offset or for_mask:
        by_input, by_offset, by_mask = triton_conv2d_backward_data(*arguments, for_input, for_offset or for_mask)
    if for_weight:
        by_weight = triton_conv2d_backward_weight(*arguments)
    gradients = (by_input, by_offset, by_weight, by_mask)
    return *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)), None, None, None


triton_conv2d.register_autograd(_backward, setup_context=_save)


def _arguments(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, int], dict[str, Any]]:
    """What all kernels take: the tensors that are read, the sizes and the settings; a missing mask is never read."""
    channels, height, width = input.shape[1:]
    total, per_group, kernel_h, kernel_w = weight.shape
    rows, columns = offset.shape[2:]
    offset_groups = offset.shape[1] // (2 * kernel_h * kernel_w)
    groups = offset_groups if per_group == 1 else channels // per_group
    sizes = {
        "positions": len(input) * rows * columns,
        "area": rows * columns,
        "columns": columns,
        "height": height,
        "width": width,
        "groups": groups,
        "inputs": channels // groups,
        "outputs": total // groups,
        "offset_groups": offset_groups,
        "segment": math.gcd(channels // groups, channels // offset_groups),
    }
    settings = {
        "KW": kernel_w,
        "TAPS": kernel_h * kernel_w,
        **dict(zip(("SY", "SX", "PY", "PX", "DY", "DX"), (*stride, *padding, *dilation), strict=True)),
        "MASKED": mask is not None,
        "DEPTHWISE": per_group == 1,
        "PRECISION": _precision(),
    }
    wide = offset.float().contiguous()
    tensors = (input.permute(0, 2, 3, 1).contiguous(), wide, wide if mask is None else mask.float().contiguous())
    return tensors, sizes, settings


def _by_tap(weight: Tensor) -> Tensor:
    """(C_out, C / groups, kh, kw) -> (kh, kw, C / groups, C_out)."""
    return weight.permute(2, 3, 1, 0).contiguous()


def _precision() -> str:
    """Of products of float32, as PyTorch is told to compute them."""
    matmul = torch.backends.cuda.matmul
    # the name since PyTorch 2.9: the older one cannot be read where the newer one was set
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"
