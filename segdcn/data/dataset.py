"""What every data set is: named classes with colours, and splits that are sequences of samples.

Legend for the whole package: N batch, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

IGNORE_INDEX = 255

Array = npt.NDArray[np.uint8]
Color = tuple[int, int, int]


class Sample(NamedTuple):
    """One labelled image.

    Shape: image uint8 (H, W, 3) RGB; label uint8 (H, W), 0..K-1 or 255 for ignored pixels.
    """

    image: Array
    label: Array
    name: str


class SegmentationDataset(Protocol):
    """A data set: K class names, K RGB colours, and its splits (indexing reads or makes one sample)."""

    @property
    def class_names(self) -> Sequence[str]:
        """K names; the position is the label."""
        ...

    @property
    def palette(self) -> Sequence[Color]:
        """K RGB colours, 0..255."""
        ...

    def split(self, name: str) -> Sequence[Sample]:
        """The samples of "train", "val" or "test"; ValueError that names the existing splits otherwise."""
        ...


class DataError(ValueError):
    """A data file that cannot be used; the message is one line that names it."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises its worker's error anew with the worker's whole traceback as the message.
        super().__init__(message.strip().rpartition("DataError: ")[2])


class ImageMaskPair(NamedTuple):
    """The files of one sample, and the name it gets."""

    image: Path
    mask: Path
    name: str


class ImageMaskFiles(Sequence[Sample]):
    """Pairs of image and mask files, read when indexed.

    Args:
        num_classes: K; a mask may hold 0..K-1 and 255.
        ignored: further labels of the files that mean "ignore" and are read as 255.
    """

    def __init__(self, pairs: Sequence[ImageMaskPair], num_classes: int, ignored: Sequence[int] = ()) -> None:
        self.pairs = list(pairs)
        self.num_classes = num_classes
        self.ignored = tuple(ignored)

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> ImageMaskFiles: ...

    def __getitem__(self, index: int | slice) -> Sample | ImageMaskFiles:
        if isinstance(index, slice):
            return ImageMaskFiles(self.pairs[index], self.num_classes, self.ignored)
        pair = self.pairs[index]
        image = read_image(pair.image)
        label = read_label(pair.mask, self.num_classes, self.ignored)
        if image.shape[:2] != label.shape:
            (h, w), (mask_h, mask_w) = image.shape[:2], label.shape
            turned = " (or apply the image's EXIF rotation to its pixels)" if (h, w) == (mask_w, mask_h) else ""
            raise DataError(
                f"{pair.image} is {h}x{w} pixels (height x width) but its mask {pair.mask} is"
                f" {mask_h}x{mask_w}: make the mask at the size of the image{turned}"
            )
        return Sample(image, label, pair.name)


def read_image(path: Path) -> Array:
    """Read an image file as 8-bit RGB; grey, palette, CMYK and 16-bit images are converted, alpha is dropped.

    The pixels are taken as stored: EXIF orientation is not applied, since masks are drawn for stored pixels.

    Shape: uint8 (H, W, 3).

    Raises:
        DataError: the file is missing, corrupt, truncated or of floating-point pixels.
    """
    image = _open(path)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips instead of scaling
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"{path} holds pixels outside 0..65535: save it as an 8-bit or 16-bit image")
        return np.repeat((grey // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise DataError(f"{path} holds floating-point pixels: save it as an 8-bit or 16-bit image")
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette with transparency warns when converted to RGB directly
    return np.array(image.convert("RGB"))


def read_label(path: Path, num_classes: int, ignored: Sequence[int] = ()) -> Array:
    """Read a mask file, whose pixels (palette indices or grey values) are the labels themselves.

    Shape: uint8 (H, W), 0..num_classes-1 or 255; the labels in `ignored` are read as 255.

    Raises:
        DataError: the file is missing, corrupt, truncated, in colours or lossy, or has a label out of range.
    """
    image = _open(path)
    if image.format == "JPEG":
        raise DataError(f"{path} is a JPEG, whose compression changes labels: save the mask as a PNG")
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise DataError(
            f"{path} is {image.mode}, not one channel: a mask holds class numbers (8-bit grey or palette"
            " PNG); map its colours to class numbers first"
        )
    stored = np.asarray(image)
    label = np.where(np.isin(stored, ignored), IGNORE_INDEX, stored) if ignored else stored
    wrong = np.unique(label[(label >= num_classes) & (label != IGNORE_INDEX)])
    if image.mode.startswith("I"):
        wrong = np.union1d(wrong, label[label < 0])
    if len(wrong):
        listed = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise DataError(
            f"{path} holds label {listed}: with {num_classes} classes a mask may hold 0..{num_classes - 1}"
            f" and {IGNORE_INDEX} (ignored)"
        )
    return label.astype(np.uint8)


def voc_palette(num_classes: int) -> list[Color]:
    """Distinct RGB colours by PASCAL VOC's rule: the number's bits go to R, G, B in turn, high bits first."""
    palette = []
    for index in range(num_classes):
        color = [0, 0, 0]
        for position in range(8):
            for channel in range(3):
                color[channel] |= (index >> (3 * position + channel) & 1) << (7 - position)
        palette.append((color[0], color[1], color[2]))
    return palette


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()  # decodes all pixels, so that a truncated file fails here
            return image
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as an image, it may be corrupt or truncated: {reason}") from error
