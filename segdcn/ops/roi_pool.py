"""Deformable RoI pooling and its position-sensitive form: sums over bags of samples, one bag for each bin.

Plain RoI pooling is torchvision's (``roi_align``, ``ps_roi_align``, ``roi_pool``, ``ps_roi_pool``).

Legend: N batch, C channels, H x W map, R regions of interest, h x w bins of each, S samples of all bins together.
"""

# no "from __future__ import annotations": torch.library.custom_op reads the annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from segdcn.ops.checks import autocast_dtype, check_tensors
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
    rows_with_ring,
    scatter_sum,
)

IntPair = int | tuple[int, int]


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
    (x, y) in fractions of the region's width and height, multiplied by ``gamma`` -> (R, C, h, w).
    spatial_scale: map pixels per image pixel, 1/16 for a map of output stride 16.
    sampling_ratio: samples per bin and axis; 0 takes about one per map pixel.

    Samples up to a pixel outside the map read its border, others and those that are not finite count as zero.
    Gradients: by input and offset, none by rois.

    Raises: ValueError that names the argument when a shape, dtype, device, image number or coordinate does not fit.
    Source: Dai et al. 2017, section 2.2 (equation 6), with the sampling of RoIAlign (He et al. 2017).
    """
    size = _size(output_size)
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
    pooling of these samples -> (R, output_channels, h, w).
    part_size: offsets per region and axis, by default those of the output.
    Gradients: by input and offset, none by rois.

    Raises: ValueError that names the argument when a shape, dtype, device, image number or coordinate does not fit.
    Source: Dai et al. 2017, section 2.2; rounding and borders: the authors' deformable_psroi_pooling.cu.
    """
    size = _size(output_size)
    settings = {"output_channels": output_channels, "group_size": group_size, "sample_per_part": sample_per_part}
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
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
    samples = _aligned_samples(input, rois, offset, size, spatial_scale, sampling_ratio, gamma)
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
) -> tuple[Tensor, Tensor]:
    samples = _aligned_samples(input, rois, offset, size, spatial_scale, sampling_ratio, gamma)
    grad = grad.permute(0, 2, 3, 1).reshape(-1, input.shape[1])
    grad_input, by_bin = _backward(grad, input, samples, 1)
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
    samples = _position_sensitive_samples(input, rois, offset, size, group_size, spatial_scale, sample_per_part, gamma)
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
) -> tuple[Tensor, Tensor]:
    classes = 1 if offset is None else offset.shape[1] // 2
    channels = input.shape[1] // group_size**2 // classes
    samples = _position_sensitive_samples(input, rois, offset, size, group_size, spatial_scale, sample_per_part, gamma)
    grad = grad.reshape(rois.shape[0], classes, channels, *size).permute(0, 1, 3, 4, 2).reshape(-1, channels)
    grouped = _by_class_and_group(input, classes, group_size)
    grad_grouped, by_bin = _backward(grad, grouped, samples, classes * group_size**2)
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


def _fake_backward(
    grad: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input, memory_format=torch.contiguous_format), (
        input.new_empty(0) if offset is None else offset.new_empty(offset.shape)
    )


_aligned_pool_backward.register_fake(_fake_backward)
_position_sensitive_pool_backward.register_fake(_fake_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rois, offset, *ctx.settings = inputs
    ctx.save_for_backward(input, rois, offset)


def _gradients(backward: Any) -> Any:
    def formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_input, grad_offset = backward(grad, *ctx.saved_tensors, *ctx.settings)
        wanted = ctx.needs_input_grad
        return (
            grad_input if wanted[0] else None,
            None,
            grad_offset if wanted[2] else None,
            *(None for _ in ctx.settings),
        )

    return formula


_aligned_pool.register_autograd(_gradients(_aligned_pool_backward), setup_context=_save)
_position_sensitive_pool.register_autograd(_gradients(_position_sensitive_pool_backward), setup_context=_save)


# --- what both have in common ---------------------------------------------------------------------------------------


class _Samples(NamedTuple):
    """The samples of all bins, bin after bin."""

    points: Points  # (S,)
    row: Tensor  # (S,) the row of the top left corner
    share: Tensor  # (S,) of the bin's average
    moves: Tensor  # (S, 2) 1 where the value changes with x and with y; beyond the border it does not
    bin: Tensor  # (S,)
    first: Tensor  # (bins,) first sample of each bin
    reach: Tensor  # (bins, 2) pixels that an offset of 1 moves a bin along x and y


def _forward(input: Tensor, samples: _Samples, groups: int) -> Tensor:
    """(N, C, H, W) -> (bins, C / groups)."""
    return gather_sum(rows_with_ring(input, groups), _bags(input, samples, groups))


def _backward(grad: Tensor, input: Tensor, samples: _Samples, groups: int) -> tuple[Tensor, Tensor]:
    """Gradient (bins, C / groups) -> those by input (N, C, H, W) and by each bin's offset (bins, 2), x before y."""
    rows, bags, grad = rows_with_ring(input, groups), _bags(input, samples, groups), grad.contiguous()
    grad_rows = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
    scatter_sum(grad_rows, bags, grad)
    y, x = point_gradient(samples.points, gather_dot(rows, bags, grad).view(-1, 4) * samples.share[:, None])
    moved = torch.stack((x, y), dim=-1) * samples.moves
    by_bin = torch.zeros_like(samples.reach).index_add_(0, samples.bin, moved) * samples.reach
    return map_from_rows(grad_rows, input.shape).to(input.dtype), by_bin


def _bags(input: Tensor, samples: _Samples, groups: int) -> Bags:
    index = corner_index(samples.row, input.shape[3], groups).flatten()
    weight = corner_weight(samples.points) * samples.share[:, None]
    first, owner = (t.to(index.dtype) for t in (samples.first * 4, samples.bin))
    return Bags(index, weight.flatten(), first, owner.repeat_interleave(4))


def _aligned_samples(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> _Samples:
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
    return _read(input, 1, image[roi], 0, y, x, 1.0, share[bin], bin, first, reach)


def _position_sensitive_samples(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    size: list[int],
    group_size: int,
    spatial_scale: float,
    sample_per_part: int,
    gamma: float,
) -> _Samples:
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
    height, width = input.shape[2:]
    read = (y >= -0.5) & (y <= height - 0.5) & (x >= -0.5) & (x <= width - 0.5)
    share = (1 / read.sum(dim=(-2, -1), keepdim=True).clamp(min=1).to(y.dtype)).expand(shape)

    cell = (bin_y * group_size // size[0])[:, None] * group_size + bin_x * group_size // size[1]
    group = torch.arange(classes, device=input.device).view(-1, 1, 1) * group_size**2 + cell
    in_bin = sample_per_part**2
    first = torch.arange(rois.shape[0] * classes * size[0] * size[1], device=input.device) * in_bin
    reach = gamma * torch.stack((roi_w, roi_h), dim=-1).repeat_interleave(classes * size[0] * size[1], dim=0)
    return _read(
        input,
        classes * group_size**2,
        _expand(image).expand(shape).reshape(-1),
        group[..., None, None].expand(shape).reshape(-1),
        y.reshape(-1),
        x.reshape(-1),
        0.5,
        share.reshape(-1),
        torch.arange(len(first), device=input.device).repeat_interleave(in_bin),
        first,
        reach,
    )


def _read(
    input: Tensor,
    groups: int,
    image: Tensor,
    group: Tensor | int,
    y: Tensor,
    x: Tensor,
    border: float,
    share: Tensor,
    bin: Tensor,
    first: Tensor,
    reach: Tensor,
) -> _Samples:
    """Samples at y, x: up to ``border`` pixels outside the map they read its nearest cells, farther away nothing."""
    height, width = input.shape[2:]
    read = (y >= -border) & (y <= height - 1 + border) & (x >= -border) & (x <= width - 1 + border)
    moves = torch.stack(((x >= 0) & (x < width - 1), (y >= 0) & (y < height - 1)), dim=-1)
    y = y.clamp(0, height - 1).masked_fill(~read, math.nan)  # which locate() keeps away from the map
    x = x.clamp(0, width - 1)
    points = locate(y, x, height, width, len(input) * (height + 2) * (width + 2) * groups)
    row = (image.to(points.cell.dtype) * ((height + 2) * (width + 2)) + points.cell) * groups + group
    return _Samples(points, row.to(points.cell.dtype), share, moves.to(y.dtype), bin, first, reach)


def _expand(values: Tensor) -> Tensor:
    """(R,) -> (R, 1, 1, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1, 1, 1)


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


def _size(output_size: IntPair) -> tuple[int, int]:
    height, width = _pair(output_size)
    if height < 1 or width < 1:
        raise ValueError(f"output_size must be positive, got {output_size}")
    return height, width


def _checked(input: Tensor, rois: Tensor, offset: Tensor | None) -> Tensor:
    """``input`` in the dtype in which it is pooled."""
    if input.ndim != 4:
        raise ValueError(f"input must be (N, C, H, W), got {tuple(input.shape)}")
    if rois.ndim != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois must be (R, 5) as (image, x1, y1, x2, y2), got {tuple(rois.shape)}")
    check_tensors(input, {}, {"rois": rois, "offset": offset})
    dtype = autocast_dtype(input)
    return input if dtype is None else input.to(dtype)


def _regions(input: Tensor, rois: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Image numbers (R,) and corners (R, 4), in float32 at least: half-precision ones are off by whole pixels."""
    if not bool(torch.isfinite(rois).all()):
        raise ValueError("rois must be finite, got NaN or infinity")
    image = rois[:, 0].long()
    if rois.shape[0] and (int(image.min()) < 0 or int(image.max()) >= len(input)):
        raise ValueError(f"rois must name images 0 to {len(input) - 1}, got {int(image.min())} to {int(image.max())}")
    dtype = torch.promote_types(rois.dtype if offset is None else offset.dtype, torch.float32)
    return image, rois[:, 1:].to(torch.promote_types(dtype, rois.dtype))


# --- modules ----------------------------------------------------------------------------------------------------------


class DeformRoIPool(nn.Module):
    """``deform_roi_pool`` with its own offset branch: fully connected, from the plainly pooled region.

    ``branch`` predicts one offset (x, y) per bin, in fractions of the region's size before ``gamma``, and with
    ``modulated`` one logit z per bin, whose factor on the bin is 2 * sigmoid(z). Its last layer starts at zero, so an
    untrained module is ``roi_align``. The authors train the branch of the plain form at 0.01 of the learning rate.

    hidden: widths of further layers of the branch; none in the paper, (1024, 1024) with ``modulated`` in Zhu et al.

    Shape: input (N, C, H, W), rois (R, 5) as (image, x1, y1, x2, y2) in image pixels -> (R, C, h, w).
    Source: Dai et al. 2017, section 2.2; modulated: Zhu et al. 2019, section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: IntPair,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        modulated: bool = False,
        hidden: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.output_size = _size(output_size)
        self.spatial_scale, self.sampling_ratio, self.gamma = spatial_scale, sampling_ratio, gamma
        self.modulated = modulated
        bins = self.output_size[0] * self.output_size[1]
        widths = (in_channels * bins, *hidden, bins * (3 if modulated else 2))
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
            nn.init.normal_(layers[-2].weight, std=0.01)  # type: ignore[arg-type]
        self.branch = nn.Sequential(*layers[:-1])
        _start_at_zero(self.branch[-1])

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool plainly, predict how the bins move, pool again."""
        settings = (self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma)
        plain = deform_roi_pool(input, rois, None, *settings)
        predicted = self.branch(plain.flatten(1)).view(rois.shape[0], -1, *self.output_size)
        pooled = deform_roi_pool(input, rois, predicted[:, :2], *settings)
        return pooled * 2 * predicted[:, 2:].sigmoid() if self.modulated else pooled

    def extra_repr(self) -> str:
        """The settings of the pooling."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}, modulated={self.modulated}"
        )


class DeformPSRoIPool(nn.Module):
    """``deform_ps_roi_pool`` of a feature map: score maps and offset fields are 1x1 convolutions of it.

    ``maps`` gives output_channels maps for each bin; ``offset`` gives the fields whose plain position-sensitive
    pooling is the offset (x, y) of each bin and class, and with ``modulated`` ``mask`` gives those of a logit z,
    whose factor on the bin is 2 * sigmoid(z). The fields start at zero: an untrained module pools plainly.

    output_size: bins per axis; also the group size.
    offset_classes: how many sets of offsets a region has: the number of classes where each moves on its own, as in
    the paper's classification branch, 1 where all channels move together; divides output_channels.

    Shape: input (N, C, H, W), rois (R, 5) as (image, x1, y1, x2, y2) in image pixels
    -> (R, output_channels, output_size, output_size).
    Source: Dai et al. 2017, section 2.2 and figure 4; modulated: Zhu et al. 2019, section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        output_channels: int,
        output_size: int,
        spatial_scale: float = 1.0,
        sample_per_part: int = 4,
        gamma: float = 0.1,
        *,
        offset_classes: int = 1,
        modulated: bool = False,
    ) -> None:
        super().__init__()
        if offset_classes < 1 or output_channels % offset_classes:
            raise ValueError(f"offset_classes must divide output_channels {output_channels}, got {offset_classes}")
        self.output_channels, self.output_size, self.spatial_scale = output_channels, output_size, spatial_scale
        self.sample_per_part, self.gamma, self.offset_classes = sample_per_part, gamma, offset_classes
        bins = output_size**2
        self.maps = nn.Conv2d(in_channels, output_channels * bins, 1)
        self.offset = nn.Conv2d(in_channels, 2 * offset_classes * bins, 1)
        _start_at_zero(self.offset)
        self.mask = nn.Conv2d(in_channels, offset_classes * bins, 1) if modulated else None
        if self.mask is not None:
            _start_at_zero(self.mask)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool the offset fields plainly, then the score maps at their offsets."""
        offset = self._pool(self.offset(input), rois, None, 2 * self.offset_classes)
        pooled = self._pool(self.maps(input), rois, offset, self.output_channels)
        if self.mask is None:
            return pooled
        mask = 2 * self._pool(self.mask(input), rois, None, self.offset_classes).sigmoid()
        return pooled * mask.repeat_interleave(self.output_channels // self.offset_classes, dim=1)

    def _pool(self, maps: Tensor, rois: Tensor, offset: Tensor | None, channels: int) -> Tensor:
        size = self.output_size
        return deform_ps_roi_pool(
            maps, rois, offset, size, channels, size, self.spatial_scale, self.sample_per_part, None, self.gamma
        )

    def extra_repr(self) -> str:
        """The settings of the pooling."""
        return (
            f"output_channels={self.output_channels}, output_size={self.output_size}, "
            f"spatial_scale={self.spatial_scale}, sample_per_part={self.sample_per_part}, gamma={self.gamma}, "
            f"offset_classes={self.offset_classes}"
        )


def _start_at_zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
