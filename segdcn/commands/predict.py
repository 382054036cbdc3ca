"""segdcn-predict checkpoint=PATH input=FILE|FOLDER|VIDEO output=DIR: label maps, overlays and more of any images."""

from __future__ import annotations

import csv
import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from hydra.utils import instantiate
from omegaconf import DictConfig

from segdcn.commands.console import console_script
from segdcn.data.dataset import DataError, dark_note, is_dark, listed, passed_over, printable
from segdcn.data.decoding import UnreadableError, check_fits
from segdcn.data.labels import count_labels
from segdcn.data.memory import keep_freed_memory
from segdcn.errors import MissingFileError, UserError, is_passing
from segdcn.runs.files import shown, write_bytes, write_png, write_text
from segdcn.runs.folder import make_folder

if TYPE_CHECKING:
    from rich.progress import Progress

    from segdcn.inference.predictor import Prediction, Predictor

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
OVERLAY_BYTES = 28  # a pixel, that an overlay takes at its peak beside the image and the labels; measured
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


class Found(NamedTuple):
    """What an input holds.

    files: images and videos by the name of their outputs.
    others: files of other kinds.
    problems: one line for each folder that cannot be read.
    """

    files: dict[str, Path]
    others: list[Path]
    problems: list[str]


@console_script("predict")
def main(config: DictConfig) -> None:
    """Console script; Hydra has composed ``config`` from conf/ and the command line."""
    keep_freed_memory()
    problems = predict(config)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


def predict(config: DictConfig) -> list[str]:
    """Predict all of ``config.input`` into ``config.output``.

    Whatever goes wrong with one file, the others are predicted; areas.csv has what there is, whatever ends it.

    Returns:
        One line for each file that could not be predicted, which names it.

    Raises:
        FileNotFoundError, ValueError: before anything is written; nothing to predict, two files with one output, or a
            checkpoint that cannot be used.
        OSError: a fault of the moment, such as a full disk.
    """
    source, output = Path(config.input), Path(config.output)
    found = find_files(source, output)  # before torch is imported: a wrong path is reported at once
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from segdcn.drawing.console import for_progress

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    work = _open(config, Progress(*columns, console=for_progress(), transient=True))
    make_folder(output, "output=DIR")
    failed: list[str] = []
    try:
        with work.progress:
            task = work.progress.add_task("files", total=len(found.files))
            for name, path in found.files.items():
                try:
                    (work.video if path.suffix.lower() in VIDEOS else work.image)(path, name)
                except Exception as error:
                    if is_passing(error):
                        raise
                    failed.append(_problem(path, error))
                work.progress.advance(task)
    except BaseException:  # also where a person ends it
        with suppress(OSError):  # the first error is the one to tell
            work.write_tables()
        raise
    work.write_tables()
    print(
        f"{len(found.files) - len(failed)} of {len(found.files)} file(s) predicted, in {printable(str(shown(output)))}"
    )
    if work.dark:
        many = f"{len(work.dark):,} of {work.images:,} image(s)"
        print(f"note: {dark_note(many, printable(work.dark[0]))}")
    if found.others:
        print(passed_over(found.others))
    return found.problems + failed


def _open(config: DictConfig, progress: Progress) -> Work:
    """What predicts files with ``config.checkpoint``.

    Raises: MissingFileError or UserError for a checkpoint or a device that cannot be used.
    """
    from segdcn.commands.dispatch import of_boxes
    from segdcn.inference.devices import find_device
    from segdcn.runs.checkpoint import read_checkpoint

    device = find_device(config.device)  # before anything is read
    checkpoint = read_checkpoint(Path(config.checkpoint), config.trust)
    if of_boxes(checkpoint.config):
        from segdcn.commands.predict_boxes import BoxWork

        return BoxWork(config, checkpoint, device, progress, partial(_named_in, Path(config.input)))
    if config.annotations is not None:
        raise UserError("annotations=FILE is of a detector: a network of label maps finds no boxes")
    return _Work(config, checkpoint.predictor(device, instantiate(config.inference, _convert_="all")), progress)


def find_files(source: Path, output: Path) -> Found:
    """The images and videos of a file or folder, by the name of their outputs: the path below ``source``, no suffix.

    A folder is searched with its subfolders and those that are linked there, in order, without ``output`` and without
    hidden files. A name is that of the path as it is seen, through links.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file of neither kind, or two files that would write the same outputs.
    """
    known = " ".join(sorted(IMAGES | VIDEOS))
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file: give a folder")
    if source.is_file():
        if source.suffix.lower() not in IMAGES | VIDEOS:
            raise UserError(f"input={source} is neither an image nor a video by its suffix: {known}")
        if output.resolve() == source.parent.resolve():
            raise UserError(f"output={output} is the folder of the input: its own files might be replaced by results")
        return Found({source.stem: source}, [], [])
    if not source.is_dir():
        raise MissingFileError(f"input={source} does not exist: give an image, a video or a folder")
    if output.resolve() == source.resolve():
        raise UserError(f"output={output} is the input folder: its results would be inputs of the next run")
    found = Found({}, [], [])
    names: dict[str, Path] = {}  # without regard to case, as some file systems see it
    written = output.resolve()
    closed = set() if written in source.resolve().parents else {written}
    for path in _walk(source, closed, set(), found.problems):
        if path.suffix.lower() not in IMAGES | VIDEOS:
            found.others.append(path)
            continue
        name = path.relative_to(source).with_suffix("").as_posix()
        other = names.setdefault(name.lower(), path)
        if other != path:
            raise UserError(f"{other} and {path} would both be written to {output / name}_*: rename one of them")
        found.files[name] = path
    if not found.files:
        others = f": {passed_over(found.others)}" if found.others else ""
        raise MissingFileError(f"input={source} holds no image and no video ({known}){others}")
    return found


def _walk(folder: Path, closed: set[Path], above: set[Path], problems: list[str]) -> Iterator[Path]:
    """The files below a folder, but for those in ``closed`` ones; ``above`` are the real folders above this one."""
    real = folder.resolve()
    if real in above or not closed.isdisjoint((real, *real.parents)):
        return
    try:
        entries = listed(folder)
    except DataError as error:
        problems.append(str(error))
        return
    for path, is_folder in entries:
        if is_folder:
            yield from _walk(path, closed, above | {real}, problems)
        else:
            yield path


def _problem(path: Path, error: Exception) -> str:
    """One line that names the file, for whatever went wrong with it."""
    message, name = printable(str(error).strip()), printable(str(path))
    if not isinstance(error, ValueError | OSError):  # a fault of this program: its kind helps to find it
        message = f"{type(error).__name__}: {message}"
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exception(error)
    return message if name in message else f"{name}: {message}"


class Work(Protocol):
    """What predicts files one by one, and tells of all of them at the end.

    images: seen so far.  dark: those of them that are nearly black.
    """

    progress: Progress
    images: int
    dark: list[str]

    def image(self, path: Path, name: str) -> None:
        """Predict a file into outputs of that name."""
        ...

    def video(self, path: Path, name: str) -> None:
        """Predict a video's frames."""
        ...

    def write_tables(self) -> None:
        """Write what is of all files."""
        ...


@dataclass
class _Work:
    """Label maps of files.

    areas: file, class, pixels, share; the rows of areas.csv.
    dark: images that are nearly black.
    """

    config: DictConfig
    predictor: Predictor
    progress: Progress
    areas: list[tuple[str, str, int, float]] = field(default_factory=list)
    images: int = 0
    dark: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    def image(self, path: Path, name: str) -> None:
        import numpy as np

        result = self.predictor(path, probabilities=self.config.probabilities)
        self.images += 1
        if is_dark(result.image):
            self.dark.append(_named_in(Path(self.config.input), path))
        write_png(self.output / f"{name}_labels.png", result.palette_image())
        self._add_areas(
            result, _named_in(Path(self.config.input), path)
        )  # before what is there to look at, which may fail
        if self.config.overlay:
            height, width = result.labels.shape
            try:
                check_fits(width, height, OVERLAY_BYTES)
            except UnreadableError as error:
                raise DataError(f"{path}: its overlay {error}; its labels are written") from None
            write_png(self.output / f"{name}_overlay.png", result.overlay())
        if self.config.probabilities:
            content = io.BytesIO()
            np.savez_compressed(content, probabilities=result.probabilities.astype(np.float16))
            write_bytes(self.output / f"{name}_probabilities.npz", content.getvalue())

    def video(self, path: Path, name: str) -> None:
        """Frame by frame: one is in memory at a time."""
        import numpy as np

        from segdcn.commands.videos import mp4, opened_video

        if self.config.probabilities:
            raise UserError("probabilities=true is for images, not for a video's frames")
        task = self.progress.add_task(printable(path.name), total=None)
        try:
            with opened_video(path) as video, mp4(self.output / f"{name}_overlay.mp4", video.rate) as write:
                self.progress.update(task, total=video.expected or None)
                for number, frame in enumerate(video.frames()):
                    result = self.predictor(frame)
                    self._add_areas(result, f"{_named_in(Path(self.config.input), path)}#{number}")
                    if self.config.frames:
                        write_png(self.output / f"{name}_labels" / f"{number:06d}.png", result.palette_image())
                    if self.config.overlay:
                        write(np.asarray(result.overlay(legend="all")))
                    self.progress.advance(task)
        finally:
            self.progress.remove_task(task)
        video.check_whole()

    def write_tables(self) -> None:
        """areas.csv, where it is asked for; bytes of a file's name that are not UTF-8 are written as escapes."""
        if not self.config.areas:
            return
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("file", "class", "pixels", "share"))
        writer.writerows((file, label, pixels, f"{share:.6f}") for file, label, pixels, share in self.areas)
        write_text(self.output / "areas.csv", table.getvalue())

    def _add_areas(self, result: Prediction, file: str) -> None:
        if self.config.areas:
            counts = count_labels(result.labels)[: len(result.class_names)].tolist()
            pixels = result.labels.size
            named = zip(result.class_names, counts, strict=True)
            self.areas += [(file, name, count, count / pixels) for name, count in named]


def _named_in(source: Path, path: Path) -> str:
    """A file as a table of all files names it."""
    return path.name if path == source else path.relative_to(source).as_posix()


if __name__ == "__main__":
    main()
