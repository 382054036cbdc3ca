"""Batch norms as parts of the convolutions before them, for evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from segdcn.models.backbones import MobileNetV2
from segdcn.models.frozen import ConstantBatchNorm2d
from segdcn.models.heads import FPNHead
from segdcn.ops import DeformConv2d

Conv = nn.Conv2d | DeformConv2d
Norm = nn.BatchNorm2d | ConstantBatchNorm2d
Children = dict[str, nn.Module | None]
M = TypeVar("M", bound=nn.Module)

PARTS = (MobileNetV2, FPNHead)  # the light ones: beside a ResNet's convolutions its norms cost little
KNOWN = ("segdcn.", "torchvision.", "torch.nn.modules.")
LEAST_PIXELS = 2**17


def folded(network: nn.Module, size: Sequence[int]) -> nn.Module:
    """What computes the same as ``network`` in evaluation mode, but for rounding, with fewer passes over the maps.

    On a CPU, a batch norm that follows a convolution in an ``nn.Sequential`` of one of ``PARTS`` is multiplied into its
    weights. Left are norms that take the batch's statistics, and modules with hooks or of somebody else, who may look
    at what lies between. ``network`` stays as it is; all else is shared with it, offset branches too. It is made anew
    for each call, since weights may change: some 7 ms, which small images do not win back, so that for these it is
    ``network`` itself.

    size: (H, W) of the image.
    """
    if math.prod(size) < LEAST_PIXELS or any(parameter.device.type != "cpu" for parameter in network.parameters()):
        return network
    return _folded(network, within=False)


def _folded(module: nn.Module, within: bool) -> nn.Module:
    """within: whether it is inside of one of ``PARTS``."""
    if not type(module).__module__.startswith(KNOWN) or _is_watched(module):
        return module
    within = within or type(module) in PARTS
    children: Children = {
        name: None if child is None else _folded(child, within) for name, child in module._modules.items()
    }
    if within and type(module).forward is nn.Sequential.forward:
        for first, second in pairwise(children):
            conv, norm = children[first], children[second]
            if _is_conv(conv) and _is_norm(norm):
                children |= {first: _fused(conv, norm), second: nn.Identity()}
    return module if children == module._modules else _with(module, _modules=children)


def _with(module: M, **attributes: Any) -> M:
    """A twin with other attributes; not by ``copy``, for which a module may have a protocol of its own."""
    twin = type(module).__new__(type(module))
    twin.__dict__ = {**vars(module), **attributes}
    return twin


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody would notice a twin in its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module) or module._compiled_call_impl is not None


def _is_conv(module: Any) -> TypeGuard[Conv]:
    # a parametrised weight makes a class of its own; what prunes or quantises may keep it as a buffer
    return type(module) in (nn.Conv2d, DeformConv2d) and not (_is_watched(module) or module._buffers)


def _is_norm(module: Any) -> TypeGuard[Norm]:
    if type(module) is nn.BatchNorm2d and (module.training or module.running_var is None):
        return False
    return type(module) in (nn.BatchNorm2d, ConstantBatchNorm2d) and not _is_watched(module)


@torch.no_grad()
def _fused(conv: Conv, norm: Norm) -> Conv:
    """One convolution that computes what the two do in turn; in half precision it is rounded once, at the end."""
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    mean, variance = cast(Tensor, norm.running_mean).to(wide), cast(Tensor, norm.running_var).to(wide)
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias)
    return _with(conv, _parameters={"weight": weight, "bias": bias})
