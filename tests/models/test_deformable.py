"""make_deformable: the paper's layers, the same function at the start, refusals that change nothing."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segdcn.models import (
    Deform,
    build_backbone,
    build_deeplab,
    deformable_layers,
    make_deformable,
    plain_twin,
    set_fixed_dilation,
)
from segdcn.ops import DeformConv2d

RES5 = ["layer4.0.conv2", "layer4.1.conv2", "layer4.2.conv2"]
RES4 = ["layer3.20.conv2", "layer3.21.conv2", "layer3.22.conv2"]


class ForeignNet(nn.Module):
    """Somebody's network: nested, strided, grouped, dilated, with biases, and kernels that are not 3x3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU())
        self.body = nn.ModuleDict(
            {
                "a": nn.Conv2d(8, 12, 3, stride=2, padding=1),
                "b": nn.Sequential(nn.GELU(), nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=4, bias=False)),
                "c": nn.Conv2d(12, 6, (3, 1), padding=(1, 0)),
            }
        )
        self.out = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.body.values():
            x = part(x)
        return self.out(x)


NETWORKS = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "foreign": ForeignNet,
}


@pytest.mark.parametrize(("last", "names"), [(0, []), (1, RES5[2:]), (2, RES5[1:]), (3, RES5), (6, RES4 + RES5)])
def test_the_papers_layers_of_resnet101(last: int, names: list[str]) -> None:
    with torch.device("meta"):
        network = build_backbone("resnet101", 16)
        assert make_deformable(network, last) == names
    assert list(deformable_layers(network)) == names
    for layer in deformable_layers(network).values():
        assert layer.dilation == layer.offset.dilation == ((2, 2) if layer.in_channels == 512 else (1, 1))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_and_the_weights_are_kept(name: str, modulated: bool) -> None:
    network = NETWORKS[name]().double().eval()
    image = torch.randn(1, 3, 64, 96, dtype=torch.double)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        before = network(image)
        names = make_deformable(network, 3, modulated=modulated, offset_groups=2)
        after = network(image)
    torch.testing.assert_close(after, before)
    assert len(names) == len(deformable_layers(network)) == 3
    assert not any(module.training for module in network.modules())
    state = network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    assert {key.split(".offset.")[0] for key in state.keys() - weights.keys()} == set(names)


def test_names_in_network_order_and_other_kernels_left_alone() -> None:
    network = ForeignNet()
    assert make_deformable(network, 3) == ["body.a", "body.b.1", "out"]
    assert type(network.stem[0]) is type(network.body["c"]) is nn.Conv2d


def test_basic_blocks_count_each_convolution() -> None:
    with torch.device("meta"):
        network = build_backbone("resnet18", 16)
        assert make_deformable(network, 3) == ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]


@settings(max_examples=15)
@given(st.lists(st.integers(0, 3), max_size=3).filter(lambda calls: sum(calls) <= 3))
def test_a_second_call_goes_on_where_the_first_ended(calls: list[int]) -> None:
    step_by_step, at_once = ForeignNet(), ForeignNet()
    replaced: list[str] = []
    for last in calls:
        replaced = make_deformable(step_by_step, last) + replaced
    assert replaced == make_deformable(at_once, sum(calls)) == list(deformable_layers(step_by_step))


def test_only_the_backbone_of_a_whole_network_is_changed() -> None:
    network = build_deeplab(3, "resnet_tiny", "aspp", weights=None, deform=Deform(0))
    names = make_deformable(network, 2)
    assert names == ["backbone.layer4.0.conv1", "backbone.layer4.0.conv2"] == list(deformable_layers(network))


def test_a_shared_layer_stays_shared() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    network = nn.Sequential(conv, nn.Sequential(conv, nn.ReLU()))
    assert make_deformable(network, 1) == ["0"]
    assert isinstance(network[0], DeformConv2d)
    assert network[0] is network[1][0]


class OwnPadding(nn.Conv2d):
    """A convolution that a user changed."""


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (ForeignNet(), {"last": 4}, "cannot make the last 4 3x3 .* the network has 3 .* ask for 0 to 3"),
        (ForeignNet(), {"last": -1}, "cannot make the last -1 3x3"),
        (ForeignNet(), {"last": 3, "offset_groups": 4}, "cannot make out deformable: offset_groups .* got 4"),
        (ForeignNet(), {"last": 1, "offset_groups": 0}, "offset_groups .* got 0"),
        (
            nn.Sequential(OwnPadding(3, 3, 3), nn.Conv2d(3, 3, 3)),
            {"last": 2},
            "make 0 deformable.*OwnPadding",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 3, 3, padding="same"), nn.Conv2d(3, 3, 3)),
            {"last": 2},
            "make 0 deform.*same",
        ),
    ],
)
def test_refusals_are_one_line_and_change_nothing(network: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_deformable(network, **options)
    assert "\n" not in str(caught.value)
    assert not deformable_layers(network)


def test_the_gradient_reaches_every_offset_branch_and_the_old_weights() -> None:
    network = build_deeplab(3, "resnet_tiny", "paper", weights=None, deform=Deform(0))
    make_deformable(network, 3, modulated=True)
    network(torch.randn(2, 3, 48, 80)).square().mean().backward()
    layers = deformable_layers(network)
    assert len(layers) == 3
    for name, layer in layers.items():
        for part in (layer.weight, layer.offset.weight, layer.offset.bias):
            assert part.grad is not None, name
            assert part.grad.abs().max() > 0, name


def test_fixed_dilation_keeps_size_and_weights_and_takes_the_layers_that_would_be_deformed() -> None:
    plain, control = (
        build_deeplab(3, "resnet18", "paper", weights=None, output_stride=16, deform=Deform(0)).eval() for _ in range(2)
    )
    control.load_state_dict(plain.state_dict())
    names = set_fixed_dilation(control, 6)
    assert names == make_deformable(plain, last=3)
    for name in names:
        assert control.get_submodule(name).dilation == (6, 6)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert control(image).shape == (1, 3, 64, 96)
        assert not torch.equal(control(image), plain(image))


def test_fixed_dilation_and_offsets_combine() -> None:
    image = torch.randn(1, 3, 64, 96)
    control = build_deeplab(3, "resnet_tiny", "paper", weights=None, fixed_dilation=2, deform=Deform(0)).eval()
    deformed = build_deeplab(3, "resnet_tiny", "paper", weights=None, fixed_dilation=2, deform=Deform(layers=2)).eval()
    deformed.load_state_dict(control.state_dict(), strict=False)
    torch.testing.assert_close(deformed(image), control(image))


@pytest.mark.parametrize("dilation", [0, -1])
def test_fixed_dilation_must_be_positive(dilation: int) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        build_deeplab(3, "resnet_tiny", "paper", weights=None, fixed_dilation=dilation, deform=Deform(0))


@pytest.mark.parametrize("modulated", [False, True])
def test_a_plain_twin_has_the_same_weights_and_no_offsets(modulated: bool) -> None:
    original = ForeignNet().eval()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    image = torch.randn(2, 3, 40, 44)
    expected = original(image)
    make_deformable(original, last=2, modulated=modulated)
    for layer in deformable_layers(original).values():
        nn.init.normal_(layer.offset.weight)
    deformed = original(image)
    twin = plain_twin(original)
    assert not deformable_layers(twin)
    torch.testing.assert_close(twin(image), expected)
    assert {name: value.tolist() for name, value in twin.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    # the network itself is as it was, and shares nothing with its twin
    assert len(deformable_layers(original)) == 2
    assert torch.equal(original(image), deformed)
    assert not {id(p) for p in original.parameters()} & {id(p) for p in twin.parameters()}
    assert not torch.allclose(deformed, expected)
