"""Where the RoI poolings sample: the rules of both, region corners to points.

Legend: N batch, C channels, H x W map, R regions of interest, S samples of all bins together.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from segdcn.ops.sampling import Points, locate, table_row


class RoISamples(NamedTuple):
    """The samples of all bins, bin after bin."""

    points: Points  # (S,)
    row: Tensor  # (S,) the row of the top left corner
    share: Tensor  # (S,) of the bin's average
    moves: Tensor  # (S, 2) 1 where the value changes with x and with y; beyond the border it does not
    bin: Tensor  # (S,)
    first: Tensor  # (bins,) first sample of each bin
    reach: Tensor  # (bins, 2) pixels that an offset of 1 moves a bin along x and y


def aligned_samples(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> RoISamples:
    """The sub-bin centres of RoIAlign (He et al. 2017) for the arguments of ``deform_roi_pool``."""
    image, corners = _regions(input, rois, offset)
    left, top, right, bottom = (corners * spatial_scale - 0.5).unbind(1)
    roi_w, roi_h = right - left, bottom - top
    (bins_h, bins_w), bins = size, size[0] * size[1]
    # a region turned inside out holds no samples and gives 0
    grid_h, grid_w = (
        torch.full_like(image, sampling_ratio) if sampling_ratio else torch.ceil(side / count).long().clamp(min=0)
        for side, count in ((roi_h, bins_h), (roi_w, bins_w))
    )
    in_bin = (grid_h * grid_w).repeat_interleave(bins)
    bin = torch.arange(len(in_bin), device=input.device).repeat_interleave(in_bin)
    first = in_bin.cumsum(0) - in_bin
    number = torch.arange(len(bin), device=input.device) - first[bin]
    roi = bin // bins
    rows, columns = grid_h[roi], grid_w[roi]
    # how far down and along its bin, in bins; the coordinates' dtype, not that of integers divided
    down = ((number // columns).to(top.dtype) + 0.5) / rows
    along = ((number % columns).to(top.dtype) + 0.5) / columns
    y = top[roi] + (bin % bins // bins_w + down) * (roi_h / bins_h)[roi]
    x = left[roi] + (bin % bins_w + along) * (roi_w / bins_w)[roi]
    reach = gamma * torch.stack((roi_w, roi_h), dim=-1).repeat_interleave(bins, dim=0)
    if offset is not None:
        shift = reach * offset.to(reach.dtype).permute(0, 2, 3, 1).reshape(-1, 2)
        x, y = x + shift[bin, 0], y + shift[bin, 1]
    share = 1 / in_bin.clamp(min=1).to(y.dtype)
    return _samples(input, 1, image[roi], 0, y, x, _is_read(input, y, x, 1.0), share[bin], bin, first, reach)


def position_sensitive_samples(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: list[int],
    group_size: int,
    spatial_scale: float,
    sample_per_part: int,
    gamma: float,
) -> RoISamples:
    """The samples of the authors' deformable_psroi_pooling.cu for the arguments of ``deform_ps_roi_pool``."""
    image, corners = _regions(input, rois, offset)
    classes = 1 if offset is None else offset.shape[1] // 2
    whole = corners.sign() * (corners.abs() + 0.5).floor()  # halves away from zero, as in C
    left, top = (whole[:, :2] * spatial_scale - 0.5).unbind(1)
    right, bottom = ((whole[:, 2:] + 1) * spatial_scale - 0.5).unbind(1)
    roi_w, roi_h = (right - left).clamp(min=0.1), (bottom - top).clamp(min=0.1)
    bin_y, bin_x = (torch.arange(bins, device=input.device) for bins in size)
    step = torch.arange(sample_per_part, device=input.device, dtype=top.dtype) / sample_per_part
    # dimensions: region, class, bin row, bin column, sample row, sample column
    y = _expand(top) + (bin_y.view(-1, 1, 1, 1) + step.view(-1, 1)) * _expand(roi_h / size[0])
    x = _expand(left) + (bin_x.view(-1, 1, 1) + step) * _expand(roi_w / size[1])
    if offset is not None:
        part = offset.shape[-1]
        by_bin = offset.to(y.dtype).view(rois.shape[0], classes, 2, part, part)
        by_bin = by_bin[..., (bin_y * part // size[0])[:, None], bin_x * part // size[1]] * gamma
        x = x + by_bin[:, :, 0, ..., None, None] * _expand(roi_w)
        y = y + by_bin[:, :, 1, ..., None, None] * _expand(roi_h)
    shape = (rois.shape[0], classes, *size, sample_per_part, sample_per_part)
    y, x = y.expand(shape), x.expand(shape)
    read = _is_read(input, y, x, 0.5)
    share = (1 / read.sum(dim=(-2, -1), keepdim=True).clamp(min=1).to(y.dtype)).expand(shape)

    cell = (bin_y * group_size // size[0])[:, None] * group_size + bin_x * group_size // size[1]
    group = torch.arange(classes, device=input.device).view(-1, 1, 1) * group_size**2 + cell
    in_bin = sample_per_part**2
    first = torch.arange(rois.shape[0] * classes * size[0] * size[1], device=input.device) * in_bin
    reach = gamma * torch.stack((roi_w, roi_h), dim=-1).repeat_interleave(classes * size[0] * size[1], dim=0)
    return _samples(
        input,
        classes * group_size**2,
        _expand(image).expand(shape).reshape(-1),
        group[..., None, None].expand(shape).reshape(-1),
        y.reshape(-1),
        x.reshape(-1),
        read.reshape(-1),
        share.reshape(-1),
        torch.arange(len(first), device=input.device).repeat_interleave(in_bin),
        first,
        reach,
    )


def _is_read(input: Tensor, y: Tensor, x: Tensor, border: float) -> Tensor:
    """Whether samples count: up to ``border`` pixels beyond the outermost cells' centres; never where not finite."""
    height, width = input.shape[2:]
    return (y >= -border) & (y <= height - 1 + border) & (x >= -border) & (x <= width - 1 + border)


def _samples(
    input: Tensor,
    groups: int,
    image: Tensor,
    group: Tensor | int,
    y: Tensor,
    x: Tensor,
    read: Tensor,
    share: Tensor,
    bin: Tensor,
    first: Tensor,
    reach: Tensor,
) -> RoISamples:
    """Samples at y, x: those that are ``read`` read the map's nearest cells where they lie outside it."""
    height, width = input.shape[2:]
    moves = torch.stack(((x >= 0) & (x < width - 1), (y >= 0) & (y < height - 1)), dim=-1)
    y = y.clamp(0, height - 1).masked_fill(~read, math.nan)  # which locate() keeps away from the map
    x = x.clamp(0, width - 1)
    points = locate(y, x, height, width, len(input) * (height + 2) * (width + 2) * groups)
    row = table_row(points.cell, image, group, (height, width), groups)
    return RoISamples(points, row, share, moves.to(y.dtype), bin, first, reach)


def _expand(values: Tensor) -> Tensor:
    """(R,) -> (R, 1, 1, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1, 1, 1)


def _regions(input: Tensor, rois: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Image numbers (R,) and corners (R, 4), in float32 at least: half-precision ones are off by whole pixels."""
    if not bool(torch.isfinite(rois).all()):
        raise ValueError("rois must be finite, got NaN or infinity")
    image = rois[:, 0].long()
    if rois.shape[0] and (int(image.min()) < 0 or int(image.max()) >= len(input)):
        named = f"got {int(image.min())} to {int(image.max())}"
        if not len(input):
            raise ValueError(f"rois must be empty where input has no images, {named}")
        raise ValueError(f"rois must name images 0 to {len(input) - 1}, {named}")
    dtype = torch.promote_types(rois.dtype if offset is None else offset.dtype, torch.float32)
    return image, rois[:, 1:].to(torch.promote_types(dtype, rois.dtype))
