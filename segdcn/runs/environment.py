"""What a figure depends on besides the config: versions, commit, device, seed."""

from __future__ import annotations

import contextlib
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

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
_CHECKOUT = Path(__file__).resolve().parents[2]
# where an untracked file changes what a run computes
_CODE = ("segdcn", "conf", "hydra_plugins")


def environment(seed: int) -> dict[str, Any]:
    """Plain values for environment.json."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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
    """Commit of the checkout that this package runs from, and whether its code was changed; None for a wheel.

    What runs, sweeps and benchmarks leave in the checkout does not count.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_CHECKOUT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", str(Path(__file__).resolve())):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        untracked = git("ls-files", "--others", "--exclude-standard", "--", *_CODE)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed or untracked)}
    except (OSError, subprocess.SubprocessError):
        return None
