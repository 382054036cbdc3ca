"""How far a sweep is: one live table in a terminal, a line per event elsewhere; from the jobs' files alone."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from segdcn.drawing import console
from segdcn.drawing.numbers import clock, metric_value
from segdcn.runs.folder import locked
from segdcn.sweep.jobs import Progress, is_finished, read_progress
from segdcn.sweep.plan import Job, Sweep, read_sweep

STYLES = {
    "waiting": "dim",
    "running": "cyan",
    "stopped": "yellow",
    "pruned": "blue",
    "finished": "green",
    "failed": "red",
}
REFRESH_SECONDS = 2.0


def show(folder: Path) -> None:
    """Print the sweep's table once.

    Raises: ValueError, one line, where there is no sweep.
    """
    console.show(_now(read_sweep(folder)))


def watch(folder: Path) -> None:
    """Print the sweep's table anew every few seconds, until Ctrl-C."""
    sweep = read_sweep(folder)
    with contextlib.suppress(KeyboardInterrupt), Live(_now(sweep), auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH_SECONDS)
            live.update(_now(sweep), refresh=True)


def _now(sweep: Sweep) -> Table:
    progress = {job.folder: read_progress(sweep.path(job), sweep.metric) for job in sweep.jobs}
    table = status_table(sweep, sweep.jobs, progress, time.time())
    with locked(sweep.folder / "sweep.lock") as lock:
        if lock is not None and any(now_at.record.state == "running" for now_at in progress.values()):
            table.caption = "no process runs this sweep: what was running was interrupted"
    return table


def time_left(job: Job, progress: Progress, now: float) -> float | None:
    """Seconds until the job ends, by the pace of the running attempt; None while nothing can be said."""
    if progress.record.state != "running" or progress.record.started is None:
        return None
    done = progress.epochs - progress.record.epochs_before
    if done < 1:
        return None
    seconds_per_epoch = (now - progress.record.started) / done
    if job.epochs is not None:
        return seconds_per_epoch * max(0, job.epochs - progress.epochs)
    if job.steps is not None and progress.steps:
        return seconds_per_epoch * max(0, job.steps - progress.steps) * progress.epochs / progress.steps
    return None


def status_table(sweep: Sweep, jobs: Sequence[Job], progress: dict[str, Progress], now: float) -> Table:
    """One row per job: its state, epoch, best figure, time so far and left."""
    table = Table("job", "state", title=Text(f"{sweep.name}: {count(progress)}"), title_justify="left")
    for heading in ("epoch", f"best {sweep.metric}", "time", "left"):
        table.add_column(heading, justify="right")
    labels = sweep.job_labels
    for job in jobs:
        now_at = progress[job.folder]
        record = now_at.record
        state = record.state + (f", attempt {record.attempts}" if record.attempts > 1 else "")
        seconds = record.seconds + (now - record.started if record.started and record.state == "running" else 0)
        left = time_left(job, now_at, now)
        table.add_row(
            Text(labels[job.folder]),
            Text(state, STYLES[record.state]),
            _length(job, now_at),
            "" if math.isnan(now_at.best) else metric_value(now_at.best, sweep.metric),
            clock(seconds) if seconds else "",
            "" if left is None else clock(left),
        )
    return table


def _length(job: Job, progress: Progress) -> str:
    if job.epochs is not None:
        return f"{progress.epochs}/{job.epochs}"
    return f"step {progress.steps}/{job.steps}" if job.steps is not None else str(progress.epochs)


def count(progress: dict[str, Progress]) -> str:
    """Such as ``3 of 15 finished, 2 running, 1 failed``."""
    states: Counter[str] = Counter(one.record.state for one in progress.values())
    rest = [
        f"{states[state]} {state}" for state in ("running", "stopped", "pruned", "failed", "waiting") if states[state]
    ]
    return ", ".join([f"{states['finished']} of {len(progress)} finished", *rest])


class Display:
    """What a coordinator shows while it runs ``jobs``; ``update`` may be called as often as one likes."""

    def __init__(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        self.sweep, self.jobs = sweep, jobs
        self.console = Console(highlight=False)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._labels = sweep.job_labels
        self._progress: dict[str, Progress] = {}
        self._next = 0.0

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.start()
        self.update()
        return self

    def __exit__(self, *error: object) -> None:
        self._next = 0.0
        self.update()
        if self.live is not None:
            self.live.stop()

    def update(self) -> None:
        """Show what is new, every few seconds."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + REFRESH_SECONDS
        before = self._progress
        self._progress = {job.folder: self._read(job) for job in self.jobs}
        if self.live is not None:
            shown = self.jobs
            if len(shown) > self.console.height - 6:  # what would not fit: the jobs of which there is no news
                quiet = ("waiting", "pruned", "finished")
                shown = [job for job in shown if self._progress[job.folder].record.state not in quiet]
            table = status_table(self.sweep, shown, self._progress, time.time())
            self.live.update(table, refresh=True)
            return
        for number, job in enumerate(self.jobs, 1):
            record = self._progress[job.folder].record
            if job.folder not in before:
                continue
            old = before[job.folder].record
            if (record.state, record.attempts) != (old.state, old.attempts):
                self.note(f"{number:>3}/{len(self.jobs)} {self._labels[job.folder]}: {self._event(job)}")

    def note(self, line: str) -> None:
        """One line for the user, above the table or after the other lines."""
        self.console.print(line, soft_wrap=True, markup=False)

    def _read(self, job: Job) -> Progress:
        known = self._progress.get(job.folder)
        folder = self.sweep.path(job)
        if known is not None and known.record.state == "finished" and is_finished(folder):
            return known
        return read_progress(folder, self.sweep.metric)

    def _event(self, job: Job) -> str:
        now_at = self._progress[job.folder]
        record = now_at.record
        if record.state == "running":
            after = f" after epoch {record.epochs_before}" if record.epochs_before else ""
            return f"started{after}" + (f", attempt {record.attempts}" if record.attempts > 1 else "")
        if record.state == "finished":
            metric = self.sweep.metric
            return f"finished, {metric} {metric_value(now_at.best, metric)}, {clock(record.seconds)}"
        return f"{record.state}: {record.error}" if record.error else record.state
