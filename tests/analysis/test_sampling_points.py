from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from segdcn.analysis import sampling_points
from segdcn.ops import DeformConv2d


def stack(*dilations: int, **options: object) -> nn.Sequential:
    """Undeformed 3x3 layers behind a convolution of stride 4."""
    layers = [DeformConv2d(4, 4, 3, padding=d, dilation=d, **options) for d in dilations]  # type: ignore[arg-type]
    return nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), *layers).eval()


def points_of(network: nn.Module, image: Tensor, pixels: list[tuple[int, int]], layers: int = 3) -> Tensor:
    """After the whole chain."""
    (depths,) = sampling_points(network, image, pixels, layers)
    return depths[-1]


def ordered(points: Tensor) -> list[tuple[float, ...]]:
    return sorted(tuple(round(value, 3) for value in point) for point in points.tolist())


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("offset_groups", [1, 2])
def test_undeformed_layers_give_the_grid_of_the_stacked_convolutions(modulated: bool, offset_groups: int) -> None:
    network = stack(1, 2, 3, modulated=modulated, offset_groups=offset_groups)
    points = points_of(network, torch.randn(1, 3, 80, 120), [(41, 62)])  # cell (10, 15) of 20 x 30
    steps = [[(dy * d, dx * d) for dy in (-1, 0, 1) for dx in (-1, 0, 1)] for d in (1, 2, 3)]
    expected = [
        ((10 + sum(y for y, _ in path) + 0.5) * 4 - 0.5, (15 + sum(x for _, x in path) + 0.5) * 4 - 0.5)
        for path in itertools.product(*steps)
    ]
    assert len(points) == 729
    assert ordered(points) == sorted(expected)


@pytest.mark.parametrize("kind", [nn.Conv2d, DeformConv2d])
def test_each_depth_of_an_undeformed_network_is_a_regular_grid(kind: type[nn.Module]) -> None:
    layers = [kind(4, 4, 3, padding=1) for _ in range(4)]
    network = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), *layers).eval()
    (depths,) = sampling_points(network, torch.randn(1, 3, 64, 96), [(33, 50)])  # cell (8, 12)
    assert [len(points) for points in depths] == [9, 81, 729]
    for reach, points in enumerate(depths, start=1):
        counted = Counter(map(tuple, points.tolist()))
        ways = Counter({0: 1})  # how many paths of `reach` steps end so far away, along one axis
        for _ in range(reach):
            ways = Counter({d: ways[d - 1] + ways[d] + ways[d + 1] for d in range(-reach, reach + 1)})
        assert counted == {
            ((8 + dy + 0.5) * 4 - 0.5, (12 + dx + 0.5) * 4 - 0.5): ways[dy] * ways[dx] for dy in ways for dx in ways
        }


def test_offsets_move_the_points_and_are_read_at_the_nearest_cell() -> None:
    network = stack(1, 1)
    first, last = network[1], network[2]
    with torch.no_grad():
        last.offset.bias[0::2] = 2.4  # (dy, dx): two cells down for the reading of the first layer's offsets
        last.offset.bias[1::2] = -1.0
        first.offset.bias[2 * 5 + 1] = 0.5  # the sixth kernel point (1, 2) looks further right
        first.offset.weight[0] = 0.1  # and the first one's dy varies over the map
    image = torch.randn(1, 3, 48, 64)
    points = points_of(network, image, [(20, 30)])

    with torch.no_grad():
        offset = first.offset(network[0](image))[0]  # (18, 12, 16)
    expected = []
    for ky, kx in itertools.product(range(3), repeat=2):
        row, col = 5 + ky - 1 + 2, 7 + kx - 1 - 1  # the last layer's tap, rounded: 2.4 -> 2
        for qy, qx in itertools.product(range(3), repeat=2):
            index = 2 * (3 * qy + qx)
            y = row + qy - 1 + offset[index, row, col].item()
            x = col + qx - 1 + offset[index + 1, row, col].item()
            expected.append(((y + 0.5) * 4 - 0.5, (x + 0.5) * 4 - 0.5))
    torch.testing.assert_close(torch.tensor(ordered(points)), torch.tensor(sorted(expected)), atol=2e-3, rtol=0)


def test_taps_outside_the_map_stay_as_one_point_each() -> None:
    points = points_of(stack(1, 1), torch.randn(1, 3, 32, 48), [(0, 0)])
    # In the corner 4 of 9 taps are inside and become 9 points each; the other 5 stay.
    assert len(points) == 4 * 9 + 5
    outside = (points < -0.5).any(dim=1)
    assert outside.sum() == 5 + 5 + 3 + 3  # the taps of (0, 0), (0, 1), (1, 0) beyond the border; (1, 1) has none


def test_layers_limits_the_chain() -> None:
    image = torch.randn(1, 3, 160, 176)
    for layers in (1, 2, 3):
        points = points_of(stack(1, 1, 1, 1), image, [(80, 90)], layers)
        assert len(points) == 9**layers


def test_chain_ends_where_the_resolution_changes() -> None:
    network = nn.Sequential(DeformConv2d(3, 3, 3, padding=1), nn.AvgPool2d(2), DeformConv2d(3, 3, 3, padding=1)).eval()
    points = points_of(network, torch.randn(1, 3, 16, 24), [(8, 9)])
    assert ordered(points) == sorted(
        ((4 + y + 0.5) * 2 - 0.5, (4 + x + 0.5) * 2 - 0.5) for y in (-1, 0, 1) for x in (-1, 0, 1)
    )


def test_strided_layer_samples_its_finer_input_map() -> None:
    network = nn.Sequential(DeformConv2d(3, 3, 3, stride=2, padding=1)).eval()
    points = points_of(network, torch.randn(1, 3, 16, 24), [(8, 9)])
    assert ordered(points) == sorted((8.0 + y, 8.0 + x) for y in (-1, 0, 1) for x in (-1, 0, 1))


def test_network_is_left_as_it_was() -> None:
    network = stack(1)
    image = torch.randn(1, 3, 16, 24)
    before = network(image)
    sampling_points(network, image, [(3, 4), (15, 23)])
    assert torch.equal(network(image), before)
    assert not network[1].offset._forward_hooks


def test_wrong_use_is_refused() -> None:
    image = torch.randn(1, 3, 16, 24)
    with pytest.raises(ValueError, match="no 3x3 convolutions"):
        sampling_points(nn.Conv2d(3, 3, 1).eval(), image, [(0, 0)])
    with pytest.raises(ValueError, match=r"network\.eval"):
        sampling_points(stack(1).train(), image, [(0, 0)])
    with pytest.raises(ValueError, match=r"row 16, col 0.* outside the image of 16 x 24"):
        sampling_points(stack(1), image, [(16, 0)])
    with pytest.raises(ValueError, match=r"one image \(1, 3, H, W\), got \(2, 3, 16, 24\)"):
        sampling_points(stack(1), image.repeat(2, 1, 1, 1), [(0, 0)])
