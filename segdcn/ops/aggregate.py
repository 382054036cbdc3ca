"""Deformable aggregation, what DCNv3 and DCNv4 have in the place of a convolution: weighted sums of samples.

    out at a position, for a group of channels = sum over k of  mask of k * input at point k

No weights are shared between positions, so that one bag of samples for each position and group is all there is.
``torch.compile`` and ``torch.export`` see two opaque operators.

Legend: N batch, H x W input map, C channels, G groups, Ho x Wo output map, K kernel points, P = N * Ho * Wo positions.
"""

# no "from __future__ import annotations": torch.library.custom_op reads the annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from segdcn.ops.checks import IntPair, check_least, check_tensors, check_triton, output_size, two
from segdcn.ops.sampling import (
    Bags,
    Points,
    bilinear,
    gather_dot,
    gather_sum,
    locate,
    map_from_rows,
    point_gradient,
    rows_for_dots,
    rows_with_ring,
    sampling_grid,
    scatter_corners,
    sum_dtype,
    table_row,
)

AggregateBackend = Literal["auto", "gather", "grid_sample", "triton"]

TILE = 1 << 16  # samples that are looked at together: their corners and weights stay in the cache


def deform_aggregate(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: IntPair = 3,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    *,
    backend: AggregateBackend = "auto",
) -> Tensor:
    """For each position and group of channels the sum of the kernel's samples, each times its mask.

    Shape: input (N, H, W, C); offset (N, Ho, Wo, G * K * 2), (x, y) per kernel point in pixels of the input map before
    ``offset_scale``; mask (N, Ho, Wo, G * K) -> (N, Ho, Wo, C). Groups are slowest, and the kernel's points run down
    its columns: point kx * kh + ky. This is the authors' layout, the transpose of ``deform_conv2d``'s. N may be 0.
    offset_scale: factor on the offsets, and on the kernel around its centre; it draws the whole kernel apart.
    remove_center: the kernel's centre is no point, K = kh * kw - 1.

    Samples that are not finite or lie a pixel or more outside the map are zero, with a zero gradient. Coordinates are
    float32 at least, the result is of the dtype of ``input``.
    backend: ``gather`` is the way of all our operators, ``grid_sample`` a graph of common operators; ``auto`` is
    gather, but grid_sample while a graph is exported, since ONNX has no such operator. ``triton`` is for a GPU with the
    package triton, not for float64 (see triton_aggregate.py); under deterministic algorithms it is gather.

    Raises: ValueError that names the argument when a shape, dtype or device does not fit, before any kernel runs.
    Source: DCNv3: Wang et al. 2023 (InternImage), section 3.1, equation 2; DCNv4, masks of any size: Xiong et al. 2024,
    section 3.1.
    """
    kernel, stride, padding, dilation = two(kernel_size), two(stride), two(padding), two(dilation)
    check_tensors(input, {}, {"offset": offset, "mask": mask})
    _check_shapes(input, offset, mask, kernel, stride, padding, dilation, remove_center)
    if backend not in get_args(AggregateBackend):
        raise ValueError(f"backend must be auto, gather, grid_sample or triton, got {backend!r}")
    exporting = torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()
    settings = (list(kernel), list(stride), list(padding), list(dilation), float(offset_scale), bool(remove_center))
    if backend == "grid_sample" or (backend == "auto" and exporting):
        return _by_grid_sample(input, offset, mask, *settings)
    aggregate: Callable[..., Any] = _aggregate
    if backend == "triton":
        check_triton(input)
        from segdcn.ops.triton_aggregate import triton_aggregate  # not every machine has Triton

        if not torch.are_deterministic_algorithms_enabled():
            aggregate = triton_aggregate
    output: Tensor = aggregate(input, offset, mask, *settings)
    return output


class _Geometry(NamedTuple):
    """Where the kernel stands at each position."""

    groups: int
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    offset_scale: float
    remove_center: bool

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1] - self.remove_center

    def points(self, offset: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Sampling points in pixels of the input map.

        Shape: offset (..., G, K, 2) as (x, y); row, column, integers (...) of the output map -> y, x, each (..., G, K).
        """
        middle = (self.kernel[1] // 2, self.kernel[0] // 2)
        taps = [(x, y) for x in range(self.kernel[1]) for y in range(self.kernel[0])]
        tap = torch.tensor([at for at in taps if not (self.remove_center and at == middle)], device=offset.device)
        dtype = torch.promote_types(offset.dtype, torch.float32)
        points = []
        for axis, side, position in ((1, 0, row), (0, 1, column)):  # y, then x
            centre = self.dilation[side] * (self.kernel[side] - 1) // 2
            at = (position * self.stride[side] - self.padding[side] + centre).to(dtype)[..., None, None]
            from_centre = (tap[:, axis] * self.dilation[side] - centre).to(dtype)
            points.append(at + (from_centre + offset[..., axis].to(dtype)) * self.offset_scale)
        return points[0], points[1]


@torch.library.custom_op("segdcn::deform_aggregate", mutates_args=())
def _aggregate(
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
    geometry = _geometry(mask, kernel, stride, padding, dilation, offset_scale, remove_center)
    rows = rows_with_ring(input.permute(0, 3, 1, 2), geometry.groups)
    output = rows.new_empty(math.prod(offset.shape[:3]) * geometry.groups, rows.shape[1])
    for tile in _tiles(input, offset, mask, geometry):
        output[tile.bags] = sum(gather_sum(rows, tile.summed(*each)) for each in tile.corners(input.shape[2], geometry))
    return output.view(*offset.shape[:3], input.shape[3])


@_aggregate.register_fake
def _(input: Tensor, offset: Tensor, *_: Any) -> Tensor:
    return input.new_empty(*offset.shape[:3], input.shape[3])


@torch.library.custom_op("segdcn::deform_aggregate_backward", mutates_args=())
def _aggregate_backward(
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
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by input, offset and mask, of their shapes; zeros where one is not ``needed``."""
    for_input, for_points = needed[0], needed[1] or needed[2]
    geometry = _geometry(mask, kernel, stride, padding, dilation, offset_scale, remove_center)
    groups, taps, width = geometry.groups, geometry.taps, input.shape[2]
    maps = input.permute(0, 3, 1, 2)
    rows = rows_with_ring(maps, groups)
    dot_table = rows_for_dots(rows) if for_points else rows
    grad = grad.reshape(-1, rows.shape[1])
    grad_rows = torch.zeros_like(rows, dtype=sum_dtype(rows))
    grad_offset, grad_mask = (torch.zeros_like(each, memory_format=torch.contiguous_format) for each in (offset, mask))
    by_offset, by_mask = grad_offset.view(-1, taps, 2), grad_mask.view(-1, taps)
    for tile in _tiles(input, offset, mask, geometry):
        of_bag = grad[tile.bags].contiguous()
        corners = tile.corners(width, geometry)
        if for_points:
            dots = [gather_dot(dot_table, tile.summed(*each), of_bag).view(tile.mask.shape) for each in corners]
            y, x = point_gradient(tile.points, dots)
            factor = tile.mask * geometry.offset_scale
            by_offset[tile.bags, :, 0], by_offset[tile.bags, :, 1] = x * factor, y * factor
            by_mask[tile.bags] = bilinear(tile.points, dots).to(mask.dtype)
        if for_input:
            # without those outside, which all read the ring's first line, a tile's rows lie close together
            inside = (~tile.points.outside).flatten().nonzero().flatten()
            kept = [(row.index_select(0, inside), weight.index_select(0, inside)) for row, weight in corners]
            scatter_corners(grad_rows, kept, tile.owner.index_select(0, inside), of_bag)
    grad_input = map_from_rows(grad_rows, maps.shape).permute(0, 2, 3, 1).to(input.dtype).contiguous()
    return grad_input, grad_offset, grad_mask


@_aggregate_backward.register_fake
def _(grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return input.new_empty(input.shape), offset.new_empty(offset.shape), mask.new_empty(mask.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, mask, *ctx.settings = inputs
    ctx.save_for_backward(input, offset, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    gradients = _aggregate_backward(grad, *ctx.saved_tensors, *ctx.settings, needed)
    return *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)), *(None for _ in ctx.settings)


_aggregate.register_autograd(_backward, setup_context=_save)


class _Tile(NamedTuple):
    """The bags of some positions, T of them, each of K points."""

    bags: slice  # of all positions' bags, P * G
    points: Points  # (T, K)
    row: Tensor  # (T, K) of the top left corner
    mask: Tensor  # (T, K)
    owner: Tensor  # (T * K,) the bag of each point
    start: Tensor  # (T,) the first point of each bag

    def summed(self, row: Tensor, weight: Tensor) -> Bags:
        """The bags of one corner of all points."""
        return Bags(row, weight, self.start, self.owner)

    def corners(self, width: int, geometry: _Geometry) -> list[tuple[Tensor, Tensor]]:
        """The rows and the weights, (T * K,), of each of the points' four corners."""
        _, down, right, _ = self.points
        upper, lower = (1 - down) * self.mask, down * self.mask
        left = 1 - right
        below = (width + 2) * geometry.groups
        return [
            ((self.row + shift).flatten(), (vertical * horizontal).flatten())
            for shift, vertical, horizontal in (
                (0, upper, left),
                (geometry.groups, upper, right),
                (below, lower, left),
                (below + geometry.groups, lower, right),
            )
        ]


def _geometry(mask: Tensor, kernel: list[int], *settings: Any) -> _Geometry:
    remove_center = settings[-1]
    return _Geometry(mask.shape[3] // (kernel[0] * kernel[1] - remove_center), kernel, *settings)


def _tiles(input: Tensor, offset: Tensor, mask: Tensor, geometry: _Geometry) -> Iterator[_Tile]:
    n, height, width, _ = input.shape
    _, rows, columns, _ = offset.shape
    groups, taps = geometry.groups, geometry.taps
    offset, mask = offset.reshape(-1, groups, taps, 2), mask.reshape(-1, groups, taps)
    group = torch.arange(groups, device=input.device)[:, None]
    length = min(len(offset), max(1, TILE // (groups * taps)))
    integer = torch.int32 if n * (height + 2) * (width + 2) * groups < 2**31 else torch.int64
    bag = torch.arange(length * groups, dtype=integer, device=input.device)
    start, owner = bag * taps, bag.repeat_interleave(taps)
    for first in range(0, len(offset), max(1, length)):
        at = slice(first, min(first + length, len(offset)))
        position = torch.arange(at.start, at.stop, device=input.device)
        y, x = geometry.points(offset[at], position // columns % rows, position % columns)
        points = locate(y, x, height, width, n * (height + 2) * (width + 2) * groups)
        image = (position // (rows * columns))[:, None, None]
        row = table_row(points.cell, image, group, (height, width), groups)
        bags = slice(at.start * groups, at.stop * groups)
        row = row.view(-1, taps)
        yield _Tile(
            bags,
            Points(*(each.view(-1, taps) for each in points)),
            row,
            mask[at].to(y.dtype).view(-1, taps),
            owner[: row.numel()],
            start[: len(row)],
        )


def _by_grid_sample(
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
    """The same as a graph of common operators, in float32 at least."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    n, height, width, channels = input.shape
    rows, columns = offset.shape[1:3]
    geometry = _geometry(mask, kernel, stride, padding, dilation, offset_scale, remove_center)
    groups, taps = geometry.groups, geometry.taps
    row, column = (torch.arange(count, device=input.device) for count in (rows, columns))
    y, x = geometry.points(offset.view(n, rows, columns, groups, taps, 2), row[:, None], column)
    grid = sampling_grid(y, x, height, width).to(dtype).permute(0, 3, 1, 2, 4, 5)
    grid = grid.reshape(n * groups, rows * columns, taps, 2)
    maps = input.to(dtype).permute(0, 3, 1, 2).reshape(n * groups, channels // groups, height, width)
    samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    factor = mask.to(dtype).view(n, rows * columns, groups, taps).transpose(1, 2)
    factor = factor.reshape(n * groups, 1, rows * columns, taps)
    return (samples * factor).sum(-1).view(n, channels, rows, columns).permute(0, 2, 3, 1).to(input.dtype)


def _check_shapes(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    remove_center: bool,
) -> None:
    if input.ndim != 4 or offset.ndim != 4 or mask.ndim != 4:
        raise ValueError(
            "input, offset and mask must have 4 dimensions, channels last,"
            f" got {tuple(input.shape)}, {tuple(offset.shape)} and {tuple(mask.shape)}"
        )
    if 0 in input.shape[1:3]:
        raise ValueError(f"input must have at least one pixel, got {tuple(input.shape)}")
    check_least(kernel_size=(kernel, 1), stride=(stride, 1), padding=(padding, 0), dilation=(dilation, 1))
    if remove_center and (kernel == (1, 1) or 0 in (kernel[0] % 2, kernel[1] % 2)):
        raise ValueError(f"remove_center needs a kernel_size that is odd and not 1 x 1, got {kernel[0]} x {kernel[1]}")
    taps = kernel[0] * kernel[1] - remove_center
    out = output_size(input.shape[1:3], kernel, stride, padding, dilation)
    if min(out) < 1:
        raise ValueError(f"input of {tuple(input.shape[1:3])} pixels, padding included, is smaller than the kernel")
    channels, groups = input.shape[3], mask.shape[3] // taps
    if groups == 0 or mask.shape[3] != groups * taps or channels == 0 or channels % groups:
        raise ValueError(
            f"mask must have {taps} channels per group, the groups dividing {channels} input channels, got"
            f" {mask.shape[3]}"
        )
    for name, tensor, last in (("offset", offset, 2 * taps * groups), ("mask", mask, taps * groups)):
        expected = (input.shape[0], *out, last)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must be {expected}, got {tuple(tensor.shape)}")
