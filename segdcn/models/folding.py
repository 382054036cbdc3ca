"""Batch norms as parts of the convolutions before them, for evaluation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import TypeGuard, cast, get_args

import torch
from torch import Tensor, nn

from segdcn.models.backbones import MobileNetV2
from segdcn.models.frozen import ConstantBatchNorm2d
from segdcn.models.heads import FPNHead
from segdcn.ops import DeformConv2d

Conv = nn.Conv2d | DeformConv2d
Norm = nn.BatchNorm2d | ConstantBatchNorm2d
Modules = Mapping[str, nn.Module | None]

PARTS = (MobileNetV2, FPNHead)
"""The light ones, which it makes faster (a ResNet's convolutions cost too much beside its norms), and in which nothing
looks between a convolution and its norm, as a network of somebody else's may.
"""


def folded(network: nn.Module) -> nn.Module:
    """What computes the same as ``network`` in evaluation mode, but for rounding, with fewer passes over the maps.

    On a CPU, a batch norm that follows a convolution in an ``nn.Sequential`` of one of ``PARTS`` is multiplied into its
    weights; not one in training mode, of a subclass, or where a hook wants to see what comes between. ``network`` stays
    as it is, and shares with what is returned all that has no such norm, offset branches among it. Made for one
    evaluation: weights that change later are not followed.
    """
    if any(parameter.device.type != "cpu" for parameter in network.parameters()):
        return network
    done: dict[tuple[nn.Module, bool], nn.Module] = {}

    def copied(module: nn.Module, ours: bool) -> nn.Module:
        if (module, ours) not in done:
            within = ours or isinstance(module, PARTS)
            children: dict[str, nn.Module | None] = {
                name: None if child is None else copied(child, within) for name, child in module._modules.items()
            }
            if within and type(module).forward is nn.Sequential.forward:
                children |= _fused_pairs(children)
            done[module, ours] = module if children == module._modules else _with_modules(module, children)
        return done[module, ours]

    return copied(network, ours=False)


def _with_modules(module: nn.Module, children: Modules) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(children)
    return twin


def _fused_pairs(children: Modules) -> Modules:
    fused: dict[str, nn.Module] = {}
    for first, second in pairwise(children):
        conv, norm = children[first], children[second]
        if _is_conv(conv) and _is_norm(norm):
            fused |= {first: _fused(conv, norm), second: nn.Identity()}
    return fused


def _is_conv(module: nn.Module | None) -> TypeGuard[Conv]:
    return isinstance(module, Conv) and type(module) in get_args(Conv) and not _has_hooks(module)


def _is_norm(module: nn.Module | None) -> TypeGuard[Norm]:
    if not isinstance(module, Norm) or type(module) not in get_args(Norm) or _has_hooks(module):
        return False
    constant = isinstance(module, ConstantBatchNorm2d)  # in training mode too
    return constant or (not module.training and module.running_var is not None)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@torch.no_grad()
def _fused(conv: Conv, norm: Norm) -> Conv:
    """The convolution of which ``norm`` is a part: both are linear in what the other one has."""
    dtype = conv.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    factor = (variance.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    bias = (-mean if conv.bias is None else conv.bias - mean) * factor
    if norm.bias is not None:
        bias = bias + norm.bias
    weight = conv.weight * factor[:, None, None, None]
    fused = copy.copy(conv)
    fused._parameters = dict(conv._parameters)
    fused.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    fused.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return fused
