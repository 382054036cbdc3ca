"""Sampling points and bilinear corners, against loops written from the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segdcn.ops import kernel_points, outside_map

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=20, deadline=None)
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


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 4),
    extra=st.integers(1, 3),
    points=st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=20),
)
def test_corners_interpolate_a_map_that_is_zero_outside(
    height: int, extra: int, points: list[tuple[float, float]]
) -> None:
    width = height + extra
    values = torch.arange(1, height * width + 1, dtype=torch.float64).view(height, width) ** 2
    y, x = torch.tensor(points, dtype=torch.float64).unbind(-1)
    index, weight = bilinear_corners(y, x, height, width)
    assert index.shape == weight.shape == (len(points), 4)
    assert index.dtype == torch.int64
    assert index.min() >= 0
    assert index.max() < height * width
    read = (values.flatten()[index] * weight).sum(-1)
    expected = torch.tensor([interpolated(values, *point) for point in points], dtype=torch.float64)
    torch.testing.assert_close(read, expected)


def test_outside_means_no_cell_within_a_pixel() -> None:
    axis = torch.tensor([-1e30, -1.5, -1.0, -0.75, 0.0, 2.5, 3.0, 4.75, 5.0, 1e30, math.inf, -math.inf, math.nan])
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside_y, inside_x = (y > -1) & (y < 3), (x > -1) & (x < 5)
    assert torch.equal(outside_map(y, x, 3, 5), ~(inside_y & inside_x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e6])
def test_a_wild_coordinate_weighs_nothing_and_gets_no_gradient(bad: float) -> None:
    for y_value, x_value in ((bad, 1.5), (1.5, bad), (bad, bad)):
        y = torch.tensor([y_value, 0.5], requires_grad=True)
        x = torch.tensor([x_value, 2.5], requires_grad=True)
        index, weight = bilinear_corners(y, x, 3, 5)
        assert index[0].min() >= 0
        assert index[0].max() < 15
        assert weight.tolist() == [[0.0] * 4, [0.25] * 4]
        (weight * torch.arange(8.0).view(2, 4)).sum().backward()
        assert y.grad is not None
        assert x.grad is not None
        assert (y.grad[0], x.grad[0]) == (0, 0)
        assert (y.grad[1], x.grad[1]) == (2, 1)  # d/dy of 4(1-y)(1-x) + 5(1-y)x + 6y(1-x) + 7yx, and d/dx
