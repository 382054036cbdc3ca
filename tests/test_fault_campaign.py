"""The fault campaign itself: a small one goes well and says what it did."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from running import process

SCRIPT = Path(__file__).parents[1] / "scripts" / "fault_campaign.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="commands are forked, and found in /proc")
def test_a_small_campaign_finds_nothing(tmp_path: Path) -> None:
    only = ("--only", "training", "prediction", "image", "mask", "class table", "checkpoint")
    ended = process(tmp_path, str(SCRIPT), "--kills", "4", "--inputs", "12", "--seed", "3", *only)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    cases = json.loads((tmp_path / "fault_campaign.json").read_text())
    assert len(cases) == 16
    assert "| all |  | 16 |" in ended.stdout
