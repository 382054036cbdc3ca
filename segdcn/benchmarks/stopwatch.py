"""Time and peak memory of calls that are compared: in one process, in turn, medians."""

from __future__ import annotations

import ctypes
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Candidate:
    """Something to time: ``run`` makes the output, whose backward reaches ``leaves``."""

    name: str
    run: Callable[[], Tensor]
    leaves: Sequence[Tensor]


@dataclass
class Figures:
    """Medians of one candidate: milliseconds, and peak memory in MB above what was held before (NaN: not known)."""

    forward_ms: float
    training_ms: float  # forward and backward
    forward_mb: float
    training_mb: float


def compare(candidates: Sequence[Candidate], repeats: int) -> dict[str, Figures]:
    """Time candidates in turn, so that a busy moment of the machine hits all of them; then their peak memory."""
    gradients = {c.name: torch.randn_like(c.run()) for c in candidates}
    device = candidates[0].leaves[0].device

    def train(candidate: Candidate) -> None:
        torch.autograd.grad(candidate.run(), candidate.leaves, gradients[candidate.name])

    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for c in candidates:
        calls |= {(c.name, "forward"): c.run, (c.name, "training"): partial(train, c)}
    medians = interleaved(calls, repeats, device)
    return {
        c.name: Figures(
            *(medians[c.name, kind] for kind in ("forward", "training")),
            *(peak_megabytes(calls[c.name, kind], device) for kind in ("forward", "training")),
        )
        for c in candidates
    }


def plain_figures(figures: Mapping[str, Figures]) -> dict[str, dict[str, float | None]]:
    """Those of each candidate as JSON takes them; a memory figure that is not known becomes null."""
    return {
        name: {key: None if math.isnan(value) else round(value, 4) for key, value in vars(one).items()}
        for name, one in figures.items()
    }


def interleaved(calls: Mapping[Any, Callable[[], object]], repeats: int, device: torch.device) -> dict[Any, float]:
    """Median milliseconds of each call, all called in turn, round after round.

    On a GPU that is the device's own time, between two of its events, as ``triton.testing.do_bench`` takes it: each
    call is queued while the device still clears its cache, or what was queued before, so that it finds no arguments
    there. Where the processor takes longer to queue calls than the device to run them, it is the processor's time.
    """
    if device.type == "cuda":
        return _interleaved_on_cuda(calls, repeats, device)
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            taken = _milliseconds(call)
            if turn:  # the first round warms up
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    taken = 1000 * (time.perf_counter() - start)
    del result
    return taken


_CACHE_BYTES = 2**28  # more than any GPU's
_WARM_UP = 3  # rounds, in which kernels are compiled and chosen and the clock rises


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _interleaved_on_cuda(
    calls: Mapping[Any, Callable[[], object]], repeats: int, device: torch.device
) -> dict[Any, float]:
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)
    moments: dict[Any, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for turn in range(_WARM_UP + repeats):
        for name, call in calls.items():
            start, end = _timed_event(), _timed_event()
            cache.zero_()
            start.record()
            call()
            end.record()
            if turn >= _WARM_UP:
                moments[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: statistics.median(one.elapsed_time(other) for one, other in pairs) for name, pairs in moments.items()}


def peak_megabytes(call: Callable[[], object], device: torch.device) -> float:
    """Peak memory of a call above what was held before; on a CPU from Linux's own books, elsewhere NaN."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not reset_peak():
        return math.nan
    held = resident_megabytes()
    call()
    return resident_megabytes(peak=True) - held


def reset_peak() -> bool:
    """Let this process's peak memory begin anew; False where the system keeps no such book."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or the call would reuse it unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def resident_megabytes(peak: bool = False) -> float:
    """Memory of this process, now or at its peak; NaN where the system does not tell (all but Linux)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return math.nan
    found = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else math.nan
