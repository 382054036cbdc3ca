"""Which pixels are one object, where a data set tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from segdcn.data.dataset import IGNORE_INDEX, read_numbers

Instances = NDArray[np.int32]


class InstanceMaps(Sequence[Instances]):
    """The instance map of each image of a split, read when indexed: int32 (H, W), a number per object, 0 for none.

    Args:
        files: PNGs of numbers.
        lowest: the lowest number of an object in them; lower ones, and 255, are of no object.
    """

    def __init__(self, files: Sequence[Path], lowest: int = 1) -> None:
        self.files = list(files)
        self.lowest = lowest

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Instances: ...

    @overload
    def __getitem__(self, index: slice) -> InstanceMaps: ...

    def __getitem__(self, index: int | slice) -> Instances | InstanceMaps:
        if isinstance(index, slice):
            return InstanceMaps(self.files[index], self.lowest)
        numbers = read_numbers(self.files[index]).astype(np.int32)
        return np.where((numbers >= self.lowest) & (numbers != IGNORE_INDEX), numbers, 0)
