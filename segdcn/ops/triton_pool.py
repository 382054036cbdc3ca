"""Deformable RoI poolings in Triton: averages over bins, each of a grid of samples, see regions.py.

Both poolings are one pair of kernels. PyTorch computes where each bin's grid begins and how it goes on, as it does for
gather's backend, and differentiates that; the kernels step through the grids and give the gradient by their first
points, so that no list of samples is ever stored.

A bag is a bin with a class. Maps have their planes, those of a group's cells, before the channels, which are last:
bags read neighbouring channels of one plane, and a program holds a tile of BM bags by BL of their channels. Coordinates
and sums are float32. The gradient by the input is added up by atomics, in any order.

The kernels' sizes: bags, bins of a region, classes with their channels, height and width of the map. ``margin`` is how
far outside the map a sample reads its border, in pixels. An average is over all samples of a bin (ALL) or over those
that are read.
"""

# no "from __future__ import annotations": torch.library reads the annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdcn.ops.regions import Bins
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

SIZES = ["bags", "bins", "height", "width"]  # a kernel is not compiled anew for multiples of 16


@triton.jit
def _at(k, x, y, step_x, step_y, columns, samples, height, width, margin):
    """The k-th samples of bags, and whether they are there and read the map."""
    x += k % columns * step_x
    y += k // columns * step_y
    near = (x >= -margin) & (x <= width - 1 + margin) & (y >= -margin) & (y <= height - 1 + margin)
    return x, y, (k < samples) & near  # never near where not finite


@triton.jit
def _share(x, y, step_x, step_y, columns, samples, height, width, margin, ALL: tl.constexpr):
    """Of each sample in the average of its bag."""
    counted = samples
    if not ALL:
        counted = tl.zeros_like(samples)
        for k in range(tl.max(samples, 0)):
            _, _, is_read = _at(k, x, y, step_x, step_y, columns, samples, height, width, margin)
            counted += is_read.to(tl.int32)
    return 1.0 / tl.maximum(counted, 1)


@triton.jit
def _sample(x, y, is_read, plane, of_class, height, width, channels):
    """What samples read, those beyond the border its cells, and whether the value changes with x and with y."""
    moves_x = is_read & (x >= 0) & (x < width - 1)
    moves_y = is_read & (y >= 0) & (y < height - 1)
    x = tl.minimum(tl.maximum(x, 0.0), width - 1.0)
    y = tl.minimum(tl.maximum(y, 0.0), height - 1.0)
    top, left, down, right, inside = locate(y, x, is_read, height, width)
    cell, v00, v01, v10, v11 = corners(plane.to(tl.int64), top, left, inside, height, width, channels)
    return cell + of_class, v00, v01, v10, v11, down, right, moves_x, moves_y


@triton.jit(do_not_specialize=SIZES)
def _forward(map_ptr, plane_ptr, first_ptr, step_ptr, samples_ptr, out_ptr, bags, bins, classes, channels, height,
             width, margin, ALL: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr):  # fmt: skip
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BL + tl.arange(0, BL)
    b_valid = b < bags
    c_valid = c < channels
    region = b // (bins * classes)
    plane = tl.load(plane_ptr + b // classes, mask=b_valid, other=0)
    x = tl.load(first_ptr + 2 * b, mask=b_valid, other=0.0)
    y = tl.load(first_ptr + 2 * b + 1, mask=b_valid, other=0.0)
    step_x = tl.load(step_ptr + 2 * region, mask=b_valid, other=0.0)
    step_y = tl.load(step_ptr + 2 * region + 1, mask=b_valid, other=0.0)
    columns = tl.load(samples_ptr + 2 * region, mask=b_valid, other=0)
    samples = columns * tl.load(samples_ptr + 2 * region + 1, mask=b_valid, other=0)
    columns = tl.maximum(columns, 1)
    sums = tl.zeros((BM, BL), tl.float32)
    for k in range(tl.max(samples, 0)):
        at_x, at_y, is_read = _at(k, x, y, step_x, step_y, columns, samples, height, width, margin)
        cell, v00, v01, v10, v11, down, right, _, _ = _sample(
            at_x, at_y, is_read, plane, b % classes * channels, height, width, classes * channels)  # fmt: skip
        a00, a01, a10, a11 = read(map_ptr, cell, c, c_valid, width, classes * channels, v00, v01, v10, v11)
        sums += bilinear(a00, a01, a10, a11, down, right)
    share = _share(x, y, step_x, step_y, columns, samples, height, width, margin, ALL)
    average = (sums * share[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + b.to(tl.int64)[:, None] * channels + c[None, :], average,
             mask=b_valid[:, None] & c_valid[None, :])  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _backward(map_ptr, plane_ptr, first_ptr, step_ptr, samples_ptr, grad_ptr, by_map_ptr, by_first_ptr, bags, bins,
              classes, channels, height, width, margin, ALL: tl.constexpr, FOR_INPUT: tl.constexpr,
              FOR_POINTS: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr):  # fmt: skip
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    b_valid = b < bags
    region = b // (bins * classes)
    plane = tl.load(plane_ptr + b // classes, mask=b_valid, other=0)
    x = tl.load(first_ptr + 2 * b, mask=b_valid, other=0.0)
    y = tl.load(first_ptr + 2 * b + 1, mask=b_valid, other=0.0)
    step_x = tl.load(step_ptr + 2 * region, mask=b_valid, other=0.0)
    step_y = tl.load(step_ptr + 2 * region + 1, mask=b_valid, other=0.0)
    columns = tl.load(samples_ptr + 2 * region, mask=b_valid, other=0)
    samples = columns * tl.load(samples_ptr + 2 * region + 1, mask=b_valid, other=0)
    columns = tl.maximum(columns, 1)
    share = _share(x, y, step_x, step_y, columns, samples, height, width, margin, ALL)
    by_x = tl.zeros((BM,), tl.float32)
    by_y = tl.zeros((BM,), tl.float32)
    for block in range(0, channels, BL):
        c = block + tl.arange(0, BL)
        c_valid = c < channels
        grad = tl.load(grad_ptr + b.to(tl.int64)[:, None] * channels + c[None, :],
                       mask=b_valid[:, None] & c_valid[None, :], other=0.0)  # fmt: skip
        grad = grad.to(tl.float32) * share[:, None]
        for k in range(tl.max(samples, 0)):
            at_x, at_y, is_read = _at(k, x, y, step_x, step_y, columns, samples, height, width, margin)
            cell, v00, v01, v10, v11, down, right, moves_x, moves_y = _sample(
                at_x, at_y, is_read, plane, b % classes * channels, height, width, classes * channels)  # fmt: skip
            if FOR_POINTS:
                a00, a01, a10, a11 = read(map_ptr, cell, c, c_valid, width, classes * channels, v00, v01, v10, v11)
                by_x += tl.where(moves_x, tl.sum(grad * slope_x(a00, a01, a10, a11, down), 1), 0.0)
                by_y += tl.where(moves_y, tl.sum(grad * slope_y(a00, a01, a10, a11, right), 1), 0.0)
            if FOR_INPUT:
                add(by_map_ptr, grad, down, right,
                    cell, c, c_valid, width, classes * channels, v00, v01, v10, v11)  # fmt: skip
    if FOR_POINTS:
        tl.store(by_first_ptr + 2 * b, by_x, mask=b_valid)
        tl.store(by_first_ptr + 2 * b + 1, by_y, mask=b_valid)


def triton_pool(input: Tensor, bins: Bins, size: tuple[int, int], cell: Tensor | None = None, cells: int = 1) -> Tensor:
    """The bins' averages; differentiable by the input and by where the bins begin.

    Shape: input (N, C * cells, H, W), the cells fastest; bins of ``size`` = (h, w); cell (h * w,), integers, the one
    that each bin reads -> (R, C, h, w).
    cell: of position-sensitive pooling, whose samples are counted half a pixel around the map and averaged over those;
    without it all are counted, and read a pixel around the map.
    """
    channels = input.shape[1] // cells
    maps = input.reshape(len(input), channels, cells, *input.shape[2:]).permute(0, 2, 3, 4, 1)
    of_bin = bins.image.new_zeros(size[0] * size[1]) if cell is None else cell
    plane = bins.image[:, None] * cells + of_bin
    margin = 1.0 if cell is None else 0.5
    pooled: Tensor = _pool(maps, plane, bins.first, bins.step, bins.samples, margin, cell is None)
    return pooled.view(len(plane), *size, channels).permute(0, 3, 1, 2).contiguous()


@triton_op("segdcn::triton_pool", mutates_args=())
def _pool(
    maps: Tensor, plane: Tensor, first: Tensor, step: Tensor, samples: Tensor, margin: float, all_counted: bool
) -> Tensor:
    """Averages of bags.

    Shape: maps (N, cells, H, W, C); plane (R, h * w), integers, which of the N * cells maps; first (R, h * w, K, 2),
    step (R, 2) and samples (R, 2), integers, as ``Bins`` has them -> (R, h * w, C).
    """
    tensors, sizes, settings = _arguments(maps, plane, first, step, samples, all_counted)
    output = maps.new_empty(*plane.shape, maps.shape[4])

    def grid(tile: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(sizes[0], tile["BM"]), triton.cdiv(sizes[3], tile["BL"])

    if output.numel():
        wrap_triton(_forward)[grid](*tensors, output, *sizes, margin, **settings)
    return output


@_pool.register_fake
def _(maps: Tensor, plane: Tensor, *_: Any) -> Tensor:
    return maps.new_empty(*plane.shape, maps.shape[4])


@triton_op("segdcn::triton_pool_backward", mutates_args=())
def _pool_backward(
    grad: Tensor,
    maps: Tensor,
    plane: Tensor,
    first: Tensor,
    step: Tensor,
    samples: Tensor,
    margin: float,
    all_counted: bool,
    for_input: bool,
    for_points: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients by maps and by first, of their shapes; zeros where one is not asked for."""
    tensors, sizes, settings = _arguments(maps, plane, first, step, samples, all_counted)
    by_maps = torch.zeros_like(tensors[0], dtype=torch.float32)
    by_first = torch.zeros_like(tensors[2])

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(sizes[0], tile["BM"]),)

    if grad.numel():
        wrap_triton(_backward)[grid](
            *tensors, grad.contiguous(), by_maps, by_first, *sizes, margin, **settings,
            FOR_INPUT=for_input, FOR_POINTS=for_points)  # fmt: skip
    return by_maps.to(maps.dtype), by_first.to(first.dtype)


@_pool_backward.register_fake
def _(grad: Tensor, maps: Tensor, plane: Tensor, first: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return maps.new_empty(maps.shape), first.new_empty(first.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.margin, ctx.all_counted = inputs
    ctx.save_for_backward(*tensors)


def _formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    for_input, _, for_points, *_ = ctx.needs_input_grad
    by_maps, by_first = _pool_backward(grad, *ctx.saved_tensors, ctx.margin, ctx.all_counted, for_input, for_points)
    return by_maps if for_input else None, None, by_first if for_points else None, None, None, None, None


_pool.register_autograd(_formula, setup_context=_save)


def _arguments(
    maps: Tensor, plane: Tensor, first: Tensor, step: Tensor, samples: Tensor, all_counted: bool
) -> tuple[list[Tensor], list[int], dict[str, Any]]:
    """What both kernels take: the tensors that are read, the sizes but for the margin, and the settings."""
    *_, height, width, total = maps.shape
    regions, bins, classes, _ = first.shape
    channels = total // classes
    points = [each.float().contiguous() for each in (first, step)]
    tensors = [maps.contiguous(), plane.int().contiguous(), *points, samples.int().contiguous()]
    settings = {"ALL": all_counted, **bag_tile(channels)}
    return tensors, [regions * bins * classes, bins, classes, channels, height, width], settings
