"""Frozen parts of a backbone: the same function, and nothing that training does changes them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from segdcn.models import (
    BACKBONES,
    Deform,
    build_backbone,
    build_deeplab,
    freeze_batch_norm,
    freeze_stages,
    make_deformable,
)


def with_statistics(network: nn.Module) -> nn.Module:
    """Batch norms that do something, as after pretraining."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                nn.init.uniform_(tensor, low, high)
    return network


def build(**options: object) -> nn.Module:
    small = {"backbone": "resnet_tiny", "head": "paper", "weights": None, "deform": Deform(0), "head_channels": 8}
    return build_deeplab(3, **{**small, **options})  # type: ignore[arg-type]


def trained(network: nn.Module, steps: int = 2) -> set[str]:
    """The names of the tensors that some steps of training change."""
    before = copy.deepcopy(network.state_dict())
    network.train()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (network(torch.randn(2, 3, 48, 48)) * torch.randn(2, 3, 48, 48)).sum().backward()
        optimizer.step()
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


NORMS = (".bn", "bn1.", "downsample.1.")


def test_frozen_batch_norm_computes_what_batch_norm_does_in_evaluation() -> None:
    network = with_statistics(build_backbone("resnet18", 16)).eval()
    image = torch.randn(1, 3, 65, 81)
    with torch.no_grad():
        expected = network(image)
        names = freeze_batch_norm(network)
        assert len(names) == 20
        for mode in (False, True):
            for ours, theirs in zip(network.train(mode)(image), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_batch_norm_is_in_half_precision_what_its_input_is() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    freeze_batch_norm(network)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(torch.randn(1, 3, 5, 5)).dtype == torch.bfloat16


def test_training_changes_all_but_the_frozen_batch_norms() -> None:
    network = build(frozen_batch_norm=True, deform=Deform(3))
    changed = trained(network, steps=3)
    everything = set(network.state_dict())
    norms = {name for name in everything if any(part in name for part in NORMS)}
    assert len(norms) == 13 * 4
    assert changed == everything - norms
    assert not any("num_batches_tracked" in name for name in everything)


@pytest.mark.parametrize(
    ("stages", "frozen"), [(1, ("conv1", "bn1", "layer1")), (2, ("conv1", "bn1", "layer1", "layer2"))]
)
def test_training_changes_nothing_in_frozen_stages(stages: int, frozen: tuple[str, ...]) -> None:
    network = build(frozen_stages=stages)
    inside = {name for name in network.state_dict() if name.split(".")[1] in frozen and name.startswith("backbone.")}
    assert inside
    assert trained(network) == set(network.state_dict()) - inside
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == inside & {
        name for name, _ in network.named_parameters()
    }


def test_a_frozen_stage_keeps_the_gradient_flowing_only_from_where_something_learns() -> None:
    network = build_backbone("mobilenet_v2", 16)
    freeze_stages(network, 1)
    features = network.train()(torch.randn(1, 3, 33, 33))
    assert not features.low.requires_grad  # nothing has to be kept of the finest maps
    assert features.high.requires_grad


def test_offset_branches_of_a_frozen_stage_learn() -> None:
    network = build(frozen_stages=4, deform=Deform(1))
    assert {name for name in trained(network) if name.startswith("backbone.")} == {
        "backbone.layer4.0.conv2.offset.weight",
        "backbone.layer4.0.conv2.offset.bias",
    }


def test_made_deformable_afterwards_it_computes_the_same() -> None:
    network = build(frozen_batch_norm=True, frozen_stages=1).train()
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        before = network(image)
        make_deformable(network, last=3)
        torch.testing.assert_close(network(image), before)


def test_states_pass_between_frozen_and_learning_networks() -> None:
    learning = with_statistics(build()).eval()
    frozen = build(frozen_batch_norm=True, frozen_stages=1)
    frozen.load_state_dict(learning.state_dict())  # a batch counter is passed over
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(frozen.train()(image), learning(image), rtol=1e-4, atol=1e-5)
    again = build(frozen_batch_norm=True, frozen_stages=1)
    again.load_state_dict(frozen.state_dict())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_layer_of_a_backbone_is_in_one_stage(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, 32)
    parts = [part for stage in backbone.stages for part in stage]
    assert len(parts) == len(set(parts))
    for parameter, _ in backbone.named_parameters():
        assert sum(parameter.startswith(f"{part}.") for part in parts) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_stages": 5}, "cannot freeze 5 stages, since the backbone has 4: set model.frozen_stages to 0 to 4"),
        ({"frozen_stages": -1}, "cannot freeze -1 stages"),
        ({"backbone": "timm/resnet18", "frozen_stages": 1}, "does not name its stages: set model.frozen_stages to 0"),
    ],
)
def test_what_cannot_be_frozen_is_refused_in_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(**options)
    assert "\n" not in str(caught.value)


def test_a_batch_norm_that_does_more_is_refused_and_nothing_changed() -> None:
    class WithActivation(nn.BatchNorm2d):
        pass

    network = nn.Sequential(nn.BatchNorm2d(3), WithActivation(3))
    with pytest.raises(ValueError, match="cannot freeze 1: it is a WithActivation"):
        freeze_batch_norm(network)
    assert type(network[0]) is nn.BatchNorm2d
