"""What learns how fast: parameter groups by role, and learning-rate schedules stepped per iteration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from segdcn.errors import UserError
from segdcn.models import Backbone
from segdcn.ops import DeformConv2d

ADAMW = partial(AdamW, lr=1e-3, weight_decay=1e-4)
"""The optimizer of a task that is given none; takes parameter groups."""


def parameter_groups(
    network: nn.Module,
    backbone_lr_mult: float = 1.0,
    offset_lr_mult: float = 0.1,
    layer_lr_decay: float = 1.0,
    others: Iterable[tuple[str, float, Iterable[nn.Parameter]]] = (),
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer; each carries the factor ``lr_mult`` on the optimizer's learning rate.

    | role     | parameters                                  | learning rate      | weight decay           |
    |----------|---------------------------------------------|--------------------|------------------------|
    | offset   | a DeformConv2d's offset (and mask) branch   | x offset_lr_mult   | none                   |
    | backbone | the rest of ``network.backbone``            | x backbone_lr_mult | none for norms, biases |
    | head     | everything else                             | x 1                | none for norms, biases |

    Offset branches learn slowly because one offset gathers the gradients of all channels; at the full rate small
    networks fail to train. They are not decayed, since zero is no better an offset than another. The branches of DCNv3
    and DCNv4 are weights like others here, as their authors train them.

    layer_lr_decay: a further factor on the backbone's learning rates, once for its last layer and once more for each
    layer before. ``Backbone.lr_layers`` says what a layer is: a block of InternImage, a stage of other networks.

    others: further roles, their factors and parameters; one whose name ends in "offset" is treated as offset is.

    Raises: UserError for a network in which nothing learns, and for layer_lr_decay outside 0..1 or with a backbone
    that does not name its layers.
    Source: Bao et al. 2022 (BEiT); counted as in InternImage's code, which has 0.94 for L and XL, 1 for T, S and B.
    """
    in_layer = _layers_of_parameters(network, layer_lr_decay) if layer_lr_decay != 1 else {}
    branches = [module.offset for module in network.modules() if isinstance(module, DeformConv2d)]
    offsets = ("offset", offset_lr_mult, [parameter for branch in branches for parameter in branch.parameters()])
    of_role = {id(parameter): (role, mult) for role, mult, members in (offsets, *others) for parameter in members}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        place = ("backbone", backbone_lr_mult) if name.startswith("backbone.") else ("head", 1.0)
        role, lr_mult = of_role.get(id(parameter), place)
        is_offset = role.endswith("offset")
        decayed = parameter.ndim > 1 and not is_offset
        layer, below = in_layer.get(id(parameter), ("", 0))
        role += layer if decayed or is_offset else f"{layer}_no_decay"
        group = groups.setdefault(role, {"name": role, "params": [], "lr_mult": lr_mult * layer_lr_decay**below})
        if not decayed:
            group["weight_decay"] = 0.0
        group["params"].append(parameter)
    if not groups:
        raise UserError("the network has no parameter that learns")
    return list(groups.values())


def _layers_of_parameters(network: nn.Module, decay: float) -> dict[int, tuple[str, int]]:
    """Of each of the backbone's parameters, by id: its layer in words, and how many layers it lies below the head."""
    if not 0 < decay < 1:
        raise UserError(f"layer_lr_decay must be above 0 and at most 1, got {decay}")
    backbone = getattr(network, "backbone", None)
    layers = backbone.lr_layers if isinstance(backbone, Backbone) else ()
    found = {
        id(parameter): (f"_layer{number}", len(layers) - number)
        for number, names in enumerate(layers)
        for name in names
        for parameter in network.get_submodule(f"backbone.{name}").parameters()
    }
    if backbone is None or not all(id(parameter) in found for parameter in backbone.parameters()):
        kind = "" if backbone is None else f", which {type(backbone).__name__} does not"
        raise UserError(
            f"layer_lr_decay={decay} needs a backbone that names the layers of all its parameters{kind}: set"
            " task.layer_lr_decay=1.0"
        )
    return found


def poly(optimizer: Optimizer, total_steps: int | None, power: float = 0.9, warmup_steps: int = 0) -> LRScheduler:
    """lr x (1 - step / total_steps) ** power after a linear warm-up; DeepLab's schedule (Chen et al. 2017, 4.1)."""
    length = _known(total_steps, "poly")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return math.pow(max(0.0, 1 - step / length), power)

    return LambdaLR(optimizer, factor)


def one_cycle(optimizer: Optimizer, total_steps: int | None, warmup_share: float = 0.2) -> LRScheduler:
    """From lr / 25 up to lr within the first ``warmup_share`` of the steps, then down to almost zero, by cosines.

    The curve of torch's ``OneCycleLR``, whose checkpoints however insist on the number of steps they began with.
    """
    if not 0 <= warmup_share < 1:
        raise UserError(f"warmup_share must be at least 0 and below 1, got {warmup_share}")
    length = _known(total_steps, "one_cycle")
    peak, last = warmup_share * length - 1, length - 1

    def factor(step: int) -> float:
        if step < peak:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 25e4, min(1.0, (step - peak) / (last - peak)))

    return LambdaLR(optimizer, factor)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def step(
    optimizer: Optimizer,
    total_steps: int | None,
    drops: Sequence[float] = (2 / 3,),
    factor: float = 0.1,
    warmup_steps: int = 0,
    warmup_factor: float = 0.1,
) -> LRScheduler:
    """The learning rate times ``factor`` from each of some points of the run on.

    drops: those points as shares of ``total_steps``, rounded to whole steps.
    warmup_steps: so many steps at the start have ``warmup_factor`` times the learning rate instead.

    Raises: ValueError for a share outside 0..1, or factors or steps that are not positive (warmup_steps: negative).
    Source: Dai et al. 2017, section 4.1 (x 0.1 for the last third); the warm-up is of the authors' code for
    Cityscapes (1,000 steps at a tenth).
    """
    if not all(0 < share < 1 for share in drops):
        raise UserError(f"schedule.drops must be shares of the run between 0 and 1, got {list(drops)}")
    if factor <= 0 or warmup_factor <= 0 or warmup_steps < 0:
        raise UserError(
            "schedule.factor and schedule.warmup_factor must be positive and schedule.warmup_steps 0 or more, got"
            f" {factor}, {warmup_factor} and {warmup_steps}"
        )
    length = _known(total_steps, "step")
    first_steps = [round(share * length) for share in drops]

    def multiplier(number: int) -> float:
        if number < warmup_steps:
            return warmup_factor
        return math.pow(factor, sum(number >= first for first in first_steps))

    return LambdaLR(optimizer, multiplier)


def constant(optimizer: Optimizer, total_steps: int | None) -> LRScheduler:
    """The learning rate as it is given."""
    return LambdaLR(optimizer, lambda step: 1.0)


def _known(total_steps: int | None, schedule: str) -> int:
    if total_steps is None:
        raise UserError(
            f"schedule={schedule} needs the length of the training: give trainer.max_steps or trainer.max_epochs, or"
            " take schedule=constant"
        )
    if total_steps < 1:
        raise UserError(f"a training of {total_steps} steps has no schedule: give trainer.max_steps or max_epochs")
    return total_steps
