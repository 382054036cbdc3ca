"""Layer-wise decay of the learning rate, against the rule of InternImage's authors, and what it refuses."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from running import BARE, call
from torch import nn

from segdcn.commands import train
from segdcn.models import Backbone, Deform, build_deeplab
from segdcn.models.internimage import VARIANTS
from segdcn.training.optim import parameter_groups


def authors_layer(name: str, depths: tuple[int, ...]) -> int:
    """The layer of a parameter by its name: 0 is the stem, ``sum(depths) + 1`` the heads.

    The rule of mmcv_custom/custom_layer_decay_optimizer_constructor.py (OpenGVLab/InternImage at 31c962d).
    """
    found = re.match(r"backbone\.levels\.(\d)\.(\w+)(?:\.(\d+))?", name)
    if name.startswith("backbone.patch_embed."):
        return 0
    if found is None:
        return sum(depths) + 1
    stage, part, number = int(found[1]), found[2], found[3]
    if part in ("norm", "downsample"):
        return 1 + sum(depths[: min(stage, 2) + 1])
    return 1 + sum(depths[:stage]) + int(number)


@pytest.mark.parametrize(
    ("backbone", "decay"),
    [("internimage_t", 0.9), ("internimage_l", 0.94), ("internimage_h", 0.95), ("flash_internimage_s", 0.9)],
)
def test_each_layer_of_internimage_learns_as_with_its_authors(backbone: str, decay: float) -> None:
    depths = VARIANTS[backbone].depths
    with torch.device("meta"):
        network = build_deeplab(150, backbone, "upernet", None, weights=None, deform=Deform(0), auxiliary=True)
    optimizer = torch.optim.AdamW(parameter_groups(network, layer_lr_decay=decay), weight_decay=0.05)
    found = {id(p): (g["lr_mult"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        factor, weight_decay = found[id(parameter)]
        assert factor == pytest.approx(decay ** (sum(depths) + 1 - authors_layer(name, depths)), rel=1e-12), name
        free = parameter.ndim == 1 or name.endswith(".bias") or "norm" in name
        assert weight_decay == (0.0 if free else 0.05), name


def test_the_branches_of_dcnv3_learn_as_fast_as_the_rest() -> None:
    with torch.device("meta"):
        network = build_deeplab(150, "internimage_t", "upernet", None, weights=None, deform=Deform(0))
    factors = {id(p): group["lr_mult"] for group in parameter_groups(network) for p in group["params"]}
    branches = [p for name, p in network.named_parameters() if re.search(r"\.dcn\.(offset|mask)\.", name)]
    assert len(branches) == 2 * 2 * 30
    assert {factors[id(branch)] for branch in branches} == {1.0}


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_stages_are_the_layers_of_other_backbones(backbone: str) -> None:
    network = build_deeplab(6, backbone, "paper", weights=None, deform=Deform(1), head_channels=8)
    groups = parameter_groups(network, backbone_lr_mult=0.5, offset_lr_mult=0.1, layer_lr_decay=0.8)
    factors = {id(p): group["lr_mult"] for group in groups for p in group["params"]}
    starts = {"resnet18": ("conv1", "layer2.0", "layer3.0", "layer4.0"), "mobilenet_v2": (0, 4, 7, 14)}[backbone]
    for number, start in enumerate(starts):
        place = start if backbone == "resnet18" else f"features.{start}"
        weight = next(network.backbone.get_submodule(str(place)).parameters())
        assert factors[id(weight)] == pytest.approx(0.5 * 0.8 ** (4 - number))
    (offset,) = [p for name, p in network.named_parameters() if name.endswith("offset.weight")]
    assert factors[id(offset)] == pytest.approx(0.1 * 0.8)
    assert factors[id(network.head.classifier.weight)] == 1.0
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)


def test_without_decay_the_groups_are_the_roles() -> None:
    network = build_deeplab(6, "resnet_tiny", "paper", weights=None, head_channels=8)
    names = [group["name"] for group in parameter_groups(network, layer_lr_decay=1.0)]
    assert names == ["backbone", "backbone_no_decay", "offset", "head", "head_no_decay"]


def test_a_run_says_how_its_layers_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = f"output_dir={tmp_path / 'run'}"
    assert call(train.main, *BARE, "trainer.max_epochs=1", "task.layer_lr_decay=0.5", run) == 0
    assert "learning rate 0.003 (offsets x 0.1, each layer below x 0.5)" in capsys.readouterr().out
    with (tmp_path / "run" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    for layer in range(4):  # the stages of resnet_tiny
        assert float(row[f"lr/backbone_layer{layer}"]) == pytest.approx(float(row["lr/head"]) * 0.5 ** (4 - layer))


class Nameless(Backbone):
    """Of one convolution, in no stage."""

    def __init__(self) -> None:
        super().__init__((8, 8, 8, 8), 4)
        self.conv = nn.Conv2d(3, 8, 1)


@pytest.mark.parametrize(
    ("backbone", "decay", "message"),
    [
        (Nameless(), 0.9, r"layer_lr_decay=0\.9 needs .* which Nameless does not: set task\.layer_lr_decay=1\.0"),
        (None, 0.9, r"layer_lr_decay=0\.9 needs a backbone .* parameters: set task\.layer_lr_decay=1\.0"),
        (Nameless(), 1.5, "layer_lr_decay must be above 0 and at most 1, got 1.5"),
        (Nameless(), 0.0, "layer_lr_decay must be above 0 and at most 1, got 0.0"),
    ],
)
def test_a_decay_that_cannot_be_is_one_line(backbone: Backbone | None, decay: float, message: str) -> None:
    network = nn.Module()
    network.head = nn.Conv2d(8, 2, 1)
    if backbone is not None:
        network.backbone = backbone
    with pytest.raises(ValueError, match=message):
        parameter_groups(network, layer_lr_decay=decay)
