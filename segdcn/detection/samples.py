"""What a data set of boxes is: named classes, and splits that are sequences of images with their objects.

Legend for the whole package: N images, M objects of an image, C classes without the background, H x W pixels. A box is
(x1, y1, x2, y2) in pixels, where (0, 0) is the outer corner of the first pixel: x2 - x1 is its width, and the whole
image is (0, 0, W, H). Labels are 1..C, as torchvision's detectors have them; 0 is the background.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segdcn.data.dataset import Array, Color, voc_palette


class Objects(NamedTuple):
    """The true objects of an image.

    Shape: boxes float32 (M, 4); labels int64 (M,), 1..C; ignored bool (M,), VOC's "difficult" and COCO's crowds, which
    are neither learned nor counted; areas float64 (M,), in pixels, of the object itself where that is known.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    areas: NDArray[np.float64]


class Detections(NamedTuple):
    """What a detector finds in an image, the best first.

    Shape: boxes float32 (M, 4); scores float32 (M,), 0..1; labels int64 (M,), 1..C.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]

    def of_score(self, least: float) -> Detections:
        """Those that score at least so much."""
        sure = self.scores >= least
        return Detections(self.boxes[sure], self.scores[sure], self.labels[sure])


class BoxSample(NamedTuple):
    """One image with its objects; image uint8 (H, W, 3) RGB."""

    image: Array
    objects: Objects
    name: str


class DetectionDataset(ABC):
    """A data set of boxes; one of your own is a subclass."""

    @property
    @abstractmethod
    def class_names(self) -> Sequence[str]:
        """C names; the label of the first is 1."""

    @property
    def palette(self) -> Sequence[Color]:
        """C RGB colours, 0..255; PASCAL VOC's where a subclass says nothing else."""
        return voc_palette(len(self.class_names) + 1)[1:]

    @property
    @abstractmethod
    def splits(self) -> Sequence[str]:
        """Names of the splits that are there: "train", "val" and perhaps others."""

    @abstractmethod
    def split(self, name: str) -> Sequence[BoxSample]:
        """The samples of one split, read or made when indexed; ValueError that names the existing splits otherwise."""
