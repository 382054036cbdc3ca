"""What a command prints: the package's own words as lines, in whatever encoding the output has."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

_PACKAGE = Path(__file__).resolve().parents[1]
_as_usual = warnings.formatwarning


def readable_output() -> None:
    """Let what an output's encoding lacks come out as a backslash escape, instead of ending the program.

    A warning of the package's own is one line, without its place in the code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _formatted


def end_unread() -> NoReturn:
    """End well, of a command that only shows something: whoever read its output has seen enough and closed it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _formatted(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    if Path(filename).is_relative_to(_PACKAGE):
        return f"warning: {message}\n"
    return _as_usual(message, category, filename, lineno, line)


@contextmanager
def telling(first: bool) -> Iterator[None]:
    """What the package's loggers say, from INFO on, as lines of the output; without this they are silent, as a library.

    first: whether this is the first of the processes of a run, which speaks for all; the others only warn.
    """
    logger = logging.getLogger("segdcn")
    before, handler = logger.level, _Lines()
    logger.setLevel(logging.INFO if first else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)
