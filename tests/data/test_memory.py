"""What becomes of a process's memory."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from running import process

# how many pages the system gives a process for ten tensors of 64 MB, one after the other
COUNTED = """
import resource, sys, torch
from segdcn.data.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_memory_of_large_tensors_is_used_again(tmp_path: Path) -> None:
    faults = {how: int(process(tmp_path, "-c", COUNTED, how).stdout) for how in ("keep", "give back")}
    assert 3 * faults["keep"] < faults["give back"]
