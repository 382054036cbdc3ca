"""What every operator asks of its arguments before any kernel runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

IntPair = int | tuple[int, int]


def two(value: IntPair) -> tuple[int, int]:
    """One number for both axes, or one for each, as (vertical, horizontal)."""
    return cast(tuple[int, int], tuple(_pair(value)))


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast would give a convolution's features, or None where it leaves them alone."""
    device = input.device.type
    if input.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):  # meta has none
        return None
    return torch.get_autocast_dtype(device)


def check_tensors(
    input: Tensor, like_input: Mapping[str, Tensor | None], floating: Mapping[str, Tensor | None]
) -> None:
    """All on the device of ``input``, which is floating; the first mapping of its dtype, the second of any floating.

    Raises: ValueError that names the argument, what it got and what it expects.
    """
    if not input.is_floating_point():
        raise ValueError(f"input must be floating point, got {input.dtype}")
    for name, tensor in {**like_input, **floating}.items():
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on input's device {input.device}, got {tensor.device}")
        if name in like_input and tensor.dtype != input.dtype:
            raise ValueError(f"{name} must have input's dtype {input.dtype}, got {tensor.dtype}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
