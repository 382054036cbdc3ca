"""What reaches a pixel: the effective receptive field, since sampling points alone can mislead.

Legend: P chosen pixels, H x W image, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segdcn.errors import UserError


def effective_receptive_field(network: nn.Module, image: Tensor, pixels: Sequence[tuple[int, int]]) -> Tensor:
    """How much each image pixel moves the score of the class that is predicted at a chosen pixel.

    The absolute gradient of that class's logit by the normalised image, summed over the colour channels. Whatever
    the image reaches the logit by is in it: the weights, and what moves the offsets and masks.

    Args:
        network: in evaluation mode, image -> logits (N, K, H, W).
        image: (1, 3, H, W), normalised as in training, on the network's device.
        pixels: P pairs (row, col) in the image.

    Returns:
        float32 (P, H, W) on the CPU.

    Raises:
        ValueError: network in training mode, pixel outside the image, wrong shape.
    Source: Luo et al. 2016, section 2; Zhu et al. 2019 (DCNv2), section 2.
    """
    if image.ndim != 4 or len(image) != 1:
        raise UserError(f"effective_receptive_field needs one image (1, 3, H, W), got {tuple(image.shape)}")
    if network.training:
        raise UserError("effective_receptive_field needs network.eval()")
    height, width = image.shape[2:]
    for row, col in pixels:
        if not (0 <= row < height and 0 <= col < width):
            raise UserError(f"pixel (row {row}, col {col}) lies outside the image of {height} x {width} pixels")
    # weights as constants: nothing is computed for them, and the network is left as it is
    constants = {name: value.detach() for name, value in network.named_parameters()}
    with torch.enable_grad():
        leaf = image.detach().clone().requires_grad_()
        logits = torch.func.functional_call(network, constants, (leaf,))
        scores = [logits[0, :, row, col].max() for row, col in pixels]
    fields = torch.empty(len(pixels), height, width)
    for field, score in zip(fields, scores, strict=True):
        # one after another: batches of pixels need a run of the network for each, and were no faster
        (gradient,) = torch.autograd.grad(score, leaf, retain_graph=True)
        field.copy_(gradient[0].abs().sum(dim=0))
    return fields
