"""Images with their label maps as batches for Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from segdcn.data.batches import DataModule
from segdcn.data.crops import fitting_crop
from segdcn.data.dataset import IGNORE_INDEX, DataError, ImageMaskFiles, Sample, SegmentationDataset
from segdcn.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    TrainTransform,
)
from segdcn.errors import UserError


class Item(TypedDict):
    """One sample as tensors; a batch stacks them, with "name" a list of N strings.

    Shape: image float32 (3, H, W), normalised; label int64 (H, W).
    """

    image: Tensor
    label: Tensor
    name: str


class EvalItem(Item):
    """An item with its sample's index in the split, -1 for padding."""

    index: int


class TrainItems(Dataset[Item]):
    """Augmented samples; the augmentation depends on (seed, epoch, index) alone, never on the worker."""

    def __init__(self, samples: Sequence[Sample], transform: TrainTransform, seed: int) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        image, label, name = self.samples[index]
        seed = int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)[0])
        image_tensor, label_tensor = self.transform(image, label, seed)
        return {"image": image_tensor, "label": label_tensor, "name": name}


class EvalItems(Dataset[Item]):
    """Whole images; the label of a padding item is all 255, so that no metric and no loss counts it."""

    def __init__(self, samples: Sequence[Sample], transform: EvalTransform) -> None:
        self.samples, self.transform = samples, transform

    def __getitem__(self, key: tuple[int, bool]) -> EvalItem:
        index, padding = key
        image, label, name = self.samples[index]
        image_tensor, label_tensor = self.transform(image, label)
        if padding:
            label_tensor.fill_(IGNORE_INDEX)
        return {"image": image_tensor, "label": label_tensor, "name": name, "index": -1 if padding else index}


class SegmentationDataModule(DataModule):
    """A data set's splits as batches {"image", "label", "name"}.

    The Trainer must be made with `use_distributed_sampler=False`: this module shares the images out.

    Args:
        batch_size: training images per device.
        crop_size: see `TrainTransform`; "auto" is one that fits the images, see `fitting_crop`; whole images (None)
            have many sizes, so that each must be a batch of its own.
        scale, flip, photometric, mean, std, short_side, long_side, cat_max_ratio: see `TrainTransform`.
        eval_batch_size: images per device in validation and test, which see whole images; more than 1 needs
            images of one size.
        num_workers: loading processes per device and split; the batches are the same for any number.
        seed: of the order and the augmentation.

    Raises:
        ValueError: a value out of range; from the loaders, a missing split or one smaller than a batch; from a
            trainer, another number of processes than its devices and nodes, or than a resumed run had.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        batch_size: int = 8,
        crop_size: Sequence[int] | Literal["auto"] | None = "auto",
        scale: Sequence[float] = (0.5, 2.0),
        flip: float = 0.5,
        photometric: float = 0.3,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        short_side: int | None = None,
        long_side: int | None = None,
        cat_max_ratio: float | None = None,
    ) -> None:
        if crop_size is None and batch_size > 1:
            raise UserError(
                f"crop_size=null trains on whole images, which cannot share a batch of {batch_size}: set"
                f" datamodule.batch_size=1 and trainer.accumulate_grad_batches={batch_size}, or give a crop_size"
            )
        super().__init__(dataset, batch_size, eval_batch_size, num_workers, seed)
        if isinstance(crop_size, str):
            if crop_size != "auto":
                raise UserError(f"crop_size must be [height, width], auto or null, got {crop_size!r}")
            crop_size = fitting_crop(dataset.split("train"), short_side, long_side)
        self.train_transform = TrainTransform(
            crop_size, scale, flip, photometric, mean, std, short_side, long_side, cat_max_ratio
        )
        self.eval_transform = EvalTransform(mean, std)

    def train_items(self, samples: Sequence[Sample]) -> TrainItems:
        """See `DataModule`."""
        return TrainItems(samples, self.train_transform, self.seed)

    def eval_items(self, samples: Sequence[Sample]) -> EvalItems:
        """See `DataModule`."""
        return EvalItems(samples, self.eval_transform)

    def image_names(self, samples: Sequence[Sample]) -> list[str]:
        """See `DataModule`."""
        return [pair.name for pair in samples.pairs] if isinstance(samples, ImageMaskFiles) else []

    @staticmethod
    def collate(items: list[Item]) -> Any:
        """See `DataModule`; images of one size are stacked."""
        if len({item["image"].shape for item in items}) > 1:
            sizes = ", ".join(f"{item['name']} {'x'.join(map(str, item['image'].shape[1:]))}" for item in items)
            raise DataError(f"images of different size cannot share a batch ({sizes}): set eval_batch_size=1")
        return default_collate(items)
