from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segdcn.analysis import LayerCall, effective_dilation, record
from segdcn.ops import DeformConv2d


def call_of(layer: DeformConv2d, size: tuple[int, int] = (9, 11)) -> LayerCall:
    (call,) = record(nn.Sequential(layer).eval(), torch.randn(2, layer.in_channels, *size), {"0": layer})
    return call


@settings(max_examples=30)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda k: k != (1, 1)),
    dilation=st.integers(1, 5),
    stride=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    modulated=st.booleans(),
)
def test_without_offsets_it_is_the_dilation_exactly(
    kernel: tuple[int, int], dilation: int, stride: int, groups: int, modulated: bool
) -> None:
    layer = DeformConv2d(2, 2, kernel, stride, padding=9, dilation=dilation, offset_groups=groups, modulated=modulated)
    found = effective_dilation(call_of(layer))
    assert found.shape[:2] == (2, groups)
    assert (found == dilation).all()


def test_a_field_whose_value_is_known() -> None:
    layer = DeformConv2d(1, 1, 3, padding=1)
    with torch.no_grad():  # the kernel is stretched: rows to thrice, columns to twice their distance
        for ky in range(3):
            for kx in range(3):
                layer.offset.bias[2 * (3 * ky + kx)] = 2 * (ky - 1)
                layer.offset.bias[2 * (3 * ky + kx) + 1] = kx - 1
    assert (effective_dilation(call_of(layer)) == (6 * 3 + 6 * 2) / 12).all()
    with torch.no_grad():
        layer.offset.bias.zero_()
        layer.offset.bias[8], layer.offset.bias[9] = 3.0, 4.0  # the centre alone, to (4, 5) from the upper left tap
    # its neighbours, from there: above (-4, -4), left (-3, -5), right (-3, -3), below (-2, -4)
    moved = math.hypot(4, 4) + math.hypot(3, 5) + math.hypot(3, 3) + math.hypot(2, 4)
    torch.testing.assert_close(effective_dilation(call_of(layer)), torch.full((2, 1, 9, 11), (8 + moved) / 12))


def test_any_field_by_a_slow_loop() -> None:
    layer = DeformConv2d(4, 2, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(3, 2), offset_groups=2)
    nn.init.normal_(layer.offset.weight)
    call = call_of(layer)
    found = effective_dilation(call)
    for n, g, i, j in ((0, 0, 0, 0), (1, 0, 2, 3), (0, 1, 3, 10), (1, 1, 1, 5)):
        points = {(k // 3, k % 3): call.taps[n, g, k, :, i, j].tolist() for k in range(6)}
        lengths = [
            math.dist(points[a], points[b])
            for a in points
            for b in points
            if a < b and abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1
        ]
        assert len(lengths) == 7
        assert found[n, g, i, j].item() == pytest.approx(sum(lengths) / 7, rel=1e-5)


def test_one_point_has_no_dilation() -> None:
    with pytest.raises(ValueError, match="single kernel point"):
        effective_dilation(call_of(DeformConv2d(1, 1, 1)))
