"""A number of the device that is read later, without waiting for what the device is given to do meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """``read`` waits until the device has come to where this was made, not until it is idle, as ``float`` does.

    A loop that reads a number of each step at once lets a GPU run dry: the next work is queued only when the last is
    done.

    value: of one element; it may change afterwards on a GPU only.
    """

    def __init__(self, value: Tensor) -> None:
        # of other devices than CUDA's a copy that is not waited for may be read before it is made
        self._value = value.detach().to("cpu", non_blocking=value.is_cuda)
        self._there: torch.cuda.Event | None = None
        if value.is_cuda:
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record()

    def read(self) -> float:
        """The number."""
        if self._there is not None:
            self._there.synchronize()
        return float(self._value)
