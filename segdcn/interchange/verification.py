"""Whether an exported file computes what PyTorch does. Legend: N batch, K classes, H x W pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from segdcn.errors import UserError, first_line

# the image is scaled to be verified on no more pixels, and on no shorter side
MOST_PIXELS, SHORTEST_SIDE = 1024 * 2048, 64

Runner: TypeAlias = Callable[[Tensor], Tensor]
"""images -> logits, both on the CPU."""


@dataclass
class Agreement:
    """How far the logits and labels of two runs over the same images are apart.

    size, batch: of the images. span: lowest and highest logit of the reference. difference: the largest absolute one
    of a logit. differing: pixels of another label, of ``pixels``.
    """

    size: tuple[int, int]
    batch: int
    span: tuple[float, float]
    difference: float
    differing: int
    pixels: int

    @property
    def relative(self) -> float:
        """The largest difference as a share of the span; NaN where a logit is not finite."""
        return self.difference / max(self.span[1] - self.span[0], 1e-30)


def compare(reference: Runner, other: Runner, batches: Iterable[Tensor]) -> list[Agreement]:
    """Run both over batches of images (N, 3, H, W).

    Raises: ValueError, one line, where one of them cannot do with a batch, or they differ in shape.
    """
    found = []
    for images in batches:
        try:
            with torch.inference_mode():
                expected, logits = reference(images), other(images)
        except Exception as error:  # each runtime has kinds of its own
            raise UserError(f"images {tuple(images.shape)} cannot be run: {first_line(error)}") from error
        if logits.shape != expected.shape:
            raise UserError(f"{tuple(images.shape)} gives {tuple(logits.shape)} instead of {tuple(expected.shape)}")
        labels = expected.argmax(dim=1)
        found.append(
            Agreement(
                (images.shape[2], images.shape[3]),
                len(images),
                (float(expected.min()), float(expected.max())),
                float((logits - expected).abs().max()),
                int((logits.argmax(dim=1) != labels).sum()),
                labels.numel(),
            )
        )
    return found


def batches(image: NDArray[np.uint8], normalise: Callable[[NDArray[np.uint8]], Tensor]) -> Iterator[Tensor]:
    """An image, uint8 (H, W, 3), at its own size and at an odd one of another aspect, alone and with its mirror image.

    normalise: uint8 (H, W, 3) -> float32 (3, H, W).
    """
    height, width = image.shape[:2]
    scale = min(1.0, math.sqrt(MOST_PIXELS / (height * width)))
    scale = max(scale, SHORTEST_SIDE / min(height, width))
    height, width = round(scale * height), round(scale * width)
    for size in ((height, width), (height * 3 // 4 | 1, width * 5 // 4 | 1)):
        pixels = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        one = normalise(pixels)[None]
        yield one
        yield torch.cat((one, one.flip(3)))


def judge(cases: Sequence[Agreement], tolerance: Mapping[str, float], runtime: str) -> dict[str, float]:
    """The two figures that decide.

    Raises: ValueError where one is above its tolerance, or not a number.
    """
    worst = max((case.relative for case in cases), key=lambda share: math.inf if math.isnan(share) else share)
    share = sum(case.differing for case in cases) / sum(case.pixels for case in cases)
    for found, key, what in (
        (worst, "logits", "logits differ from PyTorch's by {:.1e} of their range"),
        (share, "labels", "labels differ from PyTorch's in {:.1e} of the pixels"),
    ):
        limit = float(tolerance[key])
        if not found <= limit:  # also where it is not a number
            raise UserError(
                f"nothing was written: under {runtime} {what.format(found)}, more than tolerance.{key}={limit:.1e}"
            )
    return {"relative_logit_difference": worst, "differing_labels": share}
