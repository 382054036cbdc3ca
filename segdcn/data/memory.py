"""How much memory is free: what is too large is refused before it is read."""

from __future__ import annotations

import re
from pathlib import Path


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take; None where the system does not tell."""
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
