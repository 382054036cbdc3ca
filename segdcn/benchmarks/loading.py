"""How many images per second the training pipeline prepares, beside the same steps in the naive order."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import albumentations as A  # type: ignore[import-untyped]
import cv2
import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segdcn.data.dataset import IGNORE_INDEX, Array, ImageMaskFiles, Sample
from segdcn.data.transforms import IMAGENET_MEAN, IMAGENET_STD, TrainTransform, single_threaded_worker, to_tensors

Prepare = Callable[[Array, Array, int], Any]


def measure(
    samples: ImageMaskFiles,
    crop_size: Sequence[int],
    scale: Sequence[float] = (0.5, 2.0),
    flip: float = 0.5,
    photometric: float = 0.0,
    workers: int = 1,
    seconds: float = 3.0,
    rounds: int = 5,
) -> dict[str, float]:
    """Time loaders of single training items, each for some seconds in turn within a round; medians over the rounds.

    - "pipeline": as training loads them.
    - "naive": decoded by Pillow, colours changed at full size, the whole image scaled, cropped last.
    - "naive_order": the same steps, decoded as in training: what is left is the effect of their order.
    - "decode", "decode_pillow": image and mask are read only, and the image by Pillow.

    All read the same files in the same order; the operating system has them in memory after a while. Masks are
    decoded alike everywhere.

    Args:
        crop_size, scale, flip, photometric: see `TrainTransform`.
        workers: loading processes; 0 loads in this process.
        seconds: measured time of each way and round.

    Returns:
        Images per second and worker, by the names above; "speedup", the median of pipeline / naive within a round.
    """
    settings = (crop_size, scale, flip, photometric)
    pipeline, naive, nothing = TrainTransform(*settings), naive_train_transform(*settings), _shape
    loaders = {
        "pipeline": _endless_loader(samples, pipeline, workers),
        "naive": _endless_loader(_PillowImages(samples), naive, workers),
        "naive_order": _endless_loader(samples, naive, workers),
        "decode": _endless_loader(samples, nothing, workers),
        "decode_pillow": _endless_loader(_PillowImages(samples), nothing, workers),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            # the first ones were prepared while another way was timed
            for _ in range(_PREFETCH * workers + 1):
                next(loader)
            start, count = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - start) < seconds:
                next(loader)
                count += 1
            rates[name].append(count / elapsed / max(1, workers))
    ratios = [one / other for one, other in zip(rates["pipeline"], rates["naive"], strict=True)]
    return {name: statistics.median(values) for name, values in rates.items()} | {"speedup": statistics.median(ratios)}


def _shape(image: Array, label: Array, seed: int) -> tuple[int, ...]:
    return label.shape


class _PillowImages(Sequence[Sample]):
    """The same samples with images decoded in the usual way."""

    def __init__(self, files: ImageMaskFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        pair = self.files.pairs[index]
        assert pair.mask is not None
        with Image.open(pair.image) as image:
            pixels = np.array(image.convert("RGB"))
        return Sample(pixels, self.files.label(pair.mask), pair.name)


_PREFETCH = 2  # items that each worker has ready


class _Items(Dataset[Any]):
    def __init__(self, samples: Sequence[Sample], prepare: Prepare) -> None:
        self.samples, self.prepare = samples, prepare

    def __getitem__(self, number: int) -> Any:
        image, label, _ = self.samples[number % len(self.samples)]
        return self.prepare(image, label, number)


def _endless_loader(samples: Sequence[Sample], prepare: Prepare, workers: int) -> Iterator[Any]:
    loader = DataLoader(
        _Items(samples, prepare),
        batch_size=None,
        sampler=itertools.count(),
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        worker_init_fn=single_threaded_worker,
    )
    return iter(loader)


def make_streets(root: Path, images: int = 8) -> Path:
    """Made-up 2048x1024 training images in Cityscapes' layout, for machines without the data; returns `root`.

    Blotches of several sizes with a little sensor noise: they show nothing, but compress about as far as
    photographs do, to PNGs of 2.6 MB, so that decoding takes its usual time.
    """
    for index in range(images):
        rng = np.random.default_rng(index)
        image = sum(
            cv2.resize(rng.normal(0, level, (cells, 2 * cells, 3)), (2048, 1024), interpolation=cv2.INTER_CUBIC)
            for cells, level in ((4, 40.0), (32, 15.0), (256, 6.0), (1024, 1.0))
        )
        ids = rng.choice([0, 4, 7, 8, 11, 17, 21, 23, 24, 26], (16, 32)).astype(np.uint8)
        label = cv2.resize(ids, (2048, 1024), interpolation=cv2.INTER_NEAREST)
        name = f"madeup_{index:06d}_000019"
        for file, array in (
            (f"leftImg8bit/train/madeup/{name}_leftImg8bit.png", np.clip(image + 100, 0, 255).astype(np.uint8)),
            (f"gtFine/train/madeup/{name}_gtFine_labelIds.png", label),
        ):
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(array)).save(path)
    return root


def naive_train_transform(
    crop_size: Sequence[int], scale: Sequence[float], flip: float, photometric: float
) -> Callable[[Array, Array, int], tuple[Tensor, Tensor]]:
    """The steps of `TrainTransform` in the order that comes to mind, to measure what its order saves.

    Colours at full size, then the whole image scaled, padded and at last cropped; the distribution is the same.
    """
    height, width = crop_size
    factors, hue = (1 - photometric, 1 + photometric), (-photometric / 5, photometric / 5)
    mean_colour = [round(255 * value) for value in IMAGENET_MEAN]
    pipeline = A.Compose(
        [
            *([A.ColorJitter(factors, factors, factors, hue, p=1.0)] if photometric else []),
            A.RandomScale((scale[0] - 1, scale[1] - 1), mask_interpolation=cv2.INTER_NEAREST_EXACT, p=1.0),
            A.PadIfNeeded(height, width, position="random", fill=mean_colour, fill_mask=IGNORE_INDEX),
            A.RandomCrop(height, width),
            A.HorizontalFlip(p=flip),
            A.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        ]
    )

    def transform(image: Array, label: Array, seed: int) -> tuple[Tensor, Tensor]:
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = pipeline(image=image, mask=label)
        return to_tensors(result["image"], result["mask"])

    return transform
