"""What every data set is: named classes with colours, and splits that are sequences of samples.

Legend for the whole package: N batch, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, overload

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from segdcn import UserError

try:
    import pyspng
except ImportError:  # no wheel for this Python: OpenCV decodes PNGs as well, in half as much time again
    pyspng = None

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
    """A data set: K class names, K RGB colours, and its splits (indexing reads or makes one sample).

    A data set of your own is one class like this; files that come in pairs can be an `ImageMaskFiles`. segdcn-analyze
    asks for two things more, which may be missing: `object_classes`, the names of the classes that one can count (else
    all but "background"), and `instances(split)`, None or an `InstanceMaps` (else pieces of the label map).
    """

    @property
    def class_names(self) -> Sequence[str]:
        """K names; the position is the label."""
        ...

    @property
    def palette(self) -> Sequence[Color]:
        """K RGB colours, 0..255."""
        ...

    @property
    def splits(self) -> Sequence[str]:
        """Names of the splits that are there: "train", "val" and perhaps others."""
        ...

    def split(self, name: str) -> Sequence[Sample]:
        """The samples of one split; ValueError that names the existing splits otherwise."""
        ...


class DataError(UserError):
    """A data file that cannot be used; the message is one line that names it."""


class ImageMaskPair(NamedTuple):
    """The files of one sample, and the name it gets; without a mask (a benchmark's test split) all is ignored."""

    image: Path
    mask: Path | None
    name: str


class ImageMaskFiles(Sequence[Sample]):
    """Pairs of image and mask files, read when indexed.

    Args:
        num_classes: K; a mask may hold 0..K-1 and 255.
        mapping: what further labels of the files mean, or what the files' own numbers are here, e.g. {7: 0, 4: 255}.
    """

    def __init__(
        self, pairs: Sequence[ImageMaskPair], num_classes: int, mapping: Mapping[int, int] | None = None
    ) -> None:
        self.pairs = list(pairs)
        self.num_classes = num_classes
        self.mapping = dict(mapping or {})

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> ImageMaskFiles: ...

    def __getitem__(self, index: int | slice) -> Sample | ImageMaskFiles:
        if isinstance(index, slice):
            return ImageMaskFiles(self.pairs[index], self.num_classes, self.mapping)
        pair = self.pairs[index]
        image = read_image(pair.image)
        if pair.mask is None:
            return Sample(image, np.full(image.shape[:2], IGNORE_INDEX, np.uint8), pair.name)
        label = read_label(pair.mask, self.num_classes, self.mapping)
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
    data = _read_bytes(path)
    fast = _decode_plain(data)
    if fast is not None:
        return fast
    image = _decode(path, data)
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


def read_label(path: Path, num_classes: int, mapping: Mapping[int, int] | None = None) -> Array:
    """Read a mask file, whose pixels (palette indices or grey values) are the labels themselves.

    Shape: uint8 (H, W), 0..num_classes-1 or 255, after `mapping` (see `ImageMaskFiles`).

    Raises:
        DataError: the file is missing, corrupt, truncated, in colours or lossy, or has a label out of range.
    """
    image = _decode(path, _read_bytes(path))
    if image.format == "JPEG":
        raise DataError(f"{path} is a JPEG, whose compression changes labels: save the mask as a PNG")
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise DataError(
            f"{path} is {image.mode}, not one channel: a mask holds class numbers (8-bit grey or palette"
            " PNG); map its colours to class numbers first"
        )
    table = np.arange(256, dtype=np.uint8)
    for stored_label, label in (mapping or {}).items():
        table[stored_label] = label
    unknown = (table >= num_classes) & (table != IGNORE_INDEX)
    wide = np.asarray(image)
    stored = wide.astype(np.uint8, copy=False)
    wrong = np.unique(stored[cv2.LUT(stored, unknown.astype(np.uint8)) > 0]) if unknown.any() else np.array([])
    if image.mode.startswith("I") and ((wide < 0) | (wide > 255)).any():
        wrong = np.unique(wide[(wide < 0) | (wide > 255)])
    if len(wrong):
        listed = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise DataError(
            f"{path} holds label {listed}: with {num_classes} classes a mask may hold"
            f" {_ranges(np.flatnonzero(~unknown).tolist())} (ignored)"
        )
    return np.asarray(cv2.LUT(stored, table), np.uint8)


def check_count(what: str, found: int, published: int) -> None:
    """Warn when a split of a published data set has another number of images than its authors say.

    Copies under a tenth of the size are somebody's miniature, and not spoken of.
    """
    if found != published and found > published // 10:
        warnings.warn(
            f"{what} has {found:,} images, the published data set {published:,}: figures will not compare", stacklevel=3
        )


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


def few(names: Iterable[str]) -> str:
    """How many files, and the first three names, for an error of one line."""
    names = sorted(names)
    return f"{len(names)} file(s) ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 255] as "0..2 and 255"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return " and ".join(str(a) if a == b else f"{a}..{b}" for a, b in zip(starts, ends, strict=True))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _decode(path: Path, data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # decodes all pixels, so that a truncated file fails here
            return image
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = (
            "not a known image format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        )
        raise DataError(
            f"{path} cannot be read as an image, it may be corrupt or truncated: {reason or type(error).__name__}"
        ) from error


def _decode_plain(data: bytes) -> Array | None:
    """Whole 8-bit grey or colour PNGs and JPEGs by decoders faster than Pillow, with the same pixels; or None.

    Which files those are is read here, since these decoders convert the other kinds in ways of their own and may
    return what there is of a damaged file. (Pixels of JPEGs are equal as long as both OpenCV and Pillow are built
    with libjpeg-turbo, as their wheels are; other builds may differ by a level or two.)
    """
    png = _is_plain_png(data)
    if not png and not _is_plain_jpeg(data):
        return None
    try:
        if png and pyspng is not None:
            return np.asarray(pyspng.load(data, format="RGB"), np.uint8)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except (RuntimeError, cv2.error):
        return None
    return None if image is None else np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def _is_plain_png(data: bytes) -> bool:
    """8-bit grey or RGB, and every chunk whole by its checksum, up to the end mark."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or data[24:26] not in (b"\x08\x00", b"\x08\x02"):
        return False
    view, start = memoryview(data), 8
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return False
        if data[start + 4 : start + 8] == b"IEND":
            return True
        start = end + 4
    return False


def _is_plain_jpeg(data: bytes) -> bool:
    """8 bits in one or three channels (not CMYK), and an end mark."""
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(b"\xff\xd9"):
        return False
    start = 2
    while start + 10 <= len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame header
            return data[start + 4] == 8 and data[start + 9] in (1, 3)
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return False
