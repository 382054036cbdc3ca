"""Runs that several tests look at."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported, here and in the processes that tests start: on tensors this small threads mostly wait for
# each other, and on a busy machine they wait long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from running import SMALL, process

from segdcn.runs.folder import locked

settings.register_profile("segdcn", deadline=None)  # how long an example takes is the machine's matter
settings.load_profile("segdcn")


@dataclass(frozen=True)
class FirstRun:
    """``segdcn-train`` as a newcomer's process, in an empty folder."""

    folder: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> FirstRun:
    """With everything switched on; tests copy the folder before they change anything in it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first of pytest's processes makes it for all
        shared = shared.parent
    cwd = shared / "first_run"
    with locked(shared / "first_run.lock", seconds=300):
        if not (cwd / "output.json").exists():
            cwd.mkdir()
            output = process(cwd, "-m", "segdcn.commands.train", *SMALL, "callbacks.panels.images=2")
            assert output.returncode == 0, output.stderr
            (cwd / "output.json").write_text(json.dumps([output.stdout, output.stderr]))
    (folder,) = (cwd / "runs" / "shapes").iterdir()
    return FirstRun(folder, *json.loads((cwd / "output.json").read_text()))
