"""What reaches a pixel: the effective receptive field, since sampling points alone can mislead.

Legend: P chosen pixels, H x W image, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Pixels of all copies of an image that are followed at once: beyond, larger batches are no faster.
PIXELS_AT_ONCE = 2**20


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
        raise ValueError(f"effective_receptive_field needs one image (1, 3, H, W), got {tuple(image.shape)}")
    if network.training:
        raise ValueError("effective_receptive_field needs network.eval()")
    height, width = image.shape[2:]
    for row, col in pixels:
        if not (0 <= row < height and 0 <= col < width):
            raise ValueError(f"pixel (row {row}, col {col}) lies outside the image of {height} x {width} pixels")
    # weights as constants: nothing is computed for them, and the network is left as it is
    constants = {name: value.detach() for name, value in network.named_parameters()}
    batch = max(1, PIXELS_AT_ONCE // (height * width))
    fields = [torch.empty(0, height, width)]
    for start in range(0, len(pixels), batch):
        chosen = torch.tensor(pixels[start : start + batch], device=image.device)
        copies = image.detach().repeat(len(chosen), 1, 1, 1).requires_grad_()
        with torch.enable_grad():
            logits = torch.func.functional_call(network, constants, (copies,))
            scores = logits[torch.arange(len(chosen)), :, chosen[:, 0], chosen[:, 1]]  # (P, K)
            (gradient,) = torch.autograd.grad(scores.max(dim=1).values.sum(), copies)
        fields.append(gradient.abs().sum(dim=1).float().cpu())
    return torch.cat(fields)
