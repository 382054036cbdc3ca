"""A network that starts from another one's weights: what fits is taken, the rest is told, and stays as it was."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from segdcn.commands.output import telling
from segdcn.models import Deform, build_deeplab, deformable_layers, from_torchvision_deeplabv3, load_weights

SMALL = {
    "num_classes": 6,
    "backbone": "resnet_tiny",
    "head": "aspp",
    "weights": None,
    "deform": Deform(0),
    "head_channels": 8,
}
DEFORM = Deform(layers=2)


def deeplab(seed: int, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_deeplab(**{**SMALL, **changes})


@pytest.fixture
def trained() -> nn.Module:
    """A deformable network whose every tensor differs from a new one's."""
    network = deeplab(1, deform=DEFORM)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) + 0.5)
    return network


@pytest.fixture(params=[".ckpt", ".pt", ".safetensors"])
def file(request: pytest.FixtureRequest, trained: nn.Module, tmp_path: Path) -> Path:
    """Its tensors as segdcn-train saves them, or as plain files of either kind."""
    path = tmp_path / f"weights{request.param}"
    state = trained.state_dict()
    if request.param == ".safetensors":
        save_file(state, path)
    elif request.param == ".pt":
        torch.save(state, path)
    else:
        task = {**{f"network.{key}": value for key, value in state.items()}, "train_loss.mean_value": torch.tensor(0.5)}
        torch.save({"state_dict": task, "segdcn": {"class_names": list("abcdef")}, "optimizer_states": []}, path)
    return path


def compare(made: nn.Module, trained: nn.Module, seed: int, **changes: Any) -> tuple[set[str], set[str]]:
    """The tensors that are the trained network's, and those that are a new one's of the same settings."""
    own, new, old = made.state_dict(), deeplab(seed, **changes).state_dict(), trained.state_dict()
    own = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
    taken = {key for key, value in own.items() if key in old and torch.equal(value, old[key])}
    left = {key for key, value in own.items() if torch.equal(value, new[key])}
    assert taken | left == own.keys()
    assert not taken & left
    return taken, left


def line(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    assert record.name.startswith("segdcn.")
    assert "\n" not in record.getMessage()
    return record.getMessage()


CLASSIFIER = {"head.classifier.weight", "head.classifier.bias"}
OFFSETS = {
    f"backbone.{layer}.offset.{part}" for layer in ("layer4.0.conv1", "layer4.0.conv2") for part in ("weight", "bias")
}


def test_other_classes_take_all_but_the_classifier(
    trained: nn.Module, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"num_classes": 2, "deform": DEFORM}
    with caplog.at_level(logging.INFO, "segdcn"):
        made = deeplab(7, **changes, weights=str(file))
    _, left = compare(made, trained, 7, **changes)
    assert left == CLASSIFIER
    there = [key for key in trained.state_dict() if not key.endswith("num_batches_tracked")]
    assert line(caplog) == (
        f"weights  {file}: {len(there) - 2} of {len(there)} tensors; not taken:"
        " head.classifier.weight (6x8x1x1 there, 2x8x1x1 here), head.classifier.bias (6 there, 2 here)"
    )


@pytest.mark.parametrize(
    ("changes", "left_out", "told"),
    [
        ({"deform": DEFORM}, set(), None),
        ({"deform": Deform(0)}, set(), "not taken: backbone.layer4.0.conv1.offset.weight, "),
        (
            {"deform": Deform(layers=3)},
            {"backbone.layer3.0.conv2.offset.weight"},
            "not in the file: backbone.layer3.0.conv2",
        ),
        ({"deform": Deform(layers=2, modulated=True)}, OFFSETS, "(18x96x3x3 there, 27x96x3x3 here)"),
        ({"deform": DEFORM, "output_stride": 8}, set(), None),
        ({"deform": DEFORM, "frozen_batch_norm": True, "frozen_stages": 1}, set(), None),
        ({"deform": DEFORM, "auxiliary": True}, {"auxiliary.0.weight"}, "not in the file: auxiliary.0.weight"),
        ({"deform": DEFORM, "head": "paper"}, {"head.fc6.weight"}, "and 32 more; not in the file: head.fc6.weight"),
        ({"deform": DEFORM, "image_pooling": False}, {"head.aspp.project.0.weight"}, "(8x40x1x1 there, 8x32x1x1 here)"),
    ],
)
@pytest.mark.parametrize("file", [".ckpt"], indirect=True)
def test_another_network_takes_what_fits(
    trained: nn.Module,
    file: Path,
    changes: dict[str, Any],
    left_out: set[str],
    told: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "segdcn"):
        made = deeplab(7, **changes, weights=str(file))
    taken, left = compare(made, trained, 7, **changes)
    assert left_out <= left
    assert sum(key.startswith("backbone.") for key in taken) > 60
    message = line(caplog)
    if told is None:
        assert not left
        assert "not" not in message.partition(": ")[2]
    else:
        assert told in message


def test_a_plain_network_made_deformable_computes_the_same(tmp_path: Path) -> None:
    plain = deeplab(1)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    deformed = deeplab(2, deform=DEFORM, weights=str(tmp_path / "plain.pt")).eval()
    assert len(deformable_layers(deformed)) == 2
    image = torch.randn(1, 3, 49, 65)
    with torch.no_grad():
        torch.testing.assert_close(deformed(image), plain.eval()(image))


def test_a_library_is_silent_and_of_a_commands_processes_the_first_speaks(
    trained: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    deeplab(2, weights=str(tmp_path / "weights.pt"))
    with telling(first=False):
        deeplab(2, weights=str(tmp_path / "weights.pt"))
    assert capsys.readouterr() == ("", "")
    with telling(first=True):
        deeplab(2, weights=str(tmp_path / "weights.pt"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"weights  {tmp_path}/weights.pt: ")
    deeplab(2, weights=str(tmp_path / "weights.pt"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("file", [".ckpt"], indirect=True)
def test_weights_of_another_backbone_are_refused(file: Path, backbone: str) -> None:
    with pytest.raises(ValueError, match=r"are of another network: of the 69 tensors of its backbone \d fit") as caught:
        deeplab(2, backbone=backbone, weights=str(file))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_torchvisions_published_deeplab_is_taken_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "deeplabv3_resnet50"
    theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=21).state_dict()
    save_file(theirs, tmp_path / "theirs.safetensors")
    with caplog.at_level(logging.INFO, "segdcn"):
        ours = build_deeplab(
            4,
            "resnet50",
            "aspp",
            8,
            weights=str(tmp_path / "theirs.safetensors"),
            torchvision_dilation=True,
            deform=Deform(0),
        ).state_dict()
    expected = from_torchvision_deeplabv3(theirs)
    assert {key for key, value in ours.items() if not torch.equal(value, expected[key])} == CLASSIFIER
    assert "not taken: head.classifier.weight (21x256x1x1 there, 4x256x1x1 here)" in line(caplog)


class Own(nn.Module):
    """A network of a user's own, which loads weights itself."""

    def __init__(self, num_classes: int, weights: str | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.classifier = nn.Conv2d(4, num_classes, 1)
        if weights is not None:
            load_weights(self, weights)


def test_a_network_of_ones_own_takes_what_fits(tmp_path: Path) -> None:
    first = Own(5)
    torch.save(first.state_dict(), tmp_path / "own.pt")
    second = Own(3, str(tmp_path / "own.pt"))
    assert torch.equal(second.body[0].weight, first.body[0].weight)
    torch.save({f"other.{key}": value for key, value in first.state_dict().items()}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="are of another network: of the 8 tensors of its state dict 0 fit"):
        Own(3, str(tmp_path / "other.pt"))


def test_backbones_come_from_safetensors_too(tmp_path: Path) -> None:
    state: dict[str, Tensor] = torchvision.models.resnet18().state_dict()
    save_file(state, tmp_path / "resnet18.safetensors")
    own = build_deeplab(
        3, "resnet18", "paper", weights=str(tmp_path / "resnet18.safetensors"), deform=Deform(0)
    ).backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in own.items())


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_safetensors_are_one_line(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, file)
    content = {
        "truncated": file.read_bytes()[:1000],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
    }
    file.write_bytes(content[damage])
    with pytest.raises(ValueError, match="is damaged or not a state dict") as caught:
        build_deeplab(3, "resnet18", "paper", weights=str(file), deform=Deform(0))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_run_folder_is_not_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: give a file, such as .*/checkpoints/best\.ckpt"):
        deeplab(2, weights=str(tmp_path))
