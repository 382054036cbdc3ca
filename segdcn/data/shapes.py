"""The embedded data set: generated in code from a seed, no files, no download.

Every object is one of five kinds that share colours and texture and differ in outline alone; each is rotated, drawn
at its own scale, stretched and warped non-rigidly. To name a pixel inside an object, a network has to reach the
outline around it, wherever that lies: geometry is what there is to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar, overload

import cv2
import numpy as np
from numpy.typing import NDArray

from segdcn.data.dataset import Sample
from segdcn.errors import UserError

SIZE = 96
SPLITS = ("train", "val", "test")

# Settled on the val split, then frozen: changing one of these changes what every figure on this data set means.
RADIUS = (20.0, 44.0)  # of an object, in pixels
WARP = 0.12  # strength of the non-rigid warp, in radii
DARK, BRIGHT = (20.0, 100.0), (130.0, 230.0)  # levels of background and objects: finding an object is easy


OneSample = TypeVar("OneSample")


class DrawnWhenAsked(Sequence[OneSample]):
    """``size`` samples, each of which ``draw`` makes when it is first asked for, and which is then kept in memory."""

    def __init__(self, size: int, draw: Callable[[int], OneSample]) -> None:
        self._numbers, self._draw = range(size), draw
        self._kept: dict[int, OneSample] = {}  # functools.cache could not be sent to a loading process

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> OneSample: ...

    @overload
    def __getitem__(self, index: slice) -> list[OneSample]: ...

    def __getitem__(self, index: int | slice) -> OneSample | list[OneSample]:
        if isinstance(index, slice):
            return [self[number] for number in self._numbers[index]]
        number = self._numbers[index]
        if number not in self._kept:
            self._kept[number] = self._draw(number)
        return self._kept[number]


class Generated(Generic[OneSample]):
    """Splits of images that are drawn, of which a subclass draws each.

    Their random streams are their own, (seed, split, index), so they have no image in common and the first images of a
    split stay the same whatever the split's size.

    name: of the data set, for messages.
    """

    name: str
    splits: Sequence[str] = SPLITS

    def __init__(self, train_images: int = 1600, val_images: int = 400, test_images: int = 400, seed: int = 0) -> None:
        if min(train_images, val_images, test_images, seed) < 0:
            raise UserError(
                "train_images, val_images, test_images and seed must be at least 0, got"
                f" {train_images}, {val_images}, {test_images} and {seed}"
            )
        self.seed = seed
        sizes = zip(SPLITS, (train_images, val_images, test_images), strict=True)
        self._splits = {split: DrawnWhenAsked(size, partial(self._drawn, split)) for split, size in sizes}

    def split(self, name: str) -> Sequence[OneSample]:
        """The samples of ``train``, ``val`` or ``test``."""
        if name not in SPLITS:
            raise UserError(f"{self.name} has the splits {', '.join(SPLITS)}, not {name!r}")
        return self._splits[name]

    def _drawn(self, split: str, number: int) -> OneSample:
        return self._draw(np.random.default_rng((self.seed, SPLITS.index(split), number)), f"{split}_{number:04d}")

    def _draw(self, rng: np.random.Generator, name: str) -> OneSample:
        raise NotImplementedError


class Shapes(Generated[Sample]):
    """Images of 96x96 pixels with one or two objects over texture and clutter; class 0 is the background.

    Drawn in some 2 ms each, see `Generated`.
    """

    name = "shapes"
    class_names: Sequence[str] = ("background", "disc", "ring", "cross", "star", "crescent")
    palette: Sequence[tuple[int, int, int]] = (
        (40, 40, 48),
        (230, 97, 1),
        (94, 60, 153),
        (26, 152, 80),
        (253, 200, 50),
        (69, 160, 220),
    )

    def _draw(self, rng: np.random.Generator, name: str) -> Sample:
        image = texture(rng, DARK)
        for _ in range(rng.integers(1, 4)):
            draw_line(rng, image)
        label = np.zeros((SIZE, SIZE), np.uint8)
        for _ in range(rng.integers(1, 3)):
            kind = int(rng.integers(1, len(self.class_names)))
            inside = silhouette(kind, *warped_plane(rng))
            image[inside] = texture(rng, BRIGHT)[inside]
            label[inside] = kind
        noisy = cv2.GaussianBlur(image, (3, 3), 0.6) + rng.normal(0, 6, image.shape)
        return Sample(noisy.clip(0, 255).astype(np.uint8), label, name)


def texture(rng: np.random.Generator, levels: tuple[float, float], size: int = SIZE) -> NDArray[np.float32]:
    """A random colour with soft blotches, (size, size, 3)."""
    colour = rng.uniform(*levels, 3)
    return (colour + blotches(rng, size)).astype(np.float32)


def blotches(rng: np.random.Generator, size: int = SIZE) -> NDArray[np.float64]:
    """Soft deviations from a colour, (size, size, 3)."""
    noise = _smooth_noise(rng, int(rng.integers(3, 12)), size)
    return np.asarray(15 * noise[..., None] * rng.uniform(0.3, 1, 3))


def _smooth_noise(rng: np.random.Generator, cells: int, size: int) -> NDArray[np.float32]:
    coarse = rng.normal(0, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC).astype(np.float32)


def draw_line(rng: np.random.Generator, image: NDArray[np.float32]) -> None:
    """Draw a line of clutter into a square image."""
    start, end = rng.integers(0, len(image), (2, 2)).tolist()
    cv2.line(image, start, end, rng.uniform(20, 230, 3).tolist(), int(rng.integers(1, 3)), cv2.LINE_AA)


def warped_plane(
    rng: np.random.Generator,
    size: int = SIZE,
    radius: tuple[float, float] = RADIUS,
    margin: float = 0.25,
    stretch: float = 0.35,
    cells: int = 5,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The coordinates (u, v) of each pixel in an object's own units, seen through a random non-rigid warp.

    Args:
        radius: least and greatest length of the unit, in pixels.
        margin: how far from the image's border the centre is at least, as a share of its size.
        stretch: the greatest logarithm of an axis' length.
        cells: of the warp, along a side; the more, the finer it is.

    Shape: (size, size) each.
    """
    unit = np.exp(rng.uniform(np.log(radius[0]), np.log(radius[1])))
    centre_y, centre_x = rng.uniform(margin * size, (1 - margin) * size, 2)
    angle, scale = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-stretch, stretch))
    y, x = np.mgrid[:size, :size].astype(np.float32)
    y, x = (y - centre_y) / unit, (x - centre_x) / unit
    y = y + WARP * _smooth_noise(rng, cells, size)
    x = x + WARP * _smooth_noise(rng, cells, size)
    u = (np.cos(angle) * x + np.sin(angle) * y) * scale
    v = (np.cos(angle) * y - np.sin(angle) * x) / scale
    return u, v


def silhouette(kind: int, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which points of the plane an object of a kind, 1 to 5, covers."""
    distance = np.hypot(u, v)
    if kind == 1:
        inside = distance < 0.85
    elif kind == 2:
        inside = (distance > 0.5) & (distance < 1)
    elif kind == 3:
        inside = (np.minimum(np.abs(u), np.abs(v)) < 0.3) & (np.maximum(np.abs(u), np.abs(v)) < 1)
    elif kind == 4:
        inside = distance < 0.65 + 0.4 * np.cos(5 * np.arctan2(v, u))
    else:
        inside = (distance < 1) & (np.hypot(u - 0.55, v) > 0.75)
    return np.asarray(inside)
