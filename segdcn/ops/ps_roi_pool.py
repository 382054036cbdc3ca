"""Position-sensitive deformable RoI pooling: each bin samples a map of its own.

Plain position-sensitive pooling is torchvision's (``ps_roi_align``, ``ps_roi_pool``).

Legend: N batch, C output channels, H x W map, R regions of interest, h x w bins of each, K classes, sets of offsets,
each for C / K channels, S samples of a bin.
"""

# no "from __future__ import annotations": torch.library.custom_op reads the annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segdcn.ops.checks import IntPair, check_least
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
from segdcn.ops.sampling import sum_dtype

# Numbers that the samples of one step may take, four bytes each: classes are taken together up to this.
AT_ONCE = 1 << 23


def deform_ps_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: IntPair,
    output_channels: int,
    group_size: int,
    spatial_scale: float = 1.0,
    sample_per_part: int = 4,
    part_size: int | None = None,
    gamma: float = 0.1,
    *,
    backend: PoolBackend = "auto",
) -> Tensor:
    """Position-sensitive average of each bin, the bins moved by ``offset``: the algorithm of the paper's authors.

    Each bin reads the map of its own cell of a group_size x group_size grid: map channel (c * group_size + row) *
    group_size + column for output channel c. Region corners are rounded to whole image pixels, the right and lower
    one included; a region is at least 0.1 map pixels wide. ``sample_per_part`` samples per bin and axis start at
    the bin's edge; those more than half a pixel outside the map, or not finite, are neither read nor counted.

    Shape: input (N, output_channels * group_size ** 2, H, W), rois (R, 5) as (image, x1, y1, x2, y2) in image
    pixels, offset (R, 2 * classes, part_size, part_size), for each class (x, y), in fractions of the region's width
    and height, multiplied by ``gamma``; each class moves output_channels / classes channels; None is the plain
    pooling of these samples -> (R, output_channels, h, w); N, R and output_channels may be 0.
    part_size: offsets per region and axis, by default those of the output.
    Gradients: by input and offset, none by rois. On a GPU they depend on the order of summation, as those of
    ``grid_sample`` do: ``torch.use_deterministic_algorithms(True)`` refuses them there.
    backend: ``gather``, which here is PyTorch's ``grid_sample``; ``auto`` is gather. ``triton`` is for a GPU with the
    package triton, not for float64 (see triton_pool.py); under deterministic algorithms it is gather.

    Raises: ValueError that names the argument when a shape, dtype, device, image number or coordinate does not fit.
    Source: Dai et al. 2017, section 2.2; rounding and borders: the authors' deformable_psroi_pooling.cu.
    """
    size = output_pair(output_size)
    check_least(output_channels=(output_channels, 0), group_size=(group_size, 1), sample_per_part=(sample_per_part, 1))
    input = pooled_map(input, rois, offset, backend)
    if input.shape[1] != output_channels * group_size**2:
        raise ValueError(
            f"input must have output_channels * group_size ** 2 = {output_channels * group_size**2} channels, "
            f"got {input.shape[1]}"
        )
    if part_size is None and size[0] != size[1] and offset is not None:
        raise ValueError(f"part_size must be given where output_size is not square, got output_size {size}")
    part = part_size or size[0]
    if offset is not None:
        classes = offset.shape[1] // 2 if offset.ndim == 4 else 0
        if classes < 1 or offset.shape != (rois.shape[0], 2 * classes, part, part) or output_channels % classes:
            raise ValueError(
                f"offset must be ({rois.shape[0]}, 2 * classes, {part}, {part}), the classes dividing "
                f"{output_channels} output channels, got {tuple(offset.shape)}"
            )
    if backend == "triton" and not torch.are_deterministic_algorithms_enabled():
        from segdcn.ops.triton_pool import triton_pool  # not every machine has Triton

        layout = _layout(input, offset, list(size), group_size)
        bins = _bins(input, rois.detach(), offset, layout, spatial_scale, sample_per_part, gamma)
        return triton_pool(input, bins, size, layout.cell, group_size**2)
    output: Tensor = _pool(input, rois, offset, list(size), group_size, spatial_scale, sample_per_part, gamma)
    return output


# --- the operator as torch.compile and torch.export see it --------------------------------------------------------


@torch.library.custom_op("segdcn::deform_ps_roi_pool", mutates_args=())
def _pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: list[int],
    group_size: int,
    spatial_scale: float,
    sample_per_part: int,
    gamma: float,
) -> Tensor:
    layout = _layout(input, offset, size, group_size)
    pooled = input.new_zeros(rois.shape[0], layout.classes, layout.channels, *size, dtype=sum_dtype(input))
    bins = _bins(input, rois, offset, layout, spatial_scale, sample_per_part, gamma)
    for step in _steps(input, bins, layout, sample_per_part):
        sampled = F.grid_sample(step.maps, step.grid, align_corners=False)  # (classes * h * w, C / K, R, S)
        by_bin = (sampled * step.share[:, None]).sum(-1).view(-1, *size, layout.channels, len(step.regions))
        pooled[step.regions, step.chosen] = by_bin.permute(4, 0, 3, 1, 2)
    return pooled.flatten(1, 2).to(input.dtype)


@torch.library.custom_op("segdcn::deform_ps_roi_pool_backward", mutates_args=())
def _pool_backward(
    grad: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: list[int],
    group_size: int,
    spatial_scale: float,
    sample_per_part: int,
    gamma: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:
    layout = _layout(input, offset, size, group_size)
    grad = grad.reshape(len(rois), layout.classes, layout.channels, *size).to(sum_dtype(input))
    grad_input = torch.zeros_like(layout.by_class(input), dtype=grad.dtype)
    parts = 0 if offset is None else offset.shape[-1] ** 2
    grad_offset = grad.new_zeros(rois.shape[0], layout.classes, parts, 2)
    bins = _bins(input, rois, offset, layout, spatial_scale, sample_per_part, gamma)
    for step in _steps(input, bins, layout, sample_per_part):
        of_bin = grad[step.regions, step.chosen].permute(1, 3, 4, 2, 0).flatten(0, 2)  # (classes * h * w, C / K, R)
        # what autograd calls for grid_sample: bilinear, zeros outside, corners not aligned
        by_maps, by_grid = torch.ops.aten.grid_sampler_2d_backward(
            of_bin[..., None] * step.share[:, None], step.maps, step.grid, 0, 0, False, needed
        )
        if needed[0]:
            by_cell = by_maps.unflatten(0, (-1, len(layout.cell))).transpose(1, 2)
            grad_input[step.image, step.chosen].index_add_(2, layout.cell, by_cell)
        if needed[1]:
            by_bin = (by_grid * step.moves).sum(-2).unflatten(0, (-1, len(layout.cell))) * step.reach
            # bins that share a part share its offset
            by_part = by_bin.new_zeros(len(by_bin), parts, *by_bin.shape[2:]).index_add_(1, layout.part, by_bin)
            grad_offset[step.regions, step.chosen] = by_part.permute(2, 0, 1, 3)
    by_offset = grad_offset if offset is None else grad_offset.transpose(2, 3).reshape(offset.shape)
    return grad_input.view(input.shape).to(input.dtype), like_offset(by_offset, offset)


@_pool.register_fake
def _(input: Tensor, rois: Tensor, offset: Tensor | None, size: list[int], group_size: int, *_: Any) -> Tensor:
    return input.new_empty(rois.shape[0], input.shape[1] // group_size**2, *size)


register_backward(_pool, _pool_backward)


# --- where it samples -----------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Which maps and offsets the bins read."""

    classes: int  # K
    channels: int  # C / K
    size: list[int]
    cell: Tensor  # (h * w,) of the group_size x group_size grid
    part: Tensor  # (h * w,) of the part_size x part_size grid

    def by_class(self, maps: Tensor) -> Tensor:
        """(N, C * group_size ** 2, H, W) -> (N, K, C / K, group_size ** 2, H, W)."""
        cells = maps.shape[1] // max(1, self.classes * self.channels)
        return maps.view(len(maps), self.classes, self.channels, cells, *maps.shape[2:])


class _Step(NamedTuple):
    """The regions of one image with some of the classes, k of them."""

    image: int
    regions: Tensor  # (R,) their numbers
    chosen: slice
    maps: Tensor  # (k * h * w, C / K, H, W) what each bin reads
    grid: Tensor  # (k * h * w, R, S, 2) as grid_sample takes it
    share: Tensor  # (k * h * w, R, S) of the bin's average
    moves: Tensor  # (k * h * w, R, S, 2) of the grid by pixels; 0 beyond the border, where the value does not change
    reach: Tensor  # (R, 2) pixels that an offset of 1 moves a bin along x and y


def _layout(input: Tensor, offset: Tensor | None, size: list[int], group_size: int) -> _Layout:
    classes, part_size = (1, 1) if offset is None else (offset.shape[1] // 2, offset.shape[-1])
    row, column = (torch.arange(bins, device=input.device) for bins in size)
    cell, part = (
        ((row * side // size[0])[:, None] * side + column * side // size[1]).flatten()
        for side in (group_size, part_size)
    )
    return _Layout(classes, input.shape[1] // group_size**2 // classes, size, cell, part)


def _bins(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    layout: _Layout,
    spatial_scale: float,
    sample_per_part: int,
    gamma: float,
) -> Bins:
    """The samples of the authors' deformable_psroi_pooling.cu for the arguments of ``deform_ps_roi_pool``."""
    image, corners = images_and_corners(input, rois, offset)
    whole = corners.sign() * (corners.abs() + 0.5).floor()  # halves away from zero, as in C
    corner, opposite = whole[:, :2] * spatial_scale - 0.5, (whole[:, 2:] + 1) * spatial_scale - 0.5
    extent = (opposite - corner).clamp(min=0.1)
    reach = gamma * extent
    first, side = divide(corner, extent, layout.size)
    if offset is not None:
        by_bin = offset.to(reach.dtype).flatten(2).index_select(2, layout.part)  # (R, 2 * K, h * w)
        by_bin = by_bin.view(rois.shape[0], layout.classes, 2, len(layout.part)).permute(0, 3, 1, 2)
        first = first + reach[:, None, None] * by_bin
    return Bins(image, first, side / sample_per_part, torch.full_like(side, sample_per_part).long(), reach)


def _steps(input: Tensor, bins: Bins, layout: _Layout, sample_per_part: int) -> Iterator[_Step]:
    """All samples, image by image, as many classes at once as fit."""
    image, first_point, step, _, reach = bins
    first_x, first_y = first_point.permute(3, 2, 1, 0).unbind()  # class, bin, region
    from_first = torch.arange(sample_per_part, device=input.device) * step[..., None]  # region, axis, sample

    by_class, dtype = layout.by_class(input), sum_dtype(input)
    for number in sorted(set(image.tolist())) if layout.channels else ():
        regions = (image == number).nonzero().flatten()
        of_class = len(layout.cell) * len(regions) * sample_per_part**2 * (8 + 2 * layout.channels)
        together = max(1, AT_ONCE // of_class)
        for first in range(0, layout.classes, together):
            chosen = slice(first, first + together)
            maps = by_class[number, chosen].index_select(2, layout.cell).transpose(1, 2).flatten(0, 1)
            # class, bin, region, sample
            x, y = (
                begin[chosen].index_select(2, regions)[..., None] + from_first[regions, axis]
                for axis, begin in enumerate((first_x, first_y))
            )
            grid_y, read_y, moves_y = _along(y[..., None], input.shape[2])
            grid_x, read_x, moves_x = _along(x[..., None, :], input.shape[3])
            counted = (read_y.sum(-2, keepdim=True) * read_x.sum(-1, keepdim=True)).clamp(min=1)
            yield _Step(
                number,
                regions,
                chosen,
                maps.to(dtype),
                _by_sample(grid_x, grid_y).to(dtype),
                ((read_y & read_x).to(dtype) / counted).flatten(3).flatten(0, 1),
                _by_sample(moves_x, moves_y).to(dtype),
                reach[regions].to(dtype),
            )


def _along(at: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of one axis as grid_sample takes them, whether they count, and how fast the one moves with the other."""
    read = (at >= -0.5) & (at <= side - 0.5)  # never where not finite
    # those beyond the border read its cells, whatever moves them; those that do not count are whole maps away
    grid = ((2 * at.clamp(0, side - 1) + 1) / side - 1).masked_fill(~read, -3.0)
    return grid, read, ((at >= 0) & (at < side - 1)).to(at.dtype) * (2 / side)


def _by_sample(x: Tensor, y: Tensor) -> Tensor:
    """(k, h * w, R, 1, s) and (k, h * w, R, s, 1) -> (k * h * w, R, S, 2)."""
    return torch.stack((x.expand(*x.shape[:3], y.shape[3], -1), y.expand(*y.shape[:4], x.shape[4])), dim=-1).view(
        -1, x.shape[2], y.shape[3] * x.shape[4], 2
    )
