"""What a run left in its folder, however far it came: read and checked here alone; nothing is written."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import yaml

from segdcn.errors import UserError, is_passing
from segdcn.runs import job
from segdcn.runs.files import file_hash, read_object, shown, typed

STATES = (*get_args(job.State), "missing")


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder tells.

    state: one of ``STATES``: finished where metrics.json is there; else as job.json says, which the jobs of a sweep
        have; missing where neither is.
    error: why a run that has not finished did not.
    config: as composed, with its interpolations; environment, metrics: the JSON files. Empty where there is none.
    """

    folder: Path
    state: str
    error: str | None
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def split(self) -> str:
        return str(self.metrics.get("split", "val"))

    @property
    def seed(self) -> Any:
        return self.metrics.get("seed", self.config.get("seed"))

    @property
    def iou(self) -> dict[str, float | None]:
        """IoU of each class, see ``by_class``."""
        return self.by_class("iou")

    def by_class(self, kind: str) -> dict[str, float | None]:
        """A figure of each class as a fraction, in the order of the labels; None of a class that does not occur.

        kind: what stands before the class in its name, such as ``iou``.
        """
        prefix = f"{self.split}/{kind}/"
        return {key.removeprefix(prefix): self.number(key) for key in self.metrics if key.startswith(prefix)}

    def figure(self, name: str) -> float | None:
        """A figure of the run's split, such as ``miou``, as ``number`` gives it."""
        return self.number(f"{self.split}/{name}")

    def number(self, key: str) -> float | None:
        """A number of metrics.json; None where it does not exist.

        Raises: UserError, one line, for something else than a number.
        """
        return checked_number(self.metrics, key, self.folder / "metrics.json", resume_command(self.folder))

    @property
    def git(self) -> Mapping[str, Any]:
        """Of the checkout that the run was started from; empty of an installed package."""
        git = self.environment.get("git")
        return git if isinstance(git, Mapping) else {}

    @property
    def commit(self) -> str:
        """Of the code, in words; empty where the environment is not known."""
        if not self.environment:
            return ""
        changed = ", with changes that were not committed" if self.git.get("dirty") else ""
        return f"{self.git.get('commit', 'unknown, an installed package')}{changed}"

    @property
    def hardware(self) -> str:
        """The device and the CPU threads, in words; empty where the environment is not known."""
        devices, device, threads = (self.environment.get(key) for key in ("devices", "device", "threads"))
        parts = [f"{devices} × {device}" if devices else device]
        parts += [None if threads is None else f"{threads} thread{'' if threads == 1 else 's'}"]
        return ", ".join(filter(None, parts))

    @property
    def published(self) -> float | None:
        """The published mean IoU of the setting as a fraction: ``paper_miou`` of the config, there in percent.

        Raises: UserError, one line, for something else than a percentage.
        """
        percent = self.config.get("paper_miou")
        if percent is None:
            return None
        if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
            path = shown(self.folder / "config.yaml")
            raise UserError(f"paper_miou in {path} must be a figure in percent or null, got {percent!r}")
        return percent / 100

    @property
    def checkpoint(self) -> Path:
        """The one that the figures are of."""
        return self.folder / "checkpoints" / Path(self.metrics.get("checkpoint") or "best.ckpt").name

    @cached_property
    def checkpoint_hash(self) -> str | None:
        """The checkpoint's sha256; None where there is no such file (any more)."""
        return file_hash(self.checkpoint) if self.checkpoint.is_file() else None

    @cached_property
    def epochs(self) -> dict[str, Sequence[float]]:
        """See ``read_epochs``."""
        return read_epochs(self.folder)

    def evaluation_command(self, split: str) -> str:
        """The command that evaluates the run's checkpoint."""
        return f"segdcn-evaluate {typed(self.checkpoint, 'checkpoint')}" + ("" if split == "val" else f" split={split}")

    def evaluation_folder(self, split: str) -> Path:
        """Where that command leaves its figures."""
        return self.folder / "evaluation" / f"{self.checkpoint.stem}_{split}"

    def evaluation(self, split: str) -> RunRecord | None:
        """What an evaluation of the checkpoint left, a folder as a run's; None where there was none.

        Figures of a checkpoint that was deleted since then stay, those of one that was trained on do not.
        """
        found = read_run(self.evaluation_folder(split), self.evaluation_command(split))
        if found.state != "finished":
            return None
        same = self.checkpoint_hash in (None, found.metrics.get("checkpoint_sha256"))
        return found if same else None


def read_run(folder: Path, again: str | None = None) -> RunRecord:
    """Read a run's folder, which need not be there.

    again: the command that writes metrics.json anew; None is to resume the run.

    Raises: UserError, one line, for a file that is there and cannot be read.
    """
    metrics: Mapping[str, Any] = {}
    path, state, error = folder / "metrics.json", "finished", None
    if path.is_file():
        metrics = read_object(path, f"{again or resume_command(folder)} writes it anew")
    else:
        state, error = _unfinished(folder)
    environment = folder / "environment.json"
    return RunRecord(
        folder,
        state,
        error,
        _read_config(folder / "config.yaml"),
        read_object(environment, "delete it to do without it") if environment.is_file() else {},
        metrics,
    )


def read_epochs(folder: Path, names: Collection[str] | None = None) -> dict[str, Sequence[float]]:
    """The columns of metrics.csv, NaN where an epoch has no figure; a file that is missing or damaged has none.

    names: of the columns that are wanted; None is all.
    """
    try:
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        if is_passing(error):
            raise
        return {}
    found = [key for key in (rows[0] if rows else ()) if key and (names is None or key in names)]
    return {key: [_cell(row.get(key)) for row in rows] for key in found}


def resume_command(folder: Path) -> str:
    """The command that goes on with a run, and at its end writes its figures anew."""
    return f"segdcn-train {typed(folder, 'resume')}"


def _unfinished(folder: Path) -> tuple[str, str]:
    """The state of a run without metrics.json, and why it is that."""
    if not (folder / job.FILE).is_file():
        return "missing", "never started"
    record = job.read_job(folder)
    if record.state == "finished":
        record = replace(
            record, state="failed", error=f"{job.FILE} says that it finished, but there is no metrics.json"
        )
    reason = f"{record.state} in attempt {record.attempts}" if record.attempts > 1 else record.state
    return record.state, f"{reason}: {record.error}" if record.error else reason


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        if is_passing(error):
            raise
        raise UserError(f"{shown(path)} cannot be read: it is damaged ({type(error).__name__})") from error
    return config if isinstance(config, dict) else {}


def checked_number(metrics: Mapping[str, Any], key: str, path: Path, again: str) -> float | None:
    """A number among what ``path`` holds; see ``RunRecord.number``."""
    value = metrics.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key} in {shown(path)} is no number but {value!r}; {again} writes it anew")
    return value


def _cell(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan
