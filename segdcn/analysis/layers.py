"""Where a network's convolutions sample, seen while it runs.

Legend: N images, G offset groups, K = kh * kw kernel points, H x W input map, Ho x Wo output map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from segdcn import UserError
from segdcn.models import deformable_layers
from segdcn.ops import DeformConv2d, kernel_points

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One pass through a convolution: where each cell of its output map samples its input map.

    name: as in ``network.named_modules()``.
    taps: float32 (N, G, K, 2, Ho, Wo) on the CPU, (y, x) in pixels of the input map; K is row-major over the kernel.
    input_size: (H, W).
    deformable: False for a plain convolution, whose taps are the regular grid, G = 1.
    """

    name: str
    taps: Tensor
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    input_size: Pair
    deformable: bool

    @property
    def output_size(self) -> Pair:
        """(Ho, Wo)."""
        return self.taps.shape[4], self.taps.shape[5]

    def undeformed(self) -> LayerCall:
        """The same layer without its offsets: the regular grid, N = G = 1."""
        taps = _regular_taps(self.output_size, self.kernel_size, self.stride, self.padding, self.dilation)
        return replace(self, taps=taps, deformable=False)

    def offset_lengths(self) -> Tensor:
        """How far each tap lies from the regular grid: (N, G, K, Ho, Wo), in pixels of the input map."""
        y, x = (self.taps - self.undeformed().taps).unbind(dim=3)
        return torch.hypot(y, x)


def last_layers(network: nn.Module, count: int | None = None) -> dict[str, nn.Module]:
    """The last 3x3 convolutions of a network by name, deformable or plain, in network order.

    Of a network with a submodule ``backbone`` only that is searched, as by ``make_deformable``; the offset branches
    are left out, and so are convolutions of other classes and with other than zero padding.

    Args:
        count: how many at most; None takes the layers that are deformable, or 3 of a network without any.
    """
    deformable = deformable_layers(network)
    if count is None and deformable:
        return dict(deformable)
    branches = {part for layer in deformable.values() for part in layer.modules()} - set(deformable.values())
    searched, prefix = getattr(network, "backbone", None), "backbone."
    if not isinstance(searched, nn.Module):
        searched, prefix = network, ""
    found = [
        (prefix + name, module)
        for name, module in searched.named_modules()
        if name
        and (isinstance(module, DeformConv2d) or _is_plain(module))
        and module.kernel_size == (3, 3)
        and module not in branches
    ]
    count = 3 if count is None else count
    return dict(found[max(0, len(found) - count) :])


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
    hooks = [_watch(name, layer, calls) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise UserError(f"the network does not use {', '.join(layers)}, so there are no sampling points to show")
    return calls


def _watch(name: str, layer: nn.Module, calls: list[LayerCall]) -> RemovableHandle:
    """A hook that adds each pass through the layer to ``calls``."""
    if not (isinstance(layer, DeformConv2d) or _is_plain(layer)):
        raise UserError(f"{name} is a {type(layer).__name__}: only DeformConv2d and zero-padded nn.Conv2d are followed")
    padding = cast(Pair, layer.padding)
    settings = (_pair(layer.kernel_size), _pair(layer.stride), _pair(padding), _pair(layer.dilation))

    def deformed(_: nn.Module, inputs: tuple[Tensor, ...], predicted: Tensor) -> None:
        offset, _mask = cast(DeformConv2d, layer).split_branch(predicted)
        taps = torch.stack(kernel_points(offset, *settings), dim=3).float().cpu()
        calls.append(LayerCall(name, taps, *settings, _pair(inputs[0].shape[2:]), deformable=True))

    def plain(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        taps = _regular_taps(_pair(output.shape[2:]), *settings).expand(len(output), -1, -1, -1, -1, -1)
        calls.append(LayerCall(name, taps, *settings, _pair(inputs[0].shape[2:]), deformable=False))

    if isinstance(layer, DeformConv2d):
        return layer.offset.register_forward_hook(deformed)
    return layer.register_forward_hook(plain)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """A subclass, or another padding, may sample elsewhere."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _pair(values: Sequence[int]) -> Pair:
    return values[0], values[1]


def _regular_taps(size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """(1, 1, K, 2, Ho, Wo) for an output map of ``size`` = (Ho, Wo)."""
    no_offset = torch.zeros(1, 2 * kernel_size[0] * kernel_size[1], *size)
    return torch.stack(kernel_points(no_offset, kernel_size, stride, padding, dilation), dim=3)
