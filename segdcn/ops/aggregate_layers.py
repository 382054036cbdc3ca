"""DCNv3 and DCNv4: deformable aggregation with the branches that say where to look and how much each sample counts.

The names of the parameters are the authors' (OpenGVLab/InternImage and OpenGVLab/DCNv4), whose state dicts load
strictly. Neither is a drop-in for a convolution: both mix channels by linear maps before and behind the aggregation.

Legend: N batch, H x W map, C channels, G groups, K kernel points.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segdcn.ops.aggregate import AggregateBackend, deform_aggregate


class _Aggregation(nn.Module):
    """What DCNv3 and DCNv4 have in common: the settings, and the blend with the input that is not aggregated."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilation: int,
        group: int,
        offset_scale: float,
        center_feature_scale: bool,
        remove_center: bool,
        backend: AggregateBackend,
    ) -> None:
        super().__init__()
        if group < 1 or channels % group:
            raise ValueError(f"group must divide the {channels} channels, got {group}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the map keeps its size, got {kernel_size}")
        self.channels, self.kernel_size, self.dilation, self.group = channels, kernel_size, dilation, group
        self.offset_scale, self.remove_center = offset_scale, remove_center
        self.backend: AggregateBackend = backend
        self.center_feature_scale = center_feature_scale
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))

    @property
    def points(self) -> int:
        """Kernel points of all groups, G * K."""
        return self.group * (self.kernel_size**2 - self.remove_center)

    def _aggregate(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        padding = self.dilation * (self.kernel_size - 1) // 2
        geometry = (self.kernel_size, 1, padding, self.dilation, self.offset_scale, self.remove_center)
        return deform_aggregate(x, offset, mask, *geometry, backend=self.backend)

    def _blended(self, aggregated: Tensor, projected: Tensor, query: Tensor) -> Tensor:
        """With ``center_feature_scale`` each group's share, by the query, of what was not aggregated."""
        if not self.center_feature_scale:
            return aggregated
        weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        share = F.linear(query, weight, bias).sigmoid().repeat_interleave(self.channels // self.group, dim=-1)
        return aggregated * (1 - share) + projected * share

    def extra_repr(self) -> str:
        """The settings of the aggregation."""
        text = f"{self.channels}, kernel_size={self.kernel_size}, dilation={self.dilation}, group={self.group}"
        text += f", offset_scale={self.offset_scale:g}, remove_center={self.remove_center}"
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"


class DCNv3(_Aggregation):
    """Third generation: separable branches, masks that a softmax over the kernel's points makes sum to 1.

    ``offset`` (x, y in pixels before ``offset_scale``) and ``mask`` are linear maps of ``dw_conv``, a depthwise
    convolution with LayerNorm and GELU; both start at zero: an untrained layer averages over its kernel.

    group: groups of channels that share offsets and masks.
    dw_kernel_size: of that depthwise convolution; None is ``kernel_size``.
    center_feature_scale: blend with what was not aggregated, by a share per position and group (InternImage-H).
    backend: as in ``deform_aggregate``; an attribute that may be changed at any time.

    Shape: (N, H, W, C) -> the same.
    Raises: ValueError, one line, for groups that do not divide the channels, or an even kernel.
    Source: Wang et al. 2023 (InternImage), section 3.1.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        *,
        backend: AggregateBackend = "auto",
    ) -> None:
        super().__init__(
            channels, kernel_size, dilation, group, offset_scale, center_feature_scale, remove_center, backend
        )
        self.dw_conv = nn.Sequential(
            _depthwise(channels, dw_kernel_size or kernel_size),
            nn.Sequential(ChannelsLast(), nn.LayerNorm(channels, eps=1e-6)),
            nn.GELU(),
        )
        self.offset = nn.Linear(channels, self.points * 2)
        self.mask = nn.Linear(channels, self.points)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        _start(zero=(self.offset, self.mask), mixing=(self.input_proj, self.output_proj))

    @property
    def branch(self) -> nn.Linear:
        """What predicts the offsets, see ``offsets``: the map ``offset``."""
        return self.offset

    def offsets(self, predicted: Tensor) -> Tensor:
        """The offsets among what ``branch`` predicts, as ``deform_aggregate`` takes them: all of it."""
        return predicted

    def forward(self, input: Tensor) -> Tensor:
        """Project, predict where and how much to sample, aggregate, project."""
        projected = self.input_proj(input)
        query = self.dw_conv(input.permute(0, 3, 1, 2))
        logit = self.mask(query).unflatten(-1, (self.group, -1))
        mask = logit.softmax(-1).flatten(-2).to(projected.dtype)
        aggregated = self._aggregate(projected, self.offset(query), mask)
        output: Tensor = self.output_proj(self._blended(aggregated, projected, query))
        return output


class DCNv4(_Aggregation):
    """Fourth generation: one linear map gives offsets and masks, and the masks are of any size and sign.

    ``offset_mask`` gives 3 * G * K values, and some of no meaning up to a multiple of 8 (the authors' kernel wants
    them): of each group the K offsets (x, y), then the K masks. It starts at zero: an untrained layer gives the bias
    of ``output_proj``.

    dw_kernel_size: of a depthwise convolution before ``offset_mask``; None is none.
    without_pointwise: without the linear maps before and behind the aggregation.
    Otherwise as ``DCNv3``; group widths that are no multiple of 16, which the authors' kernel refuses, are taken.

    Shape: (N, H, W, C) -> the same. (The authors' layer takes (N, H * W, C) and the size beside it.)
    Raises: ValueError, one line, for groups that do not divide the channels, or an even kernel.
    Source: Xiong et al. 2024, section 3.1.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        *,
        backend: AggregateBackend = "auto",
    ) -> None:
        super().__init__(
            channels, kernel_size, dilation, group, offset_scale, center_feature_scale, remove_center, backend
        )
        self.without_pointwise = without_pointwise
        self.offset_mask_dw = None if dw_kernel_size is None else _depthwise(channels, dw_kernel_size)
        self.offset_mask = nn.Linear(channels, math.ceil(self.points * 3 / 8) * 8)
        _start(zero=(self.offset_mask,))
        if not without_pointwise:
            self.value_proj = nn.Linear(channels, channels)
            self.output_proj = nn.Linear(channels, channels, bias=output_bias)
            _start(mixing=(self.value_proj, self.output_proj))

    @property
    def branch(self) -> nn.Linear:
        """What predicts the offsets, see ``offsets``: the map ``offset_mask``."""
        return self.offset_mask

    def offsets(self, predicted: Tensor) -> Tensor:
        """The offsets among what ``branch`` predicts: of each group the first two thirds."""
        return self._split(predicted)[0]

    def _split(self, predicted: Tensor) -> tuple[Tensor, Tensor]:
        taps = self.points // self.group
        of_group = predicted[..., : self.points * 3].view(*predicted.shape[:3], self.group, 3 * taps)
        return of_group[..., : 2 * taps].flatten(-2), of_group[..., 2 * taps :].flatten(-2)

    def forward(self, input: Tensor) -> Tensor:
        """Project, predict where and how much to sample, aggregate, project."""
        projected = input if self.without_pointwise else self.value_proj(input)
        query = input
        if self.offset_mask_dw is not None:
            query = self.offset_mask_dw(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        predicted = self.offset_mask(query)
        aggregated = self._aggregate(projected, *self._split(predicted))
        output = self._blended(aggregated, projected, aggregated)
        return output if self.without_pointwise else self.output_proj(output)


class ChannelsLast(nn.Module):
    """(N, C, H, W) -> (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def _depthwise(channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size, padding=(kernel_size - 1) // 2, groups=channels)


def _start(zero: tuple[nn.Linear, ...] = (), mixing: tuple[nn.Linear, ...] = ()) -> None:
    """Branches at zero, maps that mix channels by Xavier's uniform distribution, all biases at zero."""
    for layer in zero:
        nn.init.zeros_(layer.weight)
    for layer in mixing:
        nn.init.xavier_uniform_(layer.weight)
    for layer in (*zero, *mixing):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
