"""RoI poolings as layers with their own offset branch.

Legend: N batch, C channels, H x W map, R regions of interest, h x w bins of each.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from segdcn.ops.checks import IntPair, convolve
from segdcn.ops.ps_roi_pool import deform_ps_roi_pool
from segdcn.ops.regions import PoolBackend, output_pair
from segdcn.ops.roi_pool import deform_roi_pool


class DeformRoIPool(nn.Module):
    """``deform_roi_pool`` with its own offset branch: fully connected, from the plainly pooled region.

    ``branch`` predicts one offset (x, y) per bin, in fractions of the region's size before ``gamma``, and with
    ``modulated`` one logit z per bin, whose factor on the bin is 2 * sigmoid(z). Its last layer starts at zero, so an
    untrained module is ``roi_align``. The authors train the branch of the plain form at 0.01 of the learning rate.

    hidden: widths of further layers of the branch; none in the paper, (1024, 1024) with ``modulated`` in Zhu et al.
    backend: as in ``deform_roi_pool``; an attribute that may be changed at any time.

    Shape: input (N, C, H, W), rois (R, 5) as (image, x1, y1, x2, y2) in image pixels -> (R, C, h, w).
    Source: Dai et al. 2017, section 2.2; modulated: Zhu et al. 2019, section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: IntPair,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        modulated: bool = False,
        hidden: tuple[int, ...] = (),
        backend: PoolBackend = "auto",
    ) -> None:
        super().__init__()
        self.output_size = output_pair(output_size)
        self.spatial_scale, self.sampling_ratio, self.gamma = spatial_scale, sampling_ratio, gamma
        self.modulated = modulated
        self.backend: PoolBackend = backend
        bins = self.output_size[0] * self.output_size[1]
        widths = (in_channels * bins, *hidden, bins * (3 if modulated else 2))
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
            nn.init.normal_(layers[-2].weight, std=0.01)  # type: ignore[arg-type]
        self.branch = nn.Sequential(*layers[:-1])
        _start_at_zero(self.branch[-1])

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool plainly, predict how the bins move, pool again."""
        predicted = self._predicted(input, rois)
        if not self.modulated:
            return self._pool(input, rois, predicted)
        offset, logit = predicted.split_with_sizes((2, 1), dim=1)
        return self._pool(input, rois, offset) * 2 * logit.sigmoid()

    def bin_offsets(self, input: Tensor, rois: Tensor) -> Tensor:
        """How far the bins move, (x, y) in shares of the region's size: (R, 1, 2, h, w); the 1 is as of classes."""
        return self.gamma * self._predicted(input, rois)[:, None, :2]

    def _predicted(self, input: Tensor, rois: Tensor) -> Tensor:
        plain = self._pool(input, rois, None)
        predicted: Tensor = self.branch(plain.flatten(1))
        return predicted.view(rois.shape[0], 3 if self.modulated else 2, *self.output_size)

    def _pool(self, input: Tensor, rois: Tensor, offset: Tensor | None) -> Tensor:
        settings = (self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma)
        return deform_roi_pool(input, rois, offset, *settings, backend=self.backend)

    def extra_repr(self) -> str:
        """The settings of the pooling."""
        text = (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}, modulated={self.modulated}"
        )
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"


class DeformPSRoIPool(nn.Module):
    """``deform_ps_roi_pool`` of a feature map: score maps and offset fields are 1x1 convolutions of it.

    ``maps`` gives output_channels maps for each bin; ``offset`` gives the fields whose plain position-sensitive
    pooling is the offset (x, y) of each bin and class, and with ``modulated`` ``mask`` gives those of a logit z,
    whose factor on the bin is 2 * sigmoid(z). The fields start at zero: an untrained module pools plainly.

    output_size: bins per axis; also the group size.
    offset_classes: how many sets of offsets a region has: the number of classes where each moves on its own, as in
    the paper's classification branch, 1 where all channels move together; divides output_channels.
    backend: as in ``deform_ps_roi_pool``; an attribute that may be changed at any time.

    Shape: input (N, C, H, W), rois (R, 5) as (image, x1, y1, x2, y2) in image pixels
    -> (R, output_channels, output_size, output_size).
    Source: Dai et al. 2017, section 2.2 and figure 4; modulated: Zhu et al. 2019, section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        output_channels: int,
        output_size: int,
        spatial_scale: float = 1.0,
        sample_per_part: int = 4,
        gamma: float = 0.1,
        *,
        offset_classes: int = 1,
        modulated: bool = False,
        backend: PoolBackend = "auto",
    ) -> None:
        super().__init__()
        if offset_classes < 1 or output_channels % offset_classes:
            raise ValueError(f"offset_classes must divide output_channels {output_channels}, got {offset_classes}")
        self.output_channels, self.output_size, self.spatial_scale = output_channels, output_size, spatial_scale
        self.sample_per_part, self.gamma, self.offset_classes = sample_per_part, gamma, offset_classes
        self.backend: PoolBackend = backend
        bins = output_size**2
        self.maps = nn.Conv2d(in_channels, output_channels * bins, 1)
        self.offset = nn.Conv2d(in_channels, 2 * offset_classes * bins, 1)
        _start_at_zero(self.offset)
        self.mask = nn.Conv2d(in_channels, offset_classes * bins, 1) if modulated else None
        if self.mask is not None:
            _start_at_zero(self.mask)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool the offset fields plainly, then the score maps at their offsets."""
        pooled = self._pool(convolve(self.maps, input), rois, self._offset(input, rois), self.output_channels)
        if self.mask is None:
            return pooled
        mask = 2 * self._pool(convolve(self.mask, input), rois, None, self.offset_classes).sigmoid()
        return pooled * mask.repeat_interleave(self.output_channels // self.offset_classes, dim=1)

    def bin_offsets(self, input: Tensor, rois: Tensor) -> Tensor:
        """How far the bins move, (x, y) in shares of the region's size: (R, offset_classes, 2, h, w)."""
        return self.gamma * self._offset(input, rois).view(
            rois.shape[0], self.offset_classes, 2, self.output_size, self.output_size
        )

    def _offset(self, input: Tensor, rois: Tensor) -> Tensor:
        return self._pool(convolve(self.offset, input), rois, None, 2 * self.offset_classes)

    def _pool(self, maps: Tensor, rois: Tensor, offset: Tensor | None, channels: int) -> Tensor:
        size = self.output_size
        settings = (size, channels, size, self.spatial_scale, self.sample_per_part, None, self.gamma)
        return deform_ps_roi_pool(maps, rois, offset, *settings, backend=self.backend)

    def extra_repr(self) -> str:
        """The settings of the pooling."""
        text = (
            f"output_channels={self.output_channels}, output_size={self.output_size}, "
            f"spatial_scale={self.spatial_scale}, sample_per_part={self.sample_per_part}, gamma={self.gamma}, "
            f"offset_classes={self.offset_classes}"
        )
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"


def _start_at_zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
