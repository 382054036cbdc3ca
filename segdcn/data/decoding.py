"""The bytes of an image file as an array: a photograph as 8-bit RGB, a mask as the numbers or colours it stores.

What cannot be read whole is refused: no page, band or bit of a file is dropped in silence, but for alpha.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from segdcn.data.memory import free_memory

try:
    import pyspng
except ImportError:  # no wheel for this Python: OpenCV decodes PNGs as well, in half as much time again
    pyspng = None

# Its limit of 179 megapixels is below what a sliding window takes; an image's size is held against the free memory here
Image.MAX_IMAGE_PIXELS = None

Array = npt.NDArray[np.uint8]

# Bytes a pixel that reading takes at its peak, as measured: by OpenCV or pyspng; by Pillow, with its copies
_FAST, _GREY, _COLOURS = 6, 6, 15
_SMALL = 1 << 28  # bytes; nobody asks whether so many are free

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 0x0112  # EXIF's tag
_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA, _FORMAT = 254, 258, 262, 277, 338, 339  # TIFF's tags
_COLOUR_BANDS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # by photometric interpretation


class UnreadableError(ValueError):
    """Why a file is not read; the message is the rest of a line that begins with the file's name."""


class ColoursError(UnreadableError):
    """A mask of colours where one of numbers was to be read, or of colours that cannot be relied on."""


def photograph(data: bytes, bits: int | None = None, upright: bool = False) -> Array:
    """The pixels of an image file as 8-bit RGB; grey, palette, CMYK and 16-bit ones are converted, alpha is dropped.

    Args:
        bits: how many of a 16-bit image's bits are used: 12 scales 4095 to 255; None is all 16.
        upright: turned as EXIF orientation asks; else as stored.

    Shape: uint8 (H, W, 3).

    Raises:
        UnreadableError: a kind that cannot be read whole, or too large for the free memory.
        Exception: any that Pillow's decoders raise for damaged data.
    """
    size = _plain_size(data)
    if size is not None:
        check_fits(*size, _FAST)
        if (fast := _decode_plain(data)) is not None:
            return turned(fast, _orientation(data)) if upright else fast
    image, stored_bits, orientation, by_pillow = _load(data)
    if bits not in (None, 16) and stored_bits == 16 and image.mode in ("RGB", "RGBA"):
        pixels = to_8_bits(_wide_colours(data, image), bits)
    else:
        pixels = rgb(image, bits)
    if by_pillow == upright:
        return pixels
    return turned(pixels, orientation if upright else _INVERSE.get(orientation, orientation))


def numbers(data: bytes) -> npt.NDArray[Any]:
    """The numbers that a mask file stores, (H, W), whatever its bit depth: palette indices or grey values.

    Raises: UnreadableError, or what Pillow raises; see `photograph`.
    """
    image, bits, orientation, by_pillow = _load(data)
    if image.format in ("JPEG", "MPO"):
        raise UnreadableError("is a JPEG, whose compression changes labels: save the mask as a PNG")
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise ColoursError(
            f"is {image.mode}, not one channel{_colours_seen(image)}: say which class each colour is by"
            " 'dataset.colours={NAME:[RED,GREEN,BLUE],...}' or ROOT/labelmap.txt (dataset=folder), or save class"
            " numbers (8-bit grey or palette PNG)"
        )
    plain = image.format in ("BMP", "PPM") and bits == 8 and image.mode != "1"  # Pillow changes their other kinds
    if image.format not in ("PNG", "TIFF", "GIF") and not plain:
        raise UnreadableError(
            f"is a {image.format} whose numbers cannot be read as they are stored: save the mask as a PNG"
        )
    stored = np.asarray(image)
    if image.mode == "1":
        stored = stored.astype(np.uint8)
    if image.mode == "L" and bits < 8:  # Pillow spreads 0..3 and 0..15 over 0..255
        stored = stored // np.uint8(255 // (2**bits - 1))
    if bits <= 8 and _zero_is_white(image):
        stored = np.uint8(2**bits - 1) - stored  # undone: Pillow shows 0 as 255
    return turned(stored, _INVERSE.get(orientation, orientation)) if by_pillow else stored


def colours(data: bytes, lossy: bool = False) -> Array:
    """The colours that a mask file stores, as 8-bit RGB: of RGB and palette files, and of grey ones as greys.

    Args:
        lossy: take JPEGs, and others that change colours.

    Shape: uint8 (H, W, 3).

    Raises:
        ColoursError: a JPEG where ``lossy`` is false, transparent pixels, 16 bits.
        Exception: see `photograph`.
    """
    size = _plain_size(data)
    if size is not None and (lossy or data.startswith(_PNG)):
        check_fits(*size, _FAST)
        if (fast := _decode_plain(data)) is not None:
            return fast
    image, bits, orientation, by_pillow = _load(data)
    if image.format not in ("PNG", "TIFF", "GIF", "BMP", "PPM") and not lossy:
        raise ColoursError(
            f"is a {image.format}, whose compression changes colours: save the mask as a PNG from where it was drawn,"
            " or add dataset.colour_tolerance=20, and each pixel takes the nearest colour within 20 of 255"
        )
    deep = bits > 8 and image.format != "BMP"  # whose bits are those of a pixel
    if deep or image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        raise ColoursError(
            f"holds {image.mode} pixels of {bits} bits, no colours of a mask: save it as an 8-bit RGB PNG"
        )
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ColoursError("has transparent pixels, whose class nobody can tell: save the mask without transparency")
    pixels = rgb(image)
    return turned(pixels, _INVERSE.get(orientation, orientation)) if by_pillow else pixels


def _colours_seen(image: Image.Image) -> str:
    """A few of the colours that most pixels have, as the end of a phrase."""
    if image.mode == "F":
        return ""
    found = image.convert("RGB").getcolors(1 << 24) or []
    most = [colour for _, colour in sorted(found, key=lambda one: -one[0]) if isinstance(colour, tuple)]
    some = " ".join(",".join(map(str, colour)) for colour in most[:4])
    return f" ({len(most):,} colour{'' if len(most) == 1 else 's'}: {some}{' ...' if most[4:] else ''})"


def opened(image: Image.Image, bits: int | None = None) -> Array:
    """The pixels of an image that Pillow has opened (of the page where it stands), upright; see `photograph`.

    Of 16-bit colours Pillow keeps the upper 8 bits, whatever ``bits`` are.
    """
    if isinstance(image, TiffImageFile):
        _check_bands(image.tag_v2)
    image.load()  # a TIFF is turned by that, and its orientation forgotten
    return turned(rgb(image, bits), _orientation(b"", image))


def rgb(image: Image.Image, bits: int | None = None) -> Array:
    """The pixels that Pillow has loaded as 8-bit RGB, (H, W, 3); see `photograph`."""
    if image.mode.startswith("I"):
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_BITS, (16,))[0] == 12:
            bits = 12
        grey = to_8_bits(np.asarray(image), bits)
        if _zero_is_white(image):
            grey = 255 - grey  # Pillow has done so with fewer bits
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise UnreadableError("holds floating-point pixels: save it as an 8-bit or 16-bit image")
    if image.mode in ("1", "L"):
        return np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2)
    if image.mode in ("P", "La"):  # transparency of a palette, and premultiplied alpha, are converted by a detour alone
        image = image.convert("RGBA" if image.mode == "P" else "LA")
    return np.array(image.convert("RGB"))


def to_8_bits(wide: npt.NDArray[Any], bits: int | None = None) -> Array:
    """Pixels of 16 bits, of which the lower ``bits`` are used (None: all), as 8 bits: the largest number is 255.

    Raises: UnreadableError for a number that does not fit.
    """
    maximum = 2 ** (bits or 16) - 1
    lowest, highest = wide.min(), wide.max()
    if lowest < 0 or highest > maximum:
        if bits is None:
            raise UnreadableError("holds pixels outside 0..65535: save it as an 8-bit or 16-bit image")
        wrong = lowest if lowest < 0 else highest
        raise UnreadableError(
            f"holds a pixel of {wrong}, beyond the 0..{maximum} of bits={bits}: give the bits that are used"
        )
    scaled = np.empty(wide.shape, np.uint8)
    for start in range(0, len(wide), 64):  # some rows at a time: of a large image the products would not fit
        rows = slice(start, start + 64)
        scaled[rows] = wide[rows].astype(np.uint32) * 255 // maximum
    return scaled


# EXIF orientation: whether rows and columns are exchanged, then which of them are reversed
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_INVERSE = {6: 8, 8: 6}  # of the others: themselves


def turned(pixels: Array, orientation: int) -> Array:
    """Stored pixels, (H, W) or (H, W, C), as their EXIF orientation means them; an unknown one changes nothing."""
    if orientation not in _TURNS:
        return pixels
    exchanged, rows, columns = _TURNS[orientation]
    if exchanged:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def check_fits(width: int, height: int, bytes_per_pixel: float) -> None:
    """Raises: UnreadableError where so many pixels need more memory than is free."""
    needed = width * height * bytes_per_pixel
    if needed <= _SMALL:
        return
    free = free_memory()
    if free is not None and needed > free:
        raise UnreadableError(
            f"is too large: {width}×{height} pixels need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )


class _Loaded(NamedTuple):
    image: Image.Image
    bits: int  # that the file stores for each channel
    orientation: int
    turned: bool  # Pillow has turned it


def _load(data: bytes) -> _Loaded:
    """Decode all pixels by Pillow, so that a truncated file fails here; refuse what it would cut."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata beside good pixels, and of palettes
        if data.startswith(_TIFF):
            _check_tiff(data)
        if data.startswith(_PNG) and any(kind == b"IDAT" and not whole for kind, whole in _png_chunks(data)):
            raise ValueError("its checksum is wrong")  # Pillow does not look at those of pixels
        with Image.open(io.BytesIO(data)) as image:
            check_fits(*image.size, _GREY if image.mode in ("1", "L", "I;16") else _COLOURS)
            # an MPO is a photograph as telephones write it, with the same at other sizes; a TIFF's pages are counted
            pictures = getattr(image, "n_frames", 1) if image.format not in ("MPO", "TIFF") else 1
            if pictures > 1:
                raise UnreadableError(
                    f"holds {pictures} pictures, an animation: save the one that is meant as a file of its own"
                )
            bits, orientation = _stored_bits(image, data), _orientation(data, image)
            image.load()
            return _Loaded(image, bits, orientation, image.format == "TIFF")


def _stored_bits(image: ImageFile, data: bytes) -> int:
    """Of each channel; of a file that Pillow has not decoded yet."""
    if image.format == "PNG":
        return data[24]
    if isinstance(image, TiffImageFile):
        return int(image.tag_v2.get(_BITS, (1,))[0])
    if image.format == "BMP":
        return int.from_bytes(data[28:30], "little")
    if image.format == "PPM" and image.tile[0][0] != "raw":  # scaled from a largest value of the file's own
        return 0
    return 16 if image.mode.startswith("I") else 8


def _zero_is_white(image: Image.Image) -> bool:
    return isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC, 0) == 0


def _orientation(data: bytes, image: Image.Image | None = None) -> int:
    """As EXIF (or XMP) tells; 1, upright, where that is missing or damaged."""
    try:
        image = image or Image.open(io.BytesIO(data))
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # beside pixels that are not damaged
        return 1


def _wide_colours(data: bytes, image: Image.Image) -> npt.NDArray[np.uint16]:
    """16-bit RGB by OpenCV. Pillow keeps the upper half, but it alone tells a damaged file; they must agree."""
    wide = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if wide is not None and wide.ndim == 3 and wide.dtype == np.uint16:
        colours = np.asarray(wide[..., 2::-1], np.uint16)
        if np.array_equal(colours >> 8, np.asarray(image)[..., :3]):
            return colours
    raise UnreadableError(
        "holds 16-bit colours of a kind that cannot be read with bits: save it as a PNG without alpha"
    )


def _check_tiff(data: bytes) -> None:
    """Refuse, with the reason, a TIFF of which Pillow would leave something out or which it would not open."""
    directories = _tiff_directories(data)
    first = directories[0]
    pages = [not directory.get(_SUBFILE, 0) & 0b101 for directory in directories]  # no overviews, no masks of pages
    if sum(pages) > 1 or (len(pages) > 1 and not pages[0]):  # of which Pillow takes the first
        raise UnreadableError(f"holds {len(pages)} pages: save each as a file of its own")
    _check_bands(first)
    try:
        Image.open(io.BytesIO(data)).close()
    except UnidentifiedImageError:
        depth = "/".join(map(str, dict.fromkeys(first.get(_BITS, (1,)))))
        raise UnreadableError(
            f"is a TIFF of a kind that is not read ({depth} bits): save it as 8-bit grey or RGB"
        ) from None


def _check_bands(tags: ImageFileDirectory_v2) -> None:
    """Refuse floating-point pixels, and bands that are neither colours nor alpha."""
    if not {3, 6}.isdisjoint(tags.get(_FORMAT, (1,))):
        raise UnreadableError("holds floating-point pixels: save it as an 8-bit or 16-bit image")
    samples, colours = tags.get(_SAMPLES, 1), _COLOUR_BANDS.get(tags.get(_PHOTOMETRIC, 0))
    alpha = samples == (colours or 0) + 1 and tags.get(_EXTRA, (2,))[0] in (1, 2)
    if colours is None or (samples != colours and not alpha):
        raise UnreadableError(
            f"holds {samples} band(s), not grey, RGB or CMYK, alone or with alpha: save those that are meant as an RGB"
            " or grey image"
        )


def _tiff_directories(data: bytes) -> list[ImageFileDirectory_v2]:
    """What describes each page, overview and mask, in order."""
    file, found, places = io.BytesIO(data), [], set()
    header = data[: 16 if data[2:4] == b"+\0" else 8]
    place = ImageFileDirectory_v2(header).next
    while place and place not in places:  # a damaged file may lead round in a circle
        places.add(place)
        file.seek(place)
        directory = ImageFileDirectory_v2(header)
        directory.load(file)
        found.append(directory)
        place = directory.next
    if not found:
        raise UnreadableError("holds no image")
    return found


def _decode_plain(data: bytes) -> Array | None:
    """8-bit grey or colour PNGs and JPEGs by decoders faster than Pillow, with the same pixels; or None.

    `_plain_size` tells which files those are, since these decoders convert the other kinds in ways of their own and may
    return what there is of a damaged file. (Pixels of JPEGs are equal as long as both OpenCV and Pillow are built
    with libjpeg-turbo, as their wheels are; other builds may differ by a level or two.)
    """
    try:
        if data.startswith(_PNG) and pyspng is not None:
            return np.asarray(pyspng.load(data, format="RGB"), np.uint8)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except (RuntimeError, cv2.error):
        return None
    return None if image is None else np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def _plain_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a whole PNG or JPEG of 8-bit grey or RGB; None for any other file."""
    if data.startswith(_PNG):
        return _plain_png(data)
    return _plain_jpeg(data) if data.startswith(b"\xff\xd8\xff") else None


def _plain_png(data: bytes) -> tuple[int, int] | None:
    """8-bit grey or RGB, no animation, and every chunk whole by its checksum, up to the end mark."""
    if data[24:26] not in (b"\x08\x00", b"\x08\x02"):
        return None
    for kind, whole in _png_chunks(data):
        if not whole or kind == b"acTL":
            return None
        if kind == b"IEND":
            return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Each chunk's kind, and whether it is whole by its checksum, up to the end of the file."""
    view, start = memoryview(data), 8
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        whole = zlib.crc32(view[start + 4 : end]) == int.from_bytes(view[end : end + 4], "big")
        yield data[start + 4 : start + 8], whole
        start = end + 4


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """8 bits in one or three channels (not CMYK), and an end mark."""
    if not data.endswith(b"\xff\xd9"):
        return None
    start = 2
    while start + 10 <= len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame header
            height, width = (int.from_bytes(data[start + at : start + at + 2], "big") for at in (5, 7))
            return (width, height) if data[start + 4] == 8 and data[start + 9] in (1, 3) else None
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return None
