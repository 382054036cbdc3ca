from __future__ import annotations

import pytest
import torch
from torch import nn

from segdcn.analysis import last_layers, record
from segdcn.models import Deform, build_deeplab, make_deformable, plain_twin
from segdcn.ops import DCNv3, DCNv4, DeformConv2d
from segdcn.ops.aggregate import _Geometry

NAMES = ["backbone.layer3.0.conv2", "backbone.layer4.0.conv1", "backbone.layer4.0.conv2"]


def network(layers: int, **options: object) -> nn.Module:
    return build_deeplab(
        5, "resnet_tiny", "aspp", 16, weights=None, deform=Deform(layers, **options), head_channels=8
    ).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_last_layers_are_those_that_are_or_would_be_deformable(layers: int) -> None:
    one = network(layers)
    assert list(last_layers(one)) == NAMES[-layers:]  # all three of a plain network
    assert list(last_layers(one, 3)) == NAMES
    assert list(last_layers(one, 2)) == NAMES[1:]
    assert last_layers(one, 0) == {}
    every = last_layers(one, 100)  # neither offset branches nor the head
    assert list(every) == make_deformable(network(0), last=len(every))
    assert all(dict(one.named_modules())[name] is layer for name, layer in every.items())


def test_layers_that_sample_elsewhere_are_left_out() -> None:
    class Padded(nn.Conv2d):
        pass

    net = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding="same"),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        Padded(3, 3, 3),
        nn.Conv2d(3, 3, 3),
        nn.Conv2d(3, 3, 1),
    ).eval()
    assert list(last_layers(net)) == ["3"]
    with pytest.raises(ValueError, match="2 is a Padded: only"):
        record(net, torch.zeros(1, 3, 16, 16), {"2": net[2]})


@pytest.mark.parametrize("options", [{}, {"modulated": True}, {"offset_groups": 2}])
def test_an_untrained_deformable_layer_samples_the_grid_of_the_plain_one(options: dict[str, object]) -> None:
    one, image = network(3, **options), torch.randn(2, 3, 75, 90)
    for deformed, plain in zip(record(one, image), record(plain_twin(one), image), strict=True):
        assert (deformed.name, deformed.deformable, plain.deformable) == (plain.name, True, False)
        assert deformed.input_size == plain.input_size
        assert deformed.output_size == plain.output_size
        groups = options.get("offset_groups", 1)
        assert deformed.taps.shape == (2, groups, 9, 2, *plain.output_size)
        assert (deformed.taps == plain.taps).all()
        assert torch.equal(deformed.undeformed().taps, plain.taps[:1])
        assert (deformed.offset_lengths() == 0).all()


def test_taps_and_lengths_of_a_known_offset() -> None:
    layer = DeformConv2d(3, 3, (2, 3), stride=(2, 1), padding=1, dilation=(1, 2), offset_groups=3)
    with torch.no_grad():
        layer.offset.bias[2 * (6 + 4)], layer.offset.bias[2 * (6 + 4) + 1] = 3.0, -4.0  # group 1, tap (1, 1)
    (call,) = record(nn.Sequential(layer).eval(), torch.zeros(1, 3, 8, 9), {"x": layer})
    assert (call.name, call.input_size, call.output_size) == ("x", (8, 9), (5, 7))
    # cell (2, 5): row 2*2 - 1 + 1, column 5 - 1 + 2
    assert call.taps[0, 0, 4, :, 2, 5].tolist() == [4.0, 6.0]
    assert call.taps[0, 1, 4, :, 2, 5].tolist() == [7.0, 2.0]
    lengths = call.offset_lengths()
    assert (lengths[0, 1, 4] == 5).all()
    assert lengths.sum() == 5 * 5 * 7


def test_the_network_is_left_as_it_was() -> None:
    one, image = network(3), torch.randn(1, 3, 64, 64)
    before = one(image)
    record(one, image, last_layers(one, 5))
    assert torch.equal(one(image), before)
    assert not any(module._forward_hooks for module in one.modules())
    with pytest.raises(ValueError, match=r"network\.eval"):
        record(one.train(), image)
    with pytest.raises(RuntimeError):  # of the network itself, for an image of four channels
        record(one.eval(), torch.zeros(1, 4, 64, 64))
    assert not any(module._forward_hooks for module in one.modules())


class ChannelsLast(nn.Sequential):
    """Layers that take channels last, within a network that does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
@pytest.mark.parametrize(("kernel_size", "dilation", "scale"), [(3, 1, 1.0), (5, 1, 0.5), (3, 2, 2.0)])
def test_an_aggregation_is_followed_to_where_it_samples(
    kind: type, kernel_size: int, dilation: int, scale: float
) -> None:
    torch.manual_seed(0)
    layer = kind(8, kernel_size, dilation, group=2, offset_scale=scale)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    seen = []
    layer.branch.register_forward_hook(lambda module, inputs, predicted: seen.append(layer.offsets(predicted)))
    net = ChannelsLast(layer).eval()
    (call,) = record(net, torch.randn(2, 8, 6, 7), {"0": layer})
    padding = dilation * (kernel_size - 1) // 2
    sides = [[kernel_size] * 2, [1, 1], [padding] * 2, [dilation] * 2]
    offset = seen[0].view(2, 6, 7, 2, kernel_size**2, 2)
    y, x = _Geometry(2, *sides, scale, False).points(offset, torch.arange(6)[:, None], torch.arange(7))
    # (N, H, W, G, points down the columns) -> (N, G, points along the rows, H, W)
    expected = [
        each.view(2, 6, 7, 2, kernel_size, kernel_size).permute(0, 3, 5, 4, 1, 2).flatten(2, 3) for each in (y, x)
    ]
    torch.testing.assert_close(call.taps, torch.stack(expected, dim=3))
    assert call.input_size == call.output_size == (6, 7)
    several = ChannelsLast(*(kind(8, group=2) for _ in range(5)))
    assert list(last_layers(several)) == ["2", "3", "4"]
    assert list(last_layers(several, 2)) == ["3", "4"]


def test_a_kernel_without_its_centre_is_not_followed() -> None:
    net = ChannelsLast(DCNv4(8, group=2, remove_center=True)).eval()
    with pytest.raises(ValueError, match="0 has no centre in its kernel"):
        record(net, torch.randn(1, 8, 6, 7))
