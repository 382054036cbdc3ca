"""Images as data URLs, no larger than a page needs them. Legend: H x W pixels, P pixels with a receptive field."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segdcn.data.dataset import IGNORE_INDEX
from segdcn.drawing.panels import colorize

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

LONGEST_SIDE = 960  # of a picture within the page; larger ones are shrunk
FIELD_SIDE = 64  # of a receptive field, which is blurred by nature
WRONG, RIGHT, IGNORED = (230, 40, 40), (236, 238, 240), (120, 124, 130)


def photograph(image: Bytes) -> str:
    """RGB pixels uint8 (H, W, 3) as a JPEG; small ones without loss, whose pixels one sees."""
    if max(image.shape[:2]) <= 256:
        return _url(Image.fromarray(image), "png")
    return _url(Image.fromarray(_shrunk(image, cv2.INTER_AREA)), "jpeg", quality=88)


def labels(values: Bytes, palette: Sequence[Sequence[int]]) -> str:
    """Class numbers uint8 (H, W) in their colours, ignored pixels hatched, as a palette PNG."""
    shrunk = _shrunk(values, cv2.INTER_NEAREST)
    colours, kinds = np.unique(colorize(shrunk, palette).reshape(-1, 3), axis=0, return_inverse=True)
    picture = Image.fromarray(kinds.reshape(shrunk.shape).astype(np.uint8))
    picture.putpalette(colours.flatten().tolist())
    return _url(picture, "png", optimize=True)


def error_map(prediction: Bytes, label: Bytes) -> str:
    """Wrong pixels in red, right ones pale, ignored ones grey; uint8 (H, W) each."""
    kinds = np.where(label == IGNORE_INDEX, 2, prediction != label).astype(np.uint8)
    picture = Image.fromarray(_shrunk(kinds, cv2.INTER_NEAREST))
    picture.putpalette([value for colour in (RIGHT, WRONG, IGNORED) for value in colour])
    return _url(picture, "png", optimize=True)


def thumbnail(image: Bytes) -> str:
    """A small JPEG of RGB pixels uint8 (H, W, 3)."""
    factor = min(1.0, 160 / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return _url(Image.fromarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8)), "jpeg")


def field_atlas(fields: Array) -> dict[str, Any]:
    """Receptive fields (P, H, W) as tiles of one grey PNG, row by row.

    Each is smoothed by one pixel of its tile, since the gradient of single pixels is speckled, and scaled by its own
    maximum; the square root of that is stored, since most of a field is faint.

    Returns:
        ``url``, ``columns`` of tiles, ``tile`` [height, width] in pixels of the atlas.
    """
    count, height, width = fields.shape
    factor = min(1.0, FIELD_SIDE / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    columns = math.ceil(math.sqrt(count))
    atlas = np.zeros((math.ceil(count / columns) * size[1], columns * size[0]), np.uint8)
    for number, field in enumerate(fields.astype(np.float32)):
        tile = cv2.GaussianBlur(cv2.resize(field, size, interpolation=cv2.INTER_AREA), (0, 0), 1.0)
        peak = float(tile.max())
        if peak > 0:
            row, column = divmod(number, columns)
            place = (slice(row * size[1], (row + 1) * size[1]), slice(column * size[0], (column + 1) * size[0]))
            atlas[place] = np.rint(255 * np.sqrt(tile / peak))
    return {"url": _url(Image.fromarray(atlas), "png", optimize=True), "columns": columns, "tile": [size[1], size[0]]}


def _shrunk(pixels: Bytes, interpolation: int) -> Bytes:
    longest = max(pixels.shape[:2])
    if longest <= LONGEST_SIDE:
        return pixels
    factor = LONGEST_SIDE / longest
    size = (max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor)))
    return cv2.resize(pixels, size, interpolation=interpolation).astype(np.uint8, copy=False)


def _url(picture: Image.Image, kind: str, **options: Any) -> str:
    content = io.BytesIO()
    picture.save(content, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
