"""Networks of anyone's: what they give is checked on shapes, or by a run, before a training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from segdcn.models import ASPPHead, Deform, Features, build_deeplab
from segdcn.models.contract import check_logits, giving_logits

CLASSES, SIZE = 5, (48, 64)


class Own(nn.Module):
    """A network that ends as a test says: ``ending`` makes its output of logits and the image."""

    def __init__(self, ending: Callable[[Tensor, Tensor], Any] = lambda logits, image: logits) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.classifier = nn.Conv2d(3, CLASSES, 1)
        self.ending = ending

    def forward(self, image: Tensor) -> Any:
        return self.ending(self.classifier(self.drop(self.norm(image))), image)


def halved(logits: Tensor, image: Tensor) -> Tensor:
    return F.avg_pool2d(logits, (2, 4))


def by_values(ending: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    """The same, of a network that shapes alone do not get through."""

    def end(logits: Tensor, image: Tensor) -> Any:
        return ending(logits + float(image.mean()), image)

    return end


WRONG = [
    (halved, r"gives logits of 24x16 pixels for an image of 48x64 .* F\.interpolate"),
    (lambda logits, image: logits[:, 1:], "gives logits of 4 classes, but the data set has 5: .* num_classes"),
    (lambda logits, image: logits.argmax(dim=1), r"gives a tensor \(1, 48, 64\) .* must give logits, a tensor"),
    (lambda logits, image: (logits, image), r"gives a tuple .* here \(1, 5, 48, 64\)"),
    (lambda logits, image: {"out": logits, "aux": logits}, "gives a mapping of out, aux .* under 'out' alone"),
    (lambda logits, image: {}["nothing"], "cannot do with an image of 48x64 .* KeyError: 'nothing'"),
]


@pytest.mark.parametrize("wrapped", [lambda ending: ending, by_values], ids=["shapes", "values"])
@pytest.mark.parametrize(("ending", "message"), WRONG)
def test_what_a_network_must_not_give_is_one_line(wrapped: Any, ending: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_logits(giving_logits(Own(wrapped(ending))), CLASSES, (2, SIZE), [SIZE])
    assert "\n" not in str(caught.value)
    assert "the network Own" in str(caught.value)


def test_a_size_that_only_validation_has_is_tried_too() -> None:
    def in_pairs(logits: Tensor, image: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool2d(logits, 2), scale_factor=2)  # odd sides lose a pixel

    check_logits(Own(in_pairs), CLASSES, (2, SIZE), [SIZE])
    with pytest.raises(ValueError, match="gives logits of 32x48 pixels for an image of 33x49"):
        check_logits(Own(in_pairs), CLASSES, (2, SIZE), [SIZE, (33, 49)])


def test_what_it_gives_in_training_alone_is_seen() -> None:
    class Double(Own):
        def forward(self, image: Tensor) -> Any:
            logits = super().forward(image)
            return (logits, logits) if self.training else logits

    with pytest.raises(ValueError, match=r"gives a tuple for images \(3, 3, 48, 64\)"):
        check_logits(Double(), CLASSES, (3, SIZE), [SIZE])


@pytest.mark.parametrize("ending", [lambda logits, image: logits, by_values(lambda logits, image: logits)])
@settings(max_examples=5)
@given(count=st.integers(1, 3), height=st.integers(8, 40), width=st.integers(8, 40))
def test_the_check_leaves_no_trace(ending: Any, count: int, height: int, width: int) -> None:
    network = Own(ending)
    network.drop.eval()  # a part that its author keeps so
    before, modes = copy.deepcopy(network.state_dict()), {name: m.training for name, m in network.named_modules()}
    random = torch.get_rng_state()
    check_logits(network, CLASSES, (count, (height, width)), [(height, width)])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert {name: m.training for name, m in network.named_modules()} == modes
    assert next(network.parameters()).device.type == "cpu"


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "fcn_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_torchvisions_networks_give_their_logits(name: str) -> None:
    theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES).eval()
    image = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        expected = theirs(image)["out"]
        names = list(theirs.state_dict())
        ours = giving_logits(giving_logits(theirs))  # once or more
        assert torch.equal(ours(image), expected)
        assert torch.equal(copy.deepcopy(ours)(image), expected)
    assert list(ours.state_dict()) == names
    check_logits(ours, CLASSES, (2, SIZE), [SIZE])


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got a mapping of out"):
        giving_logits({"out": 1})


def pooled() -> nn.Module:
    """A user's own squeeze: a batch norm behind a pooling to one pixel."""
    squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(CLASSES, CLASSES, 1), nn.BatchNorm2d(CLASSES))
    network = Own(lambda logits, image: logits + squeeze(logits))
    network.squeeze = squeeze
    return network


@pytest.mark.parametrize("head", ["aspp", "v3plus", "own"])
def test_a_batch_of_one_image_is_refused_before_the_training_where_a_mean_is_normalised(head: str) -> None:
    network = (
        pooled()
        if head == "own"
        else build_deeplab(CLASSES, "resnet_tiny", head, weights=None, head_channels=8, deform=Deform(0))
    )
    check_logits(network, CLASSES, (2, SIZE), [SIZE])
    words = "behind a global pooling" if head == "own" else r"model\.image_pooling=false or model\.head=paper"
    with pytest.raises(
        ValueError, match=rf"{words}.*datamodule\.batch_size=2 or more .* datamodule\.crop_size"
    ) as caught:
        check_logits(network, CLASSES, (1, SIZE), [SIZE])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("head", ["paper", "aspp", "v3plus", "fpn"])
def test_without_image_pooling_one_image_trains(head: str) -> None:
    network = build_deeplab(
        CLASSES, "resnet_tiny", head, weights=None, head_channels=8, image_pooling=False, deform=Deform(0)
    )
    check_logits(network, CLASSES, (1, SIZE), [SIZE])
    network(torch.randn(1, 3, *SIZE)).mean().backward()
    with_pooling = build_deeplab(
        CLASSES, "resnet_tiny", head, weights=None, head_channels=8, deform=Deform(0)
    ).state_dict()
    dropped = set(with_pooling) - set(network.state_dict())
    assert (not dropped) if head == "paper" else all(name.startswith("head.aspp.convs.4.") for name in dropped)


def test_frozen_norms_train_on_one_image() -> None:
    head = ASPPHead(6, CLASSES, 16, 8)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    high = torch.randn(1, 6, 4, 7)
    assert head(Features(high, high, high, high)).isfinite().all()
