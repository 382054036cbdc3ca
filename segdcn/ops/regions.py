"""What both RoI poolings ask of their arguments, what a bin is to them, and how their backward operators hang together.

Legend: N batch, C channels, H x W map, R regions of interest, h x w bins of each, K classes, sets of offsets.
"""

# no "from __future__ import annotations": torch.library.custom_op reads the annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from segdcn.ops.checks import IntPair, autocast_dtype, check_map, check_tensors, check_triton, two

PoolBackend = Literal["auto", "gather", "triton"]


class Bins(NamedTuple):
    """Where bins sample the map: each at a grid of points, a step apart; the last dimensions are (x, y)."""

    image: Tensor  # (R,)
    first: Tensor  # (R, h * w, K, 2) in pixels of the map
    step: Tensor  # (R, 2) in pixels
    samples: Tensor  # (R, 2) how many along x and along y
    reach: Tensor  # (R, 2) pixels that an offset of 1 moves a bin


def output_pair(output_size: IntPair) -> tuple[int, int]:
    """Bins per region as (height, width); ValueError unless both are positive."""
    height, width = two(output_size)
    if height < 1 or width < 1:
        raise ValueError(f"output_size must be positive, got {output_size}")
    return height, width


def pooled_map(input: Tensor, rois: Tensor, offset: Tensor | None, backend: PoolBackend) -> Tensor:
    """``input`` in the dtype in which it is pooled.

    Raises: ValueError that names the argument when a shape, dtype, device or the backend does not fit.
    """
    if backend not in get_args(PoolBackend):
        raise ValueError(f"backend must be auto, gather or triton, got {backend!r}")
    check_map(input)
    if rois.ndim != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois must be (R, 5) as (image, x1, y1, x2, y2), got {tuple(rois.shape)}")
    check_tensors(input, {}, {"rois": rois, "offset": offset})
    dtype = autocast_dtype(input)
    input = input if dtype is None else input.to(dtype)
    if backend == "triton":
        check_triton(input)
    return input


def images_and_corners(input: Tensor, rois: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Image numbers (R,) and corners (R, 4), in float32 at least: half-precision ones are off by whole pixels.

    Raises: ValueError for numbers of images that are not there, and for corners that are not finite.
    """
    dtype = torch.promote_types(rois.dtype if offset is None else offset.dtype, torch.float32)
    return _images(rois, len(input)), rois[:, 1:].to(torch.promote_types(dtype, rois.dtype))


# an operator, since torch.compile cannot look into what depends on the numbers
@torch.library.custom_op("segdcn::images_of_rois", mutates_args=())
def _images(rois: Tensor, images: int) -> Tensor:
    if not bool(torch.isfinite(rois).all()):
        raise ValueError("rois must be finite, got NaN or infinity")
    image = rois[:, 0].long()
    if rois.shape[0] and (int(image.min()) < 0 or int(image.max()) >= images):
        named = f"got {int(image.min())} to {int(image.max())}"
        if not images:
            raise ValueError(f"rois must be empty where input has no images, {named}")
        raise ValueError(f"rois must name images 0 to {images - 1}, {named}")
    return image


@_images.register_fake
def _(rois: Tensor, images: int) -> Tensor:
    return rois.new_empty(rois.shape[0], dtype=torch.int64)


def divide(corner: Tensor, extent: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
    """The corners and the sides of the ``size`` = (h, w) bins of regions.

    Shape: upper left corner and extent, each (R, 2) as (x, y) -> (R, h * w, 1, 2), (R, 2).
    """
    side = torch.stack((extent[:, 0] / size[1], extent[:, 1] / size[0]), dim=1)
    row, column = (torch.arange(bins, device=corner.device) for bins in size)
    place = torch.stack((column.expand(*size), row[:, None].expand(*size)), dim=-1).view(-1, 1, 2)
    return corner[:, None, None] + place * side[:, None, None], side


def like_offset(gradient: Tensor, offset: Tensor | None) -> Tensor:
    """The offsets' gradient in their dtype; an operator cannot return None, so without offsets an empty one."""
    return gradient.new_zeros(0) if offset is None else gradient.to(offset.dtype).contiguous()


def register_backward(forward: Any, backward: Any) -> None:
    """Make ``backward`` the gradient of the custom operator ``forward``, by its input and its offset.

    forward: (input, rois, offset, *settings) -> output.
    backward: (grad, input, rois, offset, *settings, [whether for the input, whether for the offset]) -> both.
    """

    def shapes(grad: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
        grad_offset = input.new_empty(0) if offset is None else offset.new_empty(offset.shape)
        return input.new_empty(input.shape), grad_offset

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, rois, offset, *ctx.settings = inputs
        ctx.save_for_backward(input, rois, offset)

    def formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for_input, _, for_offset, *_ = ctx.needs_input_grad
        grad_input, grad_offset = backward(grad, *ctx.saved_tensors, *ctx.settings, [for_input, for_offset])
        settings = (None for _ in ctx.settings)
        return grad_input if for_input else None, None, grad_offset if for_offset else None, *settings

    backward.register_fake(shapes)
    forward.register_autograd(formula, setup_context=save)
