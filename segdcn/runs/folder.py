"""A run's folder: claimed by one process and locked while it is written."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from segdcn.errors import MissingFileError, UserError, is_lasting
from segdcn.runs.files import NO_LOCKS, shown, try_to_lock

if sys.platform != "win32":
    import fcntl

LOCK = "run.lock"
INHERITED_LOCK = "SEGDCN_LOCK"
"""Descriptor of a lock that this process was started with: a sweep's launcher holds it for its jobs."""
_STARTED = time.time()
_made: set[Path] = set()  # the folders that this process made, absolute


def make_folder(folder: Path, option: str) -> None:
    """Make a folder that can be written to.

    option: how a user names another one, such as ``output_dir=DIR``.

    Raises: UserError, one line, where that is not possible.
    """
    try:
        missing = [path for path in _around(folder) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        _made.update(missing)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if not is_lasting(error):
            raise
        raise UserError(
            f"{shown(folder)} cannot be written to ({error.strerror}): give another with {option}"
        ) from error


def unmake_folder(folder: Path) -> None:
    """Remove a folder and those around it, as far as they are empty and were made by this process."""
    with contextlib.suppress(OSError):  # not empty
        for path in itertools.takewhile(_made.__contains__, _around(folder)):
            path.rmdir()
            _made.remove(path)


@contextlib.contextmanager
def whole_folder(folder: Path, option: str) -> Iterator[Path]:
    """A folder to fill, hidden beside ``folder``, whose place it takes at the end; on an error nothing is left of it.

    What a killed process left is begun anew.

    Raises: UserError, one line: it cannot be written to, or another process fills it.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    make_folder(partial, option)
    with locked(partial / LOCK) as lock:
        if lock is None:
            raise UserError(f"{shown(folder)} is being written by another process: wait for its end, or stop it")
        try:
            for left in partial.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != LOCK:
                    left.unlink()
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            unmake_folder(folder.parent)
            raise
    (partial / LOCK).unlink()
    if folder.is_dir():
        folder.rmdir()  # empty, or this is an error
    partial.rename(folder)


def _around(folder: Path) -> list[Path]:
    """A folder and all that it lies in, absolute, the innermost first."""
    folder = folder.absolute()
    return [folder, *folder.parents]


# --- locks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, seconds: float = 0.0) -> Iterator[int | None]:
    """An exclusive lock on a file, as its descriptor; None where another process holds it for so long.

    It lasts until the block ends and every process that was given the descriptor has ended, however they do. A lock
    that this process was itself started with (``INHERITED_LOCK``) is held already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if _inherited(descriptor):
            yield descriptor
            return
        yield descriptor if _wait_for_lock(descriptor, seconds, path) else None
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, seconds: float, path: Path) -> bool:
    end = time.monotonic() + seconds
    try:
        while not try_to_lock(descriptor):
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise UserError(f"{shown(path.parent)} lies on a file system without locks: choose another") from error
        raise
    return True


def _inherited(descriptor: int) -> bool:
    """Whether the file is the one that this process was given a lock of."""
    given = os.environ.get(INHERITED_LOCK, "")
    with contextlib.suppress(OSError):  # closed, by whoever was between the launcher and this process
        return given.isdigit() and os.path.samestat(os.fstat(int(given)), os.fstat(descriptor))
    return False


# --- the folder of a run ----------------------------------------------------------------------------------------------


def new_folder(parent: Path, name: str) -> Path:
    """Make ``parent/name``, or with _2, _3, ... after the name where it is there already; no two processes get one.

    Raises: UserError, one line, where it cannot be made.
    """
    make_folder(parent, "output_dir=DIR")
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir()
            _made.add(folder.absolute())
            return folder
        except FileExistsError:
            number += 1


@contextlib.contextmanager
def owned(folder: Path, wait: float = 10.0) -> Iterator[None]:
    """The folder, made and locked, so that no other process takes it for its own.

    wait: for a process that is just ending, in seconds.

    Raises: UserError, one line: it cannot be written to, or another process owns it.
    """
    make_folder(folder, "output_dir=DIR")
    with locked(folder / LOCK, wait) as lock:
        if lock is None:
            raise UserError(f"{shown(folder)} is being written by another process: wait for its end, or stop it")
        try:
            yield
        finally:
            if sys.platform != "win32":  # at once: loading workers that are about to end hold the descriptor too
                fcntl.flock(lock, fcntl.LOCK_UN)


@contextlib.contextmanager
def reporting(folder: Path, first: bool = True) -> Iterator[None]:
    """An error leaves error.txt in the folder, with the time, the command and the traceback.

    Where nothing was begun it leaves nothing: an empty folder goes, unless it was there before. A good end takes an
    older one away.

    first: whether this is the first of the processes that share the folder. It speaks for all that fail alike:
    another one that fails after it ends without a word.
    """
    try:
        yield
    except Exception:
        if not first and _reported_by_first(folder):
            sys.exit(1)
        _leave_behind(folder, traceback.format_exc())
        raise
    if first:
        (folder / "error.txt").unlink(missing_ok=True)  # of a try before this one, which has mended it


def _reported_by_first(folder: Path) -> bool:
    """Whether the first process has reported an error of its own, given time to do it."""
    time.sleep(2)
    report = folder / "error.txt"
    # where nothing was begun the lock is taken away by the process that reports
    return not (folder / LOCK).exists() or (report.exists() and report.stat().st_mtime > _STARTED)


def _leave_behind(folder: Path, report: str) -> None:
    """error.txt in a folder where something was begun; of an empty one that was made for it nothing."""
    try:
        left = {path.name for path in folder.iterdir()}
        if left - {LOCK}:
            with (folder / "error.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(sys.argv)}\n{report}\n")
            return
        (folder / LOCK).unlink(missing_ok=True)
        unmake_folder(folder)
    except OSError:  # a full disk is the error that is being reported
        print(report, file=sys.stderr)


def run_folder_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint belongs to: RUN/checkpoints/NAME.ckpt, or else the file's own folder."""
    checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def check_checkpoint(path: Path) -> None:
    """That there is a file; whether it is a checkpoint is seen when it is read.

    Raises: MissingFileError.
    """
    if not path.is_file():
        raise MissingFileError(f"no checkpoint file at {path}: give one such as RUN/checkpoints/best.ckpt")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: the file itself, or the last one of a run folder.

    Raises: MissingFileError when there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    last = path / "checkpoints" / "last.ckpt"
    if last.is_file():
        return last
    if (best := last.with_name("best.ckpt")).is_file():
        raise MissingFileError(f"{path} holds no checkpoints/last.ckpt: resume={shown(best)} goes on from its best one")
    if path.is_dir():
        raise MissingFileError(
            f"{path} holds no checkpoints/last.ckpt: the run ended before its first checkpoint, start it again"
        )
    raise MissingFileError(f"no checkpoint or run folder at {path}")
