"""How the tests run segdcn-data check, and read what it says."""

from __future__ import annotations

import re

import pytest
from running import call

from segdcn.commands.data import main


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    """Exit status, standard output, and the lines of errors."""
    status = call(main, "check", "workers=0", *arguments)
    shown = capsys.readouterr()
    return status, shown.out, [line for line in shown.err.splitlines() if line.startswith("error: ")]


def row(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if re.match(rf"│ {name} ", line))
    return [cell.strip() for cell in line.strip("│").split("│")]
