"""Deformable convolution from grid_sample and a 1x1 convolution, for runtimes that have no operator for it.

All samples lie in memory at once, K times the input map. Coordinates are fractions of the map here, so that a point
is off by some 1e-7 of the map's side. The gradients are autograd's; where a sample falls on a cell's centre, rounding
decides between the derivatives towards its two sides, both of which are right.

Legend: N batch, C channels, H x W input map, Ho x Wo output map, K = kh * kw kernel points, G offset groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from segdcn.ops.sampling import kernel_points, sampling_grid


def grid_sample_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """``deform_conv2d`` without the bias, for arguments that it has checked; in float32 at least."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    n, channels, height, width = input.shape
    channels_out, per_group, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    points = kernel_h * kernel_w
    offset_groups = offset.shape[1] // (2 * points)

    y, x = kernel_points(offset, (kernel_h, kernel_w), stride, padding, dilation)
    maps = input.to(dtype).reshape(n * offset_groups, channels // offset_groups, height, width)
    grid = sampling_grid(y, x, height, width).to(dtype).reshape(n * offset_groups, points * out_h, out_w, 2)
    samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if mask is not None:
        samples = samples * mask.to(dtype).reshape(n * offset_groups, 1, points * out_h, out_w)
    samples = samples.reshape(n, channels * points, out_h, out_w)
    kernel = weight.to(dtype).reshape(channels_out, per_group * points, 1, 1)
    return F.conv2d(samples, kernel, groups=channels // per_group).to(input.dtype)
