"""segdcn-predict: files in, files out, and what it says of bad ones; label maps are those of segdcn-evaluate."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import FirstRun
from PIL import Image
from runs import BARE, call, compose, make_camvid, one_line, process, real_camvid
from test_predictor import noise

import segdcn
from segdcn import evaluate as evaluate_command
from segdcn.predict import main
from segdcn.predictor import Predictor
from segdcn.train import train


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


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("output=x",), ("input must be given",)),
        (("input=nowhere", "output=x"), ("input=nowhere does not exist",)),
        (("input=photos", "output=photos"), ("output=photos is the input folder",)),
        (("input=photos/a.txt", "output=x"), ("a.txt", "neither an image nor a video", ".jpg")),
        (("input=empty", "output=x"), ("input=empty holds no image",)),
        (("input=twins", "output=x"), ("twins/A.jpg", "twins/a.png", "x/a_*", "rename")),
        (("input=photos", "output=photos/a.txt"), ("is a file: give a folder",)),
        (("input=photos", "output=x", "device=abacus"), ("device=abacus",)),
        (("input=photos", "output=x", "inference.scales=[0]"), ("inference.scales",)),
        (("input=photos", "output=x", "checkpoint=short.ckpt"), ("short.ckpt", "truncated")),
        (("input=photos", "output=x", "checkpoint=nowhere.ckpt"), ("no checkpoint file at nowhere.ckpt",)),
    ],
)
def test_bad_options_are_one_line_before_anything_is_written(
    checkpoint: str, arguments: tuple[str, ...], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("photos", "empty", "twins"):
        Path(folder).mkdir()
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
    ended = process(Path.cwd(), "-m", "segdcn.predict", checkpoint, "input=photo.jpg", "output=out", "device=cpu")
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "1 of 1 file(s) predicted, in out\n")
    assert files(Path.cwd()) == ["out/photo_labels.png", "out/photo_overlay.png", "photo.jpg"]
    with Image.open("out/photo_labels.png") as labels:
        assert labels.size == (48, 64)  # upright


def write_video(path: Path, frames: list[Any]) -> None:
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
        assert not out.exists()
    else:
        read = len(list((out / "clip_labels").iterdir()))
        assert 0 < read < 10
        assert f"only {read} of 10 frames" in message
        assert len(read_video(out / "clip_overlay.mp4")[1]) == read


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Label maps of the segdcn-evaluate that runs in this test, by the image's name."""
    found: dict[str, Any] = {}
    build = evaluate_command.build_evaluator

    def with_sink(*arguments: Any, **options: Any) -> Any:
        evaluator = build(*arguments, **options)
        evaluator.sink = lambda name, labels: found.update({name: labels.numpy().copy()})
        return evaluator

    monkeypatch.setattr(evaluate_command, "build_evaluator", with_sink)
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
