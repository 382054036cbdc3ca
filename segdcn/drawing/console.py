"""Tables and progress for a terminal or a log, whatever the texts in them hold."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


def table(head: Sequence[str], title: str = "") -> Table:
    """An empty table; ``row`` fills it. The first column is folded where it is too wide, never cut, the others are
    numbers.
    """
    empty = Table(title=Text(title) if title else None, title_justify="left", padding=(0, 1, 0, 0) if title else (0, 1))
    empty.add_column(Text(head[0]), overflow="fold")
    for heading in head[1:]:
        empty.add_column(Text(heading), justify="right")
    return empty


def row(into: Table, cells: Sequence[str], style: str = "") -> None:
    """Add a row; square brackets in a cell are no markup."""
    into.add_row(*map(Text, cells), style=style or None)


def for_progress() -> Console:
    """Where a bar of progress is drawn, which is for a person who waits: a log file gets none."""
    return Console(stderr=True, quiet=not sys.stderr.isatty())


def show(content: Table | Group) -> None:
    """Print tables: as wide as they need to be where nobody's window folds them."""
    Console(width=None if sys.stdout.isatty() else 160).print(content)
