"""counts.npz: the pixel counts that a split's figures come from, so that they can be looked at and compared later."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segdcn import MissingFileError, UserError
from segdcn.runs.folder import is_passing, write_bytes

COUNTS_FILE = "counts.npz"  # beside metrics.json


@dataclass(frozen=True)
class Counts:
    """What was counted on N images with K classes.

    names: of the images, in the order of the split.
    class_names: K names.
    images: int64 (N, 3, K), each image's correct, true and predicted pixels of each class.
    confusion: int64 (K, K) over all images, rows truth and columns prediction.
    """

    names: Sequence[str]
    class_names: Sequence[str]
    images: Tensor
    confusion: Tensor

    @property
    def miou_of_images(self) -> Tensor:
        """Each image's own mIoU over the classes that it holds or is given, float64 (N,); NaN without a label.

        To find images that are worth looking at: the mean of these is no figure of the split.
        """
        correct, truth, predicted = self.images.double().unbind(dim=1)
        miou = (correct / (truth + predicted - correct)).nanmean(dim=1)
        return miou.where(truth.sum(dim=1) > 0, torch.nan)


def write_counts(path: Path, counts: Counts) -> None:
    """Write ``counts`` atomically; texts and numbers only, no pickle."""
    content = io.BytesIO()
    np.savez_compressed(
        content,
        names=np.array(list(counts.names), dtype=np.str_),
        class_names=np.array(list(counts.class_names), dtype=np.str_),
        images=counts.images.numpy(),
        confusion=counts.confusion.numpy(),
    )
    write_bytes(path, content.getvalue())


def read_counts(path: Path) -> Counts:
    """Read a counts.npz.

    Raises: FileNotFoundError, or ValueError when it is damaged or its parts do not fit; one line each.
    """
    if not path.is_file():
        raise MissingFileError(f"no pixel counts at {path}: segdcn-evaluate writes them")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names, class_names = ([str(name) for name in arrays[key]] for key in ("names", "class_names"))
            images, confusion = (torch.from_numpy(arrays[key].astype(np.int64)) for key in ("images", "confusion"))
    except Exception as error:  # a damaged archive raises many kinds: zip, zlib, key, value
        if is_passing(error):
            raise
        raise UserError(f"{path} cannot be read: it is damaged ({type(error).__name__}); evaluate again") from error
    n, k = len(names), len(class_names)
    if images.shape != (n, 3, k) or confusion.shape != (k, k):
        raise UserError(f"{path} does not fit together: {n} images, {k} classes, counts {tuple(images.shape)}")
    return Counts(names, class_names, images, confusion)
