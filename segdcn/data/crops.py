"""Which crop fits the images of a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from segdcn.data.dataset import ImageMaskFiles, Sample, spread_over

LARGEST, STEP = 512, 32  # pixels: what DeepLab is trained on, and what its strides divide
LOOKED_AT = 16  # images


def fitting_crop(
    samples: Sequence[Sample], short_side: int | None = None, long_side: int | None = None
) -> tuple[int, int]:
    """A square within the shorter side of the median image, of 32 to 512 pixels, a multiple of 32; (height, width).

    Some images spread over the split are looked at; of files only their headers.

    short_side, long_side: to which images are resized before, see ``TrainTransform``.

    Raises: DataError where no image can be read.
    """
    sides = []
    for index in spread_over(len(samples), LOOKED_AT):
        short, long = sorted(_size(samples, index))
        factor = 1.0
        if short_side is not None:
            factor = short_side / short if long_side is None else min(short_side / short, long_side / long)
        sides.append(factor * short)
    fitting = int(np.median(sides)) // STEP * STEP if sides else LARGEST
    side = min(max(fitting, STEP), LARGEST)
    return side, side


def _size(samples: Sequence[Sample], index: int) -> tuple[int, int]:
    """Of an image as it is stored, which is what is cropped."""
    if isinstance(samples, ImageMaskFiles):
        try:
            with Image.open(samples.pairs[index].image) as image:
                return image.height, image.width
        except Exception:  # one that others read, or nobody: who says so follows
            pass
    height, width = samples[index].label.shape
    return height, width
