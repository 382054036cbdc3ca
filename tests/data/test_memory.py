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

# how many bytes of a tensor of 1 GiB that is no more a process holds, before and after it asks how many are free
HELD = """
import resource, torch
from segdcn.data.memory import free_memory, keep_freed_memory
def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
keep_freed_memory()
torch.ones(1 << 20)
before = held()
torch.ones(1 << 28)
kept = held() - before
free_memory()
print(kept, held() - before)
"""

of_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")


@of_glibc
def test_memory_of_large_tensors_is_used_again(tmp_path: Path) -> None:
    faults = {how: int(process(tmp_path, "-c", COUNTED, how).stdout) for how in ("keep", "give back")}
    assert 3 * faults["keep"] < faults["give back"]


@of_glibc
def test_memory_that_is_kept_is_free(tmp_path: Path) -> None:
    """Else of two large images the second would be seen by smaller windows than the first."""
    kept, held = map(int, process(tmp_path, "-c", HELD).stdout.split())
    assert kept > 1 << 29
    assert held < 1 << 28
