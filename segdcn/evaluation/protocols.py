"""Evaluation protocols by name: at which size predictions meet the truth, and what an absent class counts.

Legend: N images, K classes, H x W pixels. A figure is comparable with others of its protocol only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from numpy.typing import NDArray
from torch import Tensor

from segdcn.errors import UserError
from segdcn.inference.windows import Size, resize


@runtime_checkable
class CityscapesLike(Protocol):
    """What a data set offers for the figures and files that only Cityscapes has."""

    @property
    def categories(self) -> Mapping[str, Sequence[str]]:
        """Category → names of its classes."""
        ...

    @property
    def label_ids(self) -> Sequence[int]:
        """The id in Cityscapes' files of each of the K classes."""
        ...

    def instances(self, split: str) -> Sequence[NDArray[Any]] | None:
        """The instance map of each image of a split, numbered as in instanceIds files; None where the data has none."""
        ...


@dataclass(frozen=True)
class EvaluationProtocol:
    """How the predictions of a split become figures.

    Args:
        name: as on the command line.
        rule: in words, for metrics.json.
        num_classes: how many classes the protocol is defined for; None for any.
        short_side, long_side: the image is resized until its shorter side has ``short_side`` pixels, less where
            its longer side would exceed ``long_side``; None keeps its size.
        multiple: both sides are then stretched to the next multiple of it.
        crop: side of the central square that is evaluated after resizing; None for all.
        like: the library whose bilinear and nearest rules resizing follows (to "pillow" belong torchvision's sizes,
            which know no ``long_side``; "mmcv" is OpenCV with half pixels rounded up).
        meet_at: whether the predicted classes are resized (nearest) to the truth or the truth to them, where
            their sizes differ.
        resized_logits: where they meet at the truth, logits are resized to it (bilinear) before classes are taken.
        absent_is_zero: a class in neither truth nor prediction counts as IoU 0 in the mean, not at all otherwise.
        categories: report category IoU, and instance-weighted IoU where there are instance files.
    """

    name: str
    rule: str
    num_classes: int | None = None
    short_side: int | None = None
    long_side: int | None = None
    multiple: int = 1
    crop: int | None = None
    like: Literal["opencv", "pillow", "mmcv"] = "opencv"
    meet_at: Literal["truth", "prediction"] = "truth"
    resized_logits: bool = False
    absent_is_zero: bool = False
    categories: bool = False

    def prepare(self, image: Tensor) -> Tensor:
        """The images that the network is to see; (N, 3, H, W) -> (N, 3, H', W')."""
        image = resize(image, self._resized((image.shape[2], image.shape[3])), antialias=self.like == "pillow")
        height, width = (self.multiple * math.ceil(side / self.multiple) for side in image.shape[2:])
        return self._cropped(resize(image, (height, width)))

    def classes(self, logits: Tensor, size: Size) -> Tensor:
        """What ``meet`` takes as prediction; logits (N, K, H', W') and the truth's size (H, W) -> (N, ...)."""
        return (resize(logits, size) if self.resized_logits else logits).argmax(dim=1)

    def meet(self, prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction (N, H', W') and truth (N, H, W) at the one size at which they are compared."""
        if self.crop is not None:
            size = self._resized((label.shape[1], label.shape[2]))
            return prediction, self._cropped(self.nearest(label, size))
        if self.meet_at == "truth":
            return self.nearest(prediction, (label.shape[1], label.shape[2])), label
        return prediction, self.nearest(label, (prediction.shape[1], prediction.shape[2]))

    def _resized(self, size: Size) -> Size:
        if self.short_side is None:
            return size
        if self.like == "pillow":  # torchvision's Resize cuts the longer side to whole pixels
            return (self.short_side * size[0] // min(size), self.short_side * size[1] // min(size))
        factor = self.short_side / min(size)
        if self.long_side is not None:
            factor = min(factor, self.long_side / max(size))
        height, width = (factor * size[0], factor * size[1])
        if self.like == "mmcv":
            return (int(height + 0.5), int(width + 0.5))
        return (round(height), round(width))

    def _cropped(self, values: Tensor) -> Tensor:
        if self.crop is None:
            return values
        top, left = (round((side - self.crop) / 2) for side in values.shape[-2:])
        return values[..., top : top + self.crop, left : left + self.crop]

    def nearest(self, label: Tensor, size: Size) -> Tensor:
        """Class maps (N, H, W) at another size, by the nearest pixel as ``like`` understands it."""
        if label.shape[1:] == size:
            return label
        rows, columns = (
            # OpenCV takes the source pixel at a target pixel's corner, Pillow the one at its centre
            (2 * torch.arange(target) + (self.like == "pillow")) * source // (2 * target)
            for source, target in zip(label.shape[1:], size, strict=True)
        )
        return label[:, rows.to(label.device)][:, :, columns.to(label.device)]


NATIVE = EvaluationProtocol("native", "each image at its own size, one confusion matrix, absent classes left out")

_PROTOCOLS = (
    NATIVE,
    EvaluationProtocol(
        "voc",
        "PASCAL VOC's (VOCevalseg.m): each image at its own size, void ignored, one confusion matrix over 21 classes",
        num_classes=21,
    ),
    EvaluationProtocol(
        "cityscapes",
        "Cityscapes' (evalPixelLevelSemanticLabeling.py): full size, class and category IoU, absent classes left out",
        num_classes=19,
        categories=True,
    ),
    # pascal_voc.py of the DCN authors' repository
    EvaluationProtocol(
        "paper",
        "DCN authors' for VOC: shorter side 360 (longer at most 600), truth resized (nearest) to the prediction,"
        " absent classes count 0",
        num_classes=21,
        short_side=360,
        long_side=600,
        meet_at="prediction",
        absent_is_zero=True,
    ),
    # cityscape.py of the same
    EvaluationProtocol(
        "paper",
        "DCN authors' for Cityscapes: shorter side 1024 (longer at most 2048), prediction resized (nearest) to the"
        " truth, absent classes count 0",
        num_classes=19,
        short_side=1024,
        long_side=2048,
        absent_is_zero=True,
    ),
    EvaluationProtocol(
        "crop513",
        "central 513×513 pixels after resizing to shorter side 513 (VainF/DeepLabV3Plus-Pytorch on VOC): no figure"
        " for whole images",
        short_side=513,
        crop=513,
        like="pillow",
    ),
    # of OpenGVLab/InternImage, for mmsegmentation: upernet_internimage_{t_512,l_640,h_896}_160k_ade20k.py
    *(
        EvaluationProtocol(
            f"short{side}",
            f"mmsegmentation's for UperNet on ADE20K: shorter side {side} (longer at most {4 * side}), then both"
            " stretched to multiples of 32, logits resized (bilinear) to the truth, absent classes left out",
            short_side=side,
            long_side=4 * side,
            multiple=32,
            like="mmcv",
            resized_logits=True,
        )
        for side in (512, 640, 896)
    ),
)


def get_protocol(name: str, num_classes: int) -> EvaluationProtocol:
    """The protocol of that name for a data set of that many classes.

    Raises:
        ValueError: no such protocol, or none for this number of classes.
    """
    named = [protocol for protocol in _PROTOCOLS if protocol.name == name]
    if not named:
        names = ", ".join(dict.fromkeys(protocol.name for protocol in _PROTOCOLS))
        raise UserError(f"protocol must be one of {names}, got {name!r}")
    for protocol in named:
        if protocol.num_classes in (None, num_classes):
            return protocol
    wanted = " or ".join(str(protocol.num_classes) for protocol in named)
    raise UserError(
        f"protocol={name} is defined for {wanted} classes, but the data set has {num_classes}: use protocol=native"
    )
