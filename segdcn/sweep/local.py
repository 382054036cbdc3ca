"""The jobs of a sweep as processes of this machine, as many at once as it has slots."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from segdcn.errors import UserError
from segdcn.runs.folder import LOCK, locked
from segdcn.runs.job import JobRecord
from segdcn.sweep.jobs import (
    begun,
    clear,
    ended,
    is_over,
    read_record,
    train_command,
    train_environment,
)
from segdcn.sweep.plan import Job, Sweep
from segdcn.sweep.status import Display

POLL_SECONDS = 0.05


class SweepStopped(RuntimeError):  # noqa: N818  (it reads as what happened)
    """The sweep was told to stop before its end; ``signal`` says by what."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@dataclass(frozen=True)
class Slot:
    """Room for one job: its devices (as ``CUDA_VISIBLE_DEVICES`` names them, none on a CPU) and its CPU threads."""

    devices: tuple[str, ...]
    threads: int


@dataclass
class _Running:
    job: Job
    slot: Slot
    process: subprocess.Popen[bytes]


class LocalLauncher:
    """Runs jobs side by side, each in a process of its own.

    Args:
        slots: jobs at once. None is one on a CPU, and on GPUs as many as there are GPUs for. With more slots than
            that, jobs of one GPU each share the GPUs; on a CPU they share the cores.
        retries: how often a job that crashed is started again, from its last checkpoint. One that ends with an
            error of segdcn's own (``error: ...``) is not: it would fail again.
        grace_seconds: what a job has for its last checkpoint when the sweep is stopped.
    """

    def __init__(self, slots: int | None = None, retries: int = 2, grace_seconds: float = 60.0) -> None:
        if slots is not None and slots < 1:
            raise UserError(f"launcher.slots must be 1 or more, or null, got {slots}")
        if retries < 0 or grace_seconds < 0:
            raise UserError(
                f"launcher.retries and launcher.grace_seconds must not be negative, got {retries} and {grace_seconds}"
            )
        self.slots = slots
        self.retries = retries
        self.grace_seconds = grace_seconds

    def check(self, jobs: Sequence[Job]) -> None:
        """Raises ValueError where this machine has not what the jobs ask for."""
        self._plan(jobs)

    def at_once(self, jobs: Sequence[Job]) -> int:
        """How many such jobs run side by side."""
        return len(self._plan(jobs))

    def run(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        """Run to their end those of the ``jobs`` that are not over.

        Raises: SweepStopped after SIGINT, SIGTERM or SIGHUP, when all processes have ended.
        """
        free = deque(self._plan(jobs))
        waiting = deque(job for job in jobs if not is_over(sweep.path(job)))
        attempts = {job.folder: 0 for job in waiting}
        running: list[_Running] = []
        with Signals() as signals, Display(sweep, jobs) as display:
            try:
                while (waiting or running) and not signals.received:
                    for one in [one for one in running if one.process.poll() is not None]:
                        running.remove(one)
                        free.append(one.slot)
                        record = _end(sweep, one)
                        if record.state == "failed" and not record.final and attempts[one.job.folder] <= self.retries:
                            waiting.appendleft(one.job)
                    for _ in range(len(waiting)):
                        if not free:
                            break
                        job = waiting.popleft()
                        process = _start(sweep, job, free[0])
                        if process is None:  # one that outlived its coordinator still runs the job
                            waiting.append(job)
                        else:
                            attempts[job.folder] += 1
                            running.append(_Running(job, free.popleft(), process))
                    display.update()
                    signals.wait(POLL_SECONDS)
            finally:
                if running:
                    display.note(f"stopping {len(running)} job(s), which save a checkpoint; a second signal kills them")
                    self._stop(sweep, running, signals)
            if signals.received:
                raise SweepStopped(signals.received[0])

    def _stop(self, sweep: Sweep, running: list[_Running], signals: Signals) -> None:
        """End the processes that run, with time for a last checkpoint."""
        for one in running:
            one.process.terminate()
        end = time.monotonic() + self.grace_seconds
        while any(one.process.poll() is None for one in running):
            if time.monotonic() > end or len(signals.received) > 1:
                break
            time.sleep(POLL_SECONDS)
        for one in running:
            _kill(one.process)
            one.process.wait()
            _end(sweep, one, stopped=True)

    def _plan(self, jobs: Sequence[Job]) -> list[Slot]:
        """The slots of this machine, for jobs that ask for equally many devices.

        Raises: ValueError, one line.
        """
        for job in jobs:
            if job.nodes > 1:
                raise UserError(f"trainer.num_nodes={job.nodes} needs launcher=slurm: this machine is one node")
            if not (job.devices == "auto" or (isinstance(job.devices, int) and job.devices > 0)):
                raise UserError(
                    f"trainer.devices must be a number (of devices per job) in a sweep, got {job.devices!r}:"
                    " which ones, the launcher chooses"
                )
        most = max((job.devices for job in jobs if isinstance(job.devices, int)), default=1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        gpus = [] if all(job.accelerator == "cpu" for job in jobs) else visible_gpus()
        if not gpus:
            wrong = next((job.accelerator for job in jobs if job.accelerator in ("gpu", "cuda")), None)
            if wrong:
                raise UserError(
                    f"trainer.accelerator={wrong}, but this machine has no GPU: use trainer.accelerator=cpu"
                )
            slots = self.slots or 1
            if slots > 1 and slots * most > cores:
                raise UserError(
                    f"launcher.slots={slots} with {most} process(es) each is more than this machine's {cores} cores"
                )
            return [Slot((), max(1, cores // (slots * most)))] * slots
        if most > len(gpus):
            raise UserError(f"trainer.devices={most} is more than this machine has: {len(gpus)} GPU(s)")
        slots = self.slots or len(gpus) // most
        if most > 1 and slots * most > len(gpus):
            raise UserError(
                f"launcher.slots={slots} with trainer.devices={most} is more than this machine has: {len(gpus)} GPU(s)"
            )
        threads = max(1, cores // (slots * most))
        return [
            Slot(tuple(gpus[(number * most + device) % len(gpus)] for device in range(most)), threads)
            for number in range(slots)
        ]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


def _start(sweep: Sweep, job: Job, slot: Slot) -> subprocess.Popen[bytes] | None:
    """A process of the job's own, or None where another one runs it already."""
    folder = sweep.path(job)
    with locked(folder / LOCK) as lock:
        if lock is None:
            return None
        clear(folder)
        command = train_command(job, folder)
        record = begun(read_record(folder), folder)
        environment = train_environment(lock, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", str(slot.threads)))
        if slot.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.devices)
        with (folder / "output.log").open("ab") as log:
            log.write(f"--- attempt {record.attempts}: {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),  # the lock lasts as long as the process, not as long as this one
                start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which tells its jobs
            )
        record.write(folder)
    return process


def _end(sweep: Sweep, one: _Running, stopped: bool = False) -> JobRecord:
    """Write down how a job's process ended, and end what it left behind: a rank, a worker."""
    _kill(one.process)
    folder = sweep.path(one.job)
    record = ended(read_record(folder), folder, one.process.returncode, stopped)
    record.write(folder)
    return record


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the session that a job began."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


class Signals:
    """Collects the signals that ask for an end, in place of what they do otherwise."""

    ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in self.ASKING}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def wait(self, seconds: float) -> None:
        """Sleep, but not on after a signal."""
        end = time.monotonic() + seconds
        while not self.received and (rest := end - time.monotonic()) > 0:
            time.sleep(min(rest, 0.2))

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
