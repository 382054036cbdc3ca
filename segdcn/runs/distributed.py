"""The processes of a run: how they find one run folder, whether they were restarted, and when they must end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from segdcn.runs.folder import new_folder

DIE_WITH_PARENT = "SEGDCN_DIE_WITH_PARENT"
_PR_SET_PDEATHSIG = 1

_stores: list[Any] = []  # the first process serves the others as long as it lives


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, if SEGDCN_DIE_WITH_PARENT is set (Linux only).

    So a launcher that is killed leaves no job behind, and a job no DDP rank. The parent is, to be exact, the thread
    that started this process. The variable holds the launcher's pid, which must not have ended already, or just 1.
    From then on it holds this process's own pid, so that the processes which Lightning starts end with it.
    """
    parent = os.environ.get(DIE_WITH_PARENT)
    os.environ[DIE_WITH_PARENT] = str(os.getpid())
    if not parent or parent == str(os.getpid()) or sys.platform != "linux":  # its own: a second run in this process
        return
    before = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # there may be others between the launcher and this process, such as srun
    if os.getppid() != before or (parent.isdigit() and not Path(f"/proc/{parent}").exists()):
        os.kill(os.getpid(), signal.SIGKILL)


def restarted() -> bool:
    """Whether torchrun has restarted its workers, or SLURM has requeued the job: the same command, once more."""
    return any(int(os.environ.get(f"{by}_RESTART_COUNT") or 0) > 0 for by in ("TORCHELASTIC", "SLURM"))


def is_first() -> bool:
    """Whether this is the first of the processes that share a run, from what their launcher tells them."""
    variables = ["RANK", "LOCAL_RANK", "NODE_RANK"]
    if _slurm_tasks() > 1:
        variables.append("SLURM_PROCID")
    return all(int(os.environ.get(name) or 0) == 0 for name in variables)


def new_run_folder(parent: Path) -> Path:
    """A folder below ``parent`` for a new run, the same on all its processes and nobody else's.

    Its name is date and time; under torchrun with the launcher's process id, in a SLURM step of several tasks the
    step's ids, so that processes that are started again find it. Processes that Lightning starts are told their folder
    and do not ask. Those of torchrun, and nodes on which the command is started by hand, take what the first one made,
    from a store at MASTER_ADDR:MASTER_PORT.

    Raises: torch.distributed.DistStoreError when the first process cannot be reached within five minutes; UserError,
    one line, where the folder cannot be made.
    """
    variables = os.environ
    if _slurm_tasks() > 1:
        return parent / f"slurm_{variables['SLURM_JOB_ID']}_{variables['SLURM_STEP_ID']}"
    if "TORCHELASTIC_RUN_ID" in variables:
        agent = os.getppid()
        return Path(_of_first(lambda: str(parent / f"{_stamp(_started(agent))}_{agent}"), int(variables["RANK"])))
    if {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= variables.keys() and "LOCAL_RANK" not in variables:
        return Path(_of_first(lambda: str(_claimed(parent)), int(variables["NODE_RANK"])))
    return _claimed(parent)


def _claimed(parent: Path) -> Path:
    return new_folder(parent, _stamp(datetime.now()))


def _slurm_tasks() -> int:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def _stamp(time: datetime) -> str:
    return f"{time:%Y-%m-%d_%H-%M-%S}"


def _started(pid: int) -> datetime:
    """When a process started; now, where the system does not tell."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        return datetime.fromtimestamp(int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, StopIteration):
        return datetime.now()


def _of_first(make: Callable[[], str], rank: int) -> str:
    """What the process with rank 0 makes. Its server is the one that torch.distributed uses later on (multi-tenant)."""
    import torch.distributed as dist  # here: commands import this file, and their --help need not wait for torch

    variables = os.environ
    served_by_agent = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        variables["MASTER_ADDR"],
        int(variables["MASTER_PORT"]),
        is_master=rank == 0 and not served_by_agent,
        timeout=timedelta(minutes=5),
        wait_for_workers=False,
        multi_tenant=True,
    )
    _stores.append(store)
    key = f"segdcn/run_folder/{variables.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        folder = make()
        store.set(key, folder)
        return folder
    return str(store.get(key).decode())
