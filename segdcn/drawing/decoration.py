"""What is drawn or printed of a result never costs the result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from segdcn.errors import one_line


@contextmanager
def decoration(what: str, again: str) -> Iterator[None]:
    """A table, picture or page of figures that are safe already: its failure is one warning line.

    what: that is missing then, such as "the report"; again: how to make it, such as "segdcn-report RUN tries again".
    """
    try:
        yield
    except Exception as error:
        print(f"warning: no {what}: {one_line(error)}; {again}", file=sys.stderr, flush=True)
