"""From a sample to tensors; the only file that knows albumentations (its seeds, fills, dtypes, warnings)."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from segdcn.data.dataset import IGNORE_INDEX, Array
from segdcn.data.labels import count_labels
from segdcn.errors import UserError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import asks a server for its version
import albumentations as A  # type: ignore[import-untyped]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MIN_CROP = 32


class TrainTransform:
    """Resizing, random scale, crop, horizontal flip and colours, then normalisation and padding.

    Where the scaled image is smaller than the crop it is padded at a random position: the image with the mean
    colour (0 after normalisation), the label with 255.

    Args:
        crop_size: (height, width) of the output in pixels, at least 32 each; None for the whole scaled image,
            which is then neither cut nor padded.
        scale: (lowest, highest) factor of the image size, drawn uniformly.
        flip: probability of a horizontal flip.
        photometric: strength s in 0..1 of the colour changes, 0 for none: brightness, contrast and saturation
            are multiplied by 1-s to 1+s, and the hue is turned by up to s/5 of the colour circle.
        mean, std: per RGB channel, for pixel values in 0..1.
        short_side, long_side: the image size that ``scale`` multiplies: the shorter side has ``short_side`` pixels,
            less where the longer one would exceed ``long_side``; None for the image's own (long_side: no limit).
        cat_max_ratio: of up to 10 random crops the first is taken in which two classes or more are seen and none has
            this share of the labelled pixels, or else the last (as in mmsegmentation); None takes the first.
    """

    def __init__(
        self,
        crop_size: Sequence[int] | None,
        scale: Sequence[float] = (0.5, 2.0),
        flip: float = 0.5,
        photometric: float = 0.0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        short_side: int | None = None,
        long_side: int | None = None,
        cat_max_ratio: float | None = None,
    ) -> None:
        if crop_size is not None and (len(crop_size) != 2 or min(crop_size) < MIN_CROP):
            raise UserError(f"crop_size must be (height, width) of at least {MIN_CROP}, got {tuple(crop_size)}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise UserError(f"scale must be (lowest, highest) with 0 < lowest <= highest, got {tuple(scale)}")
        if not 0 <= flip <= 1:
            raise UserError(f"flip must be a probability in 0..1, got {flip}")
        if not 0 <= photometric <= 1:
            raise UserError(f"photometric must be a strength in 0..1, got {photometric}")
        if short_side is not None and short_side < MIN_CROP:
            raise UserError(f"short_side must be at least {MIN_CROP} pixels, got {short_side}")
        if long_side is not None and (short_side is None or long_side < short_side):
            raise UserError(f"long_side must be at least short_side, got {long_side} and {short_side}")
        if cat_max_ratio is not None and not 0 < cat_max_ratio < 1:
            raise UserError(f"cat_max_ratio must be above 0 and below 1 (null: any crop), got {cat_max_ratio}")
        if cat_max_ratio is not None and crop_size is None:
            raise UserError("cat_max_ratio chooses among crops, and crop_size=null makes none: give a crop_size")
        factors = (1 - photometric, 1 + photometric)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # albumentations only warns about argument names that it does not know
            steps: list[A.BasicTransform] = [
                _RandomScaledCrop(crop_size, (scale[0], scale[1]), short_side, long_side, cat_max_ratio),
                A.HorizontalFlip(p=flip),
                A.Normalize(mean=tuple(mean), std=tuple(std)),
            ]
            if crop_size is not None:
                steps.append(A.PadIfNeeded(*crop_size, position="random", fill=0, fill_mask=IGNORE_INDEX))
            if photometric:
                hue = (-photometric / 5, photometric / 5)
                steps.insert(2, A.ColorJitter(factors, factors, factors, hue, p=1.0))
            self.pipeline = A.Compose(steps)

    def __call__(self, image: Array, label: Array, seed: int) -> tuple[Tensor, Tensor]:
        """Transform one sample; the result depends on the arguments alone.

        Shape: (H, W, 3), (H, W) uint8 -> float32 (3, crop_h, crop_w), int64 (crop_h, crop_w); without a crop the
        size is that of the scaled image.
        """
        # Not Compose.set_random_seed: it gives each step a generator of its own with the same seed, so that
        # for example the flip would follow from the scale.
        self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = self.pipeline(image=image, mask=label)
        return to_tensors(result["image"], result["mask"])


class EvalTransform:
    """Normalisation only: the whole image at its native size; mean, std: per RGB channel, for pixel values in 0..1."""

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        self.normalize = A.Normalize(mean=self.mean, std=self.std)

    def __call__(self, image: Array, label: Array) -> tuple[Tensor, Tensor]:
        """Shape: (H, W, 3), (H, W) uint8 -> float32 (3, H, W), int64 (H, W)."""
        return to_tensors(self.normalize(image=image)["image"], label)

    def image(self, image: Array) -> Tensor:
        """An image without a label; uint8 (H, W, 3) -> float32 (3, H, W)."""
        return _image_tensor(self.normalize(image=image)["image"])


def single_threaded_worker(worker_id: int) -> None:
    """DataLoader's `worker_init_fn`: parallel workers must not start OpenCV threads of their own as well."""
    cv2.setNumThreads(0)


class _RandomScaledCrop(A.DualTransform):  # type: ignore[misc]
    """Scale by a random factor, then cut a random window of the crop's size; a smaller side stays whole.

    Done the other way round, which costs less and gives the same distribution: cut, then resize. The factor is of
    the size to which ``short_side`` and ``long_side`` would resize the image: both are one resize. ``cat_max_ratio``
    counts the pixels of windows that are not resized yet.
    """

    WINDOWS = 10

    def __init__(
        self,
        crop_size: Sequence[int] | None,
        scale: tuple[float, float],
        short_side: int | None,
        long_side: int | None,
        cat_max_ratio: float | None,
    ) -> None:
        super().__init__(p=1.0)
        self.crop_size = crop_size
        self.scale = scale
        self.short_side, self.long_side = short_side, long_side
        self.cat_max_ratio = cat_max_ratio

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        shape = params["shape"][:2]
        factor = self.py_random.uniform(*self.scale)
        if self.short_side is not None:
            resized = self.short_side / min(shape)
            factor *= resized if self.long_side is None else min(resized, self.long_side / max(shape))
        if self.crop_size is None:  # nothing of the image may be lost to rounding
            return {
                "window": (slice(None), slice(None)),
                "size": tuple(max(1, round(factor * side)) for side in shape),
            }
        size = [max(1, min(crop, round(factor * side))) for crop, side in zip(self.crop_size, shape, strict=True)]
        source = [max(1, min(side, round(target / factor))) for target, side in zip(size, shape, strict=True)]
        for _ in range(self.WINDOWS):
            starts = [self.py_random.randint(0, side - own) for own, side in zip(source, shape, strict=True)]
            window = tuple(slice(start, start + own) for start, own in zip(starts, source, strict=True))
            if self.cat_max_ratio is None or _is_mixed(data["mask"][window], self.cat_max_ratio):
                break
        return {"window": window, "size": tuple(size)}

    def apply(self, img: Array, window: tuple[slice, slice], size: tuple[int, int], **params: Any) -> Array:
        return _resize(img[window], size, cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: Array, window: tuple[slice, slice], size: tuple[int, int], **params: Any) -> Array:
        return _resize(mask[window], size, cv2.INTER_NEAREST_EXACT)  # INTER_NEAREST is half a pixel off


def _is_mixed(label: Array, ratio: float) -> bool:
    """Whether two classes or more are seen, none of which has this share of the labelled pixels."""
    counts = count_labels(label)[:IGNORE_INDEX]
    return bool(np.count_nonzero(counts) > 1 and counts.max() < ratio * counts.sum())


def _resize(array: Array, size: tuple[int, int], interpolation: int) -> Array:
    height, width = size
    return cv2.resize(array, (width, height), interpolation=interpolation).astype(np.uint8, copy=False)


def to_tensors(image: np.ndarray[Any, np.dtype[np.float32]], label: Array) -> tuple[Tensor, Tensor]:
    """An image and its labels as tensors: float32 (3, H, W), int64 (H, W)."""
    return _image_tensor(image), torch.from_numpy(np.ascontiguousarray(label)).long()


def _image_tensor(image: np.ndarray[Any, np.dtype[np.float32]]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
