"""The runs of a page: finished ones, each with a name of its own and the pixels that its figures were counted from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from segdcn.errors import MissingFileError, UserError
from segdcn.evaluation.counts import Counts
from segdcn.runs.figures import find_counts
from segdcn.runs.files import shown
from segdcn.runs.record import RunRecord, read_run, resume_command

# not what makes a run another one, and places on a machine
_OF_NO_CONCERN = ("output_dir", "resume", "launcher", "sweep", "callbacks", "logger", "hydra", "name", "report")
MOST_DIFFERENCES = 3  # of configs in a name

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class PageRun:
    """A run as a page shows it.

    name: what the page calls it.
    counts: None where they were not kept; ``lacking`` says so then, and which command mends it.
    """

    name: str
    record: RunRecord
    counts: Counts | None
    lacking: str


def read_finished(folder: Path) -> RunRecord:
    """Read the folder of a run that has finished.

    Raises: UserError, one line: no folder, a run that has no figures yet, a damaged file.
    """
    if not folder.is_dir():
        raise MissingFileError(f"no run folder at {shown(folder)}: give one such as runs/shapes/DATE_TIME")
    record = read_run(folder)
    if record.state != "finished":
        raise UserError(
            f"{shown(folder)} holds no metrics.json: it is no run folder, or its run has not finished;"
            f" {resume_command(folder)} continues one"
        )
    return record


def page_run(record: RunRecord, name: str | None = None) -> PageRun:
    """A run of a page, by default of the record's name."""
    needing = "intervals of classes, the confusion matrix and the choice of images"
    return PageRun(name or record.name, record, *kept_or_lacking(record, find_counts, needing))


def kept_or_lacking(record: RunRecord, find: Callable[[RunRecord], Kept], needing: str) -> tuple[Kept | None, str]:
    """What ``find`` finds; or None, with a sentence of what needs it and which command mends that."""
    try:
        return find(record), ""
    except UserError as error:
        reason = str(error)
        mended = record.evaluation_command(record.split)
        return None, f"{reason[0].upper()}{reason[1:]}: {needing} need {mended}"


def check_comparable(runs: Sequence[PageRun], kind: str = "iou") -> None:
    """That runs have the same classes, but those that were not validated and have no figures.

    kind: of the classes' figures, see ``RunRecord.by_class``.

    Raises: UserError, one line.
    """
    counted = [(run.record, found) for run in runs if (found := run.record.by_class(kind))]
    for other, found in counted[1:]:
        first, classes = counted[0]
        if set(found) != set(classes):
            raise UserError(
                f"{shown(first.folder)} and {shown(other.folder)} cannot be compared: their classes differ"
                f" ({len(classes)} and {len(found)}); give runs on one data set"
            )


def unique_names(records: Sequence[RunRecord]) -> list[str]:
    """Names that tell the runs of a page apart: by the config's values that differ, where these are few."""
    configs = [_flat(record.config) for record in records]
    keys = [
        key
        for key in dict.fromkeys(key for config in configs for key in config)
        if len({repr(config.get(key)) for config in configs}) > 1
    ]
    names = [record.name for record in records]
    if 0 < len(keys) <= MOST_DIFFERENCES:
        found = [
            ", ".join([name, *(f"{readable(key)}={config.get(key)}" for key in keys)])
            for name, config in zip(names, configs, strict=True)
        ]
    else:
        found = [
            name if names.count(name) == 1 else f"{name} {record.folder.resolve().name}"
            for name, record in zip(names, records, strict=True)
        ]
    return [name if found.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(found, start=1)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value, without what says nothing of the training and what repeats another key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if not prefix and key in _OF_NO_CONCERN:
            continue
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif not (isinstance(value, str) and value.startswith("${")):
            found[f"{prefix}{key}"] = value
    return found


def readable(override: str) -> str:
    """``model.deform.layers=3`` without what goes without saying."""
    return re.sub(r"^\+?(?:model|experiment|dataset)\.", "", override)
