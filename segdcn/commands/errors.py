"""How a command ends in an error: one line for what can be mended, a traceback for a bug, and its exit status."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from segdcn.commands.output import end_unread
from segdcn.errors import UserError, first_line, is_out_of_memory, is_passing, one_line
from segdcn.runs.files import shown

FAILED = 1
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h

# commands that do nothing else
_PRINTING = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}
_NO_SHARED_MEMORY = ("shared memory", "bus error")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error that is no bug as one line and exit with its status; ``HYDRA_FULL_ERROR=1`` shows tracebacks."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _PRINTING.intersection(sys.argv):
            end_unread()
        explained = explain(error)
        if explained is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        message, status = explained
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(status)


def explain(error: Exception) -> tuple[str, int] | None:
    """The line and the exit status of an error; None for a bug.

    The status is ``FAILED`` where the same would happen again, ``TRY_AGAIN`` for a fault of the moment: a disk, a
    network, another process.
    """
    cause = cause_of(error)
    message = _of_worker(cause)
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key} must be given: add {cause.full_key}=VALUE to the command", FAILED
    if isinstance(cause, HydraException) and isinstance(cause.__cause__, OmegaConfBaseException):
        return f"{message} ({str(cause.__cause__).splitlines()[0]})", FAILED
    if isinstance(cause, UserError | HydraException | OmegaConfBaseException | YAMLError) or is_misconfiguration(cause):
        return message, FAILED
    if isinstance(error, InstantiationException) and not is_passing(cause):
        return f"{_key_of(error)}{message}", FAILED  # a setting that its class does not take
    if isinstance(cause, RuntimeError | OSError) and any(words in str(cause).lower() for words in _NO_SHARED_MEMORY):
        return (
            "the loading workers have no shared memory left (/dev/shm): start the container with more, such as"
            f" --shm-size=8g, or set datamodule.num_workers=0 ({message})",
            FAILED,
        )
    if is_out_of_memory(cause):
        return (
            "the memory does not suffice: take a smaller datamodule.batch_size or crop_size, or a smaller network"
            f" ({message})",
            FAILED,
        )
    if cannot_compile(cause):
        return (
            f"torch.compile cannot do with this network or machine: set task.compile=false ({first_line(cause)})",
            FAILED,
        )
    if lost_process(cause):
        line = f"another process of this run has ended or cannot be reached: see what it said ({message})"
        return line, TRY_AGAIN
    if isinstance(cause, OSError):
        names = [name for name in (cause.filename, cause.filename2) if isinstance(name, str | bytes)]  # of a copy both
        where = " -> ".join(str(shown(os.fsdecode(name))) for name in names)
        line = f"{where}{': ' if where else ''}{cause.strerror or message}"
        if is_passing(cause):
            return f"{line}; when that is mended, give the command again", TRY_AGAIN
        return line, FAILED
    return None


def cause_of(error: BaseException) -> BaseException:
    """What a class itself raised, where Hydra has wrapped it."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_misconfiguration(error: BaseException) -> bool:
    """Whether Lightning refuses a setting; by name, since commands that do without Lightning ask too."""
    return type(error).__name__ == "MisconfigurationException"


def cannot_compile(error: BaseException) -> bool:
    """Whether torch.compile failed, such as without a C++ compiler; by its packages, since its classes move."""
    return any(kind.__module__.startswith(("torch._dynamo.", "torch._inductor.")) for kind in type(error).__mro__)


def lost_process(error: BaseException) -> bool:
    """Whether torch.distributed failed because a process is not there (any more); gloo has no class of its own."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _key_of(error: InstantiationException) -> str:
    """The key of what could not be built, as the beginning of a line; empty where Hydra does not tell it."""
    found = re.search(r"^full_key: (\S+)$", str(error), re.MULTILINE)
    return f"{found[1]}: " if found else ""


def _of_worker(error: BaseException) -> str:
    """An error in one line: of one that a loading worker raised, whose message is a traceback, the last line."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Caught ") and "worker process" in lines[0]:
        return lines[-1].partition(": ")[2] or lines[-1]
    return one_line(error)
