"""Where a network's convolutions sample, seen while it runs.

Legend: N images, G offset groups, K = kh * kw kernel points, H x W input map, Ho x Wo output map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from segdcn.errors import UserError
from segdcn.models.deformable import convolutions_3x3, sampling_layers
from segdcn.ops import DCNv3, DCNv4, DeformConv2d, kernel_points, outside_map

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One pass through a convolution: where each cell of its output map samples its input map.

    name: as in ``network.named_modules()``.
    offset: (N, 2GK, Ho, Wo), as ``deform_conv2d`` takes it, whatever layer it is of.
    input_size: (H, W).
    deformable: False for a plain convolution, whose offsets are zeros, G = 1.
    """

    name: str
    offset: Tensor
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    input_size: Pair
    deformable: bool

    @property
    def output_size(self) -> Pair:
        """(Ho, Wo)."""
        return _pair(self.offset.shape[2:])

    @cached_property
    def taps(self) -> Tensor:
        """float32 (N, G, K, 2, Ho, Wo), (y, x) in pixels of the input map; K is row-major over the kernel."""
        y, x = kernel_points(self.offset.float(), self.kernel_size, self.stride, self.padding, self.dilation)
        return torch.stack((y, x), dim=3)

    def undeformed(self) -> LayerCall:
        """The same layer without its offsets: the regular grid, N = G = 1."""
        return replace(self, offset=_no_offset(self.kernel_size, self.output_size), deformable=False)

    def offset_lengths(self) -> Tensor:
        """How far each tap lies from the regular grid: float32 (N, G, K, Ho, Wo), in pixels of the input map."""
        points = self.kernel_size[0] * self.kernel_size[1]
        y, x = torch.unflatten(self.offset.float(), 1, (-1, points, 2)).unbind(dim=3)
        return torch.hypot(y, x)

    def outside(self) -> Tensor:
        """Which taps read nothing, since they lie outside the input map: bool (N, G, K, Ho, Wo)."""
        y, x = self.taps.unbind(dim=3)
        return outside_map(y, x, *self.input_size)


def last_layers(network: nn.Module, count: int | None = None) -> dict[str, nn.Module]:
    """The last 3x3 convolutions of a network by name, deformable or plain, in network order; else its last DCNv3 or v4.

    Of a network with a submodule ``backbone`` only that is searched, as by ``make_deformable``; the offset branches
    are left out, and so are convolutions of other classes and with other than zero padding.

    Args:
        count: how many at most; None takes the layers that are deformable, or 3 of a network without any. Of DCNv3
            and DCNv4, of which a network has one in every block, it is 3 too.
    """
    found = sampling_layers(network)
    if aggregates(network):
        return dict(list(found.items())[-(count or 3) :])
    if count is None:
        if found:
            return dict(found)
        count = 3
    chosen = [(name, layer) for name, layer in convolutions_3x3(network).items() if _can_be_followed(layer)]
    return dict(chosen[max(0, len(chosen) - count) :])


def aggregates(network: nn.Module) -> bool:
    """Whether a network has layers that sample where they predict and are no convolutions: DCNv3 and DCNv4."""
    return any(isinstance(module, DCNv3 | DCNv4) for module in network.modules())


def record(network: nn.Module, image: Tensor, layers: dict[str, nn.Module] | None = None) -> list[LayerCall]:
    """Run a network once and tell where its layers sampled, in the order of the run.

    Args:
        network: in evaluation mode.
        image: (N, 3, H, W), normalised as in training, on the network's device.
        layers: convolutions of the network by name, deformable or plain; None takes ``last_layers(network)``.

    Raises:
        ValueError: network in training mode, no layer to look at, or none of them in the run.
    """
    if network.training:
        raise UserError("record needs network.eval(): in training mode a run would change the statistics")
    layers = last_layers(network) if layers is None else layers
    if not layers:
        raise UserError("the network has no 3x3 convolutions, so there are no sampling points to show")
    calls: list[LayerCall] = []
    hooks = [
        follow(name, layer, lambda call: calls.append(replace(call, offset=call.offset.cpu())))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise UserError(f"the network does not use {', '.join(layers)}, so there are no sampling points to show")
    return calls


def follow(name: str, layer: nn.Module, seen: Callable[[LayerCall], object]) -> RemovableHandle:
    """A hook that tells ``seen`` of each pass through a layer, with its offsets where they were computed.

    Those of DCNv3 and DCNv4 count from the convolution's grid: ``offset_scale`` is in them.

    Raises: UserError for a layer that samples in a way that is not known here.
    """
    if isinstance(layer, DCNv3 | DCNv4):
        return _follow_aggregation(name, layer, seen)
    if not _can_be_followed(layer):
        raise UserError(
            f"{name} is a {type(layer).__name__}: only DeformConv2d, DCNv3, DCNv4 and zero-padded nn.Conv2d are"
            " followed"
        )
    padding = cast(Pair, layer.padding)
    settings = (_pair(layer.kernel_size), _pair(layer.stride), _pair(padding), _pair(layer.dilation))

    def deformed(_: nn.Module, inputs: tuple[Tensor, ...], predicted: Tensor) -> None:
        offset, _mask = cast(DeformConv2d, layer).split_branch(predicted.detach())
        seen(LayerCall(name, offset, *settings, _pair(inputs[0].shape[2:]), deformable=True))

    def plain(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        offset = _no_offset(settings[0], _pair(output.shape[2:])).expand(len(output), -1, -1, -1)
        seen(LayerCall(name, offset, *settings, _pair(inputs[0].shape[2:]), deformable=False))

    if isinstance(layer, DeformConv2d):
        return layer.offset.register_forward_hook(deformed)
    return layer.register_forward_hook(plain)


def _follow_aggregation(name: str, layer: DCNv3 | DCNv4, seen: Callable[[LayerCall], object]) -> RemovableHandle:
    if layer.remove_center:
        raise UserError(f"{name} has no centre in its kernel, which is not followed")
    side, centre = layer.kernel_size, (layer.kernel_size - 1) / 2
    padding = layer.dilation * (side - 1) // 2
    # how the scale draws the kernel apart, beside a convolution's
    apart = (torch.arange(side) - centre) * layer.dilation * (layer.offset_scale - 1)

    def aggregated(_: nn.Module, inputs: tuple[Tensor, ...], predicted: Tensor) -> None:
        offset = layer.offsets(predicted.detach()).float()
        n, height, width = offset.shape[:3]
        # (x, y) down the kernel's columns to (y, x) along its rows
        by_tap = offset.view(n, height, width, layer.group, side, side, 2).permute(0, 3, 5, 4, 6, 1, 2).flip(4)
        y, x = (by_tap * layer.offset_scale).unbind(4)
        along = apart.to(offset.device)
        moved = torch.stack((y + along.view(side, 1, 1, 1), x + along.view(side, 1, 1)), dim=4).flatten(1, 4)
        seen(LayerCall(name, moved, (side, side), (1, 1), (padding,) * 2, (layer.dilation,) * 2, (height, width), True))

    return layer.branch.register_forward_hook(aggregated)


def _can_be_followed(module: nn.Module) -> TypeGuard[nn.Conv2d | DeformConv2d]:
    """Not a subclass, which may sample elsewhere, and no padding but zeros."""
    plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return plain or isinstance(module, DeformConv2d)


def _pair(values: Sequence[int]) -> Pair:
    return values[0], values[1]


def _no_offset(kernel_size: Pair, output_size: Pair) -> Tensor:
    """(1, 2K, Ho, Wo) for an output map of (Ho, Wo)."""
    return torch.zeros(1, 2 * kernel_size[0] * kernel_size[1], *output_size)
