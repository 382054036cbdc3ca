"""job.json, which a run that is a sweep's job has: what the run's own files do not tell."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from segdcn.errors import UserError
from segdcn.runs.files import read_object, shown, write_json

FILE = "job.json"
State = Literal["finished", "failed", "stopped", "pruned", "running", "waiting"]


@dataclass(frozen=True)
class JobRecord:
    """What ``job.json`` holds.

    attempts: how often the job was started.
    seconds: all attempts that ended, together.  started: when the running one began, in seconds since 1970.
    epochs_before: those that were done then.
    error: why the last attempt failed.  final: whether another one would fail in the same way.
    """

    state: State = "waiting"
    attempts: int = 0
    seconds: float = 0.0
    started: float | None = None
    epochs_before: int = 0
    error: str | None = None
    final: bool = False

    def write(self, folder: Path) -> None:
        """Write it atomically."""
        write_json(folder / FILE, asdict(self))


def read_job(folder: Path) -> JobRecord:
    """The record in a run's folder.

    Raises: UserError, one line, where there is none, or none that can be read.
    """
    path, remedy = folder / FILE, "delete it and start the sweep again"
    values = read_object(path, remedy)
    if values.get("state") not in get_args(State):
        raise UserError(f"{shown(path)} is no job's record: its state is {values.get('state')!r}; {remedy}")
    try:
        record = JobRecord(**values)
        if not (isinstance(record.attempts, int) and isinstance(record.error, str | None)):
            raise TypeError("its attempts must be a number and its error a text or null")
        return record
    except TypeError as error:
        raise UserError(f"{shown(path)} is no job's record: {error}; {remedy}") from error
