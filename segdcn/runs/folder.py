"""A run's folder: claimed by one process, locked while it is written, each file there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from segdcn import MissingFileError, UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = "run.lock"
INHERITED_LOCK = "SEGDCN_LOCK"
"""Descriptor of a lock that this process was started with: a sweep's launcher holds it for its jobs."""
_LASTING = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,  # of a place within a file that its own, damaged bytes name
}
_PARTIAL = ".partial"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system that has none
_STARTED = time.time()
_made: set[Path] = set()  # the folders that this process made, absolute


# --- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes ``path``'s place when it is whole and on the disk; on an error nothing is changed.

    It is written beside ``path``, as its ``name``: a rename within one folder is atomic, a copy from another file
    system is not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path):
        file = _open_partial(path)
        partial = Path(file.name)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "win32":  # where an open file cannot be renamed
                file.close()
            partial.replace(path)  # elsewhere while it is locked: nobody else may take it for left behind
        except BaseException:
            _throw_away(file, partial)
            raise
        finally:
            file.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the system that name no file, or the one that is to take ``path``'s place, name ``path``."""
    try:
        yield
    except BaseException as error:
        # torch.save raises an error of its own where the disk is full
        for one in (error, error.__context__):
            if not isinstance(one, OSError) or one.errno is None:
                continue
            if one.filename is None or str(one.filename).endswith(_PARTIAL):
                raise OSError(one.errno, os.strerror(one.errno), str(path)) from error
        raise


def _throw_away(file: IO[bytes], partial: Path) -> None:
    with contextlib.suppress(OSError):  # what is not written yet does not fit either
        if sys.platform == "win32":
            file.close()
    partial.unlink(missing_ok=True)  # elsewhere before another process can lock it
    with contextlib.suppress(OSError):
        file.close()


def _open_partial(path: Path) -> IO[bytes]:
    """A hidden file beside ``path``, empty and locked; what a killed process left is used again.

    So there are never more of them than processes that write ``path`` at once.
    """
    for number in itertools.count():
        partial = path.with_name(f".{path.name}.{number}{_PARTIAL}")
        try:
            file = open(partial, "wb", opener=_open_uncut)  # noqa: SIM115  (returned open)
        except PermissionError:
            if not partial.exists():
                raise
            continue  # another user's
        try:
            if _try_to_lock(file.fileno()) and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                file.truncate()
                return file
        except FileNotFoundError:  # its writer has just given it its name
            pass
        except OSError as error:
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            partial.unlink(missing_ok=True)  # a file system without locks: a name of this process alone
            return path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}").open("wb")
        file.close()
    raise AssertionError  # itertools.count has no end


def _open_uncut(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC, 0o666)


def write_bytes(path: Path, content: bytes) -> None:
    """Write the file atomically: a reader, or a killed process, never leaves or sees half of it."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 atomically; what is no Unicode (a file's name may be any bytes) as backslash escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write one JSON object atomically; figures that do not exist (NaN) become null, at any depth.

    Raises: ValueError for an infinite one, which is no figure that is missing.
    """
    write_text(path, json.dumps(_without_nan(values), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def file_hash(path: Path) -> str:
    """The file's sha256, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def shown(path: str | Path) -> Path:
    """A path as a user types it: relative below the working folder, whole elsewhere."""
    path = Path(path).absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def typed(path: str | Path, key: str = "") -> str:
    """A path, or the setting ``key=path``, as it is typed in a shell."""
    return shlex.quote(f"{key}={shown(path)}" if key else str(shown(path)))


def is_lasting(error: OSError) -> bool:
    """Whether a path is missing, forbidden or none at all, or a file damaged: another moment it would be the same.

    Without a number it is not the system's error but one that a reader makes of what a file holds.
    """
    return error.errno in _LASTING or (error.errno is None and not isinstance(error, ConnectionError | TimeoutError))


def is_passing(error: BaseException) -> bool:
    """Whether a disk or a network fails at the moment, whatever was to be read: no reason to call a file damaged."""
    return isinstance(error, OSError) and not is_lasting(error)


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
        while not _try_to_lock(descriptor):
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise UserError(f"{shown(path.parent)} lies on a file system without locks: choose another") from error
        raise
    return True


def _inherited(descriptor: int) -> bool:
    """Whether the file is the one that this process was given a lock of."""
    given = os.environ.get(INHERITED_LOCK, "")
    with contextlib.suppress(OSError):  # closed, by whoever was between the launcher and this process
        return given.isdigit() and os.path.samestat(os.fstat(int(given)), os.fstat(descriptor))
    return False


def _try_to_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


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

    Where nothing was begun it leaves nothing: an empty folder goes, unless it was there before.

    first: whether this is the first of the processes that share the folder. It speaks for all that fail alike:
    another one that fails after it ends without a word.
    """
    try:
        yield
    except Exception:
        if not first and _told_by_first(folder):
            sys.exit(1)
        _leave_behind(folder, traceback.format_exc())
        raise


def _told_by_first(folder: Path) -> bool:
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
