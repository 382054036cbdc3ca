"""Parts of a pretrained backbone that do not learn: its batch norms as constants, its first stages whole.

Legend: N batch, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from segdcn.errors import UserError
from segdcn.models.features import Backbone


class ConstantBatchNorm2d(FrozenBatchNorm2d):  # type: ignore[misc]
    """A batch norm as a constant map per channel: statistics, factor and shift are buffers, in training too.

    torchvision's, whose names in a state dict are those of ``nn.BatchNorm2d`` (a batch counter in a file is passed
    over), but in one pass over the input instead of two, and a half-precision input stays in half precision.

    Shape: (N, C, H, W) -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    @classmethod
    def from_norm(cls, norm: nn.BatchNorm2d) -> ConstantBatchNorm2d:
        """What ``norm`` computes in evaluation mode."""
        constant: ConstantBatchNorm2d = cls(norm.num_features, norm.eps).to(norm.weight.device, norm.weight.dtype)
        constant.load_state_dict(norm.state_dict())
        return constant


def freeze_batch_norm(network: nn.Module, parts: Sequence[str] = ("",)) -> list[str]:
    """Replace the batch norms of a network by constants, in place; return their names.

    ``network.train()`` does not bring them back. Meant for pretrained weights, whose statistics are worth keeping:
    those of a random start are 0 and 1 and would normalise nothing.

    parts: names of the submodules to which it is limited; "" is the whole network.

    Raises: ValueError, before anything is changed, for a kind of batch norm that computes something else as well
    (timm has such), or without affine parameters or running statistics.
    Source: the code of Dai et al. 2017, where statistics, factor and shift of all batch norms are fixed.
    """
    found = {
        name: norm
        for name, norm in network.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and any(part in ("", name) or name.startswith(f"{part}.") for part in parts)
    }
    plain: dict[str, nn.BatchNorm2d] = {}
    for name, norm in found.items():
        if type(norm) is not nn.BatchNorm2d or not norm.affine or not norm.track_running_stats:
            kind = type(norm).__name__
            raise UserError(
                f"cannot freeze {name}: it is a {kind}, not a plain nn.BatchNorm2d with affine parameters and running"
                " statistics; set model.frozen_batch_norm=false and model.frozen_stages=0"
            )
        plain[name] = norm
    for name, norm in plain.items():
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, ConstantBatchNorm2d.from_norm(norm))
    return list(plain)


def freeze_stages(backbone: Backbone, stages: int) -> None:
    """Let the first stages of a backbone learn nothing, in place: neither weights nor batch statistics.

    Offset branches that ``make_deformable`` adds to a frozen stage afterwards are new, and learn.

    stages: 1 is the stem and the first stage, up to stride 4; each further one reaches to the end of the next stage.

    Raises: ValueError for a number out of range, or a backbone whose stages are not known (timm's).
    Source: 1 is what the code of Dai et al. 2017 freezes (conv1 and res2).
    """
    if not 0 <= stages <= len(backbone.stages):
        known = f"has {len(backbone.stages)}" if backbone.stages else "does not name its stages"
        raise UserError(
            f"cannot freeze {stages} stages, since the backbone {known}: set model.frozen_stages to 0"
            + (f" to {len(backbone.stages)}" if backbone.stages else "")
        )
    for names in backbone.stages[:stages]:
        freeze_batch_norm(backbone, names)
        for name in names:
            backbone.get_submodule(name).requires_grad_(False)
