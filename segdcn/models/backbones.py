"""Backbones: classification networks cut before their classifier and dilated to an output stride.

Legend: N batch, C channels, H x W input pixels.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from segdcn.errors import MissingFileError, UserError, first_line
from segdcn.models.features import Backbone, Features
from segdcn.models.internimage import CLASSIFIER, VARIANTS, InternImage
from segdcn.models.weights import Weights, load_strictly, read_weights, torchvision_imagenet_file

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BACKBONES = ("resnet_tiny", *RESNETS, "mobilenet_v2", *VARIANTS)
OUTPUT_STRIDES = (8, 16, 32)


class ResNet(Backbone):
    """A residual network of four stages (module names as in torchvision)."""

    stages = (("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",))

    def __init__(
        self,
        conv1: nn.Conv2d,
        bn1: nn.BatchNorm2d,
        maxpool: nn.Module,
        stages: Sequence[nn.Sequential],
        channels: tuple[int, int, int, int],
        output_stride: int,
    ) -> None:
        super().__init__(channels, output_stride)
        self.conv1, self.bn1, self.relu, self.maxpool = conv1, bn1, nn.ReLU(inplace=True), maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

    def forward(self, image: Tensor) -> Features:
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        low = self.layer1(x)
        second = self.layer2(low)
        middle = self.layer3(second)
        return Features(low, second, middle, self.layer4(middle))


class MobileNetV2(Backbone):
    """MobileNetV2 up to its last 3x3 convolution, 320 channels (module names as in torchvision)."""

    stages = tuple(
        tuple(f"features.{number}" for number in range(start, end))
        for start, end in ((0, 4), (4, 7), (7, 14), (14, 18))
    )

    def __init__(self, features: nn.Sequential, output_stride: int) -> None:
        super().__init__((24, 32, 96, 320), output_stride)
        self.features = features[:18]
        _replace_stride(self.features[7:14], self.features[14:], output_stride)

    def forward(self, image: Tensor) -> Features:
        low = self.features[:4](image)
        second = self.features[4:7](low)
        middle = self.features[7:14](second)
        return Features(low, second, middle, self.features[14:](middle))


class TimmBackbone(Backbone):
    """Any timm network that offers feature maps at a chosen output stride."""

    def __init__(
        self, network: nn.Module, channels: tuple[int, int, int, int], output_stride: int, low_index: int
    ) -> None:
        super().__init__(channels, output_stride)
        self.network = network
        self.low_index = low_index

    def forward(self, image: Tensor) -> Features:
        maps = self.network(image)
        return Features(maps[self.low_index], maps[self.low_index + 1], maps[-2], maps[-1])


def build_backbone(
    name: str, output_stride: int, weights: str | Weights | None = None, torchvision_dilation: bool = False
) -> Backbone:
    """A backbone by name: one of BACKBONES, or ``timm/NAME``.

    output_stride: 8, 16 or 32 input pixels per pixel of the last feature map. A stage that loses its stride
    has every 3x3 convolution dilated instead: rate 2 in the last stage at 16; 2, then 4 in the last two at 8.
    weights: ``imagenet``, a file for ``read_weights`` or what that found, with torchvision's (or timm's) names, or None
    for random.
    torchvision_dilation: the first block of a dilated stage keeps the rate of the stage before, as in
    torchvision's ``replace_stride_with_dilation``, with which its DeepLab weights were trained (resnet50, 101
    and 152 only).

    Raises: ValueError or FileNotFoundError, one line, for a wrong setting or weights that are missing or do
    not fit.
    Source: Dai et al. 2017, section 2.3 (stride 32 -> 16); Chen et al. 2017 (DeepLabv3), section 3.1.
    """
    if output_stride not in OUTPUT_STRIDES:
        raise UserError(f"output_stride must be 8, 16 or 32, got {output_stride}")
    if torchvision_dilation and name not in ("resnet50", "resnet101", "resnet152"):
        raise UserError(f"torchvision_dilation needs resnet50, resnet101 or resnet152, got {name}")
    if name.startswith("timm/"):
        return _build_timm(name.removeprefix("timm/"), output_stride, weights)
    if name == "resnet_tiny":
        return _build_resnet_tiny(output_stride, weights)
    if name in VARIANTS:
        return _build_internimage(name, output_stride, weights)
    if name not in BACKBONES:
        raise UserError(f"no backbone {name!r}; there are {', '.join(_closest_first(name, BACKBONES))} and timm/NAME")

    whole = torchvision.models.get_model(name, weights=None)
    if name == "mobilenet_v2":
        backbone: Backbone = MobileNetV2(whole.features, output_stride)
    else:
        width = whole.fc.in_features
        stages = (whole.layer1, whole.layer2, whole.layer3, whole.layer4)
        channels = (width // 8, width // 4, width // 2, width)
        _replace_stride(whole.layer3, whole.layer4, output_stride, torchvision_dilation)
        backbone = ResNet(whole.conv1, whole.bn1, whole.maxpool, stages, channels, output_stride)
    if weights is not None:
        found = torchvision_imagenet_file(name) if weights == "imagenet" else weights
        load_strictly(backbone, _read(found), classifier_names=whole.state_dict().keys())
    return backbone


def _read(weights: str | Path | Weights) -> Weights:
    return weights if isinstance(weights, Weights) else read_weights(weights)


def _replace_stride(
    layer3: nn.Module, layer4: nn.Module, output_stride: int, torchvision_dilation: bool = False
) -> None:
    """Take the stride out of the stages that lie beyond the output stride, and dilate them instead."""
    rate = 1
    for stage, stride in ((layer3, 16), (layer4, 32)):
        if stride > output_stride:
            _dilate(stage, 2 * rate)
            if torchvision_dilation:
                _dilate(next(stage.children()), rate)
            rate *= 2


def _dilate(stage: nn.Module, rate: int) -> None:
    # Set on the built modules: torchvision itself dilates no BasicBlock, and each first block too little.
    for conv in stage.modules():
        if isinstance(conv, nn.Conv2d):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (rate, rate)


def _build_resnet_tiny(output_stride: int, weights: str | Weights | None) -> ResNet:
    """A residual network for a CPU, about 0.5 M parameters: one block a stage, never dilated.

    Dilation preserves what pretrained filters expect where a stride is taken out; this network has none.
    """
    backbone = ResNet(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.Identity(),  # the first stage is strided instead of a pooling
        [
            nn.Sequential(_block(32, 32, stride=2)),
            nn.Sequential(_block(32, 48, stride=2)),
            nn.Sequential(_block(48, 96, stride=2 if output_stride >= 16 else 1)),
            nn.Sequential(_block(96, 128, stride=2 if output_stride >= 32 else 1)),
        ],
        (32, 48, 96, 128),
        output_stride,
    )
    for module in backbone.modules():  # as torchvision initialises its own
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if weights == "imagenet":
        raise UserError("resnet_tiny has no ImageNet weights; set model.weights=null or a path")
    if weights is not None:
        load_strictly(backbone, _read(weights))
    return backbone


def _block(channels_in: int, channels_out: int, stride: int) -> BasicBlock:
    shortcut = nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
    )
    return BasicBlock(channels_in, channels_out, stride=stride, downsample=shortcut)


def _build_internimage(name: str, output_stride: int, weights: str | Weights | None) -> InternImage:
    if weights == "imagenet":
        raise UserError(
            f"{name} has no ImageNet weights that could be fetched here: set model.weights to the authors' file, such"
            " as internimage_t_1k_224.pth, or to null"
        )
    backbone = InternImage(VARIANTS[name], output_stride)
    if weights is not None:
        read = _read(weights)
        load_strictly(backbone, read, [key for key in read.tensors if key.startswith(CLASSIFIER)])
    return backbone


def _build_timm(name: str, output_stride: int, weights: str | Weights | None) -> TimmBackbone:
    try:
        import timm  # here: an optional package
    except ImportError as error:
        raise UserError(f'backbone timm/{name} needs timm: pip install "segdcn[timm]"') from error
    if not timm.is_model(name):
        known = ", ".join(_closest_first(name, timm.list_models())[:5])
        raise UserError(f"timm has no network {name!r}; the closest names are {known}")
    try:
        with _warnings_off("timm", "huggingface_hub"):
            network: Any = timm.create_model(
                name, pretrained=weights == "imagenet", features_only=True, output_stride=output_stride
            )
    except OSError as error:
        raise MissingFileError(
            f"weights of timm/{name} are not in the local Hugging Face cache and their download failed; "
            "set model.weights=PATH to a local state dict, or null"
        ) from error
    except (TypeError, RuntimeError, NotImplementedError, AssertionError) as error:
        raise UserError(
            f"timm/{name} gives no features at output_stride {output_stride}: {first_line(error)}"
        ) from error

    channels, strides = network.feature_info.channels(), network.feature_info.reduction()
    if strides[-1] != output_stride or 4 not in strides:
        raise UserError(
            f"timm/{name} has feature maps at strides {strides}; stride 4 and output_stride {output_stride} are needed"
        )
    low = len(strides) - 1 - strides[::-1].index(4)
    if weights is not None and weights != "imagenet":
        whole = set(timm.create_model(name).state_dict())  # not on "meta": some compute with values while being built
        # timm flattens some networks for features_only: stages.0.weight becomes stages_0.weight
        own = {key.replace(".", "_"): key for key in network.state_dict()}
        read = _read(weights)
        tensors = {own.get(key.replace(".", "_"), key): value for key, value in read.tensors.items()}
        load_strictly(network, Weights(read.source, tensors), classifier_names=whole)
    return TimmBackbone(network, (channels[low], channels[low + 1], channels[-2], channels[-1]), output_stride, low)


@contextmanager
def _warnings_off(*loggers: str) -> Iterator[None]:
    # timm reports each dropped classifier tensor, the hub each of its retries: a user needs the outcome only
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _closest_first(name: str, names: Collection[str]) -> list[str]:
    return sorted(names, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
