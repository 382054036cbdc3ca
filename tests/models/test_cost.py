from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segdcn.models import Deform, build_deeplab, deformable_layers, make_deformable
from segdcn.models.cost import count_flops, network_cost
from segdcn.ops import DeformConv2d


@pytest.mark.parametrize("backend", ["auto", "gather", "torchvision"])
@pytest.mark.parametrize("modulated", [False, True])
def test_one_deformable_layer_by_hand(backend: Any, modulated: bool) -> None:
    layer = DeformConv2d(3, 8, (3, 5), stride=2, padding=1, modulated=modulated, backend=backend)
    positions, taps = 5 * 7, 15  # 9 x 16 pixels -> (9 + 2 - 3) / 2 + 1 = 5 by (16 + 2 - 5) / 2 + 1 = 7
    branch = positions * taps * 3 * taps * (3 if modulated else 2)  # multiply-adds
    product = positions * taps * 3 * 8
    sampling = positions * taps * 3 * 4
    assert count_flops(layer, (9, 16)) == 2 * (branch + product + sampling)


def test_groups_divide_the_product_and_not_the_sampling() -> None:
    layer = DeformConv2d(3, 6, 3, padding=1, groups=3, offset_groups=3)
    per_position = 9 * 3 * 54 + 9 * 6 + 9 * 3 * 4
    assert count_flops(layer, (4, 5)) == 2 * 20 * per_position


@pytest.mark.parametrize("head", ["paper", "aspp", "v3plus", "fpn"])
def test_plain_networks_as_flop_counter_mode_counts_them(head: str) -> None:
    network = build_deeplab(
        5, "resnet_tiny", head, weights=None, output_stride=16, head_channels=16, deform=Deform(0)
    ).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, 48, 64))
    assert count_flops(network, (48, 64)) == counter.get_total_flops() > 0


def test_flops_of_a_known_network() -> None:
    # 4.09 G multiply-adds are what torchvision publishes for its ResNet-50
    network = torchvision.models.resnet50()
    assert count_flops(network, (224, 224)) / 2e9 == pytest.approx(4.09, abs=0.005)


def test_both_backends_cost_the_same_in_a_network_and_more_than_the_plain_one() -> None:
    counts = []
    for backend in ("gather", "torchvision"):
        network = build_deeplab(5, "resnet18", "paper", weights=None, output_stride=16, deform=Deform(0))
        plain = count_flops(network, (65, 97))
        make_deformable(network, last=3, modulated=True)
        for layer in deformable_layers(network).values():
            layer.backend = backend  # type: ignore[assignment]
        counts.append(count_flops(network, (65, 97)))
    assert counts[0] == counts[1] > plain


def test_neither_network_nor_random_numbers_are_touched() -> None:
    network = build_deeplab(
        5, "resnet_tiny", "aspp", weights=None, output_stride=16, head_channels=16, deform=Deform(0)
    )
    network.backbone.eval()  # training mode is kept module by module
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    cost = network_cost(network, (48, 64))
    assert torch.equal(torch.rand(4), expected)
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())
    assert cost["parameters"] == sum(tensor.numel() for tensor in network.parameters())
    assert cost["flops_input"] == "[48,64]"


def test_network_that_looks_at_values_has_no_count() -> None:
    class Choosing(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if input.mean() > 0 else input

    network = Choosing(3, 2, 1, bias=False)
    network.eval()
    assert network_cost(network, (4, 4)) == {"parameters": 6, "flops": None, "flops_input": "[4,4]"}
    assert not network.training
