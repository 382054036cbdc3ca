"""Image files written byte by byte by their formats' specifications: what is stored is known, whatever a library does.

PNG: ISO/IEC 15948; TIFF: revision 6.0.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's colour types


def packed(array: NDArray[np.integer], bits: int, endian: str = ">") -> NDArray[np.uint8]:
    """Rows of samples of so many bits each, the first in the highest bits, each row filled up to a whole byte."""
    rows = array.reshape(len(array), -1)
    if bits in (8, 16, 32, 64):
        return rows.astype(f"{endian}{array.dtype.kind}{bits // 8}").view(np.uint8).reshape(len(array), -1)
    single = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(single.reshape(len(array), -1).astype(np.uint8), axis=1)


def png(
    array: NDArray[np.integer],
    bits: int = 8,
    colour_type: int = GREY,
    palette: Sequence[Sequence[int]] | None = None,
    transparency: bytes | None = None,
    extra: Iterable[tuple[bytes, bytes]] = (),
    size: tuple[int, int] | None = None,
) -> bytes:
    """(H, W) or (H, W, C) numbers as a PNG; ``size`` (width, height) writes another one into its header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    width, height = size or (array.shape[1], array.shape[0])
    rows = packed(array, bits)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))]
    if palette is not None:
        chunks.append((b"PLTE", bytes(value for colour in palette for value in colour)))
    if transparency is not None:
        chunks.append((b"tRNS", transparency))
    pixels = np.hstack([np.zeros((len(rows), 1), np.uint8), rows])  # filter 0 before each row
    chunks += [*extra, (b"IDAT", zlib.compress(pixels.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def tiff(
    pages: NDArray[np.generic] | Sequence[NDArray[np.generic]],
    bits: int | None = None,
    photometric: int = 1,
    tags: Mapping[int, Sequence[int]] | Sequence[Mapping[int, Sequence[int]]] = {},
    endian: str = "<",
) -> bytes:
    """(H, W) or (H, W, C) arrays as the pages of an uncompressed TIFF.

    photometric: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK.
    tags: more of them, SHORT or (from 65536 on) LONG, of all pages or of each.
    """
    pages = [pages] if isinstance(pages, np.ndarray) else list(pages)
    each = [tags] * len(pages) if isinstance(tags, Mapping) else list(tags)
    content = bytearray({"<": b"II", ">": b"MM"}[endian] + struct.pack(f"{endian}HI", 42, 0))
    link = 4  # where the place of the next directory is to stand
    for array, more in zip(pages, each, strict=True):
        bands = 1 if array.ndim == 2 else array.shape[2]
        depth = bits or 8 * array.dtype.itemsize
        kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
        rows = packed(array, depth, endian)  # type: ignore[arg-type]
        place = len(content)
        content += rows.tobytes()
        values: dict[int, Sequence[int]] = {
            256: [array.shape[1]],
            257: [array.shape[0]],
            258: [depth] * bands,
            259: [1],  # not compressed
            262: [photometric],
            273: [place],
            277: [bands],
            278: [array.shape[0]],  # rows of the one strip
            279: [rows.size],
            339: [kind] * bands,
            **more,
        }
        entries = b""
        for tag in sorted(values):
            long = max(values[tag]) >= 1 << 16 or tag in (273, 279)
            numbers = struct.pack(f"{endian}{len(values[tag])}{'I' if long else 'H'}", *values[tag])
            if len(numbers) > 4:
                content += b"\0" * (len(content) % 2)
                numbers, place = struct.pack(f"{endian}I", len(content)), len(content)
                content += struct.pack(f"{endian}{len(values[tag])}{'I' if long else 'H'}", *values[tag])
            entries += struct.pack(f"{endian}HHI", tag, 4 if long else 3, len(values[tag])) + numbers.ljust(4, b"\0")
        content += b"\0" * (len(content) % 2)
        content[link : link + 4] = struct.pack(f"{endian}I", len(content))
        content += struct.pack(f"{endian}H", len(values)) + entries
        link = len(content)
        content += bytes(4)
    return bytes(content)


def spoilt(data: bytes) -> dict[str, bytes]:
    """Damage that a download, a full disk or a bad cable leaves."""
    cuts = {f"cut at {tenth}0 %": data[: tenth * len(data) // 10] for tenth in range(10)}
    wrong = {
        "wrong magic": b"XXXX" + data[4:],
        "another's magic": b"\x89PNG\r\n\x1a\n"[: 8 * (data[1:2] != b"P")] + data[8:],
        "zeros": bytes(len(data)),
    }
    flipped = bytearray(data)
    for place in range(len(data) // 3, len(data), max(1, len(data) // 7)):
        flipped[place] ^= 0xFF
    return {**cuts, **wrong, "flipped bits": bytes(flipped)}
