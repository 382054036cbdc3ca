"""Batch norms as parts of convolutions: the same function, and nothing changed that somebody else holds."""

import pytest
import torch
from torch import Tensor, nn

from segdcn.data.transforms import EvalTransform
from segdcn.inference.predictor import Predictor
from segdcn.models import Deform, build_deeplab, deformable_layers
from segdcn.models.folding import folded
from segdcn.models.frozen import ConstantBatchNorm2d

IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).double()


def light(deform: Deform = Deform(), frozen_stages: int = 1) -> nn.Module:  # noqa: B008
    """In evaluation mode, with weights and statistics that no default could stand in for."""
    torch.manual_seed(1)
    network = build_deeplab(5, "mobilenet_v2", "fpn", None, None, deform, frozen_stages=frozen_stages)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | ConstantBatchNorm2d):
            state = module.state_dict()
            for name in ("running_mean", "bias"):
                nn.init.normal_(state[name], std=0.2)
            for name in ("running_var", "weight"):
                nn.init.uniform_(state[name], 0.5, 1.5)
    for layer in deformable_layers(network).values():
        nn.init.normal_(layer.offset.weight, std=0.05)
    return network.double().eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d | ConstantBatchNorm2d) for module in network.modules())


@pytest.mark.parametrize(
    "deform",
    [Deform(0), Deform(3), Deform(2, modulated=True, offset_groups=2), Deform(1, head_layers=1)],
    ids=["plain", "deformable", "modulated", "in the head"],
)
@pytest.mark.parametrize("frozen_stages", [0, 2])
def test_it_computes_the_same(deform: Deform, frozen_stages: int) -> None:
    network = light(deform, frozen_stages)
    with torch.inference_mode():
        twin = folded(network)
        torch.testing.assert_close(twin(IMAGE), network(IMAGE), rtol=1e-9, atol=1e-12)
    assert norms(twin) == 1  # that of the pyramid, which follows a sum
    assert list(dict(twin.named_modules())) == list(dict(network.named_modules()))


def test_the_network_stays_as_it_is() -> None:
    network = light()
    before, result = {name: value.clone() for name, value in network.state_dict().items()}, network(IMAGE)
    folded(network)(IMAGE)
    after = network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(network(IMAGE), result)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_what_a_hook_watches_is_computed() -> None:
    network = light()
    conv, norm = network.get_submodule("backbone.features.5.conv.0.0"), network.get_submodule("head.fuse.1")
    seen: list[Tensor] = []
    handles = [module.register_forward_hook(lambda _, __, output: seen.append(output)) for module in (conv, norm)]
    twin = folded(network)
    assert norms(twin) == 3
    network(IMAGE)
    twin(IMAGE)
    for own, other in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(own, other)
    for handle in handles:
        handle.remove()
    assert norms(folded(network)) == 1


def test_batch_statistics_and_subclasses_are_left() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    network = light()
    network.get_submodule("head.fuse.1").train()
    without = nn.BatchNorm2d(64, track_running_stats=False)
    network.set_submodule("backbone.features.7.conv.3", without.double().eval())
    network.set_submodule("backbone.features.5.conv.3", Doubled(32).double().eval())
    twin = folded(network)
    assert norms(twin) == 4
    torch.testing.assert_close(twin(IMAGE), network(IMAGE), rtol=1e-9, atol=1e-12)


def test_a_network_of_somebody_else_is_left() -> None:
    """It may look at what lies between its layers."""

    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

        def forward(self, image: Tensor) -> Tensor:
            between: Tensor = self.layers[0](image)
            return between

    network = Tapped().eval()
    assert folded(network) is network


def test_a_prediction_follows_the_weights() -> None:
    network = light().float()
    predictor = Predictor(network, list("abcde"), [(0, 0, 0)] * 5, EvalTransform([0.0] * 3, [1.0] * 3))
    pixels = (IMAGE[0] * 60 + 128).clamp(0, 255).to(torch.uint8)
    for _ in range(2):
        expected = network(predictor.batch(pixels.permute(1, 2, 0).numpy())).softmax(dim=1)[0]
        found = predictor(pixels, probabilities=True)
        torch.testing.assert_close(torch.from_numpy(found.probabilities), expected, rtol=1e-4, atol=1e-6)
        for parameter in network.parameters():
            parameter.data = parameter * -0.7
