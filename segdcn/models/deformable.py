"""Deformable layers as a change of a built network."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from segdcn.errors import UserError
from segdcn.ops import DCNv3, DCNv4, DeformConv2d


def make_deformable(network: nn.Module, last: int = 3, modulated: bool = False, offset_groups: int = 1) -> list[str]:
    """Make the last 3x3 convolutions of a network deformable, in place; return their names in network order.

    They keep their weights, and the network computes the same function until the offset branches are trained.
    "Last" is in the order in which the network defines its modules, which for torchvision's and most other
    networks is that of execution; in a ResNet-101, 3 are layer4[0..2].conv2 and 6 are layer3[20..22].conv2
    too, as in the paper. Of a network with a submodule ``backbone`` only that is searched, not its heads.
    Layers that are deformable already are passed over: a second call goes on where the first ended. DCNv3 and DCNv4
    are not made by this: neither is a drop-in for a 3x3 convolution, whose weights they could not keep.

    Raises: ValueError, before anything is changed, when fewer than ``last`` are there, when one of them is no
    plain zero-padded ``nn.Conv2d``, or when ``offset_groups`` does not divide its input channels.
    Source: Dai et al. 2017, section 4.2 and table 1; modulated: Zhu et al. 2019.
    """
    found = [(name, conv) for name, conv in convolutions_3x3(network).items() if not isinstance(conv, DeformConv2d)]
    if not 0 <= last <= len(found):
        raise UserError(
            f"cannot make the last {last} 3x3 convolutions deformable: the network has {len(found)} that are "
            f"not yet; ask for 0 to {len(found)} (model.deform.layers)"
        )
    chosen = found[len(found) - last :]
    _replace(network, {conv: _deformed(name, conv, modulated, offset_groups) for name, conv in chosen})
    return [name for name, _ in chosen]


def plain_twin(network: nn.Module) -> nn.Module:
    """A copy whose deformable layers are plain convolutions with the same weights: what the offsets cost and bring."""
    twin = copy.deepcopy(network)
    _replace(twin, {layer: _undeformed(layer) for layer in deformable_layers(twin).values()})
    return twin


def set_fixed_dilation(network: nn.Module, dilation: int, last: int = 3) -> list[str]:
    """Give the last 3x3 convolutions one dilation, in place; return their names in network order.

    The control that belongs beside every deformable result: much of the gain over a small dilation is to be had
    from a larger one. The layers are those that ``make_deformable`` would take.

    Raises: ValueError when fewer than ``last`` are there or ``dilation`` is no positive number.
    Source: Dai et al. 2017, table 3.
    """
    found = list(convolutions_3x3(network).items())
    if dilation < 1 or not 0 <= last <= len(found):
        raise UserError(
            f"cannot set dilation {dilation} on the last {last} 3x3 convolutions: it must be 1 or more, and the "
            f"network has {len(found)} of them"
        )
    chosen = found[len(found) - last :]
    for _, conv in chosen:
        conv.dilation = conv.padding = (dilation, dilation)
    return [name for name, _ in chosen]


def deformable_layers(network: nn.Module) -> dict[str, DeformConv2d]:
    """The deformable layers of a network by name, in network order."""
    return {name: module for name, module in network.named_modules() if isinstance(module, DeformConv2d)}


def sampling_layers(network: nn.Module) -> dict[str, DeformConv2d | DCNv3 | DCNv4]:
    """All layers that sample where they predict, by name, in network order."""
    kinds = DeformConv2d | DCNv3 | DCNv4
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def convolutions_3x3(network: nn.Module) -> dict[str, nn.Conv2d | DeformConv2d]:
    """The 3x3 convolutions of a network by name, deformable ones among them, in the order of their definition.

    Of a network with a submodule ``backbone`` only that is searched. Offset branches are left out.
    """
    backbone = getattr(network, "backbone", None)
    searched, prefix = (backbone, "backbone.") if isinstance(backbone, nn.Module) else (network, "")
    branches = {layer.offset for layer in deformable_layers(searched).values()}
    return {
        prefix + name: module
        for name, module in searched.named_modules()
        if name
        and isinstance(module, nn.Conv2d | DeformConv2d)
        and module.kernel_size == (3, 3)
        and module not in branches
    }


def _replace(network: nn.Module, replacement: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(network.modules()):
        for attribute, child in list(parent.named_children()):
            if child in replacement:
                setattr(parent, attribute, replacement[child])


def _undeformed(layer: DeformConv2d) -> nn.Conv2d:
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    conv = nn.Conv2d(layer.in_channels, layer.out_channels, *settings, bias=False, device="meta")
    conv.weight, conv.bias = layer.weight, layer.bias
    return conv.train(layer.training)


def _deformed(name: str, conv: nn.Conv2d, modulated: bool, offset_groups: int) -> DeformConv2d:
    # A subclass may compute something else: other padding (timm's Conv2dSame), standardised weights, ...
    if type(conv) is not nn.Conv2d:
        raise UserError(f"cannot make {name} deformable: it is a {type(conv).__name__}, not a plain nn.Conv2d")
    try:
        return DeformConv2d.from_conv(conv, modulated=modulated, offset_groups=offset_groups)
    except ValueError as error:
        raise UserError(f"cannot make {name} deformable: {error}") from error
