"""Where a deformable kernel samples, and which map cells such a fractional point reads.

Legend: N batch, G offset groups, K kernel points, H x W input map, Ho x Wo output map.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kernel_points(
    offset: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Sampling points of a deformable convolution, in pixels of its input map.

    Shape: offset (N, 2GK, Ho, Wo), interleaved (dy, dx) per kernel point, row-major over the kernel, group
    slowest -> y, x, each (N, G, K, Ho, Wo). Half-precision offsets are widened to float32 first, because a
    half-precision coordinate is off by whole pixels on a large map.
    Source: Dai et al. 2017, section 2.1 (equation 2).
    """
    n, channels, out_h, out_w = offset.shape
    kernel_h, kernel_w = kernel_size
    points = kernel_h * kernel_w
    dtype = torch.promote_types(offset.dtype, torch.float32)
    shift = offset.to(dtype).view(n, channels // (2 * points), points, 2, out_h, out_w)
    rows = torch.arange(out_h, device=offset.device, dtype=dtype) * stride[0] - padding[0]
    columns = torch.arange(out_w, device=offset.device, dtype=dtype) * stride[1] - padding[1]
    tap = torch.arange(points, device=offset.device)
    tap_y = (tap // kernel_w * dilation[0]).to(dtype).view(-1, 1, 1)
    tap_x = (tap % kernel_w * dilation[1]).to(dtype).view(-1, 1, 1)
    return shift[:, :, :, 0] + (tap_y + rows.view(-1, 1)), shift[:, :, :, 1] + (tap_x + columns)


def outside_map(y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """True where a sample reads only zeros: a whole pixel or more beyond the border, or not finite.

    Such a sample has neither a value nor a gradient, so an offset that leads there never comes back.
    """
    return ~((y > -1) & (y < height) & (x > -1) & (x < width))


def bilinear_corners(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four cells around each point and their bilinear weights.

    Cells outside the map weigh zero, so values fade over one pixel at the border: the rule of torchvision and
    of DCNv2. A point that is not finite, or far outside, weighs zero at all four and gets a zero gradient.

    Shape: y, x (...) -> index int64 (..., 4) = row * width + column, always a valid cell; weight (..., 4).
    """
    outside = outside_map(y, x, height, width)
    # masked before floor(): NaN and 1e30 have no meaningful integer
    y, x = y.masked_fill(outside, 0.0), x.masked_fill(outside, 0.0)
    top, left = y.detach().floor(), x.detach().floor()
    fraction_y, fraction_x = y - top, x - left
    top, left = top.long(), left.long()
    bottom, right = top + 1, left + 1
    weight_top = (1 - fraction_y).masked_fill(outside | (top < 0), 0.0)
    weight_bottom = fraction_y.masked_fill(outside | (bottom >= height), 0.0)
    weight_left = (1 - fraction_x).masked_fill(left < 0, 0.0)
    weight_right = fraction_x.masked_fill(right >= width, 0.0)
    top, bottom = top.clamp(min=0) * width, bottom.clamp(max=height - 1) * width
    left, right = left.clamp(min=0), right.clamp(max=width - 1)
    index = torch.stack((top + left, top + right, bottom + left, bottom + right), dim=-1)
    weight = torch.stack(
        (
            weight_top * weight_left,
            weight_top * weight_right,
            weight_bottom * weight_left,
            weight_bottom * weight_right,
        ),
        dim=-1,
    )
    return index, weight
