"""A sweep on disk: a folder with its jobs' run folders, and in each of them how far its job is.

sweeps/NAME/sweep.json      what the sweep is: its jobs, baseline and metric
sweeps/NAME/<job>/          a run folder of segdcn-train; beside that command's own files it holds
    job.json                the attempts at the job, written by whoever runs it
    output.log              what they printed, one after the other
    job.lock                locked while a process runs the job
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from segdcn.run_folder import shown, write_json

State = Literal["waiting", "running", "stopped", "finished", "failed"]
Setting = tuple[str, ...]
"""The overrides of a job without its seed."""

# Where a job runs does not make it another job: on the next machine its data may lie elsewhere.
PLACE_KEYS = ("dataset.root", "dataset.sbd_root", "datamodule.num_workers", "datamodule.eval_batch_size")
# Not of the training itself: who runs it, and where.
_AROUND = ("launcher", "sweep", "output_dir", "resume", "name")
# What another distributed program around this one would tell a training.
_FOREIGN = re.compile(
    "(LOCAL_|NODE_|GROUP_)?RANK|WORLD_SIZE|MASTER_(ADDR|PORT)|PL_GLOBAL_SEED|TORCHELASTIC_.*"
    "|SLURM_(NTASKS|PROCID|LOCALID|NODEID|NTASKS_PER_NODE|TASKS_PER_NODE)"
)


@dataclass(frozen=True)
class Job:
    """One training of a sweep.

    folder: its run folder, relative to the sweep's.
    overrides: what makes it this job, as Hydra gives them (``key=value``).
    arguments: the command line of ``python -m segdcn.train``, all but the run folder.
    epochs, steps: its length, whichever is set.
    accelerator, devices, nodes: of its trainer; devices are processes per node.
    """

    folder: str
    overrides: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    epochs: int | None = None
    steps: int | None = None
    accelerator: str = "auto"
    devices: int | str = "auto"
    nodes: int = 1

    @property
    def seed(self) -> str | None:
        """As it was typed; None where the config's own seed is used."""
        seeds = [value for key, _, value in map(_parts, self.overrides) if key == "seed"]
        return seeds[-1] if seeds else None  # Hydra takes the last one too

    @property
    def setting(self) -> Setting:
        """The overrides without the seed."""
        return tuple(override for override in self.overrides if _parts(override)[0] != "seed")


@dataclass(frozen=True)
class Sweep:
    """What ``sweep.json`` holds.

    command: that started it.
    baseline: overrides of the setting with which the others are compared; None is the first setting.
    metric: the figure that is compared, a key of metrics.json.
    """

    folder: Path
    name: str
    command: str
    baseline: tuple[str, ...] | None
    metric: str
    jobs: tuple[Job, ...]

    def path(self, job: Job) -> Path:
        """A job's run folder."""
        return self.folder / job.folder

    def write(self) -> None:
        """Write ``sweep.json``, without its own folder, which may be moved."""
        values = asdict(self)
        del values["folder"]
        write_json(self.folder / "sweep.json", values)

    @property
    def settings(self) -> dict[Setting, list[Job]]:
        """The jobs of each setting, in the sweep's order."""
        settings: dict[Setting, list[Job]] = {}
        for job in self.jobs:
            settings.setdefault(job.setting, []).append(job)
        return settings

    @property
    def labels(self) -> dict[Setting, str]:
        """The name of each setting: the overrides that not all settings have."""
        settings = list(self.settings)
        common = set(settings[0]).intersection(*settings) if len(settings) > 1 else set()
        return {
            setting: " ".join(override for override in setting if override not in common) or "(nothing changed)"
            for setting in settings
        }

    @property
    def job_labels(self) -> dict[str, str]:
        """What to call each job, by its folder: the overrides that not all jobs have, or all of them."""
        common = set(self.jobs[0].overrides).intersection(*(job.overrides for job in self.jobs))
        return {
            job.folder: " ".join([one for one in job.overrides if one not in common] or job.overrides)
            for job in self.jobs
        }

    @property
    def baseline_setting(self) -> Setting:
        """The setting with which the others are compared.

        Raises: ValueError, one line, when ``baseline`` is not exactly one of the settings.
        """
        settings = list(self.settings)
        if self.baseline is None:
            return settings[0]
        searched = {override.lstrip("+") for override in self.baseline}
        found = [setting for setting in settings if searched <= {override.lstrip("+") for override in setting}]
        if len(found) != 1:
            labels = [self.labels[setting] for setting in found or settings]
            raise ValueError(
                f"the baseline {' '.join(self.baseline)!r} of {shown(self.folder)} is"
                f" {'more than one' if found else 'none'} of the sweep's settings: name one of {'; '.join(labels)}"
            )
        return found[0]

    def check(self) -> None:
        """That a table can come of it: each run once, and a baseline.

        Raises: ValueError, one line.
        """
        for setting, jobs in self.settings.items():
            if len({job.seed for job in jobs}) < len(jobs):
                raise ValueError(
                    f"{shown(self.folder)} plans {' '.join(setting) or 'the config as it is'} twice with one seed: such"
                    " runs are the same, give each a seed of its own"
                )
        _ = self.baseline_setting

    def joined(self, other: Sweep) -> Sweep:
        """This sweep, and after its own jobs those that only the other has."""
        mine = {job.folder for job in self.jobs}
        return replace(self, jobs=self.jobs + tuple(job for job in other.jobs if job.folder not in mine))

    def check_same(self, before: Sweep) -> None:
        """That this is the sweep that its folder holds, or a part of it, or more of it.

        Raises: ValueError when each has jobs that the other lacks.
        """
        mine, its = ({job.folder for job in sweep.jobs} for sweep in (self, before))
        if not (mine <= its or its <= mine):
            raise ValueError(
                f"{shown(self.folder)} holds another sweep (its job {min(its - mine)} is none of this one): choose"
                " another sweep.name, or delete that folder"
            )


def read_sweep(folder: Path) -> Sweep:
    """The sweep in a folder.

    Raises: ValueError, one line, when there is none or its ``sweep.json`` cannot be read or does not describe one.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise ValueError(f"{shown(folder)} is no sweep: it holds no sweep.json; give a folder such as sweeps/NAME")
    values = read_object(path, "start the sweep again with the same name to write it anew")
    try:
        jobs = tuple(_job(job) for job in values["jobs"])
        name, command, metric = _texts([values["name"], values["command"], values["metric"]])
        baseline = None if values["baseline"] is None else _texts(values["baseline"])
        if not jobs:
            raise ValueError
        sweep = Sweep(folder, name, command, baseline, metric, jobs)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{shown(path)} does not describe a sweep: it must hold name, command, baseline (a list or null), metric"
            " and jobs, each with a folder's name and a list of overrides"
        ) from error
    sweep.check()
    return sweep


def _job(values: Any) -> Job:
    job = Job(**values)
    # one that lies nowhere but in the sweep's folder
    if not isinstance(job.folder, str) or job.folder in ("", ".", "..") or Path(job.folder).name != job.folder:
        raise ValueError
    return replace(job, overrides=_texts(job.overrides), arguments=_texts(job.arguments))


def _texts(values: Any) -> tuple[str, ...]:
    if not (isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)):
        raise TypeError
    return tuple(values)


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON file's one object.

    Raises: ValueError, one line with the ``remedy``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        raise ValueError(
            f"{shown(path)} cannot be read: it is damaged or truncated ({type(error).__name__}); {remedy}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{shown(path)} cannot be read: it holds no JSON object; {remedy}")
    return content


def _parts(override: str) -> tuple[str, str, str]:
    """Key, "=" and value; Hydra's pluses, which say that the key may be new, left out."""
    return override.lstrip("+").partition("=")


def job_folder(overrides: Sequence[str], config: Mapping[str, Any]) -> str:
    """A job's folder: its overrides and a short hash of its config, in characters that need quotes nowhere.

    config: the whole, as plain values; where the job runs does not count.
    """
    counted = {key: value for key, value in config.items() if key not in _AROUND}
    for key in PLACE_KEYS:
        group, _, name = key.partition(".")
        counted[group] = {other: value for other, value in counted.get(group, {}).items() if other != name}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True, default=str).encode()).hexdigest()[:8]
    readable = "_".join(re.sub(r"[^A-Za-z0-9_.]+", "-", override).strip("-") for override in overrides)[:120]
    return f"{readable or 'job'}_{digest}"


@dataclass(frozen=True)
class Record:
    """``job.json``: what a run's own files do not tell.

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
        write_json(folder / "job.json", asdict(self))


def read_record(folder: Path) -> Record:
    """A job's record; one that waits where there is none, or none that can be read."""
    try:
        return Record(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Record()


@dataclass(frozen=True)
class Progress:
    """How far a job is, from its files alone, so that any process can tell.

    epochs, steps: done so far.  best: the metric's best so far, of a loss the least; NaN where there is none yet.
    """

    record: Record
    epochs: int = 0
    steps: int = 0
    best: float = math.nan


def read_progress(folder: Path, metric: str) -> Progress:
    """The progress of the job in ``folder``; a file that is missing or half written is no news."""
    record = read_record(folder)
    epochs = steps = 0
    figures: list[float] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        for row in csv.DictReader((folder / "metrics.csv").read_text(encoding="utf-8").splitlines()):
            epochs, steps = int(row["epoch"]) + 1, int(row["step"])
            if row.get(metric):
                figures.append(float(row[metric]))
    if is_finished(folder):
        record = replace(record, state="finished", error=None)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if record.started is not None:  # nobody wrote down its end yet, or was there to do it
                seconds = record.seconds + (folder / "metrics.json").stat().st_mtime - record.started
                record = replace(record, seconds=seconds, started=None)
            figures = [float(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))[metric])]
    best = min if is_loss(metric) else max
    return Progress(record, epochs, steps, best(figures, default=math.nan))


def is_loss(metric: str) -> bool:
    """The one figure that is no fraction, and better when it is less."""
    return metric.endswith("loss")


def shown_figure(value: float, metric: str) -> str:
    """A figure as a reader sees it: in percent, a loss as it is."""
    return f"{value:.4f}" if is_loss(metric) else f"{100 * value:.2f}"


def is_finished(folder: Path) -> bool:
    """Whether the run ended: it writes its figures last."""
    return (folder / "metrics.json").is_file()


def clear(folder: Path) -> None:
    """Delete what a run left that ended before its first checkpoint; the records of its job stay."""
    if not (folder / "checkpoints" / "last.ckpt").is_file():
        for path in folder.iterdir():
            if not path.name.startswith(("job.", "output")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def train_command(job: Job, folder: Path) -> list[str]:
    """The command that begins the job's run, or goes on with it from its last checkpoint."""
    command = [sys.executable, "-m", "segdcn.train"]
    if (folder / "checkpoints" / "last.ckpt").is_file():
        place = [argument.lstrip("+") for argument in job.arguments if _parts(argument)[0] in PLACE_KEYS]
        # the config is the checkpoint's; the one that Hydra composes before may lack a key of its data set
        place = [f"++{argument}" for argument in place]
        return [*command, "hydra.mode=RUN", f"resume={_quoted(folder)}", *place]
    return [*command, *job.arguments, "hydra.mode=RUN", f"output_dir={_quoted(folder)}"]


def _quoted(path: Path) -> str:
    """A path as a value in Hydra's grammar, where some characters mean something else."""
    return "'" + str(path.absolute()).replace("'", "\\'") + "'"


def train_environment(cluster_task: bool = False, **more: str) -> dict[str, str]:
    """The environment of a job: this process's, without what makes it a part of another distributed program.

    cluster_task: this process is one of several that a cluster has started for the job, and tells it so.
    The job ends with its parent, so that none outlives a coordinator that was killed.
    """
    foreign = re.compile("PL_GLOBAL_SEED") if cluster_task else _FOREIGN
    own = {key: value for key, value in os.environ.items() if not foreign.fullmatch(key)}
    return {**own, "SEGDCN_DIE_WITH_PARENT": str(os.getpid()), **more}


@contextlib.contextmanager
def locked(path: Path, seconds: float = 0.0) -> Iterator[int | None]:
    """An exclusive lock on a file, as its descriptor; None where another process holds it for so long.

    It lasts until the block ends and every process that inherited the descriptor has ended, however they do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(0.05)
                    continue
                yield None
            else:
                yield descriptor
            return
    finally:
        os.close(descriptor)


def begun(record: Record, folder: Path, metric: str) -> Record:
    """The record of a job of which an attempt begins."""
    epochs = read_progress(folder, metric).epochs
    attempts = record.attempts + 1
    return replace(
        record, state="running", attempts=attempts, started=time.time(), epochs_before=epochs, error=None, final=False
    )


def ended(record: Record, folder: Path, status: int, stopped: bool = False) -> Record:
    """The record of a job whose attempt ended.

    status: of the process that ran it; negative, or above 128, it is a signal.
    stopped: it was asked to end before its end.
    An attempt that ended with an error of segdcn's own, one line, is final: the same would happen again.
    """
    seconds = record.seconds + time.time() - (record.started or time.time())
    record = replace(record, seconds=seconds, started=None)
    if is_finished(folder):
        return replace(record, state="finished")
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
