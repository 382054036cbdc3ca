"""The device that a network runs on, and its free memory."""

from __future__ import annotations

import torch

from segdcn.data import memory
from segdcn.errors import UserError

UNKNOWN_MEMORY = 2 << 30  # bytes taken to be free where the system does not tell


def find_device(name: str) -> torch.device:
    """A device by name; "auto" is a GPU where there is one.

    Raises: UserError where it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(name))  # 0 would be a GPU to it
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a name that is none; a device that is not there
        raise UserError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device; 2 GiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = memory.free_memory()
    return UNKNOWN_MEMORY if free is None else free
