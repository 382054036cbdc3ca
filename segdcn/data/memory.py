"""How much memory is free: what is too large is refused before it is read; and memory that is freed stays at hand."""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take; None where the system does not tell."""
    if libc := _glibc():
        libc.malloc_trim(0)  # what is kept at hand is free too, and would count as used
    found = []
    try:
        text = Path("/proc/meminfo").read_text()
        found += [1024 * int(kilobytes) for kilobytes in re.findall(r"^MemAvailable:\s+(\d+)", text, re.MULTILINE)]
    except OSError:
        pass
    group = Path("/sys/fs/cgroup")
    try:  # a container's own limit; files that the system has read ahead or kept count as used, but give way
        kept = re.findall(r"^(?:in)?active_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        used = int((group / "memory.current").read_text()) - sum(map(int, kept))
        found.append(int((group / "memory.max").read_text()) - used)
    except (OSError, ValueError):  # none, or "max"
        pass
    return max(0, min(found)) if found else None


def keep_freed_memory() -> None:
    """Let this process use the memory of large tensors again, instead of giving it back with each and asking anew.

    By itself glibc does the latter from 32 MB on, and the system clears each page first: of a training step on a CPU
    with maps of that size that is a fifth of the time, of an evaluation a third, and where the system is slow at it,
    half. Elsewhere than on glibc nothing is done.
    """
    if libc := _glibc():
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
