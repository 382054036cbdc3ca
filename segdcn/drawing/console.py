"""Lines and tables for a terminal or a log, whatever the texts in them hold and whatever the output can show."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text


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


def table(head: Sequence[str], title: str = "", right: bool = True) -> Table:
    """An empty table; ``row`` fills it. The first column is folded where it is too wide, never cut.

    right: whether the other columns are numbers, to the right.
    """
    made = Table(title=Text(title) if title else None, title_justify="left", padding=(0, 1, 0, 0) if title else (0, 1))
    made.add_column(Text(head[0]), overflow="fold")
    for heading in head[1:]:
        made.add_column(Text(heading), justify="right" if right else "left")
    return made


def row(into: Table, cells: Sequence[str], style: str = "") -> None:
    """Add a row; square brackets in a cell are no markup."""
    into.add_row(*map(Text, cells), style=style or None)


def show(made: Table) -> None:
    """Print a table: as wide as it needs to be where nobody's window folds it."""
    Console(width=None if sys.stdout.isatty() else 160).print(made)
