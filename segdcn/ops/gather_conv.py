"""Deformable convolution without a kernel of its own: for each kernel point, gather a map and convolve it 1x1.

    out = sum over k of  conv1x1(gather(input, points of k), weight of k)

A tile of a gathered map stays in the cache, so that the columns which torchvision's kernel stores (K times the map)
never exist. The matrix products are 1x1 convolutions because on a CPU that is not Intel's the convolution library
can be twice as fast as ``matmul``. ``torch.compile`` and ``torch.export`` see two opaque operators.

Legend: N batch, C channels, H x W input map, Ho x Wo output map, P = N * Ho * Wo positions, T positions of a tile,
K = kh * kw kernel points, G offset groups.
"""

# no "from __future__ import annotations": torch.library.custom_op reads the annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from segdcn.ops.sampling import (
    Bags,
    corner_index,
    corner_weight,
    gather_dot,
    gather_sum,
    kernel_points,
    locate,
    map_from_rows,
    point_gradient,
    rows_for_dots,
    rows_with_ring,
    scatter_sum,
    sum_dtype,
    table_row,
)

TILE_BYTES = 3 * 2**19  # of one gathered map: it, its gradient and the weights of one kernel point share the cache


@torch.library.custom_op("segdcn::gather_conv2d", mutates_args=())
def gather_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Deformable convolution; arguments and result as ``segdcn.ops.deform_conv2d``, which checks them."""
    samples = _Samples(input, offset, weight, mask, stride, padding, dilation)
    kernel, groups = _by_tap(weight), input.shape[1] // weight.shape[1]
    output = input.new_zeros(samples.positions, len(weight), dtype=sum_dtype(input))
    for tile in samples.tiles():
        for k in range(len(kernel)):
            gathered = gather_sum(samples.rows, samples.bags(k, tile)).view(-1, input.shape[1])
            output[tile] += _product(gathered, kernel[k], groups)
    return output.to(input.dtype).view(len(input), *offset.shape[2:], len(weight)).permute(0, 3, 1, 2)


@gather_conv2d.register_fake
def _(input: Tensor, offset: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty(input.shape[0], *offset.shape[2:], weight.shape[0]).permute(0, 3, 1, 2)


@torch.library.custom_op("segdcn::gather_conv2d_backward", mutates_args=())
def gather_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by input, offset, weight and mask, of their shapes; zeros where one is not ``needed``."""
    samples = _Samples(input, offset, weight, mask, stride, padding, dilation)
    # in a function of its own, so that its buffers are free before the results are brought into their layouts
    grad_rows, grad_kernel, grad_corner = _sum_over_tiles(grad, samples, weight, *needed)
    grad_mask = input.new_zeros(0)
    if samples.mask is not None and mask is not None:
        grad_mask = _like(_by_channel((samples.bilinear * grad_corner).sum(-1), offset), mask)
        grad_corner = grad_corner * samples.mask[..., None]
    grad_y, grad_x = (_by_channel(grad, offset) for grad in point_gradient(samples.points, grad_corner.unbind(-1)))
    return (
        map_from_rows(grad_rows, input.shape).to(input.dtype),
        _like(torch.stack((grad_y, grad_x), dim=3), offset),
        _like(grad_kernel.permute(1, 2, 0, 3, 4), weight),
        grad_mask,
    )


def _sum_over_tiles(
    grad: Tensor,
    samples: "_Samples",
    weight: Tensor,
    for_input: bool,
    for_offset: bool,
    for_weight: bool,
    for_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the table of rows, by the weights of each kernel point, and by the weights of each corner."""
    rows, kernel = samples.rows, _by_tap(weight)
    taps, channels = len(kernel), samples.channels
    groups = channels // weight.shape[1]
    for_points = for_offset or for_mask
    dot_table = rows_for_dots(rows) if for_points else rows
    grad = grad.permute(0, 2, 3, 1).reshape(samples.positions, len(weight)).contiguous()
    grad_rows = torch.zeros_like(rows, dtype=sum_dtype(rows))
    grad_kernel = torch.zeros_like(kernel, dtype=sum_dtype(rows))
    grad_corner = torch.zeros_like(samples.bilinear)
    # the gradient of a tile's gathered maps is kept for all kernel points: one scatter is cheaper than K
    buffer = rows.new_empty(taps * samples.tile_length * channels)
    for tile in samples.tiles():
        grad_tile = grad[tile]
        columns = buffer[: taps * len(grad_tile) * channels].view(taps, len(grad_tile), channels)
        for k in range(taps):
            bags = samples.bags(k, tile)
            gathered = gather_sum(rows, bags).view(-1, channels)
            grad_gathered, grad_tap = _product_backward(
                grad_tile, gathered, kernel[k], groups, for_input or for_points, for_weight
            )
            if for_weight:
                grad_kernel[k] += grad_tap
            if for_points:
                dot = gather_dot(dot_table, bags, grad_gathered.view(-1, rows.shape[1]))
                grad_corner[k, tile] = dot.view_as(grad_corner[k, tile])
            if for_input:
                columns[k] = grad_gathered
        if for_input:
            scatter_sum(grad_rows, samples.bags(slice(None), tile), columns.view(-1, rows.shape[1]))
    return grad_rows, grad_kernel, grad_corner


@gather_conv2d_backward.register_fake
def _(
    grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_mask = input.new_empty(0) if mask is None else mask.new_empty(mask.shape)
    return input.new_empty(input.shape), offset.new_empty(offset.shape), weight.new_empty(weight.shape), grad_mask


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:4])
    gradients = gather_conv2d_backward(grad, *ctx.saved_tensors, ctx.stride, ctx.padding, ctx.dilation, needed)
    return *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)), None, None, None


gather_conv2d.register_autograd(_backward, setup_context=_save)


class _Samples:
    """What one call samples: its table of rows, and for (K, P, G) points their corners in it."""

    def __init__(
        self,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> None:
        n, self.channels, height, width = input.shape
        y, x = kernel_points(offset, weight.shape[2:], stride, padding, dilation)
        groups = y.shape[1]
        self.rows = rows_with_ring(input, groups)
        self.points = locate(_by_tap_and_position(y), _by_tap_and_position(x), height, width, len(self.rows))
        self.bilinear = corner_weight(self.points)
        self.mask = None if mask is None else _by_tap_and_position(mask.to(y.dtype).view(y.shape))
        self._weight = self.bilinear if self.mask is None else self.bilinear * self.mask[..., None]
        taps, self.positions, _ = self.points.cell.shape
        cell = self.points.cell.view(taps, n, math.prod(y.shape[3:]), groups)
        image = torch.arange(n, dtype=cell.dtype, device=cell.device).view(-1, 1, 1)
        group = torch.arange(groups, dtype=cell.dtype, device=cell.device)
        row = table_row(cell, image, group, (height, width), groups)
        self._index = corner_index(row.view(taps, self.positions, groups), width, groups)

        tiles = max(1, math.ceil(self.positions * self.channels * input.element_size() / TILE_BYTES))
        self.tile_length = -(-self.positions // tiles)
        bag = torch.arange(taps * self.tile_length * groups, dtype=cell.dtype, device=cell.device)
        self._start, self._owner = bag * 4, bag.repeat_interleave(4)

    def tiles(self) -> Iterator[slice]:
        for first in range(0, self.positions, max(1, self.tile_length)):
            yield slice(first, min(first + self.tile_length, self.positions))

    def bags(self, taps: int | slice, tile: slice) -> Bags:
        """One bag of four rows for each point of a tile, in the order (taps, positions, groups)."""
        index, weight = self._index[taps, tile].reshape(-1), self._weight[taps, tile].reshape(-1)
        return Bags(index, weight, self._start[: len(index) // 4], self._owner[: len(index)])


def _product(gathered: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """1x1 convolution of rows: (T, C) and (C_out, C / groups, 1, 1) -> (T, C_out)."""
    if _is_depthwise(kernel, groups):
        return gathered * kernel.flatten()
    return _rows(F.conv2d(_image(gathered), kernel, groups=groups))


def _product_backward(
    grad: Tensor, gathered: Tensor, kernel: Tensor, groups: int, for_gathered: bool, for_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Gradients (T, C) by the rows and by the kernel, of which only those that are asked for mean anything."""
    if _is_depthwise(kernel, groups):
        by_kernel = (grad * gathered).sum(dim=0).view_as(kernel) if for_kernel else kernel
        return (grad * kernel.flatten() if for_gathered else gathered), by_kernel
    by_gathered, by_kernel, _ = torch.ops.aten.convolution_backward(
        _image(grad), _image(gathered), kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], groups,
        [for_gathered, for_kernel, False],
    )  # fmt: skip
    return (_rows(by_gathered) if for_gathered else gathered), by_kernel


def _is_depthwise(kernel: Tensor, groups: int) -> bool:
    """A factor per channel, which PyTorch takes for as many convolutions, one after the other, on a single thread."""
    return len(kernel) == groups and kernel.shape[1] == 1


def _like(gradient: Tensor, argument: Tensor) -> Tensor:
    return gradient.reshape(argument.shape).to(argument.dtype).contiguous()


def _by_tap(weight: Tensor) -> Tensor:
    """(C_out, C_in / groups, kh, kw) -> K weights of a 1x1 convolution, (K, C_out, C_in / groups, 1, 1)."""
    return weight.flatten(2).permute(2, 0, 1).contiguous()[..., None, None]


def _by_tap_and_position(values: Tensor) -> Tensor:
    """(N, G, K, Ho, Wo) -> (K, P, G)."""
    return values.permute(2, 0, 3, 4, 1).reshape(values.shape[2], -1, values.shape[1])


def _by_channel(values: Tensor, offset: Tensor) -> Tensor:
    """The inverse, for an output map of the size of ``offset``: (K, P, G) -> (N, G, K, Ho, Wo)."""
    taps, _, groups = values.shape
    return values.view(taps, len(offset), *offset.shape[2:], groups).permute(1, 4, 0, 2, 3)


def _image(rows: Tensor) -> Tensor:
    """Rows (T, C) as an image of one line, (1, C, 1, T), with the very strides that are taken for channels last."""
    return rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    """The inverse: (1, C, 1, T) -> (T, C), packed: cuDNN may return another layout than it was given."""
    return image.permute(0, 2, 3, 1).reshape(image.shape[3], image.shape[1]).contiguous()
