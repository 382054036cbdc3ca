"""Commands of segdcn in processes that are forked when everything is imported: they start at once."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

MODULES = {
    "train": "segdcn.commands.train",
    "evaluate": "segdcn.commands.evaluate",
    "predict": "segdcn.commands.predict",
    "export": "segdcn.commands.export",
    "analyze": "segdcn.commands.analyze",
    "data": "segdcn.commands.data",
    "report": "segdcn.commands.report",
    "sweep": "segdcn.commands.sweep",
}
# Four steps an epoch, each of which is saved; a checkpoint has 7 MB.
TRAINING = (
    "dataset.train_images=16",
    "dataset.val_images=6",
    "dataset.test_images=2",
    "datamodule.batch_size=4",
    "datamodule.eval_batch_size=2",
    "datamodule.crop_size=[48,48]",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=3",
    "callbacks.last_within_epoch.every_n_train_steps=1",
    "callbacks.panels=null",
    "logger=none",
    "report=false",
)
TIMEOUT = 60.0  # seconds
MEMORY = 24 << 30  # bytes of addresses that a command gets
# beside them what they import when they need it
_LATE = (
    "segdcn.training.pictures",
    "segdcn.training.progress",
    "segdcn.data.datamodule",
    "segdcn.inference.predictor",
    "segdcn.interchange.onnx",
    "segdcn.interchange.program",
    "onnxruntime",
    "onnxscript",
)


def import_all() -> None:
    """Once, for all that is forked; each command has one thread, and libraries keep what they think of a video."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENCV_FFMPEG_LOGLEVEL": "-8"}
    torch.set_num_threads(1)
    for module in (*MODULES.values(), *_LATE):
        importlib.import_module(module)


@dataclass(frozen=True)
class Ended:
    """A command that ended; ``status`` is None where it had to be ended."""

    status: int | None
    out: str
    err: str

    @property
    def problem(self) -> str:
        """What is wrong with its end; empty for success, and for one line that says why there is none."""
        lines = [line for line in self.err.splitlines() if line.strip() and "━" not in line]  # a bar of progress
        if self.status is None:
            return f"no end within {TIMEOUT:.0f} s"
        if "Traceback (most recent call last)" in self.out + self.err:
            return f"a traceback: {lines[-1] if lines else self.out[-200:]}"
        if self.status == 0:
            return ""
        errors = [line for line in lines if line.startswith("error: ")]
        others = [line for line in lines if not line.startswith(("error: ", "warning: "))]
        if self.status in (1, 75) and len(errors) == 1 and not others and 20 < len(errors[0]) < 1500:
            return ""
        return f"exit status {self.status} with {len(lines)} lines: {self.err[:500]}"


class Command:
    """A command of segdcn in a process of its own."""

    def __init__(self, program: str, *arguments: str, cwd: Path, typed: bool = False) -> None:
        self.line = " ".join([f"segdcn-{program}", *arguments])
        cwd.mkdir(parents=True, exist_ok=True)
        self.files = [cwd / f".{name}-{time.monotonic_ns()}" for name in ("out", "err")]
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(program, arguments, cwd, typed)

    def _run(self, program: str, arguments: tuple[str, ...], cwd: Path, typed: bool) -> None:
        status = 1
        try:
            os.setpgid(0, 0)
            for number, file in enumerate(self.files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            os.chdir(cwd)
            os.environ["SEGDCN_DIE_WITH_PARENT"] = str(os.getppid())
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            module = MODULES[program].removesuffix(".__main__")
            if typed:
                os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            sys.argv = [f"segdcn-{program}", *arguments]
            importlib.import_module(MODULES[program]).main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> bool:
        """Whether it has ended; its status is then known."""
        if not hasattr(self, "status"):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status: int | None = os.waitstatus_to_exitcode(status)
        return hasattr(self, "status")

    def end(self, timeout: float = TIMEOUT) -> Ended:
        """Wait for its end."""
        while not self.poll():
            time.sleep(0.01)
            if time.monotonic() - self.began > timeout:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.status = None
        return Ended(self.status, *(file.read_text(errors="replace") for file in self.files))

    def kill(self) -> None:
        """SIGKILL to the command alone; its jobs must end by themselves."""
        children = self.children
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.status = -9
        while any(Path(f"/proc/{child}").exists() for child in children):
            time.sleep(0.01)

    @property
    def children(self) -> list[int]:
        """The processes that it started."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
