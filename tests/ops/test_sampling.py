"""Sampling points, and sums of map cells at them, against loops written from the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segdcn.ops import kernel_points, outside_map
from segdcn.ops.sampling import (
    Bags,
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

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=20)
@given(
    kernel_size=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=pairs,
    groups=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_points_are_grid_plus_kernel_point_plus_offset(
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    seed: int,
) -> None:
    (kernel_h, kernel_w), n, out_h, out_w = kernel_size, 2, 2, 3
    k = kernel_h * kernel_w
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(n, 2 * groups * k, out_h, out_w, dtype=torch.float64, generator=generator)
    y, x = kernel_points(offset, kernel_size, stride, padding, dilation)
    assert y.shape == x.shape == (n, groups, k, out_h, out_w)
    for image, group, row, column, i, j in itertools.product(
        range(n), range(groups), range(kernel_h), range(kernel_w), range(out_h), range(out_w)
    ):
        point = row * kernel_w + column
        dy = offset[image, 2 * (group * k + point), i, j]
        dx = offset[image, 2 * (group * k + point) + 1, i, j]
        at = (image, group, point, i, j)
        assert y[at].item() == pytest.approx(i * stride[0] - padding[0] + row * dilation[0] + dy.item())
        assert x[at].item() == pytest.approx(j * stride[1] - padding[1] + column * dilation[1] + dx.item())


def test_zero_offsets_lie_the_dilation_apart() -> None:
    y, x = kernel_points(torch.zeros(1, 18, 2, 3), (3, 3), (1, 1), (2, 2), (2, 2))
    grid = torch.stack((y, x), dim=-1)[0, 0, :, 1, 2].view(3, 3, 2)
    across, down = grid[:, 1:] - grid[:, :-1], grid[1:] - grid[:-1]
    lengths = torch.cat((across.norm(dim=-1).flatten(), down.norm(dim=-1).flatten()))
    assert lengths.tolist() == [2.0] * 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coordinates_of_half_precision_offsets_are_float32(dtype: torch.dtype) -> None:
    width = 5001  # above 4096, neighbouring numbers are 4 apart in float16 and 32 in bfloat16
    _, x = kernel_points(torch.full((1, 2, 1, width), 0.25, dtype=dtype), (1, 1), (1, 1), (0, 0), (1, 1))
    assert x.dtype == torch.float32
    assert torch.equal(x.flatten(), torch.arange(width) + 0.25)


def cell(values: Tensor, row: int, column: int) -> float:
    """One value of a map that is zero outside."""
    height, width = values.shape
    return values[row, column].item() if 0 <= row < height and 0 <= column < width else 0.0


def interpolated(values: Tensor, y: float, x: float) -> float:
    """Bilinear interpolation from its definition: every cell, weighed by its distance in rows and in columns."""
    top, left = math.floor(y), math.floor(x)
    return sum(
        cell(values, row, column) * (1 - abs(y - row)) * (1 - abs(x - column))
        for row in (top, top + 1)
        for column in (left, left + 1)
    )


coordinates = st.floats(-3, 9, allow_nan=False, width=32) | st.integers(-3, 9).map(float)


@settings(max_examples=30)
@given(
    height=st.integers(1, 4),
    extra=st.integers(1, 3),
    groups=st.integers(1, 3),
    points=st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=20),
)
def test_a_gather_interpolates_a_map_that_is_zero_outside(
    height: int, extra: int, groups: int, points: list[tuple[float, float]]
) -> None:
    width, n, channels = height + extra, 2, groups * 2
    maps = torch.randn(n, channels, height, width, dtype=torch.float64)
    y, x = torch.tensor(points, dtype=torch.float64).unbind(-1)
    table = rows_with_ring(maps, groups)
    found = locate(y, x, height, width, len(table))
    # the last image, each group of channels
    row = ((height + 2) * (width + 2) + found.cell[:, None]) * groups + torch.arange(groups)
    weight = corner_weight(found)[:, None].expand(-1, groups, -1)
    read = gather_sum(table, bags_of_four(corner_index(row, width, groups), weight)).view(len(points), channels)
    for point, values in zip(points, read, strict=True):
        expected = [interpolated(maps[1, channel], *point) for channel in range(channels)]
        torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def bags_of_four(row: Tensor, weight: Tensor) -> Bags:
    count = row.numel() // 4
    start = torch.arange(count, dtype=row.dtype) * 4
    return Bags(row.flatten(), weight.flatten(), start, torch.arange(count, dtype=row.dtype).repeat_interleave(4))


def test_a_table_of_rows_is_the_map_with_a_ring_of_zeros() -> None:
    maps = torch.randn(2, 6, 3, 4)
    table = rows_with_ring(maps, groups=3)
    padded = torch.nn.functional.pad(maps, (1, 1, 1, 1))
    for image, group, row, column in itertools.product(range(2), range(3), range(5), range(6)):
        entry = table[((image * 5 + row) * 6 + column) * 3 + group]
        assert torch.equal(entry, padded[image, group * 2 : group * 2 + 2, row, column])
    assert torch.equal(map_from_rows(table, maps.shape), maps)


def test_the_scatter_and_the_dots_are_the_gradients_of_the_gather() -> None:
    rows = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([3, 0, 5, 1])  # one bag is empty
    row = torch.tensor([2, 5, 2, 4, 4, 4, 0, 6, 3], dtype=torch.int32)
    weight = torch.randn(9, dtype=torch.float64, requires_grad=True)
    start = (sizes.cumsum(0) - sizes).int()
    bags = Bags(row, weight, start, torch.arange(4, dtype=torch.int32).repeat_interleave(sizes))
    sums = gather_sum(rows, bags)
    assert not sums[1].any()
    grad = torch.randn_like(sums)
    for_rows, for_weight = torch.autograd.grad(sums, (rows, weight), grad)
    with torch.no_grad():
        table = torch.ones_like(rows)
        scatter_sum(table, bags, grad)
        torch.testing.assert_close(table, 1 + for_rows)
        torch.testing.assert_close(gather_dot(rows, bags, grad), for_weight)


def test_outside_means_no_cell_within_a_pixel() -> None:
    axis = torch.tensor([-1e30, -1.5, -1.0, -0.75, 0.0, 2.5, 3.0, 4.75, 5.0, 1e30, math.inf, -math.inf, math.nan])
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside_y, inside_x = (y > -1) & (y < 3), (x > -1) & (x < 5)
    assert torch.equal(outside_map(y, x, 3, 5), ~(inside_y & inside_x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e6])
def test_a_wild_coordinate_reads_the_ring_and_gets_no_gradient(bad: float) -> None:
    for y_value, x_value in ((bad, 1.5), (1.5, bad), (bad, bad)):
        points = locate(torch.tensor([y_value, 0.5]), torch.tensor([x_value, 2.5]), 3, 5, 35)
        weight = corner_weight(points)
        assert weight.tolist() == [[1, 0, 0, 0], [0.25] * 4]
        row = corner_index(points.cell, 5)
        assert row.min() >= 0
        assert row.max() < 5 * 7
        assert not rows_with_ring(torch.ones(1, 1, 3, 5))[row[0].long()].any()  # four cells of the ring
        y, x = point_gradient(points, torch.arange(8.0).view(2, 4).unbind(-1))
        assert (y[0], x[0]) == (0, 0)
        assert (y[1], x[1]) == (2, 1)  # d/dy of 4(1-y)(1-x) + 5(1-y)x + 6y(1-x) + 7yx, and d/dx


def test_rows_beyond_the_range_of_int32_are_counted_in_int64() -> None:
    y = x = torch.zeros(1)
    assert locate(y, x, 3, 5, 2**31 - 1).cell.dtype == torch.int32
    assert locate(y, x, 3, 5, 2**31).cell.dtype == torch.int64
