"""Predictions as the files that the benchmarks' servers and official evaluators read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from segdcn.runs.files import write_png


class VocSubmission:
    """FOLDER/results/VOC2012/Segmentation/comp6_<split>_cls/NAME.png: palette PNGs whose indices are the classes.

    The layout that PASCAL VOC's development kit reads and its server takes as a tar of ``results`` (comp6: trained
    on any data, such as SBD's masks).

    Args:
        palette: RGB colours of the classes.
    """

    def __init__(self, folder: Path, split: str, palette: Sequence[Sequence[int]]) -> None:
        self.folder = folder / "results" / "VOC2012" / "Segmentation" / f"comp6_{split}_cls"
        self.palette = [value for colour in palette for value in colour]

    def __call__(self, name: str, prediction: Tensor) -> None:
        """Write one image's classes, uint8 (H, W)."""
        picture = Image.fromarray(prediction.numpy())
        picture.putpalette(self.palette)
        write_png(self.folder / f"{name}.png", picture)


class CityscapesSubmission:
    """FOLDER/NAME_labelIds.png: grey PNGs of Cityscapes' label ids, of which NAME is CITY_SEQ_FRAME.

    The server and cityscapesscripts look for exactly one CITY_SEQ_FRAME*.png per image.

    Args:
        label_ids: the label id of each class.
    """

    def __init__(self, folder: Path, label_ids: Sequence[int]) -> None:
        self.folder = folder
        self.label_ids = np.asarray(label_ids, np.uint8)

    def __call__(self, name: str, prediction: Tensor) -> None:
        """Write one image's classes, uint8 (H, W)."""
        write_png(self.folder / f"{name}_labelIds.png", Image.fromarray(self.label_ids[prediction.numpy()]))
