"""Inputs of segdcn's commands that are malformed, made by rules from a random generator; see fault_campaign.py."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forked_commands import MODULES, TRAINING
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from segdcn.commands.configs import CONFIG_PATH
from segdcn.data.dataset import printable


@dataclass(frozen=True)
class Attempt:
    """A command with something malformed.

    right: says what is wrong with the result of a success; empty where nothing is.
    named: what a line that tells an error must name, one of them.
    """

    what: str
    program: str
    arguments: tuple[str, ...]
    right: Callable[[], str] = str
    named: tuple[str, ...] = ()


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Bytes of a file, and what was done to them."""
    place = rng.randrange(len(data))
    kind = rng.choice(("cut", "cut", "flipped", "flipped", "empty", "zeros", "text", "doubled", "one byte off"))
    made = {
        "cut": data[:place],
        "flipped": data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :],
        "empty": b"",
        "zeros": data[:place] + bytes(len(data) - place),
        "text": "nö\n[1, {".encode(),
        "doubled": data + data,
        "one byte off": data[:place] + data[place + 1 :],
    }[kind]
    return f"{kind} at {place} of {len(data)}", made


def spoil(path: Path, rng: random.Random) -> str:
    """Damage a file in its place, or put something else there; says what was done."""
    kind = rng.choice(("bytes",) * 6 + ("folder", "broken link", "link to itself", "missing", "pipe"))
    if kind == "bytes":
        what, data = damaged(path.read_bytes(), rng)
        path.write_bytes(data)
        return f"{path.name} {what}"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    return f"{path.name} is {kind}"


def an_image(folder: Path, reference: Path, rng: random.Random) -> Attempt:
    """A photo or a video for segdcn-predict."""
    photo = rng.choice(sorted(path for path in (reference / "photos").iterdir() if path.is_file()))
    name = rng.choice(("x", "x", "x", "画 \u202e\U0001f600", os.fsdecode(b"caf\xe9"), "[1]$x=,{'", "y" * 230))
    file = folder / f"{name}{rng.choice((photo.suffix,) * 4 + ('.PNG', '.txt'))}"
    shutil.copy(photo, file)
    what = spoil(file, rng) if rng.random() < 0.9 else f"{file.name!r} as it is"
    checked = photo.suffix == ".png" or "cut" in what or "as it is" in what

    def right() -> str:
        if photo.suffix == ".mp4":
            return "" if (folder / "out" / f"{name}_overlay.mp4").is_file() else "no video"
        with Image.open(folder / "out" / f"{name}_labels.png") as labels:
            same = labels.tobytes() == (reference / "prediction" / f"{photo.stem}.labels").read_bytes()
        return "" if same or not checked else f"{what}: labels of a damaged file without a word"

    arguments = (f"checkpoint={reference / 'best.ckpt'}", f"input={file}", f"output={folder / 'out'}", "device=cpu")
    return Attempt(f"{photo.name}: {what}", "predict", arguments, right, (printable(str(file)),))


def reading(folder: Path, rng: random.Random, *more: str) -> tuple[str, tuple[str, ...]]:
    """A command that reads a data set of one's own."""
    settings = ("dataset=folder", f"dataset.root={folder}", *(more or ("dataset.class_names=[a,b,c]",)))
    train = (*TRAINING[3:], *settings, "model=tiny", "datamodule.crop_size=[32,32]", f"output_dir={folder / 'run'}")
    workers = rng.choice((0, 1))
    if rng.random() < 0.6:
        return "data", ("check", *settings, f"workers={workers}")
    return "train", (*train, "trainer.max_epochs=1", f"datamodule.num_workers={workers}")


def a_mask(folder: Path, reference: Path, rng: random.Random) -> Attempt:
    """A mask, or a photograph beside it, of a data set of one's own."""
    shutil.copytree(reference / "own", folder, dirs_exist_ok=True)
    split = rng.choice(("train", "val"))
    path = folder / split / rng.choice(("masks", "masks", "images")) / "1.png"
    odd = {
        "of another size": Image.new("L", (31, 47)),
        "in colours": Image.new("RGB", (48, 48), (1, 2, 3)),
        "of a class that is none": Image.new("L", (48, 48), rng.randint(3, 254)),
        "of 16 bits": Image.fromarray(np.full((48, 48), rng.randint(256, 65535), np.uint16)),
        "of floats": Image.fromarray(np.full((48, 48), np.nan, np.float32)),
        "of one pixel": Image.new("L", (1, 1)),
    }
    kind = rng.choice(("spoilt", "spoilt", *odd))
    if kind == "spoilt":
        kind = spoil(path, rng)
    else:
        odd[kind].save(path, format="TIFF" if odd[kind].mode == "F" else "PNG")
    program, arguments = reading(folder, rng)

    def right() -> str:
        if path.parent.name == "images" and kind in odd:  # a photograph may be grey or of 16 bits
            return ""
        with Image.open(path) as image, Image.open(reference / "own" / path.relative_to(folder)) as whole:
            return "" if image.tobytes() == whole.tobytes() else f"a damaged {path.parent.name} is not told"

    return Attempt(f"{split}/{path.parent.name}/{path.name} {kind}", program, arguments, right, (str(folder),))


ODD = (
    *("abc", "-1", "0", "nan", "inf", "-inf", "1e30", "-1e-30", "0.5", "[]", "{}", "[1,2,3]", "[[]]", "{a: 1}", "null"),
    *(
        "''",
        "true",
        "'\u202e道\U0001f600'",
        "99999999999999999999",
        "[nan,nan]",
        "[-1,-1]",
        "[a,b]",
        "'${nowhere}'",
        "2",
    ),
)


def a_class_table(folder: Path, reference: Path, rng: random.Random) -> Attempt:
    """Names, colours and numbers of classes; lists of files."""
    if rng.random() < 0.3:
        shutil.copytree(reference / "camvid", folder, dirs_exist_ok=True)
        what = spoil(folder / rng.choice(("train.txt", "val.txt")), rng)
        return Attempt(f"CamVid's {what}", "data", ("check", "dataset=camvid", f"dataset.root={folder}", "workers=0"))
    shutil.copytree(reference / "own", folder, dirs_exist_ok=True)
    tables = {
        "class_names": (
            "[a,a,b]",
            "[a]",
            "[a,b,[c]]",
            "[a,b,null]",
            "[a,b,'']",
            "[a,b,c,d]",
            "['a\nb',b,c]",
            "[nan,1,2]",
        ),
        "palette": ("[[0,0,0],[1,1,1],[2,2,300]]", "[[0,0],[1,1],[2,2]]", "[[a,b,c],[0,0,0],[1,1,1]]", "[1,2,3]"),
        "mapping": ("{255:1}", "{1:300}", "{-1:0}", "{a:b}", "{0:nan}", "{70000:1}", "{0.5:1}"),
        "bits": ("12", "17", "0.5", "[8]"),
    }
    key = rng.choice(sorted(tables))
    value = rng.choice((*tables[key], *tables[key], *ODD))
    settings = {"class_names": "[a,b,c]", key: value}
    program, arguments = reading(folder, rng, *(f"dataset.{name}={text}" for name, text in settings.items()))
    return Attempt(f"dataset.{key}={value}", program, arguments, named=(key, value.strip("'${}")))


# what no machine stands, or is no setting of a training
LEFT_OUT = ("hydra", "output_dir", "resume", "trainer.devices", "trainer.num_nodes", "datamodule.num_workers", "sweep")


def leaves(values: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a config's values."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from leaves(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1]


def a_setting(folder: Path, reference: Path, rng: random.Random) -> Attempt:
    """A value, a key or a file of settings."""
    program = rng.choice(("train",) * 5 + ("evaluate", "predict", "export", "analyze"))
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        config = OmegaConf.to_container(compose(program, ["name=x"] if program == "train" else []))
    keys = [key for key in leaves(config) if not key.startswith(LEFT_OUT) and "_target_" not in key]
    key, value = rng.choice(keys), rng.choice(ODD)
    odd = f"{key}={value}"
    kind = rng.random()
    if kind < 0.1:
        odd = rng.choice(
            (f"{key}x=1", f"+{key}.more={value}", f"{key.split('.')[0]}=nothing", f"{key}", "=1", f"~{key}")
        )
    run = (f"checkpoint={reference / 'best.ckpt'}",)
    arguments = {
        "train": (*TRAINING, "trainer.max_epochs=1", f"output_dir={folder / 'run'}"),
        "evaluate": (*run, "trainer.accelerator=cpu", f"output_dir={folder / 'run'}"),
        "predict": (*run, f"input={reference / 'photos' / '1.png'}", f"output={folder / 'run'}", "device=cpu"),
        "export": (*run, f"output={folder / 'run' / 'x.onnx'}"),
        "analyze": (*run, f"output_dir={folder / 'run'}", "device=cpu", "images=2", "pictures=1", "repeats=1"),
    }[program]
    if kind > 0.85 and program == "train":  # an experiment of one's own
        file = folder / "conf" / "experiment" / "mine.yaml"
        file.parent.mkdir(parents=True)
        text = b"# @package _global_\noptimizer:\n  lr: 0.001\ndatamodule:\n  flip: 0.0\n"
        _, text = damaged(text, rng)
        head = b"# @package _global_\n"
        file.write_bytes(
            head * rng.randrange(2)
            + rng.choice((text, b"a: [1", b"\t- x", b"- 1", b"defaults: [nothing]", b"optimizer: 3", b"5"))
        )
        return Attempt(
            f"experiment {file.read_bytes()!r}",
            program,
            ("--config-dir", str(folder / "conf"), *arguments, "experiment=mine"),
        )

    def right() -> str:
        figures = folder / "run" / "metrics.json"
        wanted = {"train": figures, "evaluate": figures, "export": folder / "run" / "x.onnx"}.get(program)
        if wanted is not None and not wanted.is_file() and f"{value}" not in ("true",):
            return "success without a result"
        return ""

    named = (key.rpartition(".")[2], odd.rpartition("=")[2].strip("'${}"), *key.split(".")[:1])
    return Attempt(f"{program} {odd}", program, (*arguments, odd), right, named)


def a_checkpoint(folder: Path, reference: Path, rng: random.Random) -> Attempt:
    """A checkpoint that is damaged, of another program, or holds something else than it should."""
    file = folder / "checkpoints" / "last.ckpt"
    file.parent.mkdir()
    shutil.copy(reference / "best.ckpt", file)
    if rng.random() < 0.5:
        what = spoil(file, rng)
    else:
        whole = torch.load(file, weights_only=True)
        about, state = whole["segdcn"], whole["state_dict"]
        where = rng.choice((whole, about, about, about["config"], about["groups"], about["groups"]["model"], state))
        key = rng.choice([key for key in where if key not in ("pytorch-lightning_version", "hparams_name")])
        odd: tuple[Any, ...] = (None, 5, -1.0, float("nan"), "x", [], {}, [None], {"_target_": "os.system"}, b"x", True)
        if where is state:
            odd = (torch.full_like(state[key], torch.nan), torch.zeros(3), "x", None)
        value = rng.choice(odd)
        if rng.random() < 0.25:
            del where[key]
            what = f"without {key}"
        else:
            where[key] = value
            what = f"{key} is {str(value)[:60]!r}"
        torch.save(rng.choice((whole,) * 8 + ([whole], {}, 5, state)), file)
    check = {
        "predict": (f"checkpoint={file}", f"input={reference / 'photos' / '1.png'}", "device=cpu"),
        "evaluate": (f"checkpoint={file}", f"output_dir={folder / 'out'}", "trainer.accelerator=cpu"),
        "export": (f"checkpoint={file}", f"output={folder / 'out' / 'x.onnx'}"),
        "analyze": (f"checkpoint={file}", f"output_dir={folder / 'out'}", "images=2", "pictures=0", "repeats=1"),
        "resume": (f"resume={folder}", "trainer.max_epochs=4"),
        "weights": (*TRAINING, f"model.weights={file}", "trainer.max_epochs=1", f"output_dir={folder / 'out'}"),
    }
    program = rng.choice(sorted(check))
    arguments = check[program] + ((f"output={folder / 'out'}",) if program == "predict" else ())

    def right() -> str:
        if program == "predict":
            with Image.open(folder / "out" / "1_labels.png") as labels:
                same = labels.tobytes() == (reference / "prediction" / "1.labels").read_bytes()
            return "" if same else "another prediction without a word"
        return ""

    name = program if program in MODULES else "train"
    return Attempt(f"{program}: {what}", name, arguments, right, (str(file), str(folder), "not finite"))


def a_run_folder(folder: Path, reference: Path, rng: random.Random) -> Attempt:
    """A run or a sweep with a file that is damaged or missing."""
    of_sweep = rng.random() < 0.4
    place = folder / ("s" if of_sweep else "run")
    shutil.copytree(reference / ("sweep/sweeps/s" if of_sweep else "training/result"), place)
    files = [path for path in place.rglob("*") if path.is_file() and path.stat().st_size]
    file = rng.choice([path for path in files if path.suffix not in (".log", ".lock", ".png", ".md", ".ckpt")])
    before = {path: path.read_bytes() for path in place.rglob("*.ckpt")}
    what = spoil(file, rng)
    ways = {
        "report": (str(place),),
        "resume": (f"resume={place}", "trainer.max_epochs=4"),
        "evaluate": (f"checkpoint={place / 'checkpoints' / 'best.ckpt'}", "trainer.accelerator=cpu"),
        "status": ("status", str(place)),
        "collect": ("collect", str(place)),
        "again": ("-m", *TRAINING, "seed=0,1", "sweep.name=s", "launcher.slots=1"),
    }
    way = rng.choice(("report", "status", "collect", "again") if of_sweep else ("report", "resume", "evaluate"))
    program = {"status": "sweep", "collect": "sweep", "resume": "train", "again": "train"}.get(way, way)
    if way == "again":
        (folder / "sweeps").mkdir()
        (folder / "sweeps" / "s").symlink_to(place)

    def right() -> str:
        lost = [path.name for path, data in before.items() if not path.is_file() or not path.read_bytes()]
        return f"lost {', '.join(lost)}" if lost else ""

    return Attempt(f"{way}: {file.relative_to(place)}: {what}", program, ways[way], right, (file.name,))


AREAS = {
    "image": an_image,
    "mask": a_mask,
    "class table": a_class_table,
    "setting": a_setting,
    "checkpoint": a_checkpoint,
    "run folder": a_run_folder,
}
