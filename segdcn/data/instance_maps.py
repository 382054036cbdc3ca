"""Which pixels are one object, where a data set tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segdcn.data.dataset import IGNORE_INDEX, DataError

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
        path = self.files[index]
        try:
            with Image.open(path) as image:
                numbers = np.asarray(image).astype(np.int32)
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise DataError(f"{path} cannot be read as an instance map, unpack it again: {error}") from error
        return np.where((numbers >= self.lowest) & (numbers != IGNORE_INDEX), numbers, 0)
