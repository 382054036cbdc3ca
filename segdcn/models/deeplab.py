"""DeepLab: backbone -> head -> logits at the size of the image.

Legend: N batch, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.fcn import FCNHead

from segdcn.errors import UserError
from segdcn.models.backbones import build_backbone
from segdcn.models.deformable import convolutions_3x3, make_deformable, set_fixed_dilation
from segdcn.models.features import Backbone, Features
from segdcn.models.frozen import freeze_batch_norm, freeze_stages
from segdcn.models.heads import ASPPHead, FPNHead, PaperHead, UPerHead, V3PlusHead, auxiliary_head, resize
from segdcn.models.internimage import VARIANTS, InternImage
from segdcn.models.published import under_our_names
from segdcn.models.weights import Weights, load_weights, read_weights

HEADS = ("paper", "aspp", "v3plus", "fpn", "upernet")


class DeepLab(nn.Module):
    """A semantic segmentation network; ``auxiliary`` scores the features before the last stage, for training.

    evaluation_scale: factor by which ``forward`` enlarges an image before the backbone sees it; the logits have the
        image's size. ``training_logits`` takes what a training's transform has enlarged.
    settings: what ``build_deeplab`` was called with, for a checkpoint that is to build it again.

    Shape: image (N, 3, H, W), normalised -> logits (N, K, H, W).
    """

    settings: Mapping[str, Any] | None = None

    def __init__(
        self, backbone: Backbone, head: nn.Module, auxiliary: nn.Module | None = None, evaluation_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.evaluation_scale = evaluation_scale
        self.backbone = backbone
        self.head = head
        self.auxiliary = auxiliary

    def forward(self, image: Tensor) -> Tensor:
        size = image.shape[-2:]
        if self.evaluation_scale != 1:
            image = F.interpolate(image, scale_factor=self.evaluation_scale, mode="bilinear", align_corners=False)
        return resize(self.head(self.backbone(image)), size)

    def training_logits(self, image: Tensor) -> list[Tensor]:
        """All that a training compares with the truth, (N, K, H, W) each: the logits, then the auxiliary head's."""
        features: Features = self.backbone(image)
        scores = [self.head(features)]
        if self.auxiliary is not None:
            scores.append(self.auxiliary(features.middle))
        return [resize(each, image.shape[-2:]) for each in scores]


@dataclass(frozen=True)
class Deform:
    """Which layers are deformable, and how.

    layers: how many of the backbone's last 3x3 convolutions.
    modulated: with a mask per kernel point (Zhu et al. 2019).
    offset_groups: groups of input channels that have offsets of their own.
    head_layers: how many of the head's last 3x3 convolutions, which see the finest maps, are deformable too.
    """

    layers: int = 3
    modulated: bool = False
    offset_groups: int = 1
    head_layers: int = 0


def build_deeplab(
    num_classes: int,
    backbone: str = "resnet50",
    head: str = "v3plus",
    output_stride: int | None = 16,
    weights: str | None = "imagenet",
    deform: Deform = Deform(),
    *,
    head_channels: int | None = None,
    image_pooling: bool = True,
    auxiliary: bool = False,
    fixed_dilation: int | None = None,
    frozen_batch_norm: bool = False,
    frozen_stages: int = 0,
    torchvision_dilation: bool = False,
    evaluation_scale: float = 1.0,
) -> DeepLab:
    """A DeepLab with a new head on a backbone, which is made deformable after its weights are loaded.

    backbone, output_stride, torchvision_dilation: see ``build_backbone``; an output stride of None is the
    ``suited_stride`` of head and backbone.
    head: ``paper`` (1x1 to 1024, ReLU, classifier), ``aspp`` (DeepLabv3), ``v3plus`` (DeepLabv3+), ``fpn`` (the light
    one, a feature pyramid) or ``upernet``.
    weights: of the backbone, see there; of a file of a whole segmentation network, such as a checkpoint of another
    training, torchvision's deeplabv3_resnet50 or an UperNet of mmsegmentation's, all that fits is taken, see
    ``load_weights``.
    head_channels: width of the head; None is the published one, 1024 for ``paper``, 256 for ``aspp`` and ``v3plus``,
    64 for ``fpn`` and 512 for ``upernet``.
    image_pooling: whether ``aspp`` and ``v3plus`` see the mean of the whole map too, for which a training needs batches
    of two images or more.
    auxiliary: whether the stage before the last has a head of its own, for training.
    fixed_dilation: dilation of the backbone's last three 3x3 convolutions, see ``set_fixed_dilation``; None leaves
    what the output stride asks for.
    frozen_batch_norm: the backbone's batch norms are constants, see ``freeze_batch_norm``; for pretrained weights.
    frozen_stages: how many of the backbone's first stages do not learn; 1 is the stem and the first stage, see
    ``freeze_stages``.
    evaluation_scale: factor, 1 or more, by which the network enlarges an image that it evaluates, as the random scale
    of the training (``datamodule.scale``) enlarges its crops. Thin things in small images then span more cells, as with
    a smaller output stride, and a training step costs what it did; evaluation costs the square of the factor.

    Raises: ValueError or FileNotFoundError, one line, for a wrong setting or missing weights.
    """
    given = dict(locals())
    if head not in HEADS:
        raise UserError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    if num_classes < 2:
        raise UserError(f"num_classes must be 2 or more, got {num_classes}")
    if head_channels is not None and head_channels < 1:
        raise UserError(f"head_channels must be positive, got {head_channels}")
    if min(deform.layers, deform.head_layers) < 0 or deform.offset_groups < 1:
        raise UserError(
            "deform.layers and deform.head_layers must be 0 or more and deform.offset_groups 1 or more,"
            f" got {deform.layers}, {deform.head_layers} and {deform.offset_groups}"
        )
    if not 1 <= evaluation_scale < float("inf"):
        raise UserError(f"evaluation_scale must be 1 or more, a factor of the image's size, got {evaluation_scale}")

    if output_stride is None:
        output_stride = suited_stride(head, backbone)
    read = None if weights in (None, "imagenet") else read_weights(str(weights))
    if read is not None:
        read = Weights(read.source, under_our_names(read.tensors))
    whole = read is not None and read.of_segmentation
    body = build_backbone(backbone, output_stride, None if whole else read or weights, torchvision_dilation)
    if fixed_dilation is not None:
        set_fixed_dilation(body, fixed_dilation)
    freeze_stages(body, frozen_stages)
    if frozen_batch_norm:
        freeze_batch_norm(body)
    if deform.layers > 0 and isinstance(body, InternImage):
        raise UserError(f"{backbone} samples where it predicts in every layer: set model.deform.layers=0")
    if deform.layers > 0:
        make_deformable(body, deform.layers, deform.modulated, deform.offset_groups)
    classify: nn.Module
    if head == "paper":
        classify = PaperHead(body.out_channels, num_classes, head_channels or 1024)
    elif head == "aspp":
        classify = ASPPHead(body.out_channels, num_classes, output_stride, head_channels or 256, image_pooling)
    elif head == "fpn":
        pyramid = (body.low_level_channels, body.middle_channels, body.out_channels)
        classify = FPNHead(pyramid, num_classes, head_channels or 64)
    elif head == "upernet":
        every = (body.low_level_channels, body.second_channels, body.middle_channels, body.out_channels)
        classify = UPerHead(every, num_classes, head_channels or 512)
    else:
        channels = (body.out_channels, body.low_level_channels)
        classify = V3PlusHead(*channels, num_classes, output_stride, head_channels or 256, image_pooling)
    if deform.head_layers > (fine := len(convolutions_3x3(classify))):
        raise UserError(f"deform.head_layers={deform.head_layers}, but the head {head} has {fine} 3x3 convolutions")
    make_deformable(classify, deform.head_layers, deform.modulated, deform.offset_groups)
    second: nn.Module | None = None
    if auxiliary:
        middle = body.middle_channels
        second = auxiliary_head(middle, num_classes, 256) if head == "upernet" else FCNHead(middle, num_classes)
    network = DeepLab(body, classify, second, evaluation_scale)
    if read is not None and whole:
        load_weights(network, read)
    network.settings = {
        "_target_": f"{__name__}.build_deeplab",
        **given,
        "weights": None if weights is None else str(weights),
        "deform": {"_target_": f"{__name__}.Deform", **asdict(deform)},
    }
    return network


def suited_stride(head: str, backbone: str) -> int:
    """The output stride where none is asked for: 32 for ``fpn`` and ``upernet``, which see finer maps anyway.

    InternImage has no other.
    """
    return 32 if head in ("fpn", "upernet") or backbone in VARIANTS else 16
