"""DeepLab and its heads: shapes, torchvision's own DeepLabv3 as the oracle, refused settings."""

from __future__ import annotations

import cv2
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from segdcn.models import (
    ASPPHead,
    Deform,
    Features,
    FPNHead,
    PaperHead,
    V3PlusHead,
    build_deeplab,
    deformable_layers,
    from_torchvision_deeplabv3,
)

HEADS = ["paper", "aspp", "v3plus", "fpn"]


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return {
        head: build_deeplab(
            5, "resnet_tiny", head, weights=None, head_channels=8, auxiliary=True, deform=Deform(0)
        ).eval()
        for head in HEADS
    }


@settings(max_examples=20)
@given(head=st.sampled_from(HEADS), n=st.integers(1, 3), height=st.integers(17, 70), width=st.integers(17, 70))
def test_logits_have_the_size_of_the_image(
    networks: dict[str, nn.Module], head: str, n: int, height: int, width: int
) -> None:
    image = torch.randn(n, 3, height, width)
    with torch.no_grad():
        logits, auxiliary = networks[head].training_logits(image)
        assert torch.equal(networks[head](image), logits)
    assert logits.shape == auxiliary.shape == (n, 5, height, width)
    assert logits.isfinite().all()


@settings(max_examples=10)
@given(
    head=st.sampled_from(HEADS), scale=st.sampled_from([1.5, 2.0]), rows=st.integers(9, 30), columns=st.integers(9, 30)
)
def test_an_evaluation_scale_is_the_network_on_the_enlarged_image(
    networks: dict[str, nn.Module], head: str, scale: float, rows: int, columns: int
) -> None:
    image = torch.rand(1, 3, 2 * rows, 2 * columns)
    scaled = build_deeplab(
        5, "resnet_tiny", head, weights=None, head_channels=8, auxiliary=True, deform=Deform(0), evaluation_scale=scale
    ).eval()
    scaled.load_state_dict(networks[head].state_dict())
    size = (int(scale * 2 * columns), int(scale * 2 * rows))
    enlarged = cv2.resize(image[0].permute(1, 2, 0).numpy(), size, interpolation=cv2.INTER_LINEAR)
    with torch.no_grad():
        scores = networks[head].head(networks[head].backbone(torch.from_numpy(enlarged).permute(2, 0, 1)[None]))
        expected = F.interpolate(scores, image.shape[2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(scaled(image), expected, rtol=1e-3, atol=1e-4)
        trained, as_before = (each.training_logits(image) for each in (scaled, networks[head]))
        assert all(map(torch.equal, trained, as_before))  # crops come enlarged


@pytest.mark.parametrize(("head", "stride"), [("fpn", 32), ("v3plus", 16)])
def test_an_output_stride_that_is_left_open_suits_the_head(head: str, stride: int) -> None:
    network = build_deeplab(3, "resnet_tiny", head, None, weights=None, head_channels=8, deform=Deform(0))
    assert network.backbone.output_stride == stride


def test_without_an_auxiliary_head_there_are_no_auxiliary_logits() -> None:
    network = build_deeplab(3, "resnet_tiny", "paper", weights=None, deform=Deform(0)).eval()
    (logits,) = network.training_logits(torch.randn(1, 3, 33, 49))
    assert logits.shape == (1, 3, 33, 49)


def test_same_logits_as_torchvisions_deeplabv3() -> None:
    theirs = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=True
    ).eval()
    for module in theirs.modules():  # batch norm that does something
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours = build_deeplab(
        5,
        "resnet50",
        "aspp",
        weights=None,
        output_stride=8,
        auxiliary=True,
        torchvision_dilation=True,
        deform=Deform(0),
    ).eval()
    ours.load_state_dict(from_torchvision_deeplabv3(theirs.state_dict()))
    image = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected = theirs(image)
        logits, auxiliary = ours.training_logits(image)
    torch.testing.assert_close(logits, expected["out"])
    torch.testing.assert_close(auxiliary, expected["aux"])


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_every_tensor_of_torchvisions_state_dict_finds_its_place(name: str, auxiliary: bool) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(
            f"deeplabv3_{name}", weights=None, weights_backbone=None, num_classes=21, aux_loss=auxiliary
        )
        ours = build_deeplab(
            21, name, "aspp", 8, weights=None, auxiliary=auxiliary, torchvision_dilation=True, deform=Deform(0)
        )
    mapped = from_torchvision_deeplabv3(theirs.state_dict())
    assert {key: value.shape for key, value in mapped.items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }


def test_a_state_dict_of_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'layer1.0.conv1.weight' is not a name in torchvision's deeplabv3"):
        from_torchvision_deeplabv3({"layer1.0.conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize(("output_stride", "rates"), [(8, [12, 24, 36]), (16, [6, 12, 18]), (32, [3, 6, 9])])
def test_pyramid_rates_follow_the_output_stride(output_stride: int, rates: list[int]) -> None:
    for head in (ASPPHead(4, 3, output_stride, 6), V3PlusHead(4, 4, 3, output_stride, 6)):
        found = [conv.dilation[0] for conv in head.modules() if isinstance(conv, nn.Conv2d)]
        assert [rate for rate in found if rate > 1] == rates


def test_the_papers_head_is_two_linear_maps_per_pixel() -> None:
    head = PaperHead(6, 3)
    high = torch.randn(2, 6, 4, 7)
    weights = [head.fc6.weight[:, :, 0, 0], head.classifier.weight[:, :, 0, 0]]
    assert [tuple(weight.shape) for weight in weights] == [(1024, 6), (3, 1024)]
    expected = torch.einsum("kc,ncyx->nkyx", weights[1], torch.einsum("ci,niyx->ncyx", weights[0], high).clamp(min=0))
    torch.testing.assert_close(head(Features(high, high, high, high)), expected)
    assert weights[0].std().item() == pytest.approx(0.01, rel=0.1)


def test_the_pyramid_adds_its_maps_from_coarse_to_fine() -> None:
    head = FPNHead((5, 7, 6), 3, channels=8).eval()
    features = Features(
        torch.randn(2, 5, 16, 25), torch.randn(2, 3, 8, 13), torch.randn(2, 7, 4, 7), torch.randn(2, 6, 2, 4)
    )
    maps = (features.low, features.middle, features.high)
    low, middle, high = (conv(each) for conv, each in zip(head.lateral, maps, strict=True))

    def enlarged(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)

    total = low + enlarged(middle + enlarged(high, middle), low)
    expected = head.classifier(head.fuse(head.norm(total).clamp(min=0)))
    torch.testing.assert_close(head(features), expected)
    for name in ("low", "middle", "high"):  # each map has its say
        changed = features._replace(**{name: getattr(features, name) + 1})
        assert (head(changed) - head(features)).abs().max() > 0


def test_the_decoder_scores_at_stride_4_from_fine_features_and_context() -> None:
    head = V3PlusHead(6, 5, num_classes=3, output_stride=16, channels=8).eval()
    low, high = torch.randn(1, 5, 16, 25), torch.randn(1, 6, 4, 7)
    logits = head(Features(low, high, high, high))
    assert logits.shape == (1, 3, 16, 25)
    changed = low.clone()
    changed[0, :, 3, 20] += 1
    difference = (head(Features(changed, high, high, high)) - logits).abs().sum(dim=1)[0] > 0
    rows, columns = difference.nonzero().unbind(1)
    # two 3x3 convolutions: a fine pixel reaches two pixels on each side and no further
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 5, 18, 22)
    assert (head(Features(low, high, high, 2 * high)) - logits).abs().max() > 0


def test_one_image_cannot_train_image_pooling() -> None:
    high = torch.randn(1, 6, 4, 7)
    features = Features(high, high, high, high)
    for head in (ASPPHead(6, 3, 16, 8), V3PlusHead(6, 6, 3, 16, 8)):
        with pytest.raises(ValueError, match=r"cannot train on a batch of one image.*model\.image_pooling=false"):
            head(features)
        assert head.eval()(features).isfinite().all()
    for head in (ASPPHead(6, 3, 16, 8, image_pooling=False), V3PlusHead(6, 6, 3, 16, 8, image_pooling=False)):
        assert head(features).isfinite().all()


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_layers_start_as_the_plain_network(modulated: bool) -> None:
    plain = build_deeplab(4, "mobilenet_v2", "v3plus", weights=None, head_channels=16, deform=Deform(0)).eval()
    deformed = build_deeplab(
        4, "mobilenet_v2", "v3plus", weights=None, head_channels=16, deform=Deform(3, modulated, offset_groups=2)
    ).eval()
    missing = deformed.load_state_dict(plain.state_dict(), strict=False).missing_keys
    names = [
        "backbone.features.15.conv.1.0",
        "backbone.features.16.conv.1.0",
        "backbone.features.17.conv.1.0",
    ]
    assert list(deformable_layers(deformed)) == names
    assert set(missing) == {f"{name}.offset.{part}" for name in names for part in ("weight", "bias")}
    image = torch.randn(1, 3, 49, 81)
    with torch.no_grad():
        torch.testing.assert_close(deformed(image), plain(image))


@pytest.mark.parametrize(("head", "names"), [("fpn", ["fuse.0"]), ("v3plus", ["fuse.0.0", "fuse.1.0"])])
def test_the_layers_of_the_head_are_made_deformable_too(head: str, names: list[str]) -> None:
    settings = {"num_classes": 3, "backbone": "resnet_tiny", "head": head, "weights": None, "head_channels": 8}
    plain = build_deeplab(**settings, deform=Deform(0)).eval()
    deformed = build_deeplab(**settings, deform=Deform(1, offset_groups=2, head_layers=len(names))).eval()
    deformed.load_state_dict(plain.state_dict(), strict=False)
    assert list(deformable_layers(deformed)) == ["backbone.layer4.0.conv2", *(f"head.{name}" for name in names)]
    image = torch.randn(1, 3, 49, 81)
    with torch.no_grad():
        torch.testing.assert_close(deformed(image), plain(image))
        for layer in deformable_layers(deformed).values():
            nn.init.ones_(layer.offset.bias)
        assert (deformed(image) - plain(image)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "v3"}, "head must be one of paper, aspp, v3plus, fpn, upernet, got 'v3'"),
        ({"num_classes": 1}, "num_classes must be 2 or more, got 1"),
        ({"head_channels": 0}, "head_channels must be positive, got 0"),
        ({"evaluation_scale": 0.5}, "evaluation_scale must be 1 or more, a factor of the image's size, got 0.5"),
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ({"deform": Deform(layers=-1)}, "deform.layers and deform.head_layers must be 0 or more"),
        ({"deform": Deform(head_layers=1)}, "deform.head_layers=1, but the head paper has 0 3x3 convolutions"),
        ({"deform": Deform(layers=12)}, "the last 12 3x3 .* has 9 .* ask for 0 to 9"),
        ({"deform": Deform(layers=1, offset_groups=3)}, "layer4.0.conv2 deformable: offset_groups"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_deeplab(
            **{
                "num_classes": 3,
                "backbone": "resnet_tiny",
                "head": "paper",
                "weights": None,
                "deform": Deform(0),
                **options,
            }
        )
    assert "\n" not in str(caught.value)
