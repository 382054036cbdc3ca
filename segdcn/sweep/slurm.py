"""The jobs of a sweep as jobs of a SLURM cluster, through submitit."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from segdcn.errors import MissingPackageError, UserError
from segdcn.runs.files import read_object, write_json
from segdcn.runs.folder import LOCK, locked
from segdcn.sweep.jobs import begun, clear, ended, is_over, read_record, train_command, train_environment
from segdcn.sweep.local import Signals, SweepStopped
from segdcn.sweep.plan import Job, Sweep
from segdcn.sweep.status import Display

# A job that is no longer in the queue may have written its last files on another machine.
POLLS_UNTIL_LOST = 2
# by which a cluster asks a job to end
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class SlurmLauncher:
    """Submits jobs, as arrays, and waits for them; the queue is SLURM's.

    A job that is pre-empted or runs out of time saves a checkpoint, is queued again and goes on from there. SIGINT
    and SIGTERM end the waiting only: the jobs go on, and the same sweep started again takes them up.

    Args:
        cluster: ``slurm``; or ``local``, submitit's own stand-in for it, which starts all jobs on this machine at
            once.
        retries: how often a job that crashed is submitted again.
        poll_seconds: between two looks at the queue.
        parameters: submitit's (``AutoExecutor.update_parameters``): timeout_min, cpus_per_task, mem_gb,
            slurm_partition, slurm_array_parallelism, slurm_signal_delay_s, slurm_setup, ...; null ones are left
            out. Nodes, tasks and GPUs follow from ``trainer.num_nodes``, ``.devices`` and ``.accelerator``.
    """

    def __init__(
        self,
        cluster: Literal["slurm", "local"] = "slurm",
        retries: int = 2,
        poll_seconds: float = 10.0,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        if cluster not in ("slurm", "local"):
            raise UserError(f"launcher.cluster must be slurm or local, got {cluster!r}")
        self.cluster = cluster
        self.retries = retries
        self.poll_seconds = poll_seconds
        self.parameters = {key: value for key, value in (parameters or {}).items() if value is not None}

    def check(self, jobs: Sequence[Job]) -> None:
        """Raises ValueError or ImportError, one line, where the jobs cannot be submitted."""
        try:
            import submitit  # noqa: F401
        except ImportError as error:
            raise MissingPackageError('launcher=slurm needs submitit: pip install "segdcn[slurm]"') from error
        if self.cluster == "slurm" and not shutil.which("sbatch"):
            raise UserError("launcher=slurm needs sbatch on the PATH: run it on a node that may submit jobs")
        for job in jobs:
            if not (job.devices == "auto" or (isinstance(job.devices, int) and job.devices > 0)):
                raise UserError(f"trainer.devices must be a number (per node and job), got {job.devices!r}")

    def at_once(self, jobs: Sequence[Job]) -> int:
        """Raises UserError: how many jobs run side by side is the cluster's matter."""
        raise UserError("hydra.sweeper.n_jobs must be given with launcher=slurm: how many trials run at once")

    def run(self, sweep: Sweep, jobs: Sequence[Job]) -> None:
        """Run to their end those of the ``jobs`` that are not over.

        Raises: SweepStopped after SIGINT, SIGTERM or SIGHUP; the jobs go on.
        """
        left = [job for job in jobs if not is_over(sweep.path(job))]
        retries = dict.fromkeys((job.folder for job in left), self.retries)
        missed = dict.fromkeys((job.folder for job in left), 0)
        queue = _Queue(self.cluster, sweep.folder)
        with Signals() as signals, Display(sweep, jobs) as display:
            self._submit(sweep, [job for job in left if not queue.holds(job.folder)], queue)
            while left and not signals.received:
                display.update()
                signals.wait(self.poll_seconds)
                queue.look()
                again = []
                for job in list(left):
                    folder = sweep.path(job)
                    missed[job.folder] = 0 if queue.holds(job.folder) else missed[job.folder] + 1
                    if is_over(folder):
                        left.remove(job)
                    elif missed[job.folder] >= POLLS_UNTIL_LOST:
                        missed[job.folder] = 0
                        record = read_record(folder)
                        if record.state in ("running", "waiting"):  # it had no chance to say why
                            record = replace(record, state="failed", started=None, error="its cluster job is gone")
                            record.write(folder)
                        retries[job.folder] -= 1
                        if record.final or retries[job.folder] < 0:
                            left.remove(job)
                        else:
                            again.append(job)
                self._submit(sweep, again, queue)
            if signals.received:
                if self.cluster == "slurm":
                    ids = " ".join(queue.submitted[job.folder] for job in left)
                    display.note(
                        f"the jobs go on; the same command takes them up again, this one cancels: scancel {ids}"
                    )
                raise SweepStopped(signals.received[0])

    def _submit(self, sweep: Sweep, jobs: Sequence[Job], queue: _Queue) -> None:
        """Submit the jobs, those of equal needs as one array."""
        import submitit

        on_slurm = self.cluster == "slurm"
        groups: dict[tuple[int, int, int], list[Job]] = {}
        for job in jobs:
            devices = job.devices if isinstance(job.devices, int) else 1
            gpus = 0 if job.accelerator == "cpu" else devices
            groups.setdefault((job.nodes, devices, gpus), []).append(job)
        for (nodes, devices, gpus), members in groups.items():
            # on a cluster a task is a rank, elsewhere Lightning starts the ranks of a job itself
            needs = {"nodes": nodes, "tasks_per_node": devices if on_slurm else 1, "gpus_per_node": gpus}
            given = {key: value for key, value in self.parameters.items() if on_slurm or not key.startswith("slurm_")}
            executor = submitit.AutoExecutor(sweep.folder / "submitit" / "%j", cluster=self.cluster)
            executor.update_parameters(name=sweep.name, **{**needs, **given})
            for job in members:
                folder = sweep.path(job)
                folder.mkdir(parents=True, exist_ok=True)
                replace(read_record(folder), state="waiting", started=None, error=None, final=False).write(folder)
            try:
                with executor.batch():
                    submitted = [executor.submit(JobTask(job, str(sweep.path(job)))) for job in members]
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # sbatch's words, as submitit has them
                raise UserError(f"the cluster takes no jobs: {error}") from error
            queue.add({job.folder: one for job, one in zip(members, submitted, strict=True)})


class _Queue:
    """Which jobs of a sweep are in the cluster's queue: they wait or run.

    submitted: the cluster's id of each job, by its folder; kept in a file, so that a sweep that is started again
    knows it.
    """

    def __init__(self, cluster: str, sweep: Path) -> None:
        self._on_slurm = cluster == "slurm"
        self._sweep = sweep
        self._listed: set[str] | None = set()
        self._of_submitit: dict[str, Any] = {}
        path = sweep / "submitit" / "jobs.json"
        self.submitted: dict[str, str] = read_object(path, "delete it") if path.is_file() else {}
        self.look()

    def add(self, jobs: Mapping[str, Any]) -> None:
        """Jobs of submitit's, by their folders, that were submitted after the last look."""
        self._of_submitit |= jobs
        self.submitted |= {folder: job.job_id for folder, job in jobs.items()}
        write_json(self._sweep / "submitit" / "jobs.json", self.submitted)
        if self._listed is not None:
            self._listed |= {job.job_id for job in jobs.values()}

    def look(self) -> None:
        """Ask SLURM; where it does not answer, nothing is known until it does."""
        if self._on_slurm:
            asked = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
            answer = subprocess.run(asked, capture_output=True, text=True)
            self._listed = set(answer.stdout.split()) if answer.returncode == 0 else None

    def holds(self, folder: str) -> bool:
        """Whether the job of that folder was submitted, and waits or runs for all that is known."""
        if folder not in self.submitted:
            return False
        if self._on_slurm:
            return self._listed is None or self.submitted[folder] in self._listed
        if folder in self._of_submitit and not self._of_submitit[folder].done():
            return True
        with locked(self._sweep / folder / LOCK) as lock:  # of a task that outlived its coordinator
            return lock is None


@dataclass
class JobTask:
    """What the cluster runs for a job, once for each of its processes: segdcn-train, begun or gone on with.

    folder: the job's run folder.
    """

    job: Job
    folder: str
    _process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        folder, rank = Path(self.folder), int(os.environ.get("SLURM_PROCID", 0))
        if is_over(folder):
            return
        lock: int | None = None
        with contextlib.ExitStack() as stack:
            if rank == 0:
                lock = stack.enter_context(locked(folder / LOCK))
                if lock is None:
                    raise RuntimeError(f"another process runs {folder}")
                clear(folder)
                begun(read_record(folder), folder).write(folder)
            log = stack.enter_context((folder / ("output.log" if rank == 0 else f"output_{rank}.log")).open("ab"))
            command = train_command(self.job, folder)
            log.write(f"--- {shlex.join(command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                command,
                env=train_environment(lock, cluster_task="SLURM_PROCID" in os.environ),
                pass_fds=() if lock is None else (lock,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            status = self._process.wait()
            if rank == 0:
                record = ended(read_record(folder), folder, status, stopped=abs(status) % 128 in STOPPING)
                record.write(folder)
                if record.state == "failed":
                    raise RuntimeError(record.error)
                if record.state == "stopped" and "SLURM_JOB_ID" in os.environ:
                    _queue_again()

    def checkpoint(self) -> Any:
        """Called by submitit, which queues the job again, at SLURM's warning before its time is over: end the run."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            # not Popen.wait: this runs as a signal's handler, on top of the wait that holds its lock
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(JobTask(self.job, self.folder))


def _queue_again() -> None:
    """Queue this SLURM job again, if it was asked to end for another one's sake and not cancelled.

    Where pre-emption leaves a job time (GraceTime), one that ends within it has ended for SLURM.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job_id = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    asked = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%T"]
    if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == "RUNNING":
        subprocess.run(["scontrol", "requeue", job_id], check=True)
