"""Backbones: dilation of every layer, strides, channels, and a dilated against a strided network."""

from __future__ import annotations

import sys
from math import ceil

import pytest
import torch
from torch import nn

from segdcn.models import BACKBONES, build_backbone
from segdcn.models.internimage import VARIANTS

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
# DeepLabv3, section 3.1: a stage that loses its stride takes the whole rate, in every block
RATES = {8: {"layer3": 2, "layer4": 4}, 16: {"layer4": 2}, 32: {}}
TIMM = "timm/tf_efficientnet_lite0"


def convolutions_3x3(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    }


def on_meta(name: str, output_stride: int, **options: bool) -> nn.Module:
    with torch.device("meta"):
        return build_backbone(name, output_stride, **options)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", RESNETS)
def test_dilation_of_every_3x3_layer_of_the_resnets(name: str, output_stride: int) -> None:
    layers = convolutions_3x3(on_meta(name, output_stride))
    assert layers
    for layer_name, conv in layers.items():
        rate = RATES[output_stride].get(layer_name.split(".")[0], 1)
        assert (conv.dilation, conv.padding) == ((rate, rate), (rate, rate)), layer_name


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_resnet_tiny_is_never_dilated(output_stride: int) -> None:
    assert {conv.dilation for conv in convolutions_3x3(on_meta("resnet_tiny", output_stride)).values()} == {(1, 1)}


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_dilation_of_every_depthwise_layer_of_mobilenet(output_stride: int) -> None:
    layers = convolutions_3x3(on_meta("mobilenet_v2", output_stride))
    assert len(layers) == 18
    for layer_name, conv in layers.items():
        block = int(layer_name.split(".")[1])
        stage = "layer4" if block >= 14 else "layer3" if block >= 7 else "before"
        rate = RATES[output_stride].get(stage, 1)
        assert (conv.dilation, conv.padding) == ((rate, rate), (rate, rate)), layer_name


@pytest.mark.parametrize(("output_stride", "layer3", "layer4"), [(8, [1, 2], [2, 4]), (16, [1, 1], [1, 2])])
def test_torchvision_dilation_is_torchvisions(output_stride: int, layer3: list[int], layer4: list[int]) -> None:
    import torchvision

    ours = on_meta("resnet50", output_stride, torchvision_dilation=True)
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(
            replace_stride_with_dilation=[False, output_stride == 8, output_stride <= 16]
        )
    expected = {name: conv.dilation for name, conv in convolutions_3x3(theirs).items()}
    assert {name: conv.dilation for name, conv in convolutions_3x3(ours).items()} == expected
    assert [block.conv2.dilation[0] for block in ours.layer3[:2]] == layer3
    assert [block.conv2.dilation[0] for block in ours.layer4[:2]] == layer4


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        (name, output_stride)
        for name in (*BACKBONES, TIMM)
        for output_stride in ((32,) if name in VARIANTS else (8, 16, 32))
    ],
)
def test_feature_maps_have_the_stated_channels_and_strides(name: str, output_stride: int) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    backbone = on_meta(name, output_stride).eval()
    height, width = 65, 97
    low, second, middle, high = backbone(torch.empty(2, 3, height, width, device="meta"))

    def expected(channels: int, stride: int) -> tuple[int, ...]:
        return (2, channels, ceil(height / stride), ceil(width / stride))

    assert low.shape == expected(backbone.low_level_channels, 4)
    assert second.shape == expected(backbone.second_channels, 8)
    assert middle.shape == expected(backbone.middle_channels, min(output_stride, 16))
    assert high.shape == expected(backbone.out_channels, output_stride)
    assert backbone.output_stride == output_stride


@pytest.mark.parametrize("size", [(64, 96), (75, 41)])
def test_dilated_features_on_the_coarse_grid_are_those_of_the_strided_network(size: tuple[int, int]) -> None:
    # The a-trous identity: exact where each first block keeps the rate of the stage before.
    strided = build_backbone("resnet50", 32).double().eval()
    dilated = build_backbone("resnet50", 8, torchvision_dilation=True).double().eval()
    dilated.load_state_dict(strided.state_dict())
    image = torch.randn(1, 3, *size, dtype=torch.double)
    with torch.no_grad():
        coarse, fine = strided(image), dilated(image)
    torch.testing.assert_close(fine.high[:, :, ::4, ::4], coarse.high)
    torch.testing.assert_close(fine.middle[:, :, ::2, ::2], coarse.middle)
    torch.testing.assert_close(fine.low, coarse.low)


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet18", "resnet50", "mobilenet_v2", TIMM, "timm/resnet18"])
def test_3x3_layers_are_defined_in_the_order_of_execution(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    backbone = on_meta(name, 16).eval()
    executed: list[str] = []
    for layer_name, conv in convolutions_3x3(backbone).items():
        conv.register_forward_hook(lambda *_, layer_name=layer_name: executed.append(layer_name))
    backbone(torch.empty(1, 3, 64, 96, device="meta"))
    assert executed == list(convolutions_3x3(backbone))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet50", {"output_stride": 12}, "output_stride must be 8, 16 or 32, got 12"),
        ("resnet-50", {}, "no backbone 'resnet-50'; there are resnet50, "),
        ("mobilenetv2", {}, "there are mobilenet_v2, "),
        ("resnet18", {"torchvision_dilation": True}, "torchvision_dilation needs .* got resnet18"),
        ("resnet_tiny", {"weights": "imagenet"}, "resnet_tiny has no ImageNet weights"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_backbone(name, **{"output_stride": 16, **options})
    assert "\n" not in str(caught.value)


def test_timm_names_and_strides_are_checked() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"timm has no network 'tf_efficientnet_light0'; .* tf_efficientnet_lite0"):
        build_backbone("timm/tf_efficientnet_light0", 16)
    with pytest.raises(ValueError, match="timm/vit_tiny_patch16_224 gives no features at output_stride 16"):
        build_backbone("timm/vit_tiny_patch16_224", 16)


def test_missing_timm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r'pip install "segdcn\[timm\]"'):
        build_backbone("timm/resnet18", 16)
