"""Sweeps whose jobs are scripts of a few lines in place of trainings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from segdcn.sweep.plan import Job, Sweep

FINISH = "open('metrics.json', 'w').write('{\"val/miou\": 0.5}')"


def made_sweep(folder: Path, *names: str) -> Sweep:
    jobs = tuple(Job(name, (f"name={name}",), (f"name={name}",), epochs=4, accelerator="cpu") for name in names)
    return Sweep(folder, folder.name, "segdcn-train -m", None, "val/miou", jobs)


def scripts(monkeypatch: pytest.MonkeyPatch, module: str, script: Callable[[Job], str]) -> None:
    """Let the launcher of ``module`` run ``script(job)`` in the job's folder instead of a training."""

    def command(job: Job, folder: Path) -> Sequence[str]:
        return [sys.executable, "-c", f"import os, sys, time\nos.chdir({str(folder)!r})\n{script(job)}"]

    monkeypatch.setattr(f"{module}.train_command", command)
