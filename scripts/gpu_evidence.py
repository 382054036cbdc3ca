"""What a machine with one GPU can tell of segdcn, in one go: docs/gpu.md's tables.

    python scripts/gpu_evidence.py [--minutes 8] [--output gpu_evidence] [--only PART ...] [--camvid PATH] [--reduced]

In a checkout. The first parts need PyTorch, torchvision and (for its backend) Triton alone, the others segdcn
installed; what cannot be run is left out and says so. Everything found is written at once, into evidence.json and, as
tables, into tables.md in the output folder: a run that is cut short counts as far as it came. Each part has a process
of its own, so that one that crashes or hangs takes no other with it, and a share of the time.

Without a GPU, or with --reduced, all is tiny: it shows that the parts work, and its times say nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare machine has segdcn not installed

import torch

from segdcn.benchmarks import tables
from segdcn.benchmarks.agreement import CASES, TOLERANCES, compare_backends, working_backends
from segdcn.benchmarks.networks import mixed_steps
from segdcn.benchmarks.operators import layers_of_deeplab
from segdcn.errors import first_line
from segdcn.runs.environment import environment
from segdcn.runs.files import write_json, write_text

CHECKOUT = Path(__file__).resolve().parents[1]
BACKENDS = ("torchvision", "gather", "grid_sample", "triton")  # first the one to compare with, last the newest
GRACE = 20.0  # seconds that a part may take for its last row
ENDING = 3.0  # seconds that what a part has started may take to end, once it is told


@dataclass(frozen=True)
class Setting:
    """What a part is given: backends that work here, and the moment (of ``time.monotonic``) at which it is to end."""

    device: torch.device
    reduced: bool
    missing: dict[str, str]
    backends: list[str]
    until: float
    folder: Path
    camvid: Path | None

    def command(self, *arguments: str) -> tuple[float, str]:
        """Run a command of Python; its seconds, and what it printed. Raises: RuntimeError with its last line."""
        began = time.monotonic()
        with subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        ) as started:
            try:
                printed, errors = started.communicate(timeout=self.left())
            except subprocess.TimeoutExpired:
                started.terminate()  # not killed: a sweep tells its jobs, which have sessions of their own
                raise
        if started.returncode:
            said = _last_line(errors) or _last_line(printed)
            raise RuntimeError(said.removeprefix("error: ") or f"status {started.returncode}")
        return time.monotonic() - began, errors + printed

    def left(self) -> float:
        """Seconds."""
        return max(1.0, self.until - time.monotonic())


Rows = Iterator[dict[str, Any]]


class Part(NamedTuple):
    """measure: yields rows. table: what shows them. share: of the time. needs: packages. gpu: whether a GPU too."""

    measure: Callable[[Setting], Rows]
    table: Callable[[Any], str]
    title: str
    share: float = 1.0
    needs: tuple[str, ...] = ()
    gpu: bool = False


# --- PyTorch alone ----------------------------------------------------------------------------------------------


def right(setting: Setting) -> Rows:
    """Each backend beside the float64 reference; those that cannot be used first."""
    for backend, why in setting.missing.items():
        yield {"backend": backend, "missing": why}
    _without_tuning()
    cases, compiler = (CASES[:2], "aot_eager") if setting.reduced else (CASES, "inductor")
    yield from compare_backends(setting.device, setting.backends, cases, tuple(TOLERANCES), compiler)


def _without_tuning() -> None:
    """Triton's kernels with their first tile: to compile all for each case would take minutes."""
    module = sys.modules.get("segdcn.ops.triton_conv")
    for kernel in [] if module is None else vars(module).values():
        if hasattr(kernel, "configs"):
            kernel.configs = kernel.configs[:1]


def operators(setting: Setting) -> Rows:
    """The layers of DeepLab by each backend that is for speed."""
    tiny = {"maps": ((1, 16, 9, 9, 2),)} if setting.reduced else {}
    yield from layers_of_deeplab(2 if setting.reduced else 10, setting.device, _fast(setting), **tiny)


def steps(setting: Setting) -> Rows:
    """Training steps in bfloat16."""
    tiny: dict[str, Any] = {}
    if setting.reduced:
        tiny = {"backbones": ("resnet_tiny",), "images": (2, 3, 64, 64), "layer_counts": (0, 2)}
        tiny["compilers"] = (None, "aot_eager")
    yield from mixed_steps(2 if setting.reduced else 8, setting.device, _fast(setting), **tiny)


def _fast(setting: Setting) -> list[str]:
    return [one for one in ("torchvision", "triton", "gather") if one in setting.backends]  # if time does not suffice


# --- what is installed ------------------------------------------------------------------------------------------


def suite(setting: Setting) -> Rows:
    """The tests of the operators that need a GPU."""
    arguments = ("-m", "pytest", "-m", "gpu", str(CHECKOUT / "tests" / "ops"))
    taken, printed = setting.command(*arguments)
    yield {"tests": "pytest -m gpu tests/ops", "ended": _last_line(printed), "seconds": taken}


TRAIN = ("-m", "segdcn.commands.train")
SMALL = (
    "dataset.train_images=32",
    "dataset.val_images=8",
    "dataset.test_images=8",
    "datamodule.batch_size=8",
    "trainer.accelerator=cpu",
)
QUIET = ("report=false", "callbacks.panels=null", "logger=none")


def trainings(setting: Setting) -> Rows:
    """The default run, what its steps wait for, and CamVid's where it is."""
    small = (*SMALL, "trainer.max_epochs=2") if setting.reduced else ()
    yield _trained(setting, "segdcn-train", *small)
    if setting.device.type == "cuda":
        yield from _waits(setting)
    if setting.camvid is not None:
        recipe = ("experiment=camvid_gpu", f"dataset.root={setting.camvid}")
        small = ("trainer.accelerator=cpu", "model.weights=null", "datamodule.crop_size=[64,96]", "trainer.max_steps=2")
        small += ("trainer.precision=32-true", "trainer.limit_val_batches=2", "model.backbone=resnet_tiny")
        yield _trained(setting, "experiment=camvid_gpu", *recipe, *(small if setting.reduced else ()))


def _trained(setting: Setting, name: str, *overrides: str) -> dict[str, Any]:
    run = setting.folder / "runs" / re.sub(r"\W+", "_", name)
    taken, _ = setting.command(*TRAIN, *overrides, f"output_dir={run}")
    figures = json.loads((run / "metrics.json").read_text())
    return {"run": name, "seconds": taken} | {key: figures[key] for key in ("training_seconds", "val/miou", "val/loss")}


def _waits(setting: Setting) -> Rows:
    """The lines at which the processor waits for the GPU in every step of a training, as PyTorch tells them."""
    watched = (
        "import torch, warnings; torch.cuda.set_sync_debug_mode('warn'); warnings.simplefilter('always');"
        " from segdcn.commands.train import main; main()"
    )
    run, steps = setting.folder / "runs" / "waits", 60
    settings = (f"trainer.max_steps={steps}", "trainer.limit_val_batches=0", "callbacks=ema", *QUIET)
    _, printed = setting.command("-c", watched, *settings, f"output_dir={run}")
    lines = Counter(re.findall(r"(\S+\.py:\d+): UserWarning: called a synchronizing", printed))
    often = {line.replace(f"{CHECKOUT}/", ""): count for line, count in lines.items() if count >= steps - 1}
    yield {"run": "waits in each step, callbacks=ema", "found": json.dumps(often)}


def resume(setting: Setting) -> Rows:
    """Two undisturbed runs, the network of one on both devices, and a run that was killed; epoch by epoch."""
    length = ("trainer.max_epochs=3", *QUIET, *(SMALL if setting.reduced else ()))
    runs = [setting.folder / "runs" / name for name in ("undisturbed", "undisturbed_again", "killed")]
    for run in runs[: 1 if setting.reduced else 2]:
        taken, _ = setting.command(*TRAIN, *length, f"output_dir={run}")
        yield _epochs(run) | {"seconds": taken}
    yield _pixels_that_differ(setting, runs[0])
    _kill_after_an_epoch(setting, runs[-1], *length)
    setting.command(*TRAIN, f"resume={runs[-1]}")
    yield _epochs(runs[-1])


def _kill_after_an_epoch(setting: Setting, run: Path, *settings: str) -> None:
    started = subprocess.Popen(
        [sys.executable, *TRAIN, *settings, f"output_dir={run}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_environment(),
    )
    while started.poll() is None and not (run / "checkpoints" / "last.ckpt").exists() and setting.left() > 1:
        time.sleep(0.02)
    time.sleep(0 if setting.reduced else 1)  # into the next epoch
    ended = started.poll()
    started.kill()
    started.wait()
    if ended is not None:
        raise RuntimeError(f"the run that was to be killed had ended before, with status {ended}")


def _epochs(run: Path) -> dict[str, Any]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    miou = ", ".join(row["val/miou"] for row in rows)
    return {"run": run.name, "val/miou of each epoch": miou, "val/loss": rows[-1]["val/loss"]}


def _pixels_that_differ(setting: Setting, run: Path) -> dict[str, Any]:
    from segdcn.runs.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(run / "checkpoints" / "best.ckpt")
    images = [sample.image for sample in checkpoint.dataset().split("val")]
    found = [
        [one.labels for one in checkpoint.predictor(device)(images)] for device in (setting.device, torch.device("cpu"))
    ]
    differ = sum(int((one != other).sum()) for one, other in zip(*found, strict=True))
    return {"run": "pixels that differ from the CPU's", "pixels": f"{differ} of {sum(one.size for one in found[0])}"}


def one_of_several(setting: Setting) -> Rows:
    """What a single GPU shows of several: NCCL and synchronised batch norm with one process, jobs that share it."""
    short = ("trainer.max_epochs=1", *QUIET, *(SMALL if setting.reduced else ()))
    ddp = ("trainer=ddp", "trainer.devices=1", *(("trainer.sync_batchnorm=false",) if setting.reduced else ()))
    for name, settings in (("one device", ()), ("trainer=ddp of one device", ddp)):
        yield _trained(setting, name, *settings, *short)
    for slots in (2,) if setting.reduced else (1, 2):
        folder = setting.folder / "sweeps" / str(slots)
        sweep = ("-m", "seed=0,1", f"launcher.slots={slots}", f"hydra.sweep.dir={folder}")
        taken, _ = setting.command(*TRAIN, *sweep, *short)
        yield {"run": f"two jobs, launcher.slots={slots}", "seconds": taken}


# --- all of it --------------------------------------------------------------------------------------------------

COMMANDS = ("hydra", "pytorch_lightning", "torchmetrics", "albumentations", "cv2", "rich")
PARTS = {
    "right": Part(right, tables.agreement_table, "Right: beside torchvision's in float64 on the CPU", 2),
    "operators": Part(operators, tables.layers_table, "Operators: forward / forward and backward", 4),
    "steps": Part(steps, tables.mixed_steps_table, "Training step, DeepLabv3, 8×3×513×513, bfloat16", 4),
    "suite": Part(suite, tables.records_table, "Tests", 2, (*COMMANDS, "pytest", "hypothesis"), gpu=True),
    "trainings": Part(trainings, tables.records_table, "Trainings", 3, COMMANDS),
    "resume": Part(resume, tables.records_table, "Killed and resumed", 3, COMMANDS),
    "one_of_several": Part(one_of_several, tables.records_table, "What one GPU shows of several", 2, COMMANDS),
}


def main() -> None:
    """All parts one after the other, each in a process of its own; or one of them, in this."""
    options = parse_arguments()
    if options.part:
        measure(options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    ends = time.monotonic() + 60 * options.minutes
    if not torch.cuda.is_available() and not options.reduced:
        print("no GPU: everything is tiny (--reduced), times say nothing", flush=True)
        options.reduced = True
    if (options.output / "evidence.json").exists():
        sys.exit(f"error: {options.output} holds the evidence of another run: give --output another folder")
    put(options.output, "conditions", conditions(options))
    waiting = list(options.only)
    for name in options.only:
        if why := _why_not(PARTS[name]):
            waiting.remove(name)
            put(options.output, name, {"left_out": why})
    for number, name in enumerate(waiting):
        seconds = (ends - time.monotonic()) * PARTS[name].share / sum(PARTS[one].share for one in waiting[number:])
        print(f"{name}: {seconds:.0f} s", flush=True)
        crashed = not run_part(options, name, seconds)
        if crashed and not PARTS[name].needs:
            seconds = min(seconds, ends - time.monotonic())
            run_part(options, name, seconds, without="triton")  # the newest kernels, and the likeliest cause
    print(f"written: {options.output / 'evidence.json'}, {options.output / 'tables.md'}")


def run_part(options: argparse.Namespace, part: str, seconds: float, without: str | None = None) -> bool:
    """Run a part in a process of its own; whether it went well, though it may have been cut short."""
    name = _called(part, without)
    if seconds < 1:
        put(options.output, name, {"left_out": "time was up"})
        return True
    command = [sys.executable, __file__, "--part", part, "--seconds", f"{seconds:.1f}", "--output", str(options.output)]
    command += ["--reduced"] if options.reduced else []
    command += ["--camvid", str(options.camvid)] if options.camvid else []
    command += ["--without", without] if without else []
    with subprocess.Popen(command, start_new_session=True) as started:
        try:
            status = started.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGTERM)
                time.sleep(ENDING)
                os.killpg(started.pid, signal.SIGKILL)
    found = evidence(options.output).get(name, {})
    if status != 0 and "error" not in found:
        why = {"cut": "time was up"} if status is None else {"error": f"its process ended with status {status}"}
        put(options.output, name, {**found, **why})
    return status == 0 or (status is None and bool(found.get("rows")))


def measure(options: argparse.Namespace) -> None:
    """One part, written row by row."""
    until = time.monotonic() + options.seconds
    device = torch.device("cpu" if options.reduced else "cuda")
    found = working_backends(device, [name for name in BACKENDS if name != options.without])
    usable = [name for name, why in found.items() if why is None]
    missing = {name: why for name, why in found.items() if why is not None}
    name = _called(options.part, options.without)
    part: dict[str, Any] = {"rows": []}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, options.reduced, missing, usable, until, Path(folder), options.camvid)
        try:
            for row in PARTS[options.part].measure(setting):
                part["rows"].append(row)
                part["seconds"] = round(time.monotonic() - started, 1)
                put(options.output, name, part)
                print(f"  {json.dumps(row, ensure_ascii=False)[:300]}", flush=True)
                if device.type == "cuda":
                    torch.cuda.synchronize()  # raises what a kernel has broken, after which nothing works
                if time.monotonic() > until:
                    part["cut"] = "time was up"
                    break
        except subprocess.TimeoutExpired as error:
            part["cut"] = f"time was up after {error.timeout:.0f} s of a command"
        except Exception as error:
            part["error"] = first_line(error)
            print(f"  {part['error']}", flush=True)
    put(options.output, name, part)
    if "error" in part:
        sys.exit(1)


def put(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write what is known of a part, and all tables anew."""
    known = evidence(folder) | {name: content}
    write_json(folder / "evidence.json", known)
    texts = [", ".join(f"{key} {value}" for key, value in known["conditions"].items() if key in SHOWN)]
    for part, found in known.items():
        if part != "conditions":
            kind, _, how = part.partition(", ")
            notes = [f"{key}: {found[key]}" for key in ("left_out", "cut", "error") if key in found]
            shown = [PARTS[kind].table(found["rows"])] if found.get("rows") else []
            texts += [f"## {PARTS[kind].title}" + (f" ({how})" if how else ""), *shown, *notes]
    write_text(folder / "tables.md", "\n\n".join(texts) + "\n")


SHOWN = ("device", "torch", "cuda", "torchvision", "triton", "reduced", "date")


def evidence(folder: Path) -> dict[str, Any]:
    """What is written so far."""
    path = folder / "evidence.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {name: import_module(name).__version__ for name in ("torchvision", "triton") if find_spec(name)}
    return {
        **environment(seed=0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **versions,
        "reduced": options.reduced,
        "date": time.strftime("%Y-%m-%d"),
    }


def _called(part: str, without: str | None) -> str:
    return f"{part}, without {without}" if without else part


def _why_not(part: Part) -> str | None:
    missing = [name for name in part.needs if find_spec(name) is None]
    if missing:
        return f"not installed here: {', '.join(missing)}"
    return "there is no GPU" if part.gpu and not torch.cuda.is_available() else None


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("gpu_evidence"), help="folder (default: gpu_evidence)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    here = os.environ.get("SEGDCN_CAMVID")
    parser.add_argument("--camvid", type=Path, default=here, help="CamVid's folder (default: $SEGDCN_CAMVID)")
    parser.add_argument("--reduced", action="store_true", help="everything tiny, on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what the command starts itself with
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--without", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
