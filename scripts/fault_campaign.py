"""Kills and malformed inputs: what was finished stays, what goes on ends as if undisturbed, what cannot is one line.

    python scripts/fault_campaign.py [--kills 100] [--inputs 200] [--other DIR] [--only KIND ...] [--output FILE]

Kills: SIGKILL to trainings, sweeps, predictions and exports, half of them at any moment, half while a file is being
written; several one after the other in each series, whose end is compared with the undisturbed result. Half have all
on one file system, half their results in ``--other``, away from the system's temporary files.

Malformed inputs, made by rules from a seed: images, masks, class tables, settings, checkpoints, run folders. Each must
give the right result, or one line and exit status 1 (75 for a fault of the moment), within a minute.

A command runs in a process that is forked when all is imported, so that a kill falls into its work and not into
Python's start; every tenth malformed input is a command as it is typed. Needs fork: Linux. Exit status 1 where anything
is wrong; all cases are in the JSON file.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from forked_commands import TIMEOUT, TRAINING, Command, import_all
from malformed_inputs import AREAS
from PIL import Image

KINDS = {"training": 50, "sweep": 10, "prediction": 20, "export": 20}  # of 100 kills
SERIES = 5  # kills of one run, one after the other


@dataclass(frozen=True)
class Case:
    """What was done, and what came of it: "same", "one line" or "wrong"."""

    kind: str
    place: str
    what: str
    outcome: str
    told: str = ""
    seconds: float = 0.0


# --- results ----------------------------------------------------------------------------------------------------------

NOT_COMPARED = {
    "environment.json",
    "job.json",
    "run.lock",
    "sweep.lock",
    "output.log",
    "sweep.json",
    "results.json",
    "multirun.yaml",
}
CLOCKS = {"training_seconds", "seconds_per_image", "training", "environment", "checkpoint"}


def content(path: Path, root: Path) -> Any:
    """What a file holds but for times and places, to compare; raises where it cannot be read whole."""
    if path.suffix == ".ckpt":
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        buffer = io.BytesIO()
        torch.save([loaded[key] for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")], buffer)
        return hashlib.sha256(buffer.getvalue()).hexdigest()
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        return None if path.name in NOT_COMPARED else {key: values[key] for key in values.keys() - CLOCKS}
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text(), newline="")))
        assert all(None not in row and None not in row.values() for row in rows), "a row is not whole"
        return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {key: arrays[key].tolist() for key in arrays}
    if path.suffix == ".yaml" and path.name not in NOT_COMPARED:
        return yaml.safe_load(path.read_text().replace(str(root), "ROOT"))
    if path.suffix == ".md" or path.name in NOT_COMPARED:
        return None
    if path.suffix == ".mp4":
        capture = cv2.VideoCapture(str(path))
        return [frame.tobytes() for there, frame in iter(capture.read, (False, None)) if there]
    if path.suffix == ".png":
        with Image.open(path) as image:
            return None if path.name == "results.png" else image.tobytes()
    return path.read_bytes()


def contents(folder: Path) -> dict[str, Any]:
    """All files of a folder, hidden ones too, by their path in it."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    names = [path.relative_to(folder) for path in files]
    return {
        str(name): None if hidden(name) else content(path, folder.parent)
        for name, path in zip(names, files, strict=True)
    }


def hidden(name: Path) -> bool:
    """Whether a file is one that its writer has not finished."""
    return any(part.startswith(".") for part in name.parts)


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How two results differ, in a line; empty where they are the same."""
    names = sorted(found.keys() ^ wanted.keys())
    names += sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    return f"differs from the undisturbed result in {', '.join(names)}" if names else ""


def progress(folder: Path) -> dict[str, int]:
    """What is finished: steps in last.ckpt, epochs in metrics.csv, and each whole file."""
    done = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir() or hidden(Path(name)) or path.suffix in (".log", ".lock"):
            continue
        done[name] = 1
        if path.name == "last.ckpt":
            done[name] = int(torch.load(path, weights_only=True)["global_step"])
        if path.name == "metrics.csv":
            done[name] = len(path.read_text().splitlines())
    return done


# --- kills ------------------------------------------------------------------------------------------------------------


class Subject:
    """What is killed: a command that writes a folder, and the one that goes on with it."""

    def __init__(self, kind: str, cwd: Path, reference: Path) -> None:
        self.kind, self.cwd, self.reference = kind, cwd, reference
        self.folder = cwd / {"sweep": "sweeps/s"}.get(kind, "result")

    def start(self) -> Command:
        """The command that begins, or goes on with, what there is."""
        checkpoint = f"checkpoint={self.reference / 'training/result/checkpoints/best.ckpt'}"
        if self.kind == "training":
            resume = (self.folder / "checkpoints" / "last.ckpt").is_file()
            arguments = (f"resume={self.folder}",) if resume else (*TRAINING, f"output_dir={self.folder}")
            return Command("train", *arguments, cwd=self.cwd)
        if self.kind == "sweep":
            return Command("train", "-m", *TRAINING, "seed=0,1", "sweep.name=s", "launcher.slots=1", cwd=self.cwd)
        if self.kind == "prediction":
            options = (f"input={self.reference / 'photos'}", "areas=true", "frames=true", "device=cpu")
            return Command("predict", checkpoint, *options, f"output={self.folder}", cwd=self.cwd)
        return Command("export", checkpoint, f"output={self.folder / 'best.onnx'}", cwd=self.cwd)

    def wait_for_write(self, command: Command, count: int) -> None:
        """Until so many files have begun to be written, or the command has ended."""
        seen: set[tuple[str, int]] = set()
        while len(seen) < count and not command.poll():
            for path in self.folder.rglob(".*"):
                try:
                    about = path.stat()
                except FileNotFoundError:
                    continue
                if about.st_mtime > time.time() - 0.02:
                    seen.add((str(path), about.st_ino))
            time.sleep(0.0005)


def undisturbed(kind: str, cwd: Path, reference: Path) -> tuple[dict[str, Any], float, int]:
    """The result of a command that nothing disturbs, its seconds, and how many files it writes at least."""
    subject = Subject(kind, cwd, reference)
    command = subject.start()
    ended = command.end(5 * TIMEOUT)
    if ended.status != 0:
        raise SystemExit(f"the undisturbed {kind} failed: {ended.err}")
    found = contents(subject.folder)
    return found, time.monotonic() - command.began, 12 if kind == "training" else len(found)


def series(
    kind: str, place: str, cwd: Path, reference: Path, seed: str, kills: int, whole: tuple[dict[str, Any], float, int]
) -> list[Case]:
    """Kill a command and start it again, until it was killed so often; then let it end, and compare."""
    rng = random.Random(seed)
    wanted, seconds, writes = whole
    cases: list[Case] = []
    pending: list[Case] = []  # kills of the folder that there is now
    subject, number = Subject(kind, cwd / "0", reference), 0
    while True:
        before = progress(subject.folder)
        command = subject.start()
        moment = rng.choice(("at any moment", "while writing"))
        delay = rng.uniform(0, seconds)
        if len(cases) + len(pending) < kills:
            if moment == "while writing":
                subject.wait_for_write(command, rng.randint(1, writes))
                delay = rng.uniform(0, 0.01)
            until = time.monotonic() + delay
            while time.monotonic() < until and not command.poll():
                time.sleep(0.001)
            if not command.poll():
                victim = f"{kind} after {time.monotonic() - command.began:.2f} s, {moment}"
                jobs = command.children if kind == "sweep" and rng.random() < 0.3 else []
                if jobs:  # a job alone: its sweep starts it again
                    os.kill(jobs[0], signal.SIGKILL)
                    pending.append(Case(kind, place, f"a job of a {victim}", "same"))
                else:
                    command.kill()
                    pending.append(Case(kind, place, victim, "same", loss(subject, before, wanted)))
                    continue
        ended = command.end(5 * TIMEOUT)
        if ended.status == 0:
            problem = ended.problem or difference(contents(subject.folder), wanted)
        else:
            problem = ended.problem
            if not problem:
                pending[-1] = replace(pending[-1], outcome="one line", told=ended.err.strip())
        if problem and pending:
            pending[-1] = replace(pending[-1], told=f"{pending[-1].told} {problem}".strip())
        cases += [replace(one, outcome="wrong") if one.told and one.outcome == "same" else one for one in pending]
        pending = []
        if len(cases) >= kills:
            return cases
        number += 1
        subject = Subject(kind, cwd / str(number), reference)


def loss(subject: Subject, before: Mapping[str, int], wanted: Mapping[str, Any]) -> str:
    """What a kill cost that was finished before it, or left half; empty where nothing."""
    try:
        found, after = contents(subject.folder), progress(subject.folder)
    except Exception as error:
        return f"half a file: {type(error).__name__}: {error}"
    less = [name for name in before if after.get(name, 0) < before[name]]
    unfinished = [name for name in found if hidden(Path(name))]
    if subject.kind in ("prediction", "export"):
        less += [name for name in found if name not in unfinished and found[name] != wanted.get(name)]
    if len(unfinished) > 2:
        return f"leaves pile up: {', '.join(unfinished)}"
    return f"lost {', '.join(less)}" if less else ""


def run_kills(options: argparse.Namespace, places: Mapping[str, Path], pool: Any) -> list[Case]:
    """All series, by file system and kind, as many at once as there are workers."""
    reference = places["one"] / "reference"
    futures = []
    rng = random.Random(options.seed)
    wholes = {}
    for kind in [kind for kind in KINDS if wanted_kind(options, kind)]:
        wholes[kind] = pool.submit(undisturbed, kind, reference / "again" / kind, reference).result()
    jobs = []
    total = sum(KINDS[kind] for kind in wholes)
    for kind, whole in wholes.items():
        for place, share in zip(places, shares(round(options.kills * KINDS[kind] / total), len(places)), strict=True):
            for start in range(0, share, SERIES):
                folder = places[place] / "kills" / f"{kind}-{start}"
                jobs.append((kind, place, folder, reference, f"{rng.random()}", min(SERIES, share - start), whole))
    jobs.sort(key=lambda job: -job[5] * job[6][1])  # the longest first
    futures = [pool.submit(series, *job) for job in jobs]
    return [case for future in futures for case in shown(future.result())]


def shares(total: int, parts: int) -> list[int]:
    """A number in parts that are as equal as can be."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def wanted_kind(options: argparse.Namespace, kind: str) -> bool:
    """Whether ``--only`` leaves a kind in."""
    return not options.only or kind in options.only


def shown(cases: list[Case]) -> list[Case]:
    """The cases, of which the wrong ones are told at once."""
    for case in cases:
        if case.outcome == "wrong":
            print(f"wrong: {case.kind}, {case.place}: {case.what}: {case.told}", flush=True)
    return cases


# --- malformed inputs -------------------------------------------------------------------------------------------------


def attempt(area: str, seed: str, folder: Path, reference: Path, typed: bool) -> Case:
    """One malformed input."""
    began = time.monotonic()
    folder.mkdir(parents=True)
    one = AREAS[area](folder, reference, random.Random(seed))
    ended = Command(one.program, *one.arguments, cwd=folder, typed=typed).end()
    problem = ended.problem
    try:
        if not problem and ended.status == 0:
            problem = one.right()
        elif not problem and one.named and not any(name in ended.err for name in one.named):
            problem = f"a line that names none of {', '.join(one.named)}: {ended.err}"
    except Exception as error:
        problem = f"no result to be looked at: {type(error).__name__}: {error}"
    outcome = "wrong" if problem else "same" if ended.status == 0 else "one line"
    told = problem or ended.err.strip()
    if outcome != "wrong":
        shutil.rmtree(folder, ignore_errors=True)
    return Case(area, "one", f"{one.what} [seed {seed}]", outcome, told, round(time.monotonic() - began, 2))


def run_inputs(options: argparse.Namespace, place: Path, pool: Any) -> list[Case]:
    """All malformed inputs, spread over the areas."""
    areas = [area for area in AREAS if wanted_kind(options, area)]
    futures = []
    for number in range(options.inputs if areas else 0):
        area, seed = areas[number % len(areas)], f"{options.seed}-{number}"
        folder = place / "inputs" / f"{number}"
        futures.append(pool.submit(attempt, area, seed, folder, place / "reference", number % 10 == 9))
    return [case for future in futures for case in shown([future.result()])]


# --- the campaign -----------------------------------------------------------------------------------------------------


def make_reference(folder: Path) -> None:
    """What the commands work on: photos, data sets of two kinds, a run, its predictions, a sweep."""
    rng = np.random.default_rng(0)
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for number, suffix in enumerate((".png", ".jpg", ".bmp", ".tif", ".webp", ".gif"), 1):
        pixels = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}{suffix}")
    video = cv2.VideoWriter(str(photos / "7.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5.0, (64, 48))
    for _ in range(4):
        video.write(np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8))
    video.release()
    for split in ("train", "val"):
        for number in range(4):
            for name, root, mask in (
                ("masks", "own", 3),
                ("images", "own", 0),
                ("annot", "camvid", 11),
                ("", "camvid", 0),
            ):
                path = folder / root / (f"{split}{name}" if root == "camvid" else f"{split}/{name}") / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                small = rng.integers(0, mask or 256, (4, 4) if mask else (4, 4, 3))
                Image.fromarray(np.kron(small, np.ones((12, 12) if mask else (12, 12, 1))).astype(np.uint8)).save(path)
        lines = (f"/SegNet/CamVid/{split}/{n}.png /SegNet/CamVid/{split}annot/{n}.png\n" for n in range(4))
        (folder / "camvid" / f"{split}.txt").write_text("".join(lines))
    for kind in ("training", "sweep"):
        undisturbed(kind, folder / kind, folder)
    shutil.copy(folder / "training/result/checkpoints/best.ckpt", folder)
    out = folder / "prediction"
    arguments = (f"checkpoint={folder / 'best.ckpt'}", f"input={photos}", f"output={out}", "device=cpu")
    Command("predict", *arguments, cwd=folder).end()
    for path in sorted(out.glob("*_labels.png")):
        with Image.open(path) as labels:
            (out / f"{path.stem.removesuffix('_labels')}.labels").write_bytes(labels.tobytes())


def summary(cases: list[Case]) -> str:
    """How often each thing came of each kind, as Markdown."""
    counted = Counter((case.kind, case.place, case.outcome) for case in cases)
    lines = ["| kind | file systems | number | same result | one line | wrong |", "|---|---|---|---|---|---|"]
    rows = list(dict.fromkeys((case.kind, case.place) for case in cases))
    for kind, place in [*rows, ("all", "")]:
        of = [
            counted[kind, place, one] if place else sum(n for key, n in counted.items() if key[2] == one)
            for one in ("same", "one line", "wrong")
        ]
        lines.append(f"| {kind} | {place} | {sum(of)} | {of[0]} | {of[1]} | {of[2]} |")
    return "\n".join(lines)


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", choices=[*KINDS, *AREAS], metavar="KIND", help=f"of {', '.join([*KINDS, *AREAS])}"
    )
    parser.add_argument(
        "--other",
        type=Path,
        default=Path("/dev/shm"),
        help="a folder on another file system than the system's for temporary files",
    )
    parser.add_argument("--workers", type=int, default=2, help="commands at once")
    parser.add_argument("--output", type=Path, default=Path("fault_campaign.json"))
    options = parser.parse_args()
    began = time.monotonic()
    import_all()
    with tempfile.TemporaryDirectory(prefix="faults-") as one:
        places = {"one": Path(one)}
        if options.other.is_dir() and options.other.stat().st_dev != places["one"].stat().st_dev:
            places["two"] = Path(tempfile.mkdtemp(prefix="faults-", dir=options.other))
        else:
            print(f"no second file system at {options.other}: everything is on one")
        try:
            make_reference(places["one"] / "reference")
            with ProcessPoolExecutor(options.workers, mp_context=get_context("fork")) as pool:
                cases = run_kills(options, places, pool) + run_inputs(options, places["one"], pool)
        finally:
            if "two" in places:
                shutil.rmtree(places["two"], ignore_errors=True)
    seconds = time.monotonic() - began
    options.output.write_text(json.dumps([asdict(case) for case in cases], indent=1, ensure_ascii=True) + "\n")
    print(f"{summary(cases)}\n{seconds / 60:.1f} minutes, {os.cpu_count()} CPU cores; all cases in {options.output}")
    sys.exit(1 if any(case.outcome == "wrong" for case in cases) else 0)


if __name__ == "__main__":
    main()
