"""Images with their objects as batches for Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from segdcn.data.batches import DataModule
from segdcn.data.dataset import Array
from segdcn.detection.box_files import BoxFiles
from segdcn.detection.samples import BoxSample, DetectionDataset, Objects
from segdcn.errors import UserError


class Item(TypedDict):
    """One sample for a detector; a batch holds a list of each.

    Shape: image float32 (3, H, W) in 0..1; target "boxes" float32 (M, 4) and "labels" int64 (M,), of those objects that
    are learned; index in the split, -1 for padding.
    """

    image: Tensor
    target: Mapping[str, Tensor]
    objects: Objects
    name: str
    index: int


def as_image(pixels: Array) -> Tensor:
    """Pixels uint8 (H, W, 3) as a detector takes them, float32 (3, H, W) in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255


def as_item(sample: BoxSample, flipped: bool, index: int) -> Item:
    """A sample as an item, mirrored left and right where asked."""
    image, objects, name = sample
    if flipped:
        boxes = objects.boxes.copy()
        boxes[:, [0, 2]] = image.shape[1] - boxes[:, [2, 0]]
        image, objects = image[:, ::-1], objects._replace(boxes=boxes)
    learned = ~objects.ignored
    return {
        "image": as_image(image),
        "target": {
            "boxes": torch.from_numpy(objects.boxes[learned]),
            "labels": torch.from_numpy(objects.labels[learned]),
        },
        "objects": objects,
        "name": name,
        "index": index,
    }


class TrainItems(Dataset[Item]):
    """Samples of which each is mirrored by chance, which depends on (seed, epoch, index) alone."""

    def __init__(self, samples: Sequence[BoxSample], flip: float, seed: int) -> None:
        self.samples, self.flip, self.seed = samples, flip, seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        flipped = np.random.default_rng((self.seed, epoch, index)).random() < self.flip
        return as_item(self.samples[index], bool(flipped), index)


class EvalItems(Dataset[Item]):
    """Samples as they are."""

    def __init__(self, samples: Sequence[BoxSample]) -> None:
        self.samples = samples

    def __getitem__(self, key: tuple[int, bool]) -> Item:
        index, padding = key
        return as_item(self.samples[index], False, -1 if padding else index)


class DetectionDataModule(DataModule):
    """A data set's splits as batches of lists: {"image", "target", "objects", "name", "index"}, see `Item`.

    Args:
        batch_size, eval_batch_size, num_workers, seed: see `DataModule`; images of a batch may differ in size.
        flip: probability of a horizontal flip.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int = 2,
        flip: float = 0.5,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        if not 0 <= flip <= 1:
            raise UserError(f"flip must be a probability in 0..1, got {flip}")
        super().__init__(dataset, batch_size, eval_batch_size, num_workers, seed)
        self.flip = flip

    def train_items(self, samples: Sequence[BoxSample]) -> TrainItems:
        """See `DataModule`."""
        return TrainItems(samples, self.flip, self.seed)

    def eval_items(self, samples: Sequence[BoxSample]) -> EvalItems:
        """See `DataModule`."""
        return EvalItems(samples)

    def image_names(self, samples: Sequence[BoxSample]) -> list[str]:
        """See `DataModule`."""
        return [image.name for image in samples.images] if isinstance(samples, BoxFiles) else []

    @staticmethod
    def collate(items: list[Item]) -> dict[str, list[Any]]:
        """See `DataModule`."""
        return {key: [item[key] for item in items] for key in Item.__annotations__}  # type: ignore[literal-required]
