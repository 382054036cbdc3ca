"""The jobs of a sweep on disk: how far each of them is, and the process that runs it.

sweeps/NAME/sweep.json      what the sweep is (plan.py)
sweeps/NAME/<job>/          a run folder of segdcn-train; beside that command's own files it holds
    job.json                the attempts at the job, written by whoever runs it; by the run itself that it was pruned
    output.log              what they printed, one after the other
    run.lock                locked while a process runs the job
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from segdcn.drawing.numbers import is_loss
from segdcn.errors import UserError
from segdcn.runs.distributed import DIE_WITH_PARENT
from segdcn.runs.files import read_object
from segdcn.runs.folder import INHERITED_LOCK, LOCK
from segdcn.runs.job import JobRecord, read_job
from segdcn.runs.overrides import is_of_the_place, quoted, split_override
from segdcn.runs.record import read_epochs
from segdcn.sweep.plan import Job

# What another distributed program around this one would tell a training.
_FOREIGN = re.compile(
    "(LOCAL_|NODE_|GROUP_)?RANK|WORLD_SIZE|MASTER_(ADDR|PORT)|PL_GLOBAL_SEED|TORCHELASTIC_.*"
    "|SLURM_(NTASKS|PROCID|LOCALID|NODEID|NTASKS_PER_NODE|TASKS_PER_NODE)"
)


def read_record(folder: Path) -> JobRecord:
    """A job's record; one that waits where there is none, or none that can be read."""
    try:
        return read_job(folder)
    except (OSError, UserError):
        return JobRecord()


@dataclass(frozen=True)
class Progress:
    """How far a job is, from its files alone, so that any process can tell.

    epochs, steps: done so far.  best: the metric's best so far, of a loss the least; NaN where there is none yet.
    """

    record: JobRecord
    epochs: int = 0
    steps: int = 0
    best: float = math.nan


def read_progress(folder: Path, metric: str = "val/miou") -> Progress:
    """The progress of the job in ``folder``; a file that is missing or half written is no news."""
    record = read_record(folder)
    epochs = steps = 0
    figures: list[float] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        columns = read_epochs(folder, ("epoch", "step", metric))
        epochs, steps = int(columns["epoch"][-1]) + 1, int(columns["step"][-1])
        figures = [figure for figure in columns.get(metric, ()) if not math.isnan(figure)]
    if is_finished(folder):
        record = replace(record, state="finished", error=None)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if record.started is not None:  # nobody wrote down its end yet, or was there to do it
                seconds = record.seconds + (folder / "metrics.json").stat().st_mtime - record.started
                record = replace(record, seconds=seconds, started=None)
            figures = [float(read_object(folder / "metrics.json", "")[metric])]
    best = min if is_loss(metric) else max
    return Progress(record, epochs, steps, best(figures, default=math.nan))


def is_finished(folder: Path) -> bool:
    """Whether the run ended: it writes its figures last."""
    return (folder / "metrics.json").is_file()


def is_over(folder: Path) -> bool:
    """Whether there is nothing left to run: the run ended, or was pruned (training/pruning.py)."""
    return is_finished(folder) or read_record(folder).state == "pruned"


def clear(folder: Path) -> None:
    """Delete what a run left that ended before its first checkpoint; the records of its job stay."""
    if not (folder / "checkpoints" / "last.ckpt").is_file():
        for path in folder.iterdir():
            if path.name != LOCK and not path.name.startswith(("job.", "output")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def train_command(job: Job, folder: Path) -> list[str]:
    """The command that begins the job's run, or goes on with it from its last checkpoint."""
    command = [sys.executable, "-m", "segdcn.commands.train"]
    if (folder / "checkpoints" / "last.ckpt").is_file():
        place = [argument for argument in job.arguments if is_of_the_place(split_override(argument)[0])]
        # what the checkpoint names is what this sweep's own config named
        return [*command, "hydra.mode=RUN", f"resume={quoted(str(folder.absolute()))}", "trust=true", *place]
    return [*command, *job.arguments, "hydra.mode=RUN", f"output_dir={quoted(str(folder.absolute()))}"]


def train_environment(lock: int | None, cluster_task: bool = False, **more: str) -> dict[str, str]:
    """The environment of a job: this process's, without what makes it a part of another distributed program.

    lock: descriptor of its folder's lock, which the job's process inherits.
    cluster_task: this process is one of several that a cluster has started for the job, and tells it so.
    The job ends with its parent, so that none outlives a coordinator that was killed.
    """
    foreign = re.compile("PL_GLOBAL_SEED") if cluster_task else _FOREIGN
    own = {key: value for key, value in os.environ.items() if not foreign.fullmatch(key)}
    own.pop(INHERITED_LOCK, None)
    held = {} if lock is None else {INHERITED_LOCK: str(lock)}
    return {**own, **held, DIE_WITH_PARENT: str(os.getpid()), **more}


def begun(record: JobRecord, folder: Path) -> JobRecord:
    """The record of a job of which an attempt begins."""
    attempts, epochs = record.attempts + 1, read_progress(folder).epochs
    return replace(
        record, state="running", attempts=attempts, started=time.time(), epochs_before=epochs, error=None, final=False
    )


def ended(record: JobRecord, folder: Path, status: int, stopped: bool = False) -> JobRecord:
    """The record of a job whose attempt ended.

    status: of the process that ran it; negative, or above 128, it is a signal.
    stopped: it was asked to end before its end.
    An attempt that ended with an error that its user can mend, one line and exit status 1, is final: the same would
    happen again. A fault of the moment (another status) and a bug (a traceback) are not.
    """
    seconds = record.seconds + time.time() - (record.started or time.time())
    record = replace(record, seconds=seconds, started=None)
    if is_finished(folder):
        return replace(record, state="finished")
    if record.state == "pruned":
        return record
    if stopped:
        return replace(record, state="stopped")
    line = _last_line(folder / "output.log")
    final = status == 1 and line.startswith("error: ")
    error = line.removeprefix("error: ") if final else f"{_in_words(status)} ({line})"
    return replace(record, state="failed", error=error, final=final)


def _in_words(status: int) -> str:
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(-status if status < 0 else status - 128).name}"
    return f"exit status {status}"


def _last_line(log: Path) -> str:
    """The last line of a log file that is not empty."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1]
    return ""
