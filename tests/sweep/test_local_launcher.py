"""Jobs side by side on one machine: slots, retries, and what a signal does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from made_sweep import FINISH, made_sweep, scripts

from segdcn.runs.folder import LOCK, locked
from segdcn.sweep.jobs import read_record
from segdcn.sweep.local import LocalLauncher, SweepStopped, visible_gpus
from segdcn.sweep.plan import Job

MODULE = "segdcn.sweep.local"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def states(sweep_folder: Path) -> dict[str, str]:
    return {path.parent.name: read_record(path.parent).state for path in sweep_folder.glob("*/job.json")}


@pytest.mark.skipif(CORES == 1, reason="needs two cores")
def test_as_many_jobs_at_once_as_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"print(time.time(), os.environ['OMP_NUM_THREADS'])\ntime.sleep(0.5)\nprint(time.time())\n{FINISH}"
    scripts(monkeypatch, MODULE, lambda job: script)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sweep = made_sweep(tmp_path, *"abcd")
    LocalLauncher(slots=2).run(sweep, sweep.jobs)
    events = []
    for name in "abcd":
        _, began, end = (tmp_path / name / "output.log").read_text().splitlines()[-3:]
        began, threads = began.split()
        assert int(threads) == CORES // 2
        events += [(float(began), 1), (float(end), -1)]
    at_once = [sum(change for _, change in sorted(events)[: number + 1]) for number in range(len(events))]
    assert max(at_once) == 2
    assert set(states(tmp_path).values()) == {"finished"}


def test_finished_jobs_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts(monkeypatch, MODULE, lambda job: FINISH)
    sweep = made_sweep(tmp_path, *"ab")
    LocalLauncher().run(sweep, sweep.jobs[:1])
    assert states(tmp_path) == {"a": "finished"}
    before = (tmp_path / "a" / "job.json").stat().st_mtime_ns
    LocalLauncher().run(sweep, sweep.jobs)
    assert states(tmp_path) == {"a": "finished", "b": "finished"}
    assert (tmp_path / "a" / "job.json").stat().st_mtime_ns == before


def test_a_pruned_job_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = (
        "import json\ntold = json.load(open('job.json'))\njson.dump({**told, 'state': 'pruned'}, open('job.json', 'w'))"
    )
    scripts(monkeypatch, MODULE, lambda job: f"time.sleep(0.2)\n{pruned}" if job.folder == "a" else FINISH)
    sweep = made_sweep(tmp_path, *"ab")
    for _ in range(2):
        LocalLauncher().run(sweep, sweep.jobs)
        assert states(tmp_path) == {"a": "pruned", "b": "finished"}
        record = read_record(tmp_path / "a")
        assert (record.attempts, record.started, record.error) == (1, None, None)
        assert record.seconds > 0.1


def test_a_crash_is_retried_so_often_and_a_users_error_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {
        "crashes": "raise RuntimeError('out of memory')",
        "recovers": f"{FINISH} if os.path.exists('x') else open('x', 'w') and None or os.kill(os.getpid(), 9)",
        "wrong": "sys.exit('error: no file at x')",
        "fine": FINISH,
    }
    monkeypatch.setattr(f"{MODULE}.clear", lambda folder: None)
    scripts(monkeypatch, MODULE, lambda job: by_name[job.folder])
    sweep = made_sweep(tmp_path, *by_name)
    LocalLauncher(retries=2).run(sweep, sweep.jobs)
    records = {name: read_record(tmp_path / name) for name in by_name}
    assert {name: (record.state, record.attempts) for name, record in records.items()} == {
        "crashes": ("failed", 3),
        "recovers": ("finished", 2),
        "wrong": ("failed", 1),
        "fine": ("finished", 1),
    }
    assert records["wrong"].error == "no file at x"
    assert records["crashes"].error == "exit status 1 (RuntimeError: out of memory)"
    # started again, what failed has another chance
    by_name["crashes"] = by_name["wrong"] = FINISH
    LocalLauncher(retries=0).run(sweep, sweep.jobs)
    assert set(states(tmp_path).values()) == {"finished"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_jobs_and_gives_them_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    script = (
        "import signal\n"
        "def end(*_):\n    open('saved', 'w')\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "open('begun', 'w')\ntime.sleep(60)"
    )
    scripts(monkeypatch, MODULE, lambda job: script)
    monkeypatch.setattr(f"{MODULE}.clear", lambda folder: None)
    sweep = made_sweep(tmp_path, *"ab")

    def send() -> None:
        while not (tmp_path / "a" / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(SweepStopped, match=number.name):
        LocalLauncher().run(sweep, sweep.jobs)
    assert states(tmp_path) == {"a": "stopped"}
    assert (tmp_path / "a" / "saved").exists()
    assert signal.getsignal(number) is not None


def test_what_does_not_end_is_killed_with_all_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    rank = child + "open('rank', 'w').write(str(os.getpid())); time.sleep(60)"
    script = (
        f"import signal, subprocess\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.run([sys.executable, '-c', {rank!r}])"
    )
    scripts(monkeypatch, MODULE, lambda job: script)
    sweep = made_sweep(tmp_path, "a")

    def send() -> None:
        while not (tmp_path / "a" / "rank").exists() or not (tmp_path / "a" / "rank").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    with pytest.raises(SweepStopped):
        LocalLauncher(grace_seconds=0.2).run(sweep, sweep.jobs)
    pid = int((tmp_path / "a" / "rank").read_text())
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and ") Z " in Path(f"/proc/{pid}/stat").read_text():
            return  # dead; nobody has asked for its status
        time.sleep(0.1)
    pytest.fail("the job's child outlived it")


def test_job_that_another_process_runs_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts(monkeypatch, MODULE, lambda job: f"{FINISH}\nopen('../order', 'a').write(os.path.basename(os.getcwd()))")
    sweep = made_sweep(tmp_path, *"ab")
    with locked(tmp_path / "a" / LOCK) as lock:
        assert lock is not None
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"], pass_fds=(lock,))
    LocalLauncher().run(sweep, sweep.jobs)
    orphan.wait()
    assert (tmp_path / "order").read_text() == "ba"


def job(**values: object) -> Job:
    return Job("x", (), (), **values)  # type: ignore[arg-type]


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")


@pytest.mark.parametrize(
    ("slots", "devices", "expected"),
    [
        (None, "auto", [("2",), ("3",), ("5",), ("7",)]),
        (None, 2, [("2", "3"), ("5", "7")]),
        (1, 4, [("2", "3", "5", "7")]),
        (6, 1, [("2",), ("3",), ("5",), ("7",), ("2",), ("3",)]),
    ],
)
def test_every_gpu_once_unless_more_slots_are_asked_for(
    four_gpus: None, slots: int | None, devices: int | str, expected: list[tuple[str, ...]]
) -> None:
    assert visible_gpus() == ["2", "3", "5", "7"]
    assert [slot.devices for slot in LocalLauncher(slots)._plan([job(devices=devices)])] == expected


@pytest.mark.parametrize(
    ("slots", "values", "told"),
    [
        (None, {"devices": 8}, "trainer.devices=8 is more than this machine has: 4"),
        (3, {"devices": 2}, "launcher.slots=3 with trainer.devices=2 is more"),
        (None, {"devices": [0, 1]}, "trainer.devices must be a number"),
        (None, {"nodes": 2}, "launcher=slurm"),
        (1000, {"accelerator": "cpu"}, "launcher.slots=1000 .* cores"),
    ],
)
def test_what_the_machine_has_not_is_one_line(
    four_gpus: None, slots: int | None, values: dict[str, object], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        LocalLauncher(slots).check([job(**values)])


def test_gpu_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="no GPU"):
        LocalLauncher().check([job(accelerator="gpu")])
    LocalLauncher().check([job(), job(accelerator="cpu", devices=2)])


@pytest.mark.parametrize("values", [{"slots": 0}, {"retries": -1}, {"grace_seconds": -1.0}])
def test_wrong_options_are_named(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"launcher\.{next(iter(values))}"):
        LocalLauncher(**values)  # type: ignore[arg-type]
