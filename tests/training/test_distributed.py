"""Several processes train, evaluate, stop and resume as one would; on CPUs, with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from running import BARE, assert_same_run, call, clean_environment, compose, one_line, process
from torch import Tensor

from segdcn.commands import evaluate, train
from segdcn.models import Deform, build_deeplab
from segdcn.runs import distributed as processes
from segdcn.runs.folder import LOCK
from segdcn.training.losses import SegmentationLoss

HERE = Path(__file__).parents[1]
TWO = ("trainer=ddp", "trainer.devices=2", "trainer.sync_batchnorm=false")

# The loss


def half_batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Logits (2, 4, 5, 7) and a label (2, 5, 7) of two processes, in float64; one has far fewer labelled pixels."""
    generator = torch.Generator().manual_seed(seed)
    halves = []
    for ignored in (0.2, 0.9):
        label = torch.randint(0, 4, (2, 5, 7), generator=generator)
        label[torch.rand(2, 5, 7, generator=generator) < ignored] = 255
        halves.append((torch.randn(2, 4, 5, 7, generator=generator, dtype=torch.float64), label))
    return halves


LOSSES: list[dict[str, Any]] = [{}, {"class_weights": [0.5, 2.0, 1.0, 0.1], "label_smoothing": 0.1}]


def loss_process(rank: int, folder: str) -> None:
    """One of two processes: the losses and gradients of its half, in training mode and not, and without any label."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for options in LOSSES:
        for labelled, training in ((True, True), (False, True), (True, False)):
            logits, label = half_batches(seed=0)[rank]
            if rank == 1 and not labelled:
                label.fill_(255)
            loss = SegmentationLoss(**options).train(training)(logits.requires_grad_(), label)
            loss.backward()
            found.append((loss.detach(), logits.grad))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_loss_and_gradient_of_two_processes_are_those_of_one_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(loss_process, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    number = 0
    for options in LOSSES:
        for labelled, training in ((True, True), (False, True), (True, False)):
            halves = half_batches(seed=0)
            if not labelled:
                halves[1][1].fill_(255)
            (loss, gradient), (other_loss, other_gradient) = found[0][number], found[1][number]
            number += 1
            if not training:
                torch.testing.assert_close(loss, SegmentationLoss(**options)(*halves[0]))
                torch.testing.assert_close(other_loss, SegmentationLoss(**options)(*halves[1]))
                continue
            logits = torch.cat([one for one, _ in halves]).requires_grad_()
            expected = SegmentationLoss(**options)(logits, torch.cat([label for _, label in halves]))
            expected.backward()
            assert loss == other_loss
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
            averaged = torch.cat((gradient, other_gradient)) / 2  # as DistributedDataParallel does over processes
            torch.testing.assert_close(averaged, logits.grad, rtol=1e-12, atol=1e-15)


# One step


def step(tmp_path: Path, name: str, *options: str) -> dict[str, Tensor]:
    """The weights after one step, and before it, of a run that ``one_step.py`` makes."""
    folder = tmp_path / name
    ended = process(tmp_path, str(HERE / "one_step.py"), f"output_dir={folder}", *options)
    assert ended.returncode == 0, ended.stderr
    after = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    before = torch.load(folder / "before.pt", weights_only=True)
    return {key: after[key] - value for key, value in before.items()}


@pytest.mark.slow
def test_two_processes_step_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    """In float64, at a learning rate of 1 and without momentum, so that the step is the gradient."""
    one = step(tmp_path, "one", "datamodule.batch_size=4")
    two = step(tmp_path, "two", "datamodule.batch_size=2", *TWO)
    assert one.keys() == two.keys()
    moved = max(float(change.abs().max()) for change in one.values())
    assert moved > 1e-3
    assert all(float(one[key].abs().max()) > 0 for key in one)
    assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-6 * moved
    for name in ("train/loss", "val/loss", "val/miou"):
        figures = [json.loads((tmp_path / run / "figures.json").read_text())[name] for run in ("one", "two")]
        assert figures[1] == pytest.approx(figures[0], rel=1e-9), name


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("head", ["paper", "aspp", "v3plus", "fpn"])
@pytest.mark.parametrize("backbone", ["resnet_tiny", "mobilenet_v2"])
def test_every_parameter_has_a_gradient(backbone: str, head: str, auxiliary: bool) -> None:
    """Otherwise DDP would need find_unused_parameters, a search of the graph at each step."""
    deform = Deform(2, modulated=True)
    network = build_deeplab(3, backbone, head, 16, weights=None, deform=deform, head_channels=8, auxiliary=auxiliary)
    sum(logits.sum() for logits in network.training_logits(torch.rand(2, 3, 64, 64))).backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


# What started the processes


SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


NO_MAC = pytest.mark.skipif(sys.platform == "darwin", reason="has the accelerator that others lack")


def slurm(tasks: int) -> dict[str, str]:
    """What srun tells each task of a step."""
    number = str(tasks)
    return SLURM | {"SLURM_NTASKS": number, "SLURM_STEP_NUM_TASKS": number, "SLURM_NTASKS_PER_NODE": number}


@pytest.mark.parametrize(
    ("environment", "options", "parts"),
    [
        # here Lightning would train on half of the images and say nothing
        (slurm(1), TWO, ("ask for 2 process(es)", "SLURM started 1", "--ntasks-per-node=2")),
        # and here four times the same, into one folder
        (slurm(4), (), ("ask for 1 process(es)", "SLURM started 4", "trainer.devices")),
        (slurm(4), TWO, ("ask for 2 process(es)", "SLURM started 4")),
        ({**slurm(2), "SLURM_NTASKS_PER_NODE": ""}, TWO, ("--ntasks-per-node",)),
        ({**TORCHRUN, "WORLD_SIZE": "2"}, (), ("ask for 1 process(es)", "torchrun started 2")),
        ({**TORCHRUN, "WORLD_SIZE": "1"}, TWO, ("ask for 2 process(es)", "torchrun started 1", "--nproc-per-node=2")),
        ({}, ("trainer=ddp",), ("trainer.sync_batchnorm=false", "CPU")),
        pytest.param({}, ("trainer.accelerator=mps",), ("Trainer: ", "MPS"), marks=NO_MAC),
    ],
)
def test_wrong_number_of_processes_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    options: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    for name, value in environment.items():
        if value:
            monkeypatch.setenv(name, value)
    assert call(train.main, *BARE, *options, f"output_dir={tmp_path / 'run'}") == 1
    message = one_line(capsys.readouterr().err)
    for part in parts:
        assert part in message
    assert not list(tmp_path.iterdir())


def test_evaluation_on_a_part_of_the_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train.train(compose("train", *BARE, "name=test", "trainer.max_epochs=1", f"output_dir={run}"))
    for name, value in slurm(1).items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert call(evaluate.main, f"checkpoint={run}/checkpoints/last.ckpt", *TWO, "trainer.accelerator=cpu") == 1
    assert "SLURM started 1" in one_line(capsys.readouterr().err)


def test_folder_of_a_run_on_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):  # left behind by Lightning
        monkeypatch.delenv(name, raising=False)
    alone = processes.new_run_folder(tmp_path)
    assert alone.name.startswith("20")
    assert alone.is_dir()
    for name, value in slurm(1).items():
        monkeypatch.setenv(name, value)
    assert processes.new_run_folder(tmp_path) not in (alone, tmp_path / "slurm_77_3")
    for name, value in slurm(2).items():
        monkeypatch.setenv(name, value)
    assert processes.new_run_folder(tmp_path) == tmp_path / "slurm_77_3"


@pytest.mark.slow
def test_nodes_started_by_hand_share_the_first_ones_name(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path; from segdcn.runs.distributed import new_run_folder;"
        f"print(new_run_folder(Path({str(tmp_path)!r})).name, flush=True); time.sleep(3)"
    )
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in ("1", "0"):
        environment = {**clean_environment(), **shared, "NODE_RANK": rank}
        started.append(subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE))
        time.sleep(1.5)  # each would choose a name of its own
    names = {one.communicate(timeout=60)[0] for one in started}
    assert len(names) == 1
    assert names.pop().startswith(b"20")


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# Whole runs on two processes


RUN = (*BARE, *TWO, "name=test", "dataset.train_images=40", "dataset.val_images=7", "datamodule.batch_size=4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of five steps that nothing interrupts."""
    cwd = tmp_path_factory.mktemp("whole")
    ended = process(cwd, "-m", "segdcn.commands.train", *RUN, f"output_dir={cwd / 'run'}")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert ended.stdout.count("\n") == len(set(ended.stdout.splitlines()))  # one process speaks
    assert "batch    4 images x 2 devices = 8 per step, learning rate 0.003 (offsets x 0.1)\n" in ended.stdout
    assert list(cwd.iterdir()) == [cwd / "run"]
    names = {path.name for path in (cwd / "run").iterdir()}
    made = {"config.yaml", "environment.json", "metrics.csv", "metrics.json", "counts.npz", "checkpoints", LOCK}
    assert names == made
    assert json.loads((cwd / "run" / "metrics.json").read_text())["images"] == 7
    return cwd / "run"


def no_process_in(folder: Path) -> bool:
    """Whether no process is left that was started for this run folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                return False
        except OSError:
            continue
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed_by", "rank", "status", "saved"),
    [
        pytest.param("SIGKILL", None, -9, 6, id="all_killed"),
        # what is asked at a batch's end is answered at the next one's
        pytest.param("SIGTERM", "0", 143, 9, id="first_asked_to_stop"),
        pytest.param("SIGUSR1", "1", 138, 9, id="second_asked_to_stop"),
        pytest.param("SIGTERM", None, 143, 9, id="all_asked_to_stop"),
    ],
)
def test_stopped_run_ends_like_the_uninterrupted_one(
    whole: Path, tmp_path: Path, killed_by: str, rank: str | None, status: int, saved: int
) -> None:
    folder = tmp_path / "run"
    only = {} if rank is None else {"KILLED_RANK": rank}
    every = "callbacks.last_within_epoch.every_n_train_steps=6"
    script = str(HERE / "killed.py")
    stopped = process(tmp_path, script, "train", "7", *RUN, every, f"output_dir={folder}", KILLED_BY=killed_by, **only)
    assert stopped.returncode == status, stopped.stderr
    assert stopped.stdout.count("continue with") == (1 if status > 0 else 0)
    assert no_process_in(folder)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == saved
    resumed = process(tmp_path, "-m", "segdcn.commands.train", f"resume={folder}")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_run_ends_when_one_of_its_processes_does(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = time.monotonic()
    ended = process(tmp_path, str(HERE / "killed.py"), "train", "3", *RUN, f"output_dir={folder}", KILLED_RANK="1")
    assert ended.returncode != 0
    # either what happened, or Lightning's end of the first process
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - started < 60
    assert no_process_in(folder)


@pytest.mark.slow
def test_resuming_on_another_number_of_processes_is_refused(whole: Path, tmp_path: Path) -> None:
    resume = (f"resume={whole}", "trainer.devices=1", "trainer.max_epochs=3")
    refused = process(tmp_path, "-m", "segdcn.commands.train", *resume)
    assert refused.returncode == 1
    assert "trained by 2 process(es) and cannot go on with 1" in one_line(refused.stderr)
    (whole / "error.txt").unlink()


@pytest.mark.slow
def test_torchrun_uses_one_folder_and_its_restarts_go_on(whole: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    every = "callbacks.last_within_epoch.every_n_train_steps=6"
    # a store that outlives the restart gives new workers the addresses of dead ones
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "KILLED_RANK": "1"}
    ended = process(tmp_path, *torchrun, str(HERE / "killed.py"), "train", "7", *RUN, every, **variables)
    assert ended.returncode == 0, ended.stderr
    (folder,) = (tmp_path / "runs" / "test").iterdir()
    assert "resumed from last.ckpt" in ended.stdout
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_slurm_step_stops_on_its_warning_and_goes_on_when_requeued(whole: Path, tmp_path: Path) -> None:
    """Two tasks with the variables that srun sets; the warning reaches one of them."""
    script = (str(HERE / "killed.py"), "train", "7", *RUN)
    shared = {**slurm(2), "MASTER_ADDR": "127.0.0.1", "KILLED_BY": "SIGUSR1", "KILLED_RANK": "1"}
    for restarts, status in (("0", 138), ("1", 0)):
        step = {**shared, "SLURM_RESTART_COUNT": restarts, "MASTER_PORT": str(free_port())}
        tasks = []
        for rank in ("1", "0"):
            environment = {**clean_environment(), **step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            tasks.append(subprocess.Popen([sys.executable, *script], cwd=tmp_path, env=environment))
            time.sleep(1)  # each would choose a folder of its own
        assert [task.wait(timeout=120) for task in tasks] == [status, status]
    assert list((tmp_path / "runs" / "test").iterdir()) == [tmp_path / "runs" / "test" / "slurm_77_3"]
    folder = tmp_path / "runs" / "test" / "slurm_77_3"
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}  # no hpc_ckpt
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_error_of_all_processes_is_told_once(tmp_path: Path) -> None:
    """An error that only shows when both processes run already."""
    ended = process(
        tmp_path, "-m", "segdcn.commands.train", *RUN, "optimizer.lr=1e30", f"output_dir={tmp_path / 'run'}"
    )
    assert ended.returncode != 0
    assert "loss is" in one_line(ended.stderr)
    assert (tmp_path / "run" / "error.txt").is_file()


# Processes that end with their parent


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux only")
@pytest.mark.parametrize("value", ["1", "pid"])
def test_process_ends_with_its_parent(tmp_path: Path, value: str) -> None:
    child = (
        "import os, time; from segdcn.runs.distributed import die_with_parent; die_with_parent();"
        "open('pid.new', 'w').write(str(os.getpid())); os.rename('pid.new', 'pid'); time.sleep(60)"
    )
    variable = "str(os.getpid())" if value == "pid" else "'1'"
    parent = (
        f"import os, subprocess, sys; os.environ['SEGDCN_DIE_WITH_PARENT'] = {variable};"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    launcher = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path)
    wait_for(lambda: (tmp_path / "pid").exists())
    pid = int((tmp_path / "pid").read_text())
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not alive(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux only")
def test_process_whose_parent_has_ended_already_ends_too(tmp_path: Path) -> None:
    command = "from segdcn.runs.distributed import die_with_parent; die_with_parent(); print('still here')"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for value, status, output in ((gone.pid, -9, ""), (os.getpid(), 0, "still here\n"), (1, 0, "still here\n")):
        ended = process(tmp_path, "-c", command, SEGDCN_DIE_WITH_PARENT=str(value))
        assert (ended.returncode, ended.stdout) == (status, output)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """A zombie that nobody waits for is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
