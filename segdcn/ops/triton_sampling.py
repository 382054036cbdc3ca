"""The primitive of sampling.py as device code for Triton: read a map at fractional positions, and add into it there.

Maps are channels last. A program holds a tile of T points by L channels and reads the four cells around each point; a
cell that is no cell of the map reads zero, and what is added to it is dropped.

With TRITON_INTERPRET=1 in the environment before Triton is imported, its kernels run as Python on a CPU: slow, but the
arithmetic is that of the GPU, except for matrix products of bfloat16, which Triton's interpreter gets wrong (3.8).
"""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def locate(y, x, valid, height, width):
    """The cell to the top left of points (T,), how far they lie from it, and whether they read the map at all."""
    inside = valid & (y > -1) & (y < height) & (x > -1) & (x < width)  # never where not finite
    y = tl.where(inside, y, 0.0)
    x = tl.where(inside, x, 0.0)
    top = tl.floor(y)
    left = tl.floor(x)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, inside


@triton.jit
def corners(image, top, left, inside, height, width, channels):
    """Where the top left cells begin, in elements, and which of the four corners are cells of the map; image is int64.

    Corners are top left, top right, bottom left, bottom right.
    """
    upper = inside & (top >= 0)
    lower = inside & (top + 1 < height)
    west = left >= 0
    east = left + 1 < width
    cell = ((image * height + top) * width + left) * channels
    return cell, upper & west, upper & east, lower & west, lower & east


@triton.jit
def read(map_ptr, cell, c, c_valid, width, channels, v00, v01, v10, v11):
    """The values of channels c (L,) at the four corners, (T, L) each, in float32."""
    at = map_ptr + cell[:, None] + c[None, :]
    below = at + width * channels
    c_valid = c_valid[None, :]
    a00 = tl.load(at, mask=v00[:, None] & c_valid, other=0.0).to(tl.float32)
    a01 = tl.load(at + channels, mask=v01[:, None] & c_valid, other=0.0).to(tl.float32)
    a10 = tl.load(below, mask=v10[:, None] & c_valid, other=0.0).to(tl.float32)
    a11 = tl.load(below + channels, mask=v11[:, None] & c_valid, other=0.0).to(tl.float32)
    return a00, a01, a10, a11


@triton.jit
def add(map_ptr, value, down, right, cell, c, c_valid, width, channels, v00, v01, v10, v11):
    """Gradient of reading: spread values (T, L) over the four corners of a float32 map, in any order."""
    at = map_ptr + cell[:, None] + c[None, :]
    below = at + width * channels
    c_valid = c_valid[None, :]
    down = down[:, None]
    right = right[:, None]
    upper = value * (1 - down)
    lower = value * down
    tl.atomic_add(at, upper * (1 - right), mask=v00[:, None] & c_valid, sem="relaxed")
    tl.atomic_add(at + channels, upper * right, mask=v01[:, None] & c_valid, sem="relaxed")
    tl.atomic_add(below, lower * (1 - right), mask=v10[:, None] & c_valid, sem="relaxed")
    tl.atomic_add(below + channels, lower * right, mask=v11[:, None] & c_valid, sem="relaxed")


@triton.jit
def bilinear(a00, a01, a10, a11, down, right):
    """The values (T, L) at points from those at their corners."""
    down = down[:, None]
    right = right[:, None]
    return (a00 * (1 - right) + a01 * right) * (1 - down) + (a10 * (1 - right) + a11 * right) * down


@triton.jit
def slope_y(a00, a01, a10, a11, right):
    """Derivatives (T, L) of the values by y; at an integer the one towards larger coordinates."""
    right = right[:, None]
    return (a10 - a00) * (1 - right) + (a11 - a01) * right


@triton.jit
def slope_x(a00, a01, a10, a11, down):
    """Derivatives (T, L) of the values by x."""
    down = down[:, None]
    return (a01 - a00) * (1 - down) + (a11 - a10) * down


def bag_tile(channels: int) -> dict[str, int]:
    """BM bags by BL of their channels, of which a program of an aggregation or a pooling holds a tile."""
    lanes = min(64, triton.next_power_of_2(max(1, channels)))
    return {"BM": 1024 // lanes, "BL": lanes}


def _as_it_is(kernel: Any) -> Any:
    return kernel


INTERPRETED = not isinstance(locate, triton.JITFunction)
# torch.compile looks into an operator of kernels, but not into one of Python functions
triton_op = torch.library.custom_op if INTERPRETED else torch.library.triton_op
wrap_triton = _as_it_is if INTERPRETED else torch.library.wrap_triton
