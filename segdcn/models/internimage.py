"""InternImage and FlashInternImage: backbones of DCNv3 and DCNv4 layers.

The names of the parameters are the authors' (OpenGVLab/InternImage, OpenGVLab/DCNv4), whose files load as they are.

Legend: N batch, H x W input pixels, C channels of the first stage. Maps within are channels last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from segdcn.errors import UserError
from segdcn.models.features import Backbone, Features
from segdcn.ops import DCNv3, DCNv4
from segdcn.ops.aggregate_layers import ChannelsLast

# what the authors' files for classification hold behind the backbone
CLASSIFIER = ("conv_head.", "head.", "dcnv3_head_", "clip_projector.", "fc_norm.")


@dataclass(frozen=True)
class Variant:
    """What makes a published network.

    channels: of the first stage, twice as many in each further one; depths, groups: of the four stages.
    drop_path: probability with which the last block is left out in training, less for earlier ones.
    flash: DCNv4 in the place of DCNv3.  offset_scale, dw_kernel_size: of these layers.
    layer_scale: whether a learned factor per channel stands before each sum.
    post_norm: norms behind layer and MLP instead of before; res_post_norm: both.
    norms_within: blocks of the third stage that have another norm behind them.
    center_feature_scale: see ``DCNv3``.
    biases: of the last linear map in layer and MLP.
    """

    channels: int
    depths: tuple[int, int, int, int]
    groups: tuple[int, int, int, int]
    drop_path: float
    flash: bool = False
    offset_scale: float = 1.0
    dw_kernel_size: int | None = None
    layer_scale: bool = True
    post_norm: bool = False
    res_post_norm: bool = False
    norms_within: tuple[int, ...] = ()
    center_feature_scale: bool = False
    biases: bool = True


# The authors' configurations for UperNet on ADE20K, by which the drop rates differ from those on ImageNet.
VARIANTS = {
    "internimage_t": Variant(64, (4, 4, 18, 4), (4, 8, 16, 32), 0.2),
    "internimage_s": Variant(80, (4, 4, 21, 4), (5, 10, 20, 40), 0.3, post_norm=True),
    "internimage_b": Variant(112, (4, 4, 21, 4), (7, 14, 28, 56), 0.4, post_norm=True),
    "internimage_l": Variant(160, (5, 5, 22, 5), (10, 20, 40, 80), 0.4, offset_scale=2.0, post_norm=True),
    "internimage_xl": Variant(192, (5, 5, 24, 5), (12, 24, 48, 96), 0.4, offset_scale=2.0, post_norm=True),
    "internimage_h": Variant(
        320,
        (6, 6, 32, 6),
        (10, 20, 40, 80),
        0.5,
        dw_kernel_size=5,
        layer_scale=False,
        res_post_norm=True,
        norms_within=(5, 11, 17, 23, 29),
        center_feature_scale=True,
    ),
    "flash_internimage_t": Variant(64, (4, 4, 18, 4), (4, 8, 16, 32), 0.2, flash=True, biases=False),
    "flash_internimage_s": Variant(
        80, (4, 4, 21, 4), (5, 10, 20, 40), 0.3, flash=True, dw_kernel_size=3, post_norm=True, biases=False
    ),
    "flash_internimage_b": Variant(
        112,
        (4, 4, 21, 4),
        (7, 14, 28, 56),
        0.3,
        flash=True,
        offset_scale=0.5,
        dw_kernel_size=3,
        post_norm=True,
        biases=False,
    ),
    "flash_internimage_l": Variant(
        160, (5, 5, 22, 5), (10, 20, 40, 80), 0.4, flash=True, offset_scale=2.0, dw_kernel_size=3, post_norm=True
    ),
}


class InternImage(Backbone):
    """A stem of stride 4, then four stages of blocks, each a deformable layer and an MLP.

    Shape: (N, 3, H, W) -> Features of strides 4, 8, 16 and 32.
    Raises: UserError for another output stride than 32: the authors have none.
    Source: Wang et al. 2023 (InternImage), section 3.2; Xiong et al. 2024 (DCNv4), section 3.3.
    """

    def __init__(self, variant: Variant, output_stride: int = 32) -> None:
        if output_stride != 32:
            raise UserError(f"InternImage has output stride 32 alone, got {output_stride}: set model.output_stride=32")
        channels = [variant.channels * 2**number for number in range(4)]
        super().__init__((channels[0], channels[1], channels[2], channels[3]), output_stride)
        self.variant = variant
        self.patch_embed = _Stem(channels[0])
        blocks = sum(variant.depths)
        rates = [variant.drop_path * number / (blocks - 1) for number in range(blocks)]
        ends = [sum(variant.depths[: number + 1]) for number in range(4)]
        levels = [
            _Level(variant, number, rates[end - depth : end])
            for number, (depth, end) in enumerate(zip(variant.depths, ends, strict=True))
        ]
        self.levels = nn.ModuleList(levels)
        self.stages = tuple(
            (
                *(("patch_embed",) if number == 0 else (f"levels.{number - 1}.downsample",)),
                *(f"levels.{number}.{name}" for name in dict(level.named_children()) if name != "downsample"),
            )
            for number, level in enumerate(levels)
        )
        for module in self.modules():
            if isinstance(module, _MLP):
                for layer in (module.fc1, module.fc2):
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    @property
    def lr_layers(self) -> tuple[tuple[str, ...], ...]:
        """The stem, then the blocks of all stages; what lies between blocks is part of one as the authors count.

        Norm and downsampling behind a stage are of the next stage's first block, but the last stage's norm is of its
        own first block, and the norms among the blocks of a third stage are of its first blocks, in their order.
        """
        layers = [["patch_embed"]]
        behind: list[str] = []
        for number, depth in enumerate(self.variant.depths):
            blocks = [[f"levels.{number}.blocks.{block}"] for block in range(depth)]
            blocks[0] += behind
            behind = [f"levels.{number}.norm", f"levels.{number}.downsample"]
            if number == 2:
                for norm in range(len(self.variant.norms_within)):
                    blocks[norm].append(f"levels.2.post_norms.{norm}")
            if number == 3:
                blocks[0] += behind
            layers += blocks
        return tuple(map(tuple, layers))

    def forward(self, image: Tensor) -> Features:
        x = self.patch_embed(image)
        maps: list[Tensor] = []
        for level in self.levels:
            stage, x = level(x)
            maps.append(stage.permute(0, 3, 1, 2).contiguous())
        return Features(*maps)


class _Stem(nn.Module):
    """(N, 3, H, W) -> (N, H/4, W/4, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(ChannelsLast(), _norm(channels // 2))
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(ChannelsLast(), _norm(channels))

    def forward(self, image: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(image)))
        stem: Tensor = self.norm2(self.conv2(x.permute(0, 3, 1, 2)))
        return stem


class _Downsample(nn.Module):
    """(N, H, W, C) -> (N, H/2, W/2, 2C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.Sequential(ChannelsLast(), _norm(2 * channels))

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.norm(self.conv(x.permute(0, 3, 1, 2)))
        return halved


class _Level(nn.Module):
    """A stage: its blocks, and the norms among and behind them; gives its map, and the halved one for the next."""

    def __init__(self, variant: Variant, number: int, drop_path: list[float]) -> None:
        super().__init__()
        channels = variant.channels * 2**number
        self.blocks = nn.ModuleList(_Block(variant, channels, variant.groups[number], rate) for rate in drop_path)
        last = [_norm(channels)] if not variant.post_norm or variant.center_feature_scale else []
        self.norm = nn.Sequential(*last)
        self.norms_within = variant.norms_within if number == 2 else ()
        if self.norms_within:
            self.post_norms = nn.ModuleList(nn.Sequential(_norm(channels)) for _ in self.norms_within)
        self.downsample = _Downsample(channels) if number < 3 else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.norms_within:
                x = self.post_norms[self.norms_within.index(number)](x)
        stage = self.norm(x)
        return stage, self.downsample(stage)


class _Block(nn.Module):
    """A deformable layer and an MLP, each added to what it is given."""

    def __init__(self, variant: Variant, channels: int, group: int, drop_path: float) -> None:
        super().__init__()
        self.post_norm = variant.post_norm
        self.norm1, self.norm2 = nn.Sequential(_norm(channels)), nn.Sequential(_norm(channels))
        self.dcn: DCNv3 | DCNv4
        if variant.flash:
            self.dcn = DCNv4(
                channels,
                group=group,
                offset_scale=variant.offset_scale,
                dw_kernel_size=variant.dw_kernel_size,
                output_bias=variant.biases,
            )
        else:
            self.dcn = DCNv3(
                channels,
                group=group,
                offset_scale=variant.offset_scale,
                dw_kernel_size=variant.dw_kernel_size,
                center_feature_scale=variant.center_feature_scale,
            )
        self.drop_path = StochasticDepth(drop_path, "row")
        self.mlp = _MLP(channels, variant.biases)
        self.gamma1, self.gamma2 = (
            nn.Parameter(torch.ones(channels)) if variant.layer_scale else None for _ in range(2)
        )
        self.res_post_norm1, self.res_post_norm2 = (
            nn.Sequential(_norm(channels)) if variant.res_post_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self._added(x, self.dcn, self.norm1, self.res_post_norm1, self.gamma1)
        return self._added(x, self.mlp, self.norm2, self.res_post_norm2, self.gamma2)

    def _added(
        self, x: Tensor, layer: nn.Module, norm: nn.Module, last_norm: nn.Module, factor: Tensor | None
    ) -> Tensor:
        change: Tensor = last_norm(norm(layer(x)) if self.post_norm else layer(norm(x)))
        added: Tensor = x + self.drop_path(change if factor is None else factor * change)
        return added


class _MLP(nn.Module):
    def __init__(self, channels: int, last_bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * channels, channels, bias=last_bias)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(self.act(self.fc1(x)))
        return mixed


def _norm(channels: int) -> nn.LayerNorm:
    return nn.LayerNorm(channels, eps=1e-6)
