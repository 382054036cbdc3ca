"""What a run leaves behind: where it lies, what describes it, and how a file gets there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "segdcn",
    "torch",
    "torchvision",
    "pytorch-lightning",
    "hydra-core",
    "torchmetrics",
    "albumentations",
    "numpy",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
)


def write_bytes(path: Path, content: bytes) -> None:
    """Write the file atomically: a reader, or a killed process, never leaves or sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write one JSON object atomically; figures that do not exist (NaN) become null."""
    plain = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
    write_text(path, json.dumps(plain, indent=2, allow_nan=False) + "\n")


def environment(seed: int) -> dict[str, Any]:
    """What a figure depends on besides the config: versions, commit, device, seed."""
    import torch  # here: a command that only reads run folders starts without it

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": seed,
        "python": platform.python_version(),
        "packages": versions,
        "git": _git_state(),
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "devices": torch.cuda.device_count() if cuda else 0,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _processor() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"cpu ({platform.machine()})"


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from; None for an installed wheel."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "run_folder.py"):
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def shown(path: str | Path) -> Path:
    """A path as a user types it: relative below the working folder, whole elsewhere."""
    path = Path(path).absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: the file itself, or the last one of a run folder.

    Raises: FileNotFoundError when there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    last = path / "checkpoints" / "last.ckpt"
    if last.is_file():
        return last
    if path.is_dir():
        raise FileNotFoundError(f"{path} holds no checkpoints/last.ckpt: the run ended before its first checkpoint")
    raise FileNotFoundError(f"no checkpoint or run folder at {path}")


def run_folder_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint belongs to: RUN/checkpoints/NAME.ckpt, or else the file's own folder."""
    checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def file_hash(path: Path) -> str:
    """The file's sha256, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours, plain values and tensors only.

    Raises: FileNotFoundError, or ValueError when the file is damaged or not from segdcn; one line each.
    """
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}: give one such as RUN/checkpoints/best.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds: zip, pickle, EOF, runtime
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, truncated or no checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict) or "segdcn" not in checkpoint:
        raise ValueError(f"{path} is not a segdcn checkpoint: it lacks the description of its run")
    return checkpoint
