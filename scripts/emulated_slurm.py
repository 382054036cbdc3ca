"""A SLURM cluster of two nodes on this machine: a sweep through it, pre-empted in the middle, checked and torn down.

    apt-get install slurm-wlm munge; pip install -e ".[slurm]"
    python scripts/emulated_slurm.py            # as root, on Debian; about five minutes on two cores

The nodes are two slurmd processes with two pretended GPUs each; nothing outside a temporary folder is changed.

A sweep of two seeds, each job two DDP processes on a CPU, is run twice: with both processes on one node, which a
partition of higher priority takes away once there is a checkpoint; and with one on each node, where the jobs get the
warning that their time is over. The same sweep is then run through submitit's local executor and by the local launcher,
and one training as a plain SLURM step; all must give the same figures to the last digit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SWEEP = (
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "trainer.sync_batchnorm=false",
    "trainer.max_epochs=12",
    "dataset.train_images=64",
    "dataset.val_images=8",
    "datamodule.batch_size=4",
    "datamodule.eval_batch_size=4",
    "model.head_channels=16",
    "callbacks.panels=null",
    "logger=none",
    "seed=0,1",
)
SUBMITIT = ("launcher=slurm", "launcher.cluster=local", "launcher.poll_seconds=2")
SLURM = (
    "launcher=slurm",
    "launcher.poll_seconds=2",
    "launcher.parameters.slurm_partition=main",
    "launcher.parameters.timeout_min=30",
    "launcher.parameters.cpus_per_task=1",
    "launcher.parameters.gpus_per_node=1",
)


def slurm_conf(folder: Path) -> str:
    """Two nodes on this host; partition ``first`` takes them away from ``main``, whose jobs are queued again."""
    host = socket.gethostname()
    return f"""
ClusterName=emulated
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort=26817
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1500
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[26818-26819] CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=first Nodes=n[1-2] MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """SLURM while the block runs; ``SLURM_CONF`` points to it."""
    for name in ("munge", "state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o600)
    (folder / "slurm.conf").write_text(slurm_conf(folder))
    gpus = "".join(f"NodeName=n{node} Name=gpu File=/dev/tty[{2 * node - 2}-{2 * node - 1}]\n" for node in (1, 2))
    (folder / "gres.conf").write_text(gpus)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munge = folder / "munge"
    daemons = [
        f"munged --foreground --force --socket={munge}/socket --key-file={munge}/key --pid-file={munge}/pid"
        f" --log-file={munge}/log --seed-file={munge}/seed",
        "slurmctld -D",
        "slurmd -D -N n1",
        "slurmd -D -N n2",
    ]
    processes = []
    try:
        for command in daemons:
            log = (folder / "daemons.log").open("ab")
            processes.append(subprocess.Popen(command.split(), stdout=log, stderr=subprocess.STDOUT))
            time.sleep(1.0)
        until(
            lambda: output("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * 2, "two idle nodes", 60
        )
        yield
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        time.sleep(2)
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        time.sleep(5)
        for process in processes:
            process.kill()
            process.wait()


def output(*command: str) -> str:
    """What a command prints; nothing where it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def until(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"not reached within {seconds:.0f} s: {what}")
        time.sleep(0.5)


def train(name: str, place: str, *options: str) -> subprocess.Popen[str]:
    """Start the sweep under a name of its own."""
    command = [
        sys.executable,
        "-m",
        "segdcn.commands.train",
        "-m",
        *SWEEP,
        *place.split(),
        f"sweep.name={name}",
        *options,
    ]
    print("$", " ".join(command[1:]), flush=True)
    return subprocess.Popen(command, text=True)


def figures(sweep: subprocess.Popen[str], name: str) -> dict[str, object]:
    """Each run's figure by its seed, once the sweep has ended."""
    if sweep.wait() != 0:
        raise SystemExit(f"the sweep {name} failed with status {sweep.returncode}")
    results = json.loads(Path("sweeps", name, "results.json").read_text())
    return {run["seed"]: run["figure"] for run in results["runs"]}


def saved(sweep: subprocess.Popen[str], name: str) -> list[str]:
    """Wait until a job of the sweep has a checkpoint; returns those that run."""
    files = lambda: list(Path("sweeps", name).glob("*/checkpoints/last.ckpt"))  # noqa: E731
    until(lambda: files() or sweep.poll() is not None, "a first checkpoint", 240)
    return output("squeue", "-h", "-r", "-p", "main", "-t", "running", "-o", "%i").split()


def preempted(jobs: list[str]) -> None:
    """Another partition takes both nodes for a moment."""
    print(f"pre-empting {' '.join(jobs)}", flush=True)
    options = ("--wait", "--partition=first", "--nodes=2", "--exclusive", "--mem=0", "--output=/dev/null")
    subprocess.run(["sbatch", *options, "--wrap", "sleep 2"])


def warned(jobs: list[str]) -> None:
    """The signal by which submitit asks SLURM to be warned before a job's time is over."""
    print(f"warning {' '.join(jobs)}", flush=True)
    for job in jobs:
        subprocess.run(["scancel", "--signal=USR2", job])
    until(lambda: not output("squeue", "-h", "-t", "running", "-o", "%i").split(), "jobs that end on a warning", 60)


def released() -> None:
    """Let jobs that were queued again start at once, where SLURM would let two minutes pass."""
    waiting = output("squeue", "-h", "-r", "-t", "pending", "-o", "%i").split()
    print(f"queued again: {' '.join(waiting)}", flush=True)
    for job in waiting:
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"])


def step(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One training of the sweep as a SLURM step, without any launcher."""
    training = [*SWEEP[:-1], "seed=0", f"output_dir={Path('step').absolute()}"]
    tasks = [argument for argument in arguments if argument.startswith("--")]
    trainer = [argument for argument in arguments if not argument.startswith("--")]
    command = ["srun", "--partition=main", *tasks, sys.executable, "-m", "segdcn.commands.train", *training, *trainer]
    print("$", " ".join(command[:5]), "...", *trainer, flush=True)
    return subprocess.run(command, capture_output=True, text=True)


RUNS = (("trainer.devices=2", preempted), ("trainer.devices=1 trainer.num_nodes=2", warned))


def main() -> None:
    """Run all of it in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="segdcn-slurm-") as temporary:
        os.chdir(temporary)
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # the nodes' names mean nothing to this host
        os.environ["OMP_NUM_THREADS"] = "1"
        found = {}
        folder = Path(temporary, "cluster")
        folder.mkdir()
        with cluster(folder):
            for (place, disturb), name in zip(RUNS, ("slurm0", "slurm1"), strict=True):
                sweep = train(name, place, *SLURM)
                disturb(saved(sweep, name))
                released()
                found[f"SLURM, {place}, {disturb.__name__}"] = figures(sweep, name)
            refused = step("--ntasks=1", "trainer.devices=2")
            if refused.returncode == 0 or "but SLURM started 1" not in refused.stderr:
                raise SystemExit(f"one task for two devices was not refused: {refused.stderr}")
            ended = step("--nodes=2", "--ntasks-per-node=1", "trainer.num_nodes=2", "trainer.devices=1")
            if ended.returncode:
                raise SystemExit(f"the step failed: {ended.stderr}")
            direct = json.loads(Path("step", "metrics.json").read_text())["val/miou"]
        for name, options in {"submitit": SUBMITIT, "local": ()}.items():
            found[name] = figures(train(name, "trainer.devices=2", *options), name)
        for name, figure in found.items():
            print(f"{name}: {figure}")
        if len({json.dumps(figure, sort_keys=True) for figure in found.values()}) != 1:
            raise SystemExit("the figures differ")
        if direct != found["local"]["0"]:
            raise SystemExit(f"the step's figure differs: {direct}")
        print(f"all figures are equal; so is that of a step without a launcher, {direct}")


if __name__ == "__main__":
    main()
