"""What a command prints: the package's own words as lines, in whatever encoding the output has."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def readable_output() -> None:
    """Let what an output's encoding lacks come out as a backslash escape, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
