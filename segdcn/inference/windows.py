"""From a network and whole images to logits: at once, by a sliding window, at several scales, mirrored.

Wherever predictions overlap it is their logits that are averaged, with equal weights: windows, scales and mirror
images alike. Legend: N images, K classes, H x W pixels; a network maps images (N, 3, H, W) to logits (N, K, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from segdcn.errors import UserError

Network: TypeAlias = Callable[[Tensor], Tensor]
Size: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Inference:
    """How a network is applied to an image; called as ``inference(network, image)``.

    Args:
        scales: factors of the image's size, each with a run of its own; (1.0,) is the image as it is.
        flip: run each scale on the mirrored image too.
        window: (height, width) of a sliding window in pixels of the scaled image; None for whole images.
        stride: steps of the window, down and to the right; None for two thirds of it, rounded up.

    Raises:
        ValueError: a scale that is not positive, no scale, a stride without a window or longer than it.
    """

    scales: Sequence[float] = (1.0,)
    flip: bool = False
    window: Sequence[int] | None = None
    stride: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if (
            not isinstance(self.scales, list | tuple)
            or not self.scales
            or not all(isinstance(scale, int | float) and 0 < scale < math.inf for scale in self.scales)
        ):
            raise UserError(f"inference.scales must be a list of positive factors of the image size, got {self.scales}")
        if not isinstance(self.flip, bool):
            raise UserError(f"inference.flip must be true or false, got {self.flip}")
        if self.window is None:
            if self.stride is not None:
                raise UserError("inference.stride needs inference.window=[HEIGHT,WIDTH]")
            return
        pairs = (self.window, self.window if self.stride is None else self.stride)
        if not all(map(_is_size, pairs)) or any(step > side for side, step in zip(*pairs, strict=True)):
            raise UserError(
                "inference.window and inference.stride must be [HEIGHT,WIDTH] in pixels, and no stride longer than"
                f" its window, which would leave gaps; got {self.window} and {self.stride}"
            )

    @property
    def single_run(self) -> bool:
        """Whether the image is seen once, neither scaled nor mirrored (but perhaps by windows)."""
        return tuple(self.scales) == (1.0,) and not self.flip

    @property
    def steps(self) -> Sequence[int]:
        """Of the window, down and to the right in pixels; empty without a window."""
        return self.stride or [math.ceil(2 * side / 3) for side in self.window or ()]

    def __call__(self, network: Network, image: Tensor) -> Tensor:
        """Logits (N, K, H, W) of images (N, 3, H, W).

        Besides the network's own memory, the sum and one run's logits are alive: scales are added one by one
        (within ``torch.inference_mode()`` or ``no_grad``; gradients would keep every run).
        """
        if self.single_run:
            return self._run(network, image)
        size = (image.shape[2], image.shape[3])
        total: Tensor | None = None
        for scale in self.scales:
            scaled_size = (max(1, round(scale * size[0])), max(1, round(scale * size[1])))
            scaled = resize(image, scaled_size)
            for mirrored in (False, True) if self.flip else (False,):
                logits = self._run(network, scaled.flip(3) if mirrored else scaled)
                logits = resize(logits, size)
                if mirrored:
                    logits = logits.flip(3)
                if total is None:
                    total = _empty_sum(logits, size)
                total += logits
                del logits  # or it would live on through the next run
        assert total is not None
        return total.div_(len(self.scales) * (1 + self.flip))

    def _run(self, network: Network, image: Tensor) -> Tensor:
        if self.window is None:
            return network(image)
        return slide(network, image, self.window, self.steps)

    def __str__(self) -> str:
        """In words, for tables and metrics.json."""
        parts = [
            "whole image" if self.window is None else f"window {_pixels(self.window)}, stride {_pixels(self.steps)}"
        ]
        parts.append(
            "single scale"
            if tuple(self.scales) == (1.0,)
            else f"scales {', '.join(f'{scale:g}' for scale in self.scales)}"
        )
        if self.flip:
            parts.append("mirrored too")
        return ", ".join(parts)


def _is_size(pair: object) -> bool:
    """Whether it is two positive whole numbers, whatever was typed."""
    return isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair)


def _pixels(size: Sequence[int]) -> str:
    return "×".join(map(str, size))


def resize(values: Tensor, size: Size, antialias: bool = False) -> Tensor:
    """Bilinear as OpenCV's INTER_LINEAR, with ``antialias`` as Pillow's; (N, C, H, W) -> (N, C, *size)."""
    if values.shape[2:] == size:
        return values
    return F.interpolate(values, size, mode="bilinear", align_corners=False, antialias=antialias)


def slide(network: Network, image: Tensor, window: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Mean of the logits of all windows over a pixel; (N, 3, H, W) -> (N, K, H, W).

    The last window of a row or column is moved back so that it ends at the image's border. Where the image is
    smaller than the window, the window has the image's side: nothing is padded.
    """
    rows, columns = (_starts(*sides) for sides in zip(image.shape[2:], window, stride, strict=True))
    height, width = min(window[0], image.shape[2]), min(window[1], image.shape[3])
    if len(rows) == len(columns) == 1:
        return network(image)
    total: Tensor | None = None
    count = image.new_zeros(image.shape[2:], dtype=torch.float32)
    for top in rows:
        for left in columns:
            here = (..., slice(top, top + height), slice(left, left + width))
            logits = network(image[here])
            if total is None:
                total = _empty_sum(logits, (image.shape[2], image.shape[3]))
            total[here] += logits
            count[here] += 1
    assert total is not None
    return total.div_(count)


def slide_classes(network: Network, image: Tensor, window: Sequence[int], stride: Sequence[int]) -> Tensor:
    """``slide(...).argmax(dim=1)`` as uint8, (N, 3, H, W) -> (N, H, W), for images whose logits no memory holds.

    The same sums in the same order, hence the same classes; only the rows that one row of windows covers are kept.
    """
    rows, columns = (_starts(*sides) for sides in zip(image.shape[2:], window, stride, strict=True))
    height, width = min(window[0], image.shape[2]), min(window[1], image.shape[3])
    if len(rows) == len(columns) == 1:
        return network(image).argmax(dim=1).to(torch.uint8)
    classes = image.new_empty(image.shape[0], *image.shape[2:], dtype=torch.uint8)
    total: Tensor | None = None
    count = image.new_zeros(height, image.shape[3], dtype=torch.float32)
    for top, following in zip(rows, [*rows[1:], image.shape[2]], strict=True):
        for left in columns:
            logits = network(image[..., top : top + height, left : left + width])
            if total is None:
                total = _empty_sum(logits, (height, image.shape[3]))
            total[..., left : left + width] += logits
            count[:, left : left + width] += 1
        assert total is not None
        done = following - top  # rows that no later window reaches
        classes[:, top:following] = (total[:, :, :done] / count[:done]).argmax(dim=1)
        for values in (total, count):
            kept = values[..., done:, :].clone()
            values.zero_()[..., : height - done, :] = kept
    return classes


def _empty_sum(logits: Tensor, size: Size) -> Tensor:
    """Zeros (N, K, *size) of float32 at least: sums in half precision would round away what the runs differ in."""
    return logits.new_zeros(*logits.shape[:2], *size, dtype=torch.promote_types(logits.dtype, torch.float32))


def _starts(side: int, window: int, stride: int) -> list[int]:
    last = max(side - window, 0)
    return [min(step * stride, last) for step in range(math.ceil(last / stride) + 1)]
