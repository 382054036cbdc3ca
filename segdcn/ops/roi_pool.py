"""Deformable RoI pooling and its position-sensitive form: sums over bags of samples, one bag for each bin.

Plain RoI pooling is torchvision's (``roi_align``, ``ps_roi_align``, ``roi_pool``, ``ps_roi_pool``).

Legend: N batch, C channels, H x W map, R regions of interest, h x w bins of each, S samples of all bins together.
"""

# no "from __future__ import annotations": torch.library.custom_op reads the annotations

from typing import Any

import torch
from torch import Tensor

from segdcn.ops.checks import IntPair, autocast_dtype, check_map, check_tensors, two
from segdcn.ops.roi_samples import RoISamples, aligned_samples, position_sensitive_samples
from segdcn.ops.sampling import (
    Bags,
    corner_index,
    corner_weight,
    gather_dot,
    gather_sum,
    map_from_rows,
    point_gradient,
    rows_for_dots,
    rows_with_ring,
    scatter_sum,
    sum_dtype,
)


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: IntPair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """Average of each bin of each region, the bins moved by ``offset``; without one ``roi_align(aligned=True)``.

    Shape: input (N, C, H, W), rois (R, 5) as (image, x1, y1, x2, y2) in image pixels, offset (R, 2, h, w) ordered
    (x, y) in fractions of the region's width and height, multiplied by ``gamma`` -> (R, C, h, w); N, C and R may be 0.
    spatial_scale: map pixels per image pixel, 1/16 for a map of output stride 16.
    sampling_ratio: samples per bin and axis; 0 takes about one per map pixel.

    Samples up to a pixel outside the map read its border, others and those that are not finite count as zero.
    Gradients: by input and offset, none by rois.

    Raises: ValueError that names the argument when a shape, dtype, device, image number or coordinate does not fit.
    Source: Dai et al. 2017, section 2.2 (equation 6), with the sampling of RoIAlign (He et al. 2017).
    """
    size = output_pair(output_size)
    if sampling_ratio < 0:
        raise ValueError(f"sampling_ratio must be 0 or more, got {sampling_ratio}")
    input = _checked(input, rois, offset)
    if offset is not None and offset.shape != (rois.shape[0], 2, *size):
        raise ValueError(f"offset must be {(rois.shape[0], 2, *size)}, got {tuple(offset.shape)}")
    output: Tensor = _aligned_pool(input, rois, offset, list(size), spatial_scale, sampling_ratio, gamma)
    return output


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
    Gradients: by input and offset, none by rois.

    Raises: ValueError that names the argument when a shape, dtype, device, image number or coordinate does not fit.
    Source: Dai et al. 2017, section 2.2; rounding and borders: the authors' deformable_psroi_pooling.cu.
    """
    size = output_pair(output_size)
    for name, value, lowest in (
        ("output_channels", output_channels, 0),
        ("group_size", group_size, 1),
        ("sample_per_part", sample_per_part, 1),
    ):
        if value < lowest:
            raise ValueError(f"{name} must be {lowest} or more, got {value}")
    input = _checked(input, rois, offset)
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
    output: Tensor = _position_sensitive_pool(
        input, rois, offset, list(size), group_size, spatial_scale, sample_per_part, gamma
    )
    return output


# --- the operators as torch.compile and torch.export see them -----------------------------------------------------


@torch.library.custom_op("segdcn::deform_roi_pool", mutates_args=())
def _aligned_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    samples = aligned_samples(input, rois, offset, size, spatial_scale, sampling_ratio, gamma)
    return _forward(input, samples, 1).view(rois.shape[0], *size, input.shape[1]).permute(0, 3, 1, 2).contiguous()


@torch.library.custom_op("segdcn::deform_roi_pool_backward", mutates_args=())
def _aligned_pool_backward(
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
    samples = aligned_samples(input, rois, offset, size, spatial_scale, sampling_ratio, gamma)
    grad = grad.permute(0, 2, 3, 1).reshape(rois.shape[0] * size[0] * size[1], input.shape[1])
    grad_input, by_bin = _backward(grad, input, samples, 1, *needed)
    return grad_input, _like(by_bin.view(rois.shape[0], *size, 2).permute(0, 3, 1, 2), offset)


@torch.library.custom_op("segdcn::deform_ps_roi_pool", mutates_args=())
def _position_sensitive_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: list[int],
    group_size: int,
    spatial_scale: float,
    sample_per_part: int,
    gamma: float,
) -> Tensor:
    classes = 1 if offset is None else offset.shape[1] // 2
    samples = position_sensitive_samples(input, rois, offset, size, group_size, spatial_scale, sample_per_part, gamma)
    channels = input.shape[1] // group_size**2
    pooled = _forward(_by_class_and_group(input, classes, group_size), samples, classes * group_size**2)
    by_class = pooled.view(rois.shape[0], classes, *size, channels // classes).permute(0, 1, 4, 2, 3)
    return by_class.reshape(rois.shape[0], channels, *size).contiguous()


@torch.library.custom_op("segdcn::deform_ps_roi_pool_backward", mutates_args=())
def _position_sensitive_pool_backward(
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
    classes = 1 if offset is None else offset.shape[1] // 2
    channels = input.shape[1] // group_size**2 // classes
    samples = position_sensitive_samples(input, rois, offset, size, group_size, spatial_scale, sample_per_part, gamma)
    grad = grad.reshape(rois.shape[0], classes, channels, *size).permute(0, 1, 3, 4, 2)
    grad = grad.reshape(rois.shape[0] * classes * size[0] * size[1], channels)
    grouped = _by_class_and_group(input, classes, group_size)
    grad_grouped, by_bin = _backward(grad, grouped, samples, classes * group_size**2, *needed)
    grad_input = _by_class_and_group(grad_grouped, classes, group_size, back=True)
    if offset is None:
        return grad_input, input.new_zeros(0)
    # bins that share a part share its offset
    part = offset.shape[-1]
    row, column = (torch.arange(bins, device=input.device) * part // bins for bins in size)
    grad_offset = by_bin.new_zeros(rois.shape[0] * classes, part**2, 2)
    grad_offset.index_add_(
        1, (row[:, None] * part + column).flatten(), by_bin.view(len(grad_offset), size[0] * size[1], 2)
    )
    return grad_input, _like(grad_offset.transpose(1, 2).reshape(offset.shape), offset)


@_aligned_pool.register_fake
def _(input: Tensor, rois: Tensor, offset: Tensor | None, size: list[int], *_: Any) -> Tensor:
    return input.new_empty(rois.shape[0], input.shape[1], *size)


@_position_sensitive_pool.register_fake
def _(input: Tensor, rois: Tensor, offset: Tensor | None, size: list[int], group_size: int, *_: Any) -> Tensor:
    return input.new_empty(rois.shape[0], input.shape[1] // group_size**2, *size)


def _fake_backward(grad: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    grad_offset = input.new_empty(0) if offset is None else offset.new_empty(offset.shape)
    return input.new_empty(input.shape), grad_offset


_aligned_pool_backward.register_fake(_fake_backward)
_position_sensitive_pool_backward.register_fake(_fake_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rois, offset, *ctx.settings = inputs
    ctx.save_for_backward(input, rois, offset)


def _gradients(backward: Any) -> Any:
    def formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for_input, _, for_offset, *_ = ctx.needs_input_grad
        grad_input, grad_offset = backward(grad, *ctx.saved_tensors, *ctx.settings, [for_input, for_offset])
        settings = (None for _ in ctx.settings)
        return grad_input if for_input else None, None, grad_offset if for_offset else None, *settings

    return formula


_aligned_pool.register_autograd(_gradients(_aligned_pool_backward), setup_context=_save)
_position_sensitive_pool.register_autograd(_gradients(_position_sensitive_pool_backward), setup_context=_save)


# --- what both have in common ---------------------------------------------------------------------------------------


def _forward(input: Tensor, samples: RoISamples, groups: int) -> Tensor:
    """(N, C, H, W) -> (bins, C / groups)."""
    return gather_sum(rows_with_ring(input, groups), _bags(input, samples, groups))


def _backward(
    grad: Tensor, input: Tensor, samples: RoISamples, groups: int, for_input: bool, for_offset: bool
) -> tuple[Tensor, Tensor]:
    """Gradient (bins, C / groups) -> those by input (N, C, H, W) and by each bin's offset (bins, 2), x before y.

    One that is not asked for is left zero.
    """
    rows, bags, grad = rows_with_ring(input, groups), _bags(input, samples, groups), grad.contiguous()
    grad_rows = torch.zeros_like(rows, dtype=sum_dtype(rows))
    by_bin = torch.zeros_like(samples.reach)
    if for_input:
        scatter_sum(grad_rows, bags, grad)
    if for_offset:
        dot = gather_dot(rows_for_dots(rows), bags, grad)
        y, x = point_gradient(samples.points, dot.view(-1, 4) * samples.share[:, None])
        by_bin.index_add_(0, samples.bin, torch.stack((x, y), dim=-1) * samples.moves).mul_(samples.reach)
    return map_from_rows(grad_rows, input.shape).to(input.dtype), by_bin


def _bags(input: Tensor, samples: RoISamples, groups: int) -> Bags:
    index = corner_index(samples.row, input.shape[3], groups).flatten()
    weight = corner_weight(samples.points) * samples.share[:, None]
    first, owner = (t.to(index.dtype) for t in (samples.first * 4, samples.bin))
    return Bags(index, weight.flatten(), first, owner.repeat_interleave(4))


def _by_class_and_group(maps: Tensor, classes: int, group_size: int, back: bool = False) -> Tensor:
    """Channels in the order (class, channel, group) to (class, group, channel), and back."""
    n, channels, height, width = maps.shape
    cells = group_size**2
    rest = channels // classes // cells
    inner = (cells, rest) if back else (rest, cells)
    order = maps.reshape(n, classes, *inner, height, width).transpose(2, 3)
    return order.reshape(n, channels, height, width).contiguous()


def _like(gradient: Tensor, offset: Tensor | None) -> Tensor:
    return gradient.new_zeros(0) if offset is None else gradient.to(offset.dtype).contiguous()


# --- checks -----------------------------------------------------------------------------------------------------------


def output_pair(output_size: IntPair) -> tuple[int, int]:
    """Bins per region as (height, width); ValueError unless both are positive."""
    height, width = two(output_size)
    if height < 1 or width < 1:
        raise ValueError(f"output_size must be positive, got {output_size}")
    return height, width


def _checked(input: Tensor, rois: Tensor, offset: Tensor | None) -> Tensor:
    """``input`` in the dtype in which it is pooled."""
    check_map(input)
    if rois.ndim != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois must be (R, 5) as (image, x1, y1, x2, y2), got {tuple(rois.shape)}")
    check_tensors(input, {}, {"rois": rois, "offset": offset})
    dtype = autocast_dtype(input)
    return input if dtype is None else input.to(dtype)
