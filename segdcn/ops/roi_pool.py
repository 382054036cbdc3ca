"""Deformable RoI pooling: sums over bags of samples, one bag for each bin.

Plain RoI pooling is torchvision's (``roi_align``, ``roi_pool``).

Legend: N batch, C channels, H x W map, R regions of interest, h x w bins of each, S samples of all bins together.
"""

# no "from __future__ import annotations": torch.library.custom_op reads the annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segdcn.ops.checks import IntPair
from segdcn.ops.regions import (
    Bins,
    PoolBackend,
    divide,
    images_and_corners,
    like_offset,
    output_pair,
    pooled_map,
    register_backward,
)
from segdcn.ops.sampling import (
    Bags,
    Points,
    corner_index,
    corner_weight,
    gather_dot,
    gather_sum,
    locate,
    map_from_rows,
    point_gradient,
    rows_for_dots,
    rows_with_ring,
    scatter_sum,
    sum_dtype,
    table_row,
)


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: IntPair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    *,
    backend: PoolBackend = "auto",
) -> Tensor:
    """Average of each bin of each region, the bins moved by ``offset``; without one ``roi_align(aligned=True)``.

    Shape: input (N, C, H, W), rois (R, 5) as (image, x1, y1, x2, y2) in image pixels, offset (R, 2, h, w) ordered
    (x, y) in fractions of the region's width and height, multiplied by ``gamma`` -> (R, C, h, w); N, C and R may be 0.
    spatial_scale: map pixels per image pixel, 1/16 for a map of output stride 16.
    sampling_ratio: samples per bin and axis; 0 takes about one per map pixel.

    Samples up to a pixel outside the map read its border, others and those that are not finite count as zero.
    Gradients: by input and offset, none by rois.
    backend: ``gather`` is that of all our operators; ``auto`` is gather. ``triton`` is for a GPU with the package
    triton, not for float64 (see triton_pool.py); under deterministic algorithms it is gather.

    Raises: ValueError that names the argument when a shape, dtype, device, image number or coordinate does not fit.
    Source: Dai et al. 2017, section 2.2 (equation 6), with the sampling of RoIAlign (He et al. 2017).
    """
    size = output_pair(output_size)
    if sampling_ratio < 0:
        raise ValueError(f"sampling_ratio must be 0 or more, got {sampling_ratio}")
    input = pooled_map(input, rois, offset, backend)
    if offset is not None and offset.shape != (rois.shape[0], 2, *size):
        raise ValueError(f"offset must be {(rois.shape[0], 2, *size)}, got {tuple(offset.shape)}")
    settings = (list(size), spatial_scale, sampling_ratio, gamma)
    if backend == "triton" and not torch.are_deterministic_algorithms_enabled():
        from segdcn.ops.triton_pool import triton_pool  # not every machine has Triton

        return triton_pool(input, _bins(input, rois.detach(), offset, *settings), size)
    output: Tensor = _pool(input, rois, offset, *settings)
    return output


# --- the operator as torch.compile and torch.export see it --------------------------------------------------------


@torch.library.custom_op("segdcn::deform_roi_pool", mutates_args=())
def _pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    samples = _samples(input, _bins(input, rois, offset, size, spatial_scale, sampling_ratio, gamma))
    pooled = gather_sum(rows_with_ring(input), _bags(input, samples))
    return pooled.view(rois.shape[0], *size, input.shape[1]).permute(0, 3, 1, 2).contiguous()


@torch.library.custom_op("segdcn::deform_roi_pool_backward", mutates_args=())
def _pool_backward(
    grad: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:
    for_input, for_offset = needed
    samples = _samples(input, _bins(input, rois, offset, size, spatial_scale, sampling_ratio, gamma))
    rows, bags = rows_with_ring(input), _bags(input, samples)
    grad = grad.permute(0, 2, 3, 1).reshape(rois.shape[0] * size[0] * size[1], input.shape[1])
    grad_rows = torch.zeros_like(rows, dtype=sum_dtype(rows))
    by_bin = samples.moves.new_zeros(rois.shape[0], size[0] * size[1], 2)
    if for_input:
        scatter_sum(grad_rows, bags, grad)
    if for_offset:
        dot = gather_dot(rows_for_dots(rows), bags, grad)
        y, x = point_gradient(samples.points, (dot.view(-1, 4) * samples.share[:, None]).unbind(-1))
        by_bin.view(-1, 2).index_add_(0, samples.bin, torch.stack((x, y), dim=-1) * samples.moves)
        by_bin *= samples.reach[:, None]
    grad_input = map_from_rows(grad_rows, input.shape).to(input.dtype)
    return grad_input, like_offset(by_bin.view(rois.shape[0], *size, 2).permute(0, 3, 1, 2), offset)


@_pool.register_fake
def _(input: Tensor, rois: Tensor, offset: Tensor | None, size: list[int], *_: Any) -> Tensor:
    return input.new_empty(rois.shape[0], input.shape[1], *size)


register_backward(_pool, _pool_backward)


# --- where it samples -----------------------------------------------------------------------------------------------


class _Samples(NamedTuple):
    """The samples of all bins, bin after bin."""

    points: Points  # (S,)
    row: Tensor  # (S,) the row of the top left corner
    share: Tensor  # (S,) of the bin's average
    moves: Tensor  # (S, 2) 1 where the value changes with x and with y; beyond the border it does not
    bin: Tensor  # (S,)
    first: Tensor  # (bins,) first sample of each bin
    reach: Tensor  # (R, 2) pixels that an offset of 1 moves a bin along x and y


def _bins(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Bins:
    """The sub-bin centres of RoIAlign (He et al. 2017) for the arguments of ``deform_roi_pool``."""
    image, corners = images_and_corners(input, rois, offset)
    corners = corners * spatial_scale - 0.5
    corner = corners[:, :2]
    extent = corners[:, 2:] - corner
    reach = gamma * extent
    first, side = divide(corner, extent, size)
    # a region turned inside out holds no samples and gives 0
    samples = side.new_full(side.shape, sampling_ratio) if sampling_ratio else torch.ceil(side).clamp(min=0)
    step = side / samples.clamp(min=1)
    first = first + step[:, None, None] / 2
    if offset is not None:
        first = first + (reach[:, None, None] * offset.to(reach.dtype).permute(0, 2, 3, 1)).view(first.shape)
    return Bins(image, first, step, samples.long(), reach)


def _samples(input: Tensor, of_regions: Bins) -> _Samples:
    image, start, step, samples, reach = of_regions
    bins = start.shape[1]
    in_bin = samples.prod(1).repeat_interleave(bins)
    bin = torch.arange(len(in_bin), device=input.device).repeat_interleave(in_bin)
    first = in_bin.cumsum(0) - in_bin
    number = torch.arange(len(bin), device=input.device) - first[bin]
    roi = bin // bins
    columns = samples[roi, 0]
    place = torch.stack((number % columns, number // columns), dim=-1)
    x, y = (start.view(-1, 2)[bin] + place * step[roi]).unbind(1)
    height, width = input.shape[2:]
    read = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)  # never where not finite
    moves = torch.stack(((x >= 0) & (x < width - 1), (y >= 0) & (y < height - 1)), dim=-1).to(y.dtype)
    # those beyond the border read its cells; NaN, of those that do not count, is what locate() keeps away from the map
    at_y = y.clamp(0, height - 1).masked_fill(~read, math.nan)
    points = locate(at_y, x.clamp(0, width - 1), height, width, len(input) * (height + 2) * (width + 2))
    row = table_row(points.cell, image[roi], 0, (height, width), 1)
    share = (1 / in_bin.clamp(min=1).to(y.dtype))[bin]
    return _Samples(points, row, share, moves, bin, first, reach)


def _bags(input: Tensor, samples: _Samples) -> Bags:
    index = corner_index(samples.row, input.shape[3]).flatten()
    weight = corner_weight(samples.points) * samples.share[:, None]
    first, owner = (t.to(index.dtype) for t in (samples.first * 4, samples.bin))
    return Bags(index, weight.flatten(), first, owner.repeat_interleave(4))
