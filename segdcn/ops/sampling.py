"""The one primitive of every deformable operator: weighted sums of the cells of a map at fractional positions.

A map becomes a table of rows, one per cell, channels last, with a ring of zero cells around each map. A point reads
four neighbouring rows; the ring makes each of the four a row of the table, so that values fade over one pixel at the
border without a special case. A bag is the list of rows and weights that is summed into one result.

Nothing here is differentiable by autograd; the operators call both directions themselves.

Legend: N batch, C channels, H x W input map, G groups (row slices of one cell), R = N * (H + 2) * (W + 2) * G rows,
E entries of B bags, K kernel points, Ho x Wo output map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def kernel_points(
    offset: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
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
    shift = offset.to(dtype).reshape(n, channels // (2 * points), points, 2, out_h, out_w)
    rows = torch.arange(out_h, device=offset.device, dtype=dtype) * stride[0] - padding[0]
    columns = torch.arange(out_w, device=offset.device, dtype=dtype) * stride[1] - padding[1]
    tap = torch.arange(points, device=offset.device)
    tap_y = (tap // kernel_w * dilation[0]).to(dtype).view(-1, 1, 1)
    tap_x = (tap % kernel_w * dilation[1]).to(dtype).view(-1, 1, 1)
    dy, dx = shift.unbind(3)
    return dy + (tap_y + rows.view(-1, 1)), dx + (tap_x + columns)


def outside_map(y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """True where a sample reads only zeros: a whole pixel or more beyond the border, or not finite.

    Such a sample has neither a value nor a gradient, so an offset that leads there never comes back.
    """
    return ~((y > -1) & (y < height) & (x > -1) & (x < width))


def sampling_grid(y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Points in pixels of an H x W map as ``grid_sample`` takes them with corners not aligned: (...) -> (..., 2).

    Those outside are whole maps away, also where they are not finite.
    """
    # corners not aligned: else a map of one row or column has no coordinates
    grid = torch.stack([(2 * at + 1) / side - 1 for at, side in ((x, width), (y, height))], dim=-1)
    return grid.masked_fill(outside_map(y, x, height, width)[..., None], -3.0)


def rows_with_ring(input: Tensor, groups: int = 1) -> Tensor:
    """A map as a table of rows: (N, C, H, W) -> (R, C / groups), the rows of one cell next to each other."""
    n, channels, height, width = input.shape
    table = input.new_zeros(n, height + 2, width + 2, channels)
    table[:, 1:-1, 1:-1] = input.permute(0, 2, 3, 1)
    return table.view(n * (height + 2) * (width + 2) * groups, channels // groups)


def sum_dtype(features: Tensor) -> torch.dtype:
    """Sums of many half-precision terms are kept in float32."""
    return torch.promote_types(features.dtype, torch.float32)


def map_from_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of ``rows_with_ring``, without the ring: (R, C / groups) -> ``shape`` = (N, C, H, W)."""
    n, channels, height, width = shape
    return rows.view(n, height + 2, width + 2, channels)[:, 1:-1, 1:-1].permute(0, 3, 1, 2).contiguous()


def table_row(cell: Tensor, image: Tensor, group: Tensor | int, size: tuple[int, int], groups: int) -> Tensor:
    """The row of an image's cell and group, for maps of ``size`` = (H, W); the arguments broadcast."""
    cells = (size[0] + 2) * (size[1] + 2)
    return ((image.to(cell.dtype) * cells + cell) * groups + group).to(cell.dtype)


class Points(NamedTuple):
    """Points on a map: the cell to their top left, counted with the ring, and how far they lie from it."""

    cell: Tensor  # int32 or int64, any shape
    down: Tensor  # 0 to 1, like cell
    right: Tensor
    outside: Tensor  # bool


def locate(y: Tensor, x: Tensor, height: int, width: int, rows: int) -> Points:
    """Find the cells of points given in pixels of an H x W map; all arguments and results have one shape.

    Points that read only zeros, and those that are not finite, are moved to the end of the ring's first line, where
    all four corners are cells of the ring: what the map holds cannot reach them. Cells count within one image.
    ``rows`` is the length of the table: it decides between int32, which is faster, and int64.
    """
    outside = outside_map(y, x, height, width)
    y, x = y.masked_fill(outside, -1.0), x.masked_fill(outside, float(width))
    top, left = y.floor(), x.floor()
    integer = torch.int32 if rows < 2**31 else torch.int64
    cell = (top.to(integer) + 1) * (width + 2) + (left.to(integer) + 1)
    return Points(cell, y - top, x - left, outside)


def corner_index(row: Tensor, width: int, groups: int = 1) -> Tensor:
    """Rows of a point's four corners from that of its top left one: (...) -> (..., 4)."""
    down = (width + 2) * groups
    return row[..., None] + torch.tensor((0, groups, down, down + groups), dtype=row.dtype, device=row.device)


def corner_weight(points: Points) -> Tensor:
    """Bilinear weights of the four corners, in the order of ``corner_index``: (...) -> (..., 4)."""
    _, down, right, _ = points
    up, left = 1 - down, 1 - right
    return torch.stack((up * left, up * right, down * left, down * right), dim=-1)


def bilinear(points: Points, corners: Sequence[Tensor]) -> Tensor:
    """The values at points from those at their four corners, in the order of ``corner_index``."""
    _, down, right, _ = points
    top_left, top_right, bottom_left, bottom_right = corners
    return (top_left * (1 - right) + top_right * right) * (1 - down) + (
        bottom_left * (1 - right) + bottom_right * right
    ) * down


def point_gradient(points: Points, corners: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient of a sum by the points' y and x, from its gradients by the four corners' weights.

    At an integer coordinate it is the derivative towards larger coordinates; a point outside gets zero.
    Source: Dai et al. 2017, appendix A.
    """
    _, down, right, outside = points
    top_left, top_right, bottom_left, bottom_right = corners
    y = (bottom_left - top_left) * (1 - right) + (bottom_right - top_right) * right
    x = (top_right - top_left) * (1 - down) + (bottom_right - bottom_left) * down
    return y.masked_fill(outside, 0.0), x.masked_fill(outside, 0.0)


class Bags(NamedTuple):
    """Which rows are summed into which result: E entries, bag after bag."""

    row: Tensor  # (E,)
    weight: Tensor  # (E,)
    start: Tensor  # (B,) first entry of each bag
    owner: Tensor  # (E,) the bag of each entry


def gather_sum(rows: Tensor, bags: Bags) -> Tensor:
    """Sum the rows of each bag, weighted: rows (R, C) -> (B, C), in the dtype of the rows."""
    # embedding_bag wants one dtype; the weights of half-precision features are rounded only here
    weight = bags.weight.to(rows.dtype)
    return F.embedding_bag(bags.row, rows, bags.start, mode="sum", per_sample_weights=weight)


def rows_for_dots(rows: Tensor) -> Tensor:
    """The table as ``gather_dot`` reads it: only the CPU has its kernel for bfloat16; CUDA's rounds in float16."""
    return rows if rows.is_cpu else rows.to(sum_dtype(rows))


def gather_dot(rows: Tensor, bags: Bags, sums: Tensor) -> Tensor:
    """Gradient of ``gather_sum`` by the weights, from that by its results: (B, C) -> (E,), dot products."""
    if not len(bags.row):
        return torch.zeros_like(bags.weight)
    # what autograd calls for embedding_bag; 0 is the mode "sum"
    dot: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        sums.to(rows.dtype), rows, bags.row, bags.start, bags.owner, 0
    )
    return dot.to(bags.weight.dtype)


def scatter_sum(table: Tensor, bags: Bags, sums: Tensor) -> None:
    """Gradient of ``gather_sum`` by the rows: add each bag's gradient (B, C) to its rows of ``table`` (R, C), in place.

    A gather as well, with rows and bags exchanged: for each row the list of the bags that read it. Several times
    faster than adding entry by entry (index_add_), and the order of summation is fixed.
    """
    scatter_corners(table, [(bags.row, bags.weight)], bags.owner, sums)


def scatter_corners(table: Tensor, corners: Sequence[tuple[Tensor, Tensor]], owner: Tensor, sums: Tensor) -> None:
    """``scatter_sum`` of points' four corners, each the same number of rows from the first: sorts the points alone.

    Shape: table (R, C); of each corner its rows and weights (M,); owner (M,) the bag of each point; sums (B, C).
    """
    if not len(owner):
        return
    key, order = torch.sort(corners[0][0], stable=True)
    # only the stretch of the table that is read at all
    first, last = int(key[0]), int(key[-1])
    count = torch.bincount(key - first)
    start = (count.cumsum(0) - count).to(key.dtype)
    owner = owner.index_select(0, order)  # several times faster than indexing with brackets
    for row, weight in corners:
        shift = int(row[0] - corners[0][0][0])
        bags = Bags(owner, weight.index_select(0, order), start, key)
        table[first + shift : last + 1 + shift] += gather_sum(sums, bags)
