"""What every data set is: named classes with colours, and splits that are sequences of samples.

Legend for the whole package: N batch, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

import cv2
import numpy as np
import numpy.typing as npt
from PIL import UnidentifiedImageError

from segdcn.data.decoding import Array as Array
from segdcn.data.decoding import ColoursError, UnreadableError, colours, numbers, photograph
from segdcn.data.memory import free_memory
from segdcn.errors import UserError, is_lasting

IGNORE_INDEX = 255
MOST_STORED = 1 << 16  # numbers of a mask file; labels are 8-bit
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

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.args = (printable(str(self)),)


class MaskColoursError(DataError):
    """A mask whose colours have no class, or whose kind is not the one that was to be read.

    It is of how a data set is set up, not of one file, so that a training is refused before it begins.
    """


class ImageMaskPair(NamedTuple):
    """The files of one sample, and the name it gets; without a mask (a benchmark's test split) all is ignored."""

    image: Path
    mask: Path | None
    name: str


class ImageMaskFiles(Sequence[Sample]):
    """Pairs of image and mask files, read when indexed.

    Args:
        num_classes: K; a mask may hold 0..K-1 and 255.
        mapping: what further labels of the files mean, or what the files' own numbers are here, e.g. {7: 0, 4: 255};
            {255: 1} makes a class of the number that else is ignored.
        bits: how many of a 16-bit image's bits are used: 12 scales 4095 to 255; None is all 16.
        read_mask: a mask file as its labels, uint8 (H, W), such as a `ColourTable`; None is `read_label`, which takes
            the file's numbers.

    Raises:
        ValueError: a mapping or bits that cannot be.
    """

    def __init__(
        self,
        pairs: Sequence[ImageMaskPair],
        num_classes: int,
        mapping: Mapping[int, int] | None = None,
        bits: int | None = None,
        read_mask: Callable[[Path], Array] | None = None,
    ) -> None:
        self.pairs = list(pairs)
        self.num_classes = num_classes
        self.mapping = checked_mapping(mapping, num_classes)
        self.bits = checked_bits(bits)
        self.read_mask = read_mask

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> ImageMaskFiles: ...

    def __getitem__(self, index: int | slice) -> Sample | ImageMaskFiles:
        if isinstance(index, slice):
            return ImageMaskFiles(self.pairs[index], self.num_classes, self.mapping, self.bits, self.read_mask)
        pair = self.pairs[index]
        image, name = read_image(pair.image, self.bits), printable(pair.name)
        if pair.mask is None:
            return Sample(image, np.full(image.shape[:2], IGNORE_INDEX, np.uint8), name)
        label = self.label(pair.mask)
        if image.shape[:2] != label.shape:
            (h, w), (mask_h, mask_w) = image.shape[:2], label.shape
            turned = " (or apply the image's EXIF rotation to its pixels)" if (h, w) == (mask_w, mask_h) else ""
            raise DataError(
                f"{pair.image} is {h}x{w} pixels (height x width) but its mask {pair.mask} is"
                f" {mask_h}x{mask_w}: make the mask at the size of the image{turned}"
            )
        return Sample(image, label, name)

    def label(self, mask: Path) -> Array:
        """The labels of a mask file, uint8 (H, W)."""
        return read_label(mask, self.num_classes, self.mapping) if self.read_mask is None else self.read_mask(mask)


def read_image(path: Path, bits: int | None = None, upright: bool = False) -> Array:
    """Read an image file as 8-bit RGB; grey, palette, CMYK and 16-bit images are converted, alpha is dropped.

    The pixels are taken as stored: EXIF orientation is not applied, since masks are drawn for stored pixels.

    Args:
        bits: see `ImageMaskFiles`.
        upright: apply EXIF orientation.

    Shape: uint8 (H, W, 3).

    Raises:
        DataError: the file is missing, corrupt, truncated, too large for the free memory, of several pages, of
            floating-point pixels or of bands that RGB has no place for.
    """
    with file_errors(path):
        return photograph(file_bytes(path), bits, upright)


def read_label(path: Path, num_classes: int, mapping: Mapping[int, int] | None = None) -> Array:
    """Read a mask file, whose pixels (palette indices or grey values, of any depth) are the labels themselves.

    Shape: uint8 (H, W), 0..num_classes-1 or 255, after `mapping` (see `ImageMaskFiles`).

    Raises:
        DataError: the file is missing, corrupt, truncated, in colours or lossy, or has a label out of range.
    """
    stored = read_numbers(path)
    table, allowed = _label_table(num_classes, tuple((mapping or {}).items()))
    if stored.dtype == np.uint8:
        label = np.asarray(cv2.LUT(stored, table[:256]), np.uint8)
        good = np.asarray(cv2.LUT(stored, allowed[:256].view(np.uint8))) > 0
    else:
        inside = (stored >= 0) & (stored < MOST_STORED)
        within = np.where(inside, stored, 0)
        label, good = table[within], allowed[within] & inside
    if not good.all():
        wrong = np.unique(stored[~good]).tolist()
        listed = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise DataError(
            f"{path} holds label {listed}: with {num_classes} classes a mask may hold"
            f" {ranges(np.flatnonzero(allowed).tolist())}{' (ignored)' if table[IGNORE_INDEX] == IGNORE_INDEX else ''}"
        )
    return label


def read_numbers(path: Path) -> npt.NDArray[Any]:
    """The numbers that a file of one channel stores, (H, W), whatever they mean; DataError where there are none."""
    with file_errors(path):
        return numbers(file_bytes(path))


def read_colours(path: Path, lossy: bool = False) -> Array:
    """The colours that a mask file stores, uint8 (H, W, 3); DataError where there are none.

    lossy: whether a JPEG is taken, whose colours are about what they were.
    """
    with file_errors(path):
        return colours(file_bytes(path), lossy)


def checked_mapping(mapping: Mapping[int, int] | None, num_classes: int) -> dict[int, int]:
    """A mapping of `ImageMaskFiles`; ValueError where it is none."""
    mapping = {} if mapping is None else mapping
    labels = {*range(num_classes), IGNORE_INDEX}
    if not isinstance(mapping, Mapping) or not all(
        type(stored) is int and 0 <= stored < MOST_STORED and type(label) is int and label in labels
        for stored, label in mapping.items()
    ):
        raise UserError(
            f"mapping must give numbers of the masks (0..{MOST_STORED - 1}) their labels (0..{num_classes - 1}, or"
            f" {IGNORE_INDEX} to ignore them), such as {{255: 1}}, got {mapping}"
        )
    return dict(mapping)


def checked_bits(bits: int | None) -> int | None:
    """The bits of `ImageMaskFiles`; ValueError where they are none."""
    if bits is not None and (type(bits) is not int or not 1 <= bits <= 16):
        raise UserError(f"bits must be 1 to 16, those of a 16-bit image that are used, or null for all, got {bits}")
    return bits


def checked_names(class_names: Sequence[object]) -> tuple[str, ...]:
    """Class names as texts: numbers are taken as they are typed.

    Raises: ValueError unless they are 2 to 255 different ones.
    """
    names = () if isinstance(class_names, str) else tuple(class_names)
    texts = tuple(map(str, names))
    typed = all(isinstance(name, str | int | float) and not isinstance(name, bool) and str(name) for name in names)
    if not typed or not 2 <= len(texts) <= 255 or len(set(texts)) != len(texts):
        raise UserError(
            "class_names must be 2 to 255 different names, background included, as in [background,cat]"
            f" (true, false and null in quotes), got {class_names if isinstance(class_names, str) else list(names)}"
        )
    return texts


def checked_palette(palette: Sequence[Sequence[int]] | None, num_classes: int) -> list[Color]:
    """One RGB colour per class; None gives those of `voc_palette`. ValueError for others than that."""
    if palette is None:
        return voc_palette(num_classes)
    colors = []
    for color in palette:
        if len(color) != 3 or not all(0 <= value <= 255 for value in color):
            raise UserError(f"a palette colour must be three numbers 0..255, got {list(color)}")
        red, green, blue = color
        colors.append((int(red), int(green), int(blue)))
    if len(colors) != num_classes:
        raise UserError(f"palette must hold one colour per class: {num_classes} classes, got {len(colors)} colours")
    return colors


def read_list(path: Path) -> str:
    """The text of a file that lists names: UTF-8, or whatever bytes the files' names are of."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise _as_data_error(path, error) from error
    if "\0" in text:
        raise DataError(f"{path} is no text in UTF-8 (perhaps UTF-16): save it as UTF-8")
    return text


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of such a file that are not empty, without blanks at their ends, each with its number from 1."""
    for number, line in enumerate(read_list(path).splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def printable(text: str) -> str:
    """On one line, in characters: line breaks, and bytes of a file name that are not UTF-8, are written as escapes."""
    if text.isprintable():
        return text
    odd = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, separators of lines and paragraphs
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in odd else c for c in text)


def listed(folder: Path) -> list[tuple[Path, bool]]:
    """What is in a folder by name, without hidden files; and whether each is a folder itself, or linked to one.

    Raises: DataError where the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise _as_data_error(folder, error) from error
    found = []
    for entry in sorted(visible, key=lambda entry: entry.name):
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link to itself; who reads it says so
            is_folder = False
        found.append((folder / entry.name, is_folder))
    return found


def spread_over(total: int, count: int | None, without: Sequence[int] = ()) -> list[int]:
    """``count`` of ``total`` places (None: all) at equal distances, less those of them that are in ``without``."""
    wanted = total if count is None else min(count, total)
    return [place for place in (number * total // wanted for number in range(wanted)) if place not in without]


DARK = 63  # of 255: the most that 14 or fewer of 16 bits give


def is_dark(image: Array) -> bool:
    """Whether an image is nearly black, uint8 (H, W, 3)."""
    return int(image.max()) <= DARK


def dark_note(how_many: str, first: str) -> str:
    """What to say of nearly black images."""
    return (
        f"{how_many} have no pixel above {DARK} of 255 (the first: {first}), like 12-bit data in 16-bit files: if they"
        " are, train with dataset.bits=12, or save them with pixels up to 65535"
    )


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


def passed_over(files: Sequence[Path]) -> str:
    """How many files of which suffixes: "3 files passed over: .heic (2), .txt (1)"."""
    counted = Counter(path.suffix.lower() or "no suffix" for path in files)
    most_first = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{printable(suffix)} ({number:,})" for suffix, number in most_first)
    return f"{len(files):,} file{'' if len(files) == 1 else 's'} passed over: {listed}"


def few(names: Iterable[str]) -> str:
    """How many files, and the first three names, for an error of one line."""
    names = sorted(names)
    return f"{len(names)} file(s) ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 255] as "0..2 and 255"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return " and ".join(str(a) if a == b else f"{a}..{b}" for a, b in zip(starts, ends, strict=True))


@functools.cache
def _label_table(num_classes: int, mapping: tuple[tuple[int, int], ...]) -> tuple[Array, npt.NDArray[np.bool_]]:
    """For each number of a mask: its label, and whether the mask may hold it."""
    table, allowed = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, bool)
    table[:256] = np.arange(256)
    allowed[:num_classes] = allowed[IGNORE_INDEX] = True
    for stored, label in mapping:
        table[stored] = label
        allowed[stored] = True
    return table, allowed


@contextlib.contextmanager
def file_errors(name: object) -> Iterator[None]:
    """Whatever goes wrong while a file is decoded becomes a DataError, one line that begins with its name."""
    try:
        yield
    except DataError:
        raise
    except UnreadableError as error:
        raise (MaskColoursError if isinstance(error, ColoursError) else DataError)(f"{name} {error}") from None
    except MemoryError:
        raise DataError(f"{name} is too large for the memory that is free") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = (
            "not a known image format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        )
        raise DataError(
            f"{name} cannot be read as an image, it may be corrupt or truncated: {reason or type(error).__name__}"
        ) from error


def file_bytes(path: Path) -> bytes:
    """What a file holds; DataError where it is none, cannot be read, or is larger than the free memory."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise DataError(f"{path} is a {'folder' if stat.S_ISDIR(status.st_mode) else 'device'}, not a file")
        free = free_memory() if status.st_size > 1 << 28 else None
        if free is not None and status.st_size > free:
            raise DataError(f"{path} is too large: {status.st_size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} {'is a link to nothing' if path.is_symlink() else 'does not exist'}") from None
    except OSError as error:
        raise _as_data_error(path, error) from error


def _as_data_error(path: Path, error: OSError) -> Exception:
    """A path that cannot be read, or the failure of a disk as it is: another moment it may be read."""
    return DataError(f"{path} cannot be read: {error.strerror}") if is_lasting(error) else error
