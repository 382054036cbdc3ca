"""Photographs of any kind as pixels: uint8 (H, W, 3), upright."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from segdcn.data import decoding
from segdcn.data.dataset import file_errors, read_image
from segdcn.errors import MissingFileError, UserError

Array: TypeAlias = npt.NDArray[Any]

Photo: TypeAlias = "str | os.PathLike[str] | Image.Image | Array | Tensor"

TAKEN = (
    "a file's path, a PIL image, an array that is uint8 or uint16 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4),"
    " or a tensor that is uint8 of shape (3, H, W), (1, H, W) or (H, W)"
)


def read_photo(path: Path, bits: int | None = None) -> npt.NDArray[np.uint8]:
    """Read an image file as the network sees it: uint8 (H, W, 3), turned upright as its EXIF orientation asks.

    Apart from that the pixels are those of ``segdcn.data.dataset.read_image``, hence of an evaluation.

    Raises: FileNotFoundError, or DataError (a ValueError) when it is no image; one line that names the file.
    """
    if not path.exists() and not path.is_symlink():
        raise MissingFileError(f"no image at {path}")
    return read_image(path, bits, upright=True)


def as_rgb(pixels: Array, bits: int | None = None) -> npt.NDArray[np.uint8]:
    """Grey, RGB or RGBA pixels of 8 or 16 bits as uint8 (H, W, 3); see ``Predictor.__call__``.

    Raises: ValueError for another shape or type.
    """
    wrong = pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim not in (2, 3) or 0 in pixels.shape
    if wrong or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise UserError(f"an image must be {TAKEN}, got an array: {pixels.dtype} {pixels.shape}")
    if pixels.dtype == np.uint16:
        with file_errors("the array"):
            pixels = decoding.to_8_bits(pixels, bits)  # 65535 is 255
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return np.require(pixels[..., :3], requirements=["C", "W"])  # writable, as torch asks of what it shares


def tensor_pixels(image: Tensor) -> Array:
    """(H, W, C) of a tensor with channels first."""
    if image.dtype != torch.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] not in (1, 3)):
        hint = "; multiply values of 0..1 by 255" if image.is_floating_point() else ""
        raise UserError(f"an image must be {TAKEN}, got a tensor: {image.dtype} {tuple(image.shape)}{hint}")
    pixels: Array = (image.permute(1, 2, 0) if image.ndim == 3 else image).detach().cpu().numpy()
    return pixels
