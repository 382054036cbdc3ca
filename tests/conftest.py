"""Runs that several tests look at."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported, here and in the processes that tests start: on tensors this small threads mostly wait for
# each other, and on a busy machine they wait long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from runs import SMALL, process

settings.register_profile("segdcn", deadline=None)  # how long an example takes is the machine's matter
settings.load_profile("segdcn")


@dataclass(frozen=True)
class FirstRun:
    """``segdcn-train`` as a newcomer's process, in an empty folder."""

    folder: Path
    output: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> FirstRun:
    """With everything switched on; tests copy the folder before they change anything in it."""
    cwd = tmp_path_factory.mktemp("first_run")
    output = process(cwd, "-m", "segdcn.train", *SMALL, "callbacks.panels.images=2")
    assert output.returncode == 0, output.stderr
    (folder,) = (cwd / "runs" / "shapes").iterdir()
    return FirstRun(folder, output)
