"""Files that are there whole or not at all, and how a path is told."""

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from segdcn.errors import UserError, is_passing

if TYPE_CHECKING:
    from PIL import Image

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


_PARTIAL = ".partial"

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system that has none


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
            if try_to_lock(file.fileno()) and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                file.truncate()
                return file
        except FileNotFoundError:  # its writer has just given it its name
            pass
        except OSError as error:
            file.close()
            if error.errno not in NO_LOCKS:
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


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture atomically: a server refuses a folder with half a file, long after the process was killed."""
    with replacing(path) as file:
        picture.save(file, format="PNG")


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


def try_to_lock(descriptor: int) -> bool:
    """Take the exclusive lock of an open file; whether no other process has it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON file's one object.

    Raises: ValueError, one line with the ``remedy``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        if is_passing(error):
            raise
        raise UserError(
            f"{shown(path)} cannot be read: it is damaged or truncated ({type(error).__name__}); {remedy}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{shown(path)} cannot be read: it holds no JSON object; {remedy}")
    return content
