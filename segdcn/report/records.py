"""What a run folder tells, read for a page; nothing is written, and what is missing is a note, not an error."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from segdcn import MissingFileError, UserError, is_passing
from segdcn.evaluation.counts import Counts
from segdcn.runs.figures import COUNTS_FILE, read_counts
from segdcn.runs.files import file_hash, read_object, shown, typed


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    name: what the page calls it; setting: what tells it from the other runs of the page.
    config: as composed, with its interpolations; environment, metrics: the JSON files.
    epochs: the columns of metrics.csv, NaN where an epoch has no figure.
    counts: the pixels that the figures were counted from; None where they were not kept.
    notes: what could not be shown and which command mends it, in whole sentences.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Mapping[str, Any]
    epochs: Mapping[str, Sequence[float]]
    counts: Counts | None
    notes: tuple[str, ...] = ()

    @property
    def split(self) -> str:
        return str(self.metrics.get("split", "val"))

    @property
    def seed(self) -> Any:
        return self.metrics.get("seed", self.config.get("seed"))

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels where counts are there, else as metrics.json names them."""
        prefix = f"{self.split}/iou/"
        return list(self.counts.class_names) if self.counts else [key[len(prefix) :] for key in self._iou]

    @property
    def iou(self) -> dict[str, float | None]:
        """IoU of each class as a fraction; None of a class that does not occur."""
        prefix = f"{self.split}/iou/"
        return {key[len(prefix) :]: value for key, value in self._iou.items()}

    @property
    def _iou(self) -> dict[str, Any]:
        return {key: value for key, value in self.metrics.items() if key.startswith(f"{self.split}/iou/")}

    def figure(self, name: str) -> float | None:
        """A figure of the run's split, such as ``miou``; None where it does not exist."""
        value = self.metrics.get(f"{self.split}/{name}")
        return value if isinstance(value, int | float) and math.isfinite(value) else None

    @property
    def checkpoint(self) -> Path:
        """The one that the figures are of."""
        return self.folder / "checkpoints" / Path(str(self.metrics.get("checkpoint", "best.ckpt"))).name

    @cached_property
    def checkpoint_hash(self) -> str | None:
        """The checkpoint's sha256; None where there is no such file (any more)."""
        return file_hash(self.checkpoint) if self.checkpoint.is_file() else None


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Read a run folder.

    Raises: FileNotFoundError, ValueError, one line each: no folder, a run that has no figures yet, a damaged file.
    """
    if not folder.is_dir():
        raise MissingFileError(f"no run folder at {shown(folder)}: give one such as runs/shapes/DATE_TIME")
    if not (folder / "metrics.json").is_file():
        raise UserError(
            f"{shown(folder)} holds no metrics.json: it is no run folder, or its run has not finished;"
            f" segdcn-train {typed(folder, 'resume')} continues one"
        )
    metrics = read_object(folder / "metrics.json", f"segdcn-train {typed(folder, 'resume')} writes it anew")
    environment = folder / "environment.json"
    config = _read_config(folder / "config.yaml")
    record = RunRecord(
        folder=folder,
        name=name or str(config.get("name") or folder.resolve().name),
        config=config,
        environment=read_object(environment, "delete it to do without it") if environment.is_file() else {},
        metrics=metrics,
        epochs=_read_epochs(folder / "metrics.csv"),
        counts=None,
    )
    counts = _find_counts(record)
    if isinstance(counts, str):
        return replace(record, notes=(counts,))
    return replace(record, counts=counts)


def _find_counts(record: RunRecord) -> Counts | str:
    """The run's own counts, or those of a later evaluation of the same checkpoint; else what to do."""
    evaluated = record.folder / "evaluation" / f"{record.checkpoint.stem}_{record.split}"
    reason = "The pixel counts of single images were not kept"
    for path in (record.folder / COUNTS_FILE, evaluated / COUNTS_FILE):
        if not path.is_file():
            continue
        try:
            counts = read_counts(path)
        except ValueError as error:
            reason = f"{str(error)[0].upper()}{str(error)[1:]}"
            continue
        if path.parent == record.folder or _same_evaluation(record, path.parent / "metrics.json"):
            return counts
    return (
        f"{reason}: intervals of classes, the confusion matrix and the choice of images need "
        f"segdcn-evaluate {typed(record.checkpoint, 'checkpoint')}"
    )


def _same_evaluation(record: RunRecord, path: Path) -> bool:
    """Whether a later evaluation is of the checkpoint and the protocol that the run's figures are of."""
    if not path.is_file():
        return False
    facts = read_object(path, "evaluate again")
    return (
        facts.get("checkpoint_sha256") == record.checkpoint_hash
        and facts.get("protocol") == record.metrics.get("protocol")
        and facts.get("inference") == record.metrics.get("inference")
    )


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


def _read_epochs(path: Path) -> dict[str, list[float]]:
    """The columns of metrics.csv; a file that is missing or damaged has none."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        if is_passing(error):
            raise
        return {}
    return {key: [_number(row.get(key)) for row in rows] for key in (rows[0] if rows else {}) if key}


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan
