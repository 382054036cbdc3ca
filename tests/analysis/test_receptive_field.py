from __future__ import annotations

import pytest
import torch
from torch import nn

from segdcn.analysis import effective_receptive_field
from segdcn.models import Deform, build_deeplab
from segdcn.ops import DeformConv2d


def test_of_one_convolution_it_is_the_size_of_its_weights() -> None:
    conv = nn.Conv2d(3, 2, 3, padding=1)
    with torch.no_grad():
        conv.bias[1] = 1000.0  # the class that is predicted everywhere
    (field,) = effective_receptive_field(conv.eval(), torch.randn(1, 3, 7, 9), [(2, 4)])
    expected = torch.zeros(7, 9)
    expected[1:4, 3:6] = conv.weight[1].detach().abs().sum(dim=0)
    torch.testing.assert_close(field, expected)


def test_of_plain_convolutions_it_ends_where_theory_says() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=3, dilation=3), nn.Conv2d(4, 2, 1)
    ).eval()
    field = effective_receptive_field(network, torch.randn(1, 3, 20, 24), [(10, 12), (0, 23)])
    assert field.shape == (2, 20, 24)
    reach = torch.zeros(2, 20, 24, dtype=torch.bool)
    reach[0, 6:15, 8:17] = True
    reach[1, :5, 19:] = True
    assert (field[~reach] == 0).all()
    assert field[0, 10, 12] > 0
    assert field[1, 0, 23] > 0


def test_offsets_move_the_field() -> None:
    layer = DeformConv2d(3, 2, 1)
    with torch.no_grad():
        layer.offset.bias[0], layer.offset.bias[1] = 3.0, -2.0
    (field,) = effective_receptive_field(nn.Sequential(layer).eval(), torch.randn(1, 3, 9, 9), [(2, 5)])
    # the cell that is read, and the neighbours that a further move would read, are weighted by the offset branch
    assert field[5, 3] > 0
    assert field[2, 5] == 0  # its weights are zero: the pixel itself moves nothing
    assert field.count_nonzero() == 1


def test_it_is_the_derivative() -> None:
    """Against finite differences, through offsets that depend on the image, of both kinds of layers."""
    torch.manual_seed(0)
    layer = DeformConv2d(4, 3, 3, padding=1, modulated=True)
    nn.init.normal_(layer.offset.weight, std=0.3)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), layer).double().eval()
    image, (row, col) = torch.randn(1, 3, 8, 8, dtype=torch.float64), (4, 3)
    (field,) = effective_receptive_field(network, image, [(row, col)])
    with torch.no_grad():
        chosen = int(network(image)[0, :, row, col].argmax())
        for y, x in ((4, 3), (2, 3), (5, 5)):
            slopes = []
            for channel in range(3):
                step = torch.zeros_like(image)
                step[0, channel, y, x] = 1e-6
                high, low = (network(moved)[0, chosen, row, col] for moved in (image + step, image - step))
                slopes.append(float((high - low) / 2e-6))
            assert field[y, x].item() == pytest.approx(sum(map(abs, slopes)), rel=1e-3, abs=1e-6)


def test_each_pixel_has_its_own_and_the_network_is_left_as_it_was() -> None:
    network = build_deeplab(5, "resnet_tiny", "aspp", 16, weights=None, deform=Deform(3), head_channels=8).eval()
    image = torch.randn(1, 3, 64, 48)
    before = network(image)
    pixels = [(0, 0), (63, 47), (30, 20)]
    together = effective_receptive_field(network, image, pixels)
    assert together.shape == (3, 64, 48)
    for pixel, field in zip(pixels, together, strict=True):
        assert torch.equal(effective_receptive_field(network, image, [pixel])[0], field)
    assert effective_receptive_field(network, image, []).shape == (0, 64, 48)
    assert torch.equal(network(image), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    with torch.no_grad():  # as in a callback
        assert torch.equal(effective_receptive_field(network, image, pixels), together)
    with pytest.raises(ValueError, match=r"row 64, col 0.* outside the image of 64 x 48"):
        effective_receptive_field(network, image, [(64, 0)])
    with pytest.raises(ValueError, match=r"network\.eval"):
        effective_receptive_field(network.train(), image, pixels)
    with pytest.raises(ValueError, match="one image"):
        effective_receptive_field(network, image.repeat(2, 1, 1, 1), pixels)
