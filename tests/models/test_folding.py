"""Batch norms as parts of convolutions: the same function, and nothing changed that somebody else holds."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops.misc import Conv2dNormActivation

from segdcn.data.transforms import EvalTransform
from segdcn.inference.predictor import Predictor
from segdcn.models import Deform, build_deeplab, deformable_layers
from segdcn.models.backbones import MobileNetV2
from segdcn.models.folding import folded
from segdcn.models.frozen import ConstantBatchNorm2d

LARGE = (720, 960)
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).double()
EXPANSION, CONV, NORM = "backbone.features.5.conv.0", "backbone.features.5.conv.0.0", "backbone.features.5.conv.0.1"


def light(deform: Deform = Deform(), frozen_stages: int = 1) -> nn.Module:  # noqa: B008
    """In evaluation mode, with weights and statistics that no default could stand in for."""
    torch.manual_seed(1)
    network = build_deeplab(5, "mobilenet_v2", "fpn", None, None, deform, frozen_stages=frozen_stages)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | ConstantBatchNorm2d):
            randomised(module)
    for layer in deformable_layers(network).values():
        nn.init.normal_(layer.offset.weight, std=0.05)
    return network.double().eval()


def randomised(norm: nn.Module) -> nn.Module:
    for name, values in norm.state_dict().items():
        if name in ("running_mean", "bias"):
            nn.init.normal_(values, std=0.2)
        elif name in ("running_var", "weight"):
            nn.init.uniform_(values, 0.5, 1.5)
    return norm.double().eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d | ConstantBatchNorm2d) for module in network.modules())


def assert_same(network: nn.Module, left: int) -> None:
    """The same function, with so many norms left beside that of the pyramid, which follows a sum."""
    with torch.inference_mode():
        twin = folded(network, LARGE)
        torch.testing.assert_close(twin(IMAGE), network(IMAGE), rtol=1e-9, atol=1e-12)
    assert norms(twin) == 1 + left


@pytest.mark.parametrize(
    "deform",
    [Deform(0), Deform(3), Deform(2, modulated=True, offset_groups=2), Deform(1, head_layers=1)],
    ids=["plain", "deformable", "modulated", "in the head"],
)
@pytest.mark.parametrize("frozen_stages", [0, 2])
def test_it_computes_the_same(deform: Deform, frozen_stages: int) -> None:
    network = light(deform, frozen_stages)
    assert_same(network, left=0)
    assert list(dict(folded(network, LARGE).named_modules())) == list(dict(network.named_modules()))


def test_constant_norms_are_folded_in_training_mode_too() -> None:
    network = light(frozen_stages=2)
    constant = sum(isinstance(module, ConstantBatchNorm2d) for module in network.modules())
    assert norms(network) - norms(folded(network.train(), LARGE)) == constant > 0


@pytest.mark.parametrize("affine", [True, False])
def test_a_convolution_with_a_bias_and_a_norm_without(affine: bool) -> None:
    network = light()
    pair = Conv2dNormActivation(32, 192, 1, norm_layer=None, activation_layer=None, bias=True)
    pair.append(randomised(nn.BatchNorm2d(192, affine=affine, eps=0.1)))
    network.set_submodule(EXPANSION, pair.double())
    assert_same(network, left=0)


def test_half_precision_is_rounded_once() -> None:
    halved = light().bfloat16()
    same = light().float()
    same.load_state_dict(halved.state_dict())
    own, exact = (folded(network, LARGE).get_submodule(CONV).get_parameter("weight") for network in (halved, same))
    assert torch.equal(own, exact.bfloat16())


def test_the_network_stays_as_it_is() -> None:
    network = light()
    before, result = {name: value.clone() for name, value in network.state_dict().items()}, network(IMAGE)
    folded(network, LARGE)(IMAGE)
    after = network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(network(IMAGE), result)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_nothing_is_left_behind() -> None:
    """Without the collector of cycles too: each image has a twin of its own."""
    network = light()
    gc.disable()
    try:
        conv = weakref.ref(folded(network, LARGE).get_submodule(CONV))
        assert conv() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", [CONV, NORM, EXPANSION])
def test_what_a_hook_watches_is_computed(name: str, kind: str) -> None:
    network = light()
    seen: list[Tensor] = []
    handle = getattr(network.get_submodule(name), kind)(lambda *values: seen.append(values[-1]))
    assert_same(network, left=1)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])
    handle.remove()
    assert_same(network, left=0)


class Tapped(Conv2dNormActivation):
    """Gives what lies between, as a network of somebody else's may."""

    def forward(self, image: Tensor) -> Tensor:
        between: Tensor = self[0](image)
        return between


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Halved(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


def of_statistics(network: nn.Module) -> None:
    network.set_submodule(NORM, nn.BatchNorm2d(192, track_running_stats=False).double().eval())


def learning(network: nn.Module) -> None:
    network.get_submodule(NORM).train()


def patched(network: nn.Module) -> None:
    conv = network.get_submodule(CONV)
    forward = conv.forward
    conv.forward = lambda image: -forward(image)  # type: ignore[method-assign]


def pruned(network: nn.Module) -> None:
    prune.l1_unstructured(network.get_submodule(CONV), "weight", 0.5)


def of_a_buffer(network: nn.Module) -> None:
    conv = network.get_submodule(CONV)
    weight = conv.get_parameter("weight").detach()
    del conv.weight
    conv.register_buffer("weight", weight)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a norm of the batch's statistics": of_statistics,
    "a norm that learns": learning,
    "a forward of somebody's own": patched,
    "a pruned weight": pruned,
    "a weight that is a buffer": of_a_buffer,
    "a parametrised weight": lambda network: weight_norm(network.get_submodule(CONV)),
    "another norm": lambda network: network.set_submodule(NORM, randomised(Doubled(192))),
    "another convolution": lambda network: network.set_submodule(CONV, Halved(32, 192, 1).double()),
    "another block": lambda network: network.set_submodule(EXPANSION, Tapped(32, 192, 1).double().eval()),
}


@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_what_may_compute_something_else_is_left(change: Callable[[nn.Module], object]) -> None:
    network = light()
    change(network)
    names = list(network.state_dict())
    assert_same(network, left=1)
    assert list(network.state_dict()) == names


def test_a_network_of_somebody_else_is_left() -> None:
    class Tapping(MobileNetV2):
        pass

    network = light()
    backbone = network.get_submodule("backbone")
    backbone.__class__ = Tapping
    head = 1  # the norm of the head's convolution
    assert norms(network) - norms(folded(network, LARGE)) == head
    tapped = Tapped(3, 8)
    assert folded(tapped, LARGE) is tapped
    compiled = torch.compile(light(), backend="eager")
    names = list(compiled.state_dict())
    assert folded(compiled, LARGE) is compiled
    assert list(compiled.state_dict()) == names
    elsewhere = light().to("meta")
    assert folded(elsewhere, LARGE) is elsewhere


def test_for_a_small_image_it_would_take_longer() -> None:
    network = light()
    assert folded(network, (240, 320)) is network


def test_a_prediction_follows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segdcn.models.folding.LEAST_PIXELS", 0)
    network = light().float()
    predictor = Predictor(network, list("abcde"), [(0, 0, 0)] * 5, EvalTransform([0.0] * 3, [1.0] * 3))
    pixels = (IMAGE[0] * 60 + 128).clamp(0, 255).to(torch.uint8)
    for _ in range(2):
        expected = network(predictor.batch(pixels.permute(1, 2, 0).numpy())).softmax(dim=1)[0]
        found = predictor(pixels, probabilities=True)
        torch.testing.assert_close(torch.from_numpy(found.probabilities), expected, rtol=1e-4, atol=1e-6)
        for parameter in network.parameters():
            parameter.data = parameter * -0.7
