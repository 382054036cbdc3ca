"""Heads: from the backbone's features to class scores, each at its own stride.

Legend: N batch, C channels, h x w feature pixels, K classes. Every head maps Features to (N, K, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segdcn.errors import UserError
from segdcn.models.features import Features

ASPP_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}
BIGGER_BATCH = "set datamodule.batch_size=2 or more (and a datamodule.crop_size, where it is null)"


def resize(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, to an exact size, align_corners=False: the only resize of the networks."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class PaperHead(nn.Module):
    """The head of the deformable DeepLab: no context module, so that the deformation's effect stands alone.

    Shape: high (N, C, h, w) -> (N, K, h, w).
    Source: Dai et al. 2017, section 2.3; initial values N(0, 0.01) as in the authors' code.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int = 1024) -> None:
        super().__init__()
        self.fc6 = nn.Conv2d(in_channels, channels, 1)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.zeros_(parameter)

    def forward(self, features: Features) -> Tensor:
        logits: Tensor = self.classifier(F.relu(self.fc6(features.high)))
        return logits


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, three dilated 3x3 and, optionally, the mean of the whole map.

    Shape: (N, C, h, w) -> (N, channels, h, w).
    Raises: ValueError when it trains on a batch of one image, whose pooled vector has no batch statistics.
    Source: Chen et al. 2017 (DeepLabv3), section 3.3; module names and dropout as in torchvision.
    """

    def __init__(
        self, in_channels: int, rates: tuple[int, ...], channels: int = 256, image_pooling: bool = True
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList([_conv_bn_relu(in_channels, channels, 1)])
        self.convs.extend(_conv_bn_relu(in_channels, channels, 3, rate) for rate in rates)
        if image_pooling:
            self.convs.append(ImagePooling(in_channels, channels))
        self.project = nn.Sequential(*_conv_bn_relu(len(self.convs) * channels, channels, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        context: Tensor = self.project(torch.cat([conv(x) for conv in self.convs], dim=1))
        return context


class ImagePooling(nn.Sequential):
    """The mean of the map through a 1x1 convolution, spread over the map again."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *_conv_bn_relu(in_channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        norm = self[2]
        # the batch size last: looked at in evaluation, it would be fixed in an exported graph
        if isinstance(norm, nn.BatchNorm2d) and norm.training and len(x) == 1:
            raise UserError(
                "the head's image pooling cannot train on a batch of one image, whose mean has no batch statistics: set"
                f" model.image_pooling=false or model.head=paper, or {BIGGER_BATCH}"
            )
        size = x.shape[-2:]
        for layer in self:
            x = layer(x)
        return resize(x, size)


class ASPPHead(nn.Module):
    """The head of DeepLabv3: ASPP, one 3x3 convolution, classifier. The rates follow the output stride.

    image_pooling: the published networks have it.

    Shape: high (N, C, h, w) -> (N, K, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        output_stride: int,
        channels: int = 256,
        image_pooling: bool = True,
    ) -> None:
        super().__init__()
        self.aspp = ASPP(in_channels, ASPP_RATES[output_stride], channels, image_pooling)
        self.fuse = _conv_bn_relu(channels, channels, 3)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        logits: Tensor = self.classifier(self.fuse(self.aspp(features.high)))
        return logits


class V3PlusHead(nn.Module):
    """The encoder-decoder head of DeepLabv3+: ASPP context joined with fine features of stride 4.

    channels: of the ASPP and the decoder; fewer make it lighter. The fine features are reduced to 48.
    image_pooling: the published Cityscapes networks go without.

    Shape: low (N, C_low, H/4, W/4), high (N, C, h, w) -> (N, K, H/4, W/4).
    Source: Chen et al. 2018 (DeepLabv3+), section 3.1.
    """

    def __init__(
        self,
        in_channels: int,
        low_level_channels: int,
        num_classes: int,
        output_stride: int,
        channels: int = 256,
        image_pooling: bool = True,
    ) -> None:
        super().__init__()
        self.aspp = ASPP(in_channels, ASPP_RATES[output_stride], channels, image_pooling)
        self.reduce = _conv_bn_relu(low_level_channels, 48, 1)
        self.fuse = nn.Sequential(_conv_bn_relu(channels + 48, channels, 3), _conv_bn_relu(channels, channels, 3))
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        fine = self.reduce(features.low)
        context = resize(self.aspp(features.high), fine.shape[-2:])
        logits: Tensor = self.classifier(self.fuse(torch.cat([context, fine], dim=1)))
        return logits


class FPNHead(nn.Module):
    """The light decoder: a feature pyramid's top-down path, then one 3x3 convolution at stride 4.

    Each map through a 1x1 convolution to one width, from the coarsest on enlarged and added to the next finer one.

    channels: of the pyramid. The cost lies in the 3x3 convolution and grows with its square.

    Shape: low (N, C_low, H/4, W/4), middle, high -> (N, K, H/4, W/4).
    Source: Lin et al. 2017 (feature pyramid networks), section 3; Kirillov et al. 2019 (panoptic feature pyramids),
    whose semantic branch has convolutions at every level.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 64) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(each, channels, 1, bias=False) for each in in_channels)
        self.norm = nn.BatchNorm2d(channels)
        self.fuse = _conv_bn_relu(channels, channels, 3)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        maps = (features.low, features.middle, features.high)
        *finer, x = (convolve(each) for convolve, each in zip(self.lateral, maps, strict=True))
        for each in reversed(finer):
            x = resize(x, each.shape[-2:]) + each
        logits: Tensor = self.classifier(self.fuse(F.relu(self.norm(x))))
        return logits


class UPerHead(nn.Module):
    """The head of UperNet: pooled context joined with a feature pyramid over all four maps.

    The coarsest map and its means over 1, 2, 3 and 6 cells a side make the context; from it on each map, reduced to one
    width, is enlarged and added to the next finer one; all four, at the finest one's size, are joined.

    in_channels: of low, second, middle and high.  channels: width of everything.

    Shape: Features -> (N, K, H/4, W/4).
    Raises: UserError when it trains on a batch of one image, whose mean has no batch statistics.
    Source: Xiao et al. 2018 (UPerNet), section 3.1; widths and dropout as in mmsegmentation's UPerHead.
    """

    POOLED = (1, 2, 3, 6)

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 512) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pyramid = nn.ModuleList(
            nn.Sequential(_MeansOfCells(side), _conv_bn_relu(coarsest, channels, 1)) for side in self.POOLED
        )
        self.context = _conv_bn_relu(coarsest + len(self.POOLED) * channels, channels, 3)
        self.lateral = nn.ModuleList(_conv_bn_relu(each, channels, 1) for each in finer)
        self.smooth = nn.ModuleList(_conv_bn_relu(channels, channels, 3) for _ in finer)
        self.fuse = _conv_bn_relu(4 * channels, channels, 3)
        self.classifier = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))

    def forward(self, features: Features) -> Tensor:
        *finer, coarsest = features
        if self.training and len(coarsest) == 1:
            raise UserError(
                "the head upernet cannot train on a batch of one image, whose mean has no batch statistics:"
                f" {BIGGER_BATCH}, or take model.head=fpn"
            )
        pooled = [resize(pool(coarsest), coarsest.shape[-2:]) for pool in self.pyramid]
        maps = [lateral(each) for lateral, each in zip(self.lateral, finer, strict=True)]
        maps.append(self.context(torch.cat([coarsest, *pooled], dim=1)))
        for number in (2, 1, 0):
            maps[number] = maps[number] + resize(maps[number + 1], maps[number].shape[-2:])
        smooth = [layer(each) for layer, each in zip(self.smooth, maps[:3], strict=True)]
        size = smooth[0].shape[-2:]
        joined = torch.cat([smooth[0], *(resize(each, size) for each in (*smooth[1:], maps[3]))], dim=1)
        logits: Tensor = self.classifier(self.fuse(joined))
        return logits


class _MeansOfCells(nn.Module):
    """``nn.AdaptiveAvgPool2d(side)`` as two matrix products, which a graph for images of any size can hold.

    Shape: (N, C, h, w) -> (N, C, side, side).
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self._shares(size, x) for size in x.shape[-2:])
        return rows @ x @ columns.T

    def _shares(self, size: int, like: Tensor) -> Tensor:
        """(side, size): what each pixel counts in the mean of each cell; cells may overlap by a pixel."""
        cell = torch.arange(self.side, device=like.device)[:, None]
        first, end = cell * size // self.side, ((cell + 1) * size + self.side - 1) // self.side
        pixel = torch.arange(size, device=like.device)
        return ((pixel >= first) & (pixel < end)).to(like.dtype) / (end - first)

    def extra_repr(self) -> str:
        """How many cells a side."""
        return str(self.side)


def auxiliary_head(in_channels: int, num_classes: int, channels: int) -> nn.Sequential:
    """The FCN head that learns beside UPerHead: (N, C, h, w) -> (N, K, h, w)."""
    return nn.Sequential(
        _conv_bn_relu(in_channels, channels, 3), nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1)
    )


def _conv_bn_relu(in_channels: int, channels: int, kernel_size: int, rate: int = 1) -> nn.Sequential:
    padding = rate * (kernel_size // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, padding=padding, dilation=rate, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )
