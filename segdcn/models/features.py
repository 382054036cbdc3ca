"""What a backbone is to a head: four feature maps, and their channels.

Legend: N batch, C channels, H x W input pixels.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Features(NamedTuple):
    """What a backbone gives to the heads.

    Shape: low (N, C_low, H/4, W/4); second, of the stage behind it, (N, C_second, H/8, W/8); middle, of the stage
    before the last, and high, at the output stride s: (N, C, H/s, W/s), the middle one finer where the last stage is
    strided. Sizes are rounded up.
    """

    low: Tensor
    second: Tensor
    middle: Tensor
    high: Tensor


class Backbone(nn.Module):
    """Image (N, 3, H, W) -> Features; states the channels of each feature map and its output stride.

    stages: the names of the layers of each stage, the stem's with the first; empty where they are not known.
    """

    stages: tuple[tuple[str, ...], ...] = ()

    @property
    def lr_layers(self) -> tuple[tuple[str, ...], ...]:
        """The names of what counts as each layer where the learning rate decays by layers, from the image on."""
        return self.stages

    def __init__(self, channels: tuple[int, int, int, int], output_stride: int) -> None:
        super().__init__()
        self.low_level_channels, self.second_channels, self.middle_channels, self.out_channels = channels
        self.output_stride = output_stride
