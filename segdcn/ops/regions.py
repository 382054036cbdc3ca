"""What both RoI poolings ask of their arguments, and how their backward operators hang together.

Legend: N batch, C channels, H x W map, R regions of interest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segdcn.ops.checks import IntPair, autocast_dtype, check_map, check_tensors, two


def output_pair(output_size: IntPair) -> tuple[int, int]:
    """Bins per region as (height, width); ValueError unless both are positive."""
    height, width = two(output_size)
    if height < 1 or width < 1:
        raise ValueError(f"output_size must be positive, got {output_size}")
    return height, width


def pooled_map(input: Tensor, rois: Tensor, offset: Tensor | None) -> Tensor:
    """``input`` in the dtype in which it is pooled.

    Raises: ValueError that names the argument when a shape, dtype or device does not fit.
    """
    check_map(input)
    if rois.ndim != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois must be (R, 5) as (image, x1, y1, x2, y2), got {tuple(rois.shape)}")
    check_tensors(input, {}, {"rois": rois, "offset": offset})
    dtype = autocast_dtype(input)
    return input if dtype is None else input.to(dtype)


def images_and_corners(input: Tensor, rois: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Image numbers (R,) and corners (R, 4), in float32 at least: half-precision ones are off by whole pixels.

    Raises: ValueError for numbers of images that are not there, and for corners that are not finite.
    """
    if not bool(torch.isfinite(rois).all()):
        raise ValueError("rois must be finite, got NaN or infinity")
    image = rois[:, 0].long()
    if rois.shape[0] and (int(image.min()) < 0 or int(image.max()) >= len(input)):
        named = f"got {int(image.min())} to {int(image.max())}"
        if not len(input):
            raise ValueError(f"rois must be empty where input has no images, {named}")
        raise ValueError(f"rois must name images 0 to {len(input) - 1}, {named}")
    dtype = torch.promote_types(rois.dtype if offset is None else offset.dtype, torch.float32)
    return image, rois[:, 1:].to(torch.promote_types(dtype, rois.dtype))


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
