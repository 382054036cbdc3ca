"""segdcn-predict: files in, files out, and what it says of bad ones; label maps are those of segdcn-evaluate."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import FirstRun
from handmade import png, spoilt, tiff
from miniatures import noise
from PIL import Image
from running import BARE, call, compose, make_camvid, one_line, process, real_camvid

import segdcn
from segdcn.commands import evaluate as evaluate_command
from segdcn.commands import segmentation
from segdcn.commands.errors import TRY_AGAIN
from segdcn.commands.predict import main
from segdcn.commands.train import train
from segdcn.data import decoding
from segdcn.inference.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(first_run: FirstRun) -> Predictor:
    return segdcn.load(first_run.folder / "checkpoints" / "best.ckpt", device="cpu")


@pytest.fixture
def checkpoint(first_run: FirstRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """As the command's argument; the working folder is an empty one."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return f"checkpoint='{first_run.folder / 'checkpoints' / 'best.ckpt'}'"


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_becomes_a_folder_of_the_same_layout(
    checkpoint: str, tmp_path: Path, predictor: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "photos", tmp_path / "photos" / "out"
    (source / "b").mkdir(parents=True)
    images = {"a": noise(48, 64), "b/c": noise(56, 40, seed=1)}
    for name, image in images.items():
        Image.fromarray(image).save(source / f"{name}.PNG")
    (source / "notes.txt").write_text("no image")
    options = ("probabilities=true", "areas=true", "device=cpu")
    for _ in range(2):  # the first run's results, within the folder, are no inputs of the second
        assert call(main, checkpoint, f"input={source}", f"output={out}", *options) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.splitlines()[0] == f"2 of 2 file(s) predicted, in {out}"
    kinds = ("labels.png", "overlay.png", "probabilities.npz")
    assert files(out) == sorted(["areas.csv", *(f"{name}_{kind}" for name in images for kind in kinds)])
    rows = list(csv.DictReader((out / "areas.csv").open()))
    for name, image in images.items():
        expected = predictor(image)
        with Image.open(out / f"{name}_labels.png") as labels:
            assert labels.mode == "P"
            np.testing.assert_array_equal(np.asarray(labels), expected.labels)
            np.testing.assert_array_equal(
                np.asarray(labels.convert("RGB")), np.asarray(expected.palette, np.uint8)[expected.labels]
            )
        with Image.open(out / f"{name}_overlay.png") as overlay:
            np.testing.assert_array_equal(np.asarray(overlay), np.asarray(expected.overlay()))
        stored = np.load(out / f"{name}_probabilities.npz")["probabilities"]
        assert stored.dtype == np.float16
        np.testing.assert_allclose(stored, expected.probabilities, atol=1e-3)
        areas = {row["class"]: int(row["pixels"]) for row in rows if row["file"] == f"{name}.PNG"}
        assert areas == {c: int((expected.labels == k).sum()) for k, c in enumerate(expected.class_names)}
    assert float(rows[0]["share"]) == pytest.approx(int(rows[0]["pixels"]) / (48 * 64), abs=1e-6)


def test_bad_files_are_named_at_the_end_and_the_rest_goes_on(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    for name in ("a", "b", "d"):
        Image.fromarray(noise(48, 64)).save(source / f"{name}.png")
    whole = (source / "b.png").read_bytes()
    (source / "b.png").write_bytes(whole[: len(whole) // 2])
    (source / "c.jpg").write_bytes(b"no picture")
    (source / "e.mp4").write_bytes(b"no video")
    assert call(main, checkpoint, f"input={source}", f"output={out}", "areas=true", "device=cpu") == 1
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].startswith("2 of 5 file(s) predicted")
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    for error, name in zip(errors, ("b.png", "c.jpg", "e.mp4"), strict=True):
        assert str(source / name) in error
    assert files(out) == ["a_labels.png", "a_overlay.png", "areas.csv", "d_labels.png", "d_overlay.png"]


def save(path: Path | bytes, seed: int = 0) -> None:
    """A small image under any name."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with open(path, "wb") as file:
        Image.fromarray(noise(24, 32, seed=seed)).save(file, format="PNG")


def names_in_areas(out: Path) -> list[str]:
    with (out / "areas.csv").open(encoding="utf-8", newline="") as file:
        return list(dict.fromkeys(row["file"] for row in csv.DictReader(file)))


def test_links_are_followed_and_what_is_not_read_is_counted(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "photos", tmp_path / "photos" / "out"
    for number, name in enumerate(("photos/a.png", "photos/2024/b.png", "photos/x.png/c.png", "elsewhere/d.png")):
        save(tmp_path / name, seed=number)
    save(tmp_path / "single.png")
    out.mkdir()
    links = {
        "site": tmp_path / "elsewhere",  # a folder
        "latest": source / "2024",  # the same images once more, by another name
        "link.png": tmp_path / "single.png",
        "2024/up": source,  # round and round
        "round": source / "round",
        "results": out,  # of an earlier run
    }
    for name, target in links.items():
        (source / name).symlink_to(target)
    for name in ("b.HEIC", "c.heic", "notes.txt", "README", ".hidden.txt", ".cache/x.cr2", "2024/raw.cr2"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("")
    for _ in range(2):
        assert call(main, checkpoint, f"input={source}", f"output={out}", "areas=true", "overlay=false") == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        assert shown.out.splitlines() == [
            f"6 of 6 file(s) predicted, in {out}",
            "7 files passed over: .cr2 (2), .heic (2), no suffix (2), .txt (1)",
        ]
        expected = ["2024/b", "a", "latest/b", "link", "site/d", "x.png/c"]
        assert files(out) == sorted([f"{name}_labels.png" for name in expected] + ["areas.csv"])
        assert names_in_areas(out) == [f"{name}.png" for name in expected]


def test_a_folder_that_cannot_be_read_is_named(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "closed/b", "d/e"):
        save(tmp_path / "in" / f"{name}.png")
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # as a system does to all but its superuser
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    out = tmp_path / "out"
    assert call(main, checkpoint, f"input={tmp_path / 'in'}", f"output={out}", "areas=true") == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("2 of 2 file(s) predicted")
    assert one_line(shown.err) == f"error: {tmp_path / 'in' / 'closed'} cannot be read: Permission denied"
    assert names_in_areas(out) == ["a.png", "d/e.png"]


def test_names_of_any_bytes_are_predicted_and_listed(
    checkpoint: str, tmp_path: Path, predictor: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    names = [b"a.png", b"caf\xe9.png", b"d\xe9p\xf4t/b.png", b'one,"two"\nthree.png', "\u96ea \u00e9.png".encode()]
    for number, name in enumerate(names):
        save(os.fsencode(source) + b"/" + name, seed=number)
    write_video(tmp_path / "clip.mp4", [noise(48, 64, seed=number) for number in range(2)])
    os.rename(tmp_path / "clip.mp4", os.fsencode(source) + b"/d\xe9p\xf4t/clip\xff.mp4")
    assert call(main, checkpoint, f"input={source}", f"output={out}", "areas=true", "overlay=true") == 0
    assert capsys.readouterr() == (f"6 of 6 file(s) predicted, in {out}\n", "")
    listed = [name.decode("utf-8", "backslashreplace").replace(r"\x", r"\udc") for name in names]
    frames = [rf"d\udce9p\udcf4t/clip\udcff.mp4#{number}" for number in range(2)]
    assert sorted(names_in_areas(out)) == sorted([*listed, *frames])
    for number, name in enumerate(names):
        with open(os.fsencode(out) + b"/" + name.removesuffix(b".png") + b"_labels.png", "rb") as file:
            found = np.asarray(Image.open(file))
        np.testing.assert_array_equal(found, predictor(noise(24, 32, seed=number)).labels)
    assert os.path.getsize(os.fsencode(out) + b"/d\xe9p\xf4t/clip\xff_overlay.mp4") > 500
    # what is wrong with such a file is still one line that names it
    with open(os.fsencode(source) + b'/one,"two"\nthree.png', "wb") as file:
        file.write(b"no picture")
    assert call(main, checkpoint, f"input={source}", f"output={out}") == 1
    assert r'in/one,"two"\nthree.png cannot be read as an image' in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("fault", [RuntimeError("something\nodd"), KeyError("key"), KeyboardInterrupt()])
def test_figures_of_the_other_files_are_never_lost(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: BaseException,
) -> None:
    """Not even by a fault of this program, or by a person who ends it."""
    for name in "abc":
        save(tmp_path / "in" / f"{name}.png")
    predict = Predictor.__call__

    def stumbling(self: Predictor, image: Any, probabilities: bool = False) -> Any:
        if Path(image).stem == "b":
            raise fault
        return predict(self, image, probabilities)

    monkeypatch.setattr(Predictor, "__call__", stumbling)
    out = tmp_path / "out"
    options = (checkpoint, f"input={tmp_path / 'in'}", f"output={out}", "areas=true")
    if isinstance(fault, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            call(main, *options)
        assert names_in_areas(out) == ["a.png"]
        return
    assert call(main, *options) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("2 of 3 file(s) predicted")
    said = {RuntimeError: r"RuntimeError: something\nodd", KeyError: "KeyError: 'key'"}[type(fault)]
    assert one_line(shown.err) == f"error: {tmp_path / 'in' / 'b.png'}: {said}"
    assert names_in_areas(out) == ["a.png", "c.png"]


@pytest.mark.parametrize("full_for", ["b_labels.png", ""])
def test_a_full_disk_ends_it_and_is_told_as_what_it_is(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    full_for: str,
) -> None:
    """From the second image on, for its files or for all."""
    for name in "abc":
        save(tmp_path / "in" / f"{name}.png")
    sync, out = os.fsync, tmp_path / "out"

    def full(descriptor: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if (out / "a_labels.png").exists() and full_for in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    options = (f"input={tmp_path / 'in'}", f"output={out}", "areas=true", "overlay=false", "device=cpu")
    assert call(main, checkpoint, *options) == TRY_AGAIN
    assert f"{out}/b_labels.png: No space left on device" in one_line(capsys.readouterr().err)
    assert files(out) == (["a_labels.png", "areas.csv"] if full_for else ["a_labels.png"])
    if full_for:
        assert names_in_areas(out) == ["a.png"]


def test_a_picture_that_fails_costs_no_figure(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("segdcn.inference.predictor.overlay", fail)
    out = tmp_path / "out"
    assert call(main, checkpoint, f"input={tmp_path / 'in'}", f"output={out}", "areas=true") == 1
    assert "a.png: MemoryError" in one_line(capsys.readouterr().err)
    assert files(out) == ["a_labels.png", "areas.csv"]
    assert names_in_areas(out) == ["a.png"]


def test_an_overlay_that_no_memory_holds_is_left_out(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")
    monkeypatch.setattr(decoding, "_SMALL", 24 * 32 * 15)  # reading takes less, an overlay more
    monkeypatch.setattr(decoding, "free_memory", lambda: 20_000)
    out = tmp_path / "out"
    assert call(main, checkpoint, f"input={tmp_path / 'in'}", f"output={out}", "areas=true") == 1
    assert "a.png: its overlay is too large: 32×24 pixels need about 0.0 GB" in one_line(capsys.readouterr().err)
    assert files(out) == ["a_labels.png", "areas.csv"]


def test_damaged_files_of_every_kind_are_named_and_the_rest_is_done(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    save(source / "good.png")
    bad = {}
    for image_format, suffix in {"PNG": "png", "JPEG": "jpg", "TIFF": "tif", "WEBP": "webp", "GIF": "gif"}.items():
        whole = io.BytesIO()
        Image.fromarray(noise(24, 32)).save(whole, format=image_format)
        damaged = {damage: data for damage, data in spoilt(whole.getvalue()).items() if damage != "flipped bits"}
        bad |= {f"{damage}, {image_format}.{suffix}": data for damage, data in damaged.items()}
    bad |= {
        "huge.png": png(noise(8, 8), size=(2**31 - 1, 2**31 - 1)),
        "bands.tif": tiff(noise(8, 8, 5), photometric=2, tags={338: [0, 0]}),
        "float.tif": tiff(np.zeros((8, 8), np.float32)),
        "stack.tif": tiff([noise(8, 8)] * 3, photometric=2),
    }
    for name, data in bad.items():
        (source / name).write_bytes(data)
    (source / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(source / "pipe.png")
    assert call(main, checkpoint, f"input={source}", f"output={out}", "areas=true") == 1
    shown = capsys.readouterr()
    assert shown.out == f"1 of {len(bad) + 3} file(s) predicted, in {out}\n"
    errors = shown.err.splitlines()
    assert len(errors) == len(bad) + 2
    for error, name in zip(errors, sorted([*bad, "gone.png", "pipe.png"]), strict=True):
        assert error.startswith(f"error: {source / name} "), error
    assert names_in_areas(out) == ["good.png"]


def test_nearly_black_images_are_spoken_of_once(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    save(source / "a.png")
    for name in "bc":
        Image.fromarray(noise(24, 32, 1)[..., 0].astype(np.uint16) * 16).save(source / f"{name}.png")
    common = (f"input={source}", f"output={tmp_path / 'out'}", "overlay=false")
    assert call(main, checkpoint, *common) == 0
    _, note = capsys.readouterr().out.splitlines()
    assert note.startswith("note: 2 of 3 image(s) have no pixel above 63 of 255 (the first: b.png), like 12-bit data")
    state = torch.load(checkpoint.split("'")[1], weights_only=True)
    state["segdcn"]["groups"]["dataset"]["bits"] = 12
    torch.save(state, tmp_path / "trained.ckpt")
    assert call(main, f"checkpoint={tmp_path / 'trained.ckpt'}", *common) == 0
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("output=x",), ("input must be given",)),
        (("input=nowhere", "output=x"), ("input=nowhere does not exist",)),
        (("input=photos", "output=photos"), ("output=photos is the input folder",)),
        (("input=photos/a.png", "output=photos/../photos"), ("output=photos/../photos is the folder of the input",)),
        (("input=photos/a.txt", "output=x"), ("a.txt", "neither an image nor a video", ".jpg")),
        (("input=empty", "output=x"), ("input=empty holds no image",)),
        (("input=raw", "output=x"), ("input=raw holds no image", ": 2 files passed over: .cr2 (1), .txt (1)")),
        (("input=twins", "output=x"), ("twins/A.jpg", "twins/a.png", "x/a_*", "rename")),
        (("input=photos", "output=photos/a.txt"), ("is a file: give a folder",)),
        (("input=photos", "output=x", "device=abacus"), ("device=abacus",)),
        (("input=photos", "output=x", "inference.scales=[0]"), ("inference.scales",)),
        (("input=photos", "output=x", "checkpoint=short.ckpt"), ("short.ckpt", "truncated")),
        (("input=photos", "output=x", "checkpoint=nowhere.ckpt"), ("no checkpoint file at nowhere.ckpt",)),
        (("input=photos", "output=out", "annotations=a.json"), ("annotations=FILE is of a detector",)),
    ],
)
def test_bad_options_are_one_line_before_anything_is_written(
    checkpoint: str, arguments: tuple[str, ...], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("photos", "empty", "twins", "raw"):
        Path(folder).mkdir()
    for name in ("a.cr2", "b.txt"):
        Path("raw", name).write_text("")
    for image in ("photos/a.png", "twins/a.png", "twins/A.jpg"):
        Image.fromarray(noise(16, 16)).save(image)
    Path("photos/a.txt").write_text("")
    Path("short.ckpt").write_bytes(Path(checkpoint.split("'")[1]).read_bytes()[:3000])
    before = files(Path.cwd())
    given = () if any(argument.startswith("checkpoint") for argument in arguments) else (checkpoint,)
    assert call(main, *given, *arguments) == 1
    message = one_line(capsys.readouterr().err)
    for part in parts:
        assert part in message
    assert files(Path.cwd()) == before


def test_a_process_leaves_nothing_but_its_results(checkpoint: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(48, 64)).save("photo.jpg", exif=exif)
    ended = process(
        Path.cwd(), "-m", "segdcn.commands.predict", checkpoint, "input=photo.jpg", "output=out", "device=cpu"
    )
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "1 of 1 file(s) predicted, in out\n")
    assert files(Path.cwd()) == ["out/photo_labels.png", "out/photo_overlay.png", "photo.jpg"]
    with Image.open("out/photo_labels.png") as labels:
        assert labels.size == (48, 64)  # upright


def write_video(path: Path, frames: list[Any]) -> None:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg asks once in a process: here before the command
    height, width = frames[0].shape[:2]
    code = "MJPG" if path.suffix == ".avi" else "mp4v"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10.0, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


def read_video(path: Path) -> tuple[float, list[Any]]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(np.asarray(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB), np.uint8))
    return capture.get(cv2.CAP_PROP_FPS), frames


def test_a_video_becomes_a_video(
    checkpoint: str, tmp_path: Path, predictor: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "clip.mp4", [noise(96, 128, seed=number) for number in range(4)])
    out = tmp_path / "out"
    common = (checkpoint, f"input={tmp_path / 'clip.mp4'}", f"output={out}", "device=cpu")
    assert call(main, *common, "frames=true", "areas=true") == 0
    assert files(out) == sorted(["areas.csv", "clip_overlay.mp4", *(f"clip_labels/00000{n}.png" for n in range(4))])
    rate, overlays = read_video(out / "clip_overlay.mp4")
    assert (rate, len(overlays)) == (10.0, 4)
    for number, frame in enumerate(read_video(tmp_path / "clip.mp4")[1]):
        expected = predictor(frame)
        with Image.open(out / "clip_labels" / f"00000{number}.png") as labels:
            np.testing.assert_array_equal(np.asarray(labels), expected.labels)
        drawn = np.asarray(expected.overlay(legend="all")).astype(int)
        coded = overlays[number][: drawn.shape[0], : drawn.shape[1]]
        assert np.abs(coded - drawn).mean() < 12  # lossy, of hard edges
    rows = list(csv.DictReader((out / "areas.csv").open()))
    assert [row["file"] for row in rows[::6]] == [f"clip.mp4#{number}" for number in range(4)]
    capsys.readouterr()
    assert call(main, *common, "probabilities=true") == 1
    assert "probabilities=true is for images" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_a_truncated_video_is_named_and_what_could_be_read_is_kept(
    checkpoint: str, tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    clip = tmp_path / f"clip{suffix}"
    write_video(clip, [noise(48, 64, seed=number) for number in range(10)])
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    out = tmp_path / "out"
    assert call(main, checkpoint, f"input={clip}", f"output={out}", "device=cpu", "frames=true") == 1
    message = one_line(capfd.readouterr().err)  # FFmpeg itself is silent
    assert str(clip) in message
    if suffix == ".mp4":  # its index was at the end
        assert "cannot be read as a video" in message
        assert not list(out.glob("*.png"))
    else:
        read = len(list((out / "clip_labels").iterdir()))
        assert 0 < read < 10
        assert f"only {read} of 10 frames" in message
        assert len(read_video(out / "clip_overlay.mp4")[1]) == read


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Label maps of the segdcn-evaluate that runs in this test, by the image's name."""
    found: dict[str, Any] = {}
    original = segmentation.build_evaluator

    def with_sink(*arguments: Any, **options: Any) -> Any:
        evaluator = original(*arguments, **options)
        evaluator.sink = lambda name, labels: found.update({name: labels.numpy().copy()})
        return evaluator

    monkeypatch.setattr(segmentation, "build_evaluator", with_sink)
    return found


def trained(root: Path, run: Path) -> Path:
    """A network that has learned for two steps."""
    settings = [setting for setting in BARE if not setting.startswith("dataset.")]
    more = ("datamodule.num_workers=0", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "name=test")
    limit = "trainer.limit_val_batches=1"
    train(compose("train", "dataset=camvid", f"dataset.root={root}", *settings, *more, limit, f"output_dir={run}"))
    return run / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("window", ["null", "[40,48]"])
def test_label_maps_are_those_of_the_evaluation(tmp_path: Path, evaluated: dict[str, Any], window: str) -> None:
    root = make_camvid(tmp_path / "camvid", train=16)
    shutil.move(root / "val", root / "images")
    shutil.copytree(root / "images", root / "val")
    common = (f"checkpoint={trained(root, tmp_path / 'run')}", f"inference.window={window}")
    figures = tmp_path / "figures"
    options = ("callbacks.panels=null", "trainer.accelerator=cpu", "datamodule.eval_batch_size=1")
    assert call(evaluate_command.main, *common, *options, f"output_dir={figures}") == 0
    assert call(main, *common, f"input={root / 'images'}", f"output={tmp_path / 'out'}", "device=cpu") == 0
    assert len(evaluated) == 3
    right = labelled = 0
    for name, expected in evaluated.items():
        with Image.open(tmp_path / "out" / f"{name}_labels.png") as labels:
            np.testing.assert_array_equal(np.asarray(labels), expected)
        with Image.open(root / "valannot" / f"{name}.png") as truth:
            valid = np.asarray(truth) < 11
            right += int((np.asarray(truth) == expected)[valid].sum())
            labelled += int(valid.sum())
    written = json.loads((figures / "metrics.json").read_text())
    assert written["val/pixel_accuracy"] == pytest.approx(right / labelled)


@pytest.mark.slow
def test_label_maps_of_camvid_are_those_of_the_evaluation(tmp_path: Path, evaluated: dict[str, Any]) -> None:
    root = real_camvid()
    checkpoint = trained(root, tmp_path / "run")
    options = ("callbacks.panels=null", "trainer.accelerator=cpu", "datamodule.eval_batch_size=4")
    assert call(evaluate_command.main, f"checkpoint={checkpoint}", *options, f"output_dir={tmp_path / 'x'}") == 0
    out = tmp_path / "out"
    where = (f"input={root / 'val'}", f"output={out}", "overlay=false", "device=cpu")
    assert call(main, f"checkpoint={checkpoint}", *where) == 0
    assert len(evaluated) == 101
    equal = []
    for name, expected in evaluated.items():
        with Image.open(out / f"{name}_labels.png") as labels:
            equal.append((np.asarray(labels) == expected).mean())
    print(f"agreement {np.mean(equal):.8f}, worst image {min(equal):.8f}")
    assert np.mean(equal) >= 0.9999
