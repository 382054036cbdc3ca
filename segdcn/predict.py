"""segdcn-predict checkpoint=PATH input=FILE|FOLDER|VIDEO output=DIR: label maps, overlays and more of any images."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from segdcn import MissingFileError, UserError
from segdcn.commands.entry import console_script
from segdcn.runs.folder import make_folder, shown, write_bytes

if TYPE_CHECKING:
    from PIL import Image
    from rich.progress import Progress

    from segdcn.predictor import Prediction, Predictor

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}

Areas = list[tuple[str, str, int, float]]
"""File, class, pixels, share: the rows of areas.csv."""


def predict(config: DictConfig) -> list[str]:
    """Predict all of ``config.input`` into ``config.output``.

    Returns:
        One line for each file that could not be predicted, which names it.

    Raises:
        FileNotFoundError, ValueError: before anything is written; nothing to predict, two files with one output, or a
            checkpoint that cannot be used.
    """
    source, output = Path(config.input), Path(config.output)
    files = find_files(source, output)  # before torch is imported: a wrong path is reported at once
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    import segdcn

    make_folder(output, "output=DIR")
    predictor = segdcn.load(
        config.checkpoint,
        device=config.device,
        inference=instantiate(config.inference, _convert_="all"),
        trust=config.trust,
    )
    problems: list[str] = []
    areas: Areas = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # the bar is for a person who waits: a log file gets none
    with Progress(*columns, console=Console(stderr=True, quiet=not sys.stderr.isatty()), transient=True) as progress:
        task = progress.add_task("files", total=len(files))
        for name, path in files.items():
            run = _predict_video if path.suffix.lower() in VIDEOS else _predict_image
            try:
                run(predictor, path, name, config, areas, progress)
            except (ValueError, OSError) as error:
                message = " ".join(str(error).split())
                problems.append(message if str(path) in message else f"{path}: {message}")
            progress.advance(task)
    if config.areas:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("file", "class", "pixels", "share"))
        writer.writerows((file, label, pixels, f"{share:.6f}") for file, label, pixels, share in areas)
        write_bytes(output / "areas.csv", table.getvalue().encode("utf-8"))
    print(f"{len(files) - len(problems)} of {len(files)} file(s) predicted, in {shown(output)}")
    return problems


def find_files(source: Path, output: Path) -> dict[str, Path]:
    """The images and videos of a file or folder, by the name of their outputs: the path below ``source``, no suffix.

    A folder is searched with its subfolders, in order, without ``output`` and without hidden files.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file of neither kind, or two files that would write the same outputs.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file: give a folder")
    if source.is_file():
        if source.suffix.lower() not in IMAGES | VIDEOS:
            known = " ".join(sorted(IMAGES | VIDEOS))
            raise UserError(f"input={source} is neither an image nor a video by its suffix: {known}")
        return {source.stem: source}
    if not source.is_dir():
        raise MissingFileError(f"input={source} does not exist: give an image, a video or a folder")
    if output.resolve() == source.resolve():
        raise UserError(f"output={output} is the input folder: its results would be inputs of the next run")
    written = output.resolve()
    found: dict[str, Path] = {}
    names: dict[str, Path] = {}  # without regard to case, as some file systems see it
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        hidden = any(part.startswith(".") for part in inner.parts)
        if hidden or path.suffix.lower() not in IMAGES | VIDEOS or not path.is_file():
            continue
        if written in path.resolve().parents:
            continue
        name = inner.with_suffix("").as_posix()
        other = names.setdefault(name.lower(), path)
        if other != path:
            raise UserError(f"{other} and {path} would both be written to {output / name}_*: rename one of them")
        found[name] = path
    if not found:
        raise MissingFileError(f"input={source} holds no image and no video ({' '.join(sorted(IMAGES | VIDEOS))})")
    return found


def _predict_image(
    predictor: Predictor, path: Path, name: str, config: DictConfig, areas: Areas, progress: Progress
) -> None:
    import numpy as np

    output = Path(config.output)
    result = predictor(path, probabilities=config.probabilities)
    write_bytes(output / f"{name}_labels.png", _png(result.palette_image()))
    if config.overlay:
        write_bytes(output / f"{name}_overlay.png", _png(result.overlay()))
    if config.probabilities:
        content = io.BytesIO()
        np.savez_compressed(content, probabilities=result.probabilities.astype(np.float16))
        write_bytes(output / f"{name}_probabilities.npz", content.getvalue())
    areas += _areas(result, _file(path, config))


def _predict_video(
    predictor: Predictor, path: Path, name: str, config: DictConfig, areas: Areas, progress: Progress
) -> None:
    """Frame by frame: one is in memory at a time."""
    import cv2
    import numpy as np

    if config.probabilities:
        raise UserError("probabilities=true is for images, not for a video's frames")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong with a file is said once, at the end
    output = Path(config.output)
    capture = cv2.VideoCapture(str(path))
    task = progress.add_task(path.name, total=None)
    try:
        if not capture.isOpened():
            raise UserError("cannot be read as a video")
        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        expected = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        progress.update(task, total=expected if expected > 0 else None)
        with _video(output / f"{name}_overlay.mp4", rate) as write:
            number = 0
            while True:
                there, frame = capture.read()
                if not there:
                    break
                result = predictor(np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8))
                if config.overlay:
                    write(np.asarray(result.overlay(legend="all")))
                if config.frames:
                    write_bytes(output / f"{name}_labels" / f"{number:06d}.png", _png(result.palette_image()))
                if config.areas:
                    areas += _areas(result, f"{_file(path, config)}#{number}")
                number += 1
                progress.advance(task)
            if number == 0:
                raise UserError("holds no frame that can be read")
    finally:
        progress.remove_task(task)
        capture.release()
    if number < expected - max(2, expected // 50):  # a container's count may be an estimate
        raise UserError(f"only {number} of {expected} frames could be read; those were predicted")


@contextmanager
def _video(path: Path, rate: float) -> Iterator[Any]:
    """A function that appends RGB frames to an MP4, which appears under its name when it is whole.

    MP4 wants even sides: an odd one is given a white row or column.
    """
    import cv2

    writer: cv2.VideoWriter | None = None
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.mp4")

    def write(frame: Any) -> None:
        nonlocal writer
        height, width = frame.shape[:2]
        frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        if writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            fourcc = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(partial), fourcc, rate, (frame.shape[1], frame.shape[0]))
            if not writer.isOpened():
                raise UserError(f"OpenCV cannot write {path}: its build lacks the mp4v codec")
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    try:
        yield write
        if writer is not None:
            writer.release()
            partial.replace(path)
    finally:
        if writer is not None:
            writer.release()
        partial.unlink(missing_ok=True)


def _file(path: Path, config: DictConfig) -> str:
    """As areas.csv names it."""
    return path.name if path == Path(config.input) else path.relative_to(config.input).as_posix()


def _areas(result: Prediction, file: str) -> Areas:
    import numpy as np

    counts = np.bincount(result.labels.ravel(), minlength=len(result.class_names)).tolist()
    pixels = result.labels.size
    return [(file, name, count, count / pixels) for name, count in zip(result.class_names, counts, strict=True)]


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


@console_script("predict")
def main(config: DictConfig) -> None:
    """Console script; Hydra has composed ``config`` from conf/ and the command line."""
    problems = predict(config)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
