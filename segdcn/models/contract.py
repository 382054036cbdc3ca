"""What a network must be, whoever wrote it: images (N, 3, H, W) -> logits (N, K, H, W).

Legend: N images, K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from segdcn.errors import UserError
from segdcn.models.deeplab import DeepLab
from segdcn.models.heads import BIGGER_BATCH
from segdcn.models.shapes import in_mode, run_on_shapes

Size = tuple[int, int]
"""(H, W)"""


def giving_logits(network: Any) -> nn.Module:
    """The network; where its output is a mapping of nothing but "out", as torchvision's, it gives that from now on.

    A hook, no wrapper: the names of its parts and weights stay.

    Raises: UserError, one line: it is no ``nn.Module``, or one of torchvision's detectors.
    """
    module = checked_module(network)
    if type(module).__module__.startswith("torchvision.models.detection"):
        raise UserError(f"{_name(network)} finds boxes and gives no logits: it is no network for segmentation")
    if not isinstance(module, DeepLab):
        module.register_forward_hook(_only_out)
    return module


def checked_module(network: Any) -> nn.Module:
    """The network. Raises: UserError, one line: it is no ``nn.Module``."""
    if not isinstance(network, nn.Module):
        raise UserError(
            f"the network must be a torch.nn.Module, got {_kind(network)}: model must name one, or a function that"
            " makes one"
        )
    return network


def _only_out(network: nn.Module, inputs: Any, output: Any) -> Any:
    return output["out"] if isinstance(output, Mapping) and set(output) == {"out"} else output


def check_logits(
    network: nn.Module,
    num_classes: int,
    training: tuple[int, Size],
    evaluation: Iterable[Size],
    device: torch.device | None = None,
) -> None:
    """Refuse a network that cannot be trained and evaluated here, before anything is trained.

    By shapes alone where the network lets itself be run on them, else by a run for an image of zeros.

    num_classes: K, of the data set.
    training: how many images, and of which size, it is given in a training step.
    evaluation: sizes of single images.
    device: for runs with values; None is the CPU.

    Raises: UserError, one line: what the network gives, or what it raises.
    """
    for size in dict.fromkeys([training[1], *evaluation]):
        try:
            output = run_on_shapes(network, (1, 3, *size))
        except Exception:  # it wants values, or cannot do with this size at all
            output = _run(network, size, device)
        _check(network, output, num_classes, (1, *size))
    batch, size = training
    try:
        output = run_on_shapes(network, (batch, 3, *size), training=True)
    except UserError:
        raise
    except Exception as error:
        if "more than 1 value per channel" in str(error):  # a batch norm's words
            raise UserError(
                f"{_name(network)} has a batch norm of a single value per channel, such as behind a global pooling,"
                f" which cannot train on a batch of one image: {BIGGER_BATCH}"
            ) from error
        return  # only with values, which would change its statistics: the first step will tell
    _check(network, output, num_classes, (batch, *size))


def _run(network: nn.Module, size: Size, device: torch.device | None) -> Any:
    before = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    dtype = next((tensor.dtype for tensor in network.parameters()), torch.float32)
    device = device or before
    generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        with in_mode(network, training=False), torch.no_grad(), generators:
            return network.to(device)(torch.zeros(1, 3, *size, dtype=dtype, device=device))
    except Exception as error:
        raise UserError(
            f"{_name(network)} cannot do with an image of {size[0]}x{size[1]} pixels (height x width):"
            f" {type(error).__name__}: {' '.join(str(error).split())} (HYDRA_FULL_ERROR=1 shows where)"
        ) from error
    finally:
        network.to(before)


def _check(network: nn.Module, output: Any, num_classes: int, images: tuple[int, int, int]) -> None:
    count, height, width = images
    if not isinstance(output, Tensor) or output.ndim != 4 or len(output) != count:
        raise UserError(
            f"{_name(network)} gives {_kind(output)} for images {(count, 3, height, width)}: a network must give"
            f" logits, a tensor (N, K, H, W), here {(count, num_classes, height, width)}, or a mapping of them under"
            " 'out' alone"
        )
    if output.shape[1] != num_classes:
        raise UserError(
            f"{_name(network)} gives logits of {output.shape[1]} classes, but the data set has {num_classes}: it must"
            " make as many as its argument num_classes says"
        )
    if output.shape[2:] != (height, width):
        raise UserError(
            f"{_name(network)} gives logits of {output.shape[2]}x{output.shape[3]} pixels for an image of"
            f" {height}x{width} (height x width): enlarge them at its end, such as by"
            " F.interpolate(logits, image.shape[-2:], mode='bilinear')"
        )


def _name(network: nn.Module) -> str:
    return f"the network {type(network).__name__}"


def _kind(output: Any) -> str:
    """What something is, in a few words."""
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a mapping of {', '.join(map(str, output))}"
    return f"a {type(output).__name__}"
