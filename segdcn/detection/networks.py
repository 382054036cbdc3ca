"""The paper's three detectors, of torchvision's parts, a backbone and RoI poolings of ours.

Legend: N images, C classes without the background, R regions of interest, h x w bins of each, s output stride.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import RoIAlign, RoIPool

from segdcn.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from segdcn.errors import UserError
from segdcn.models.backbones import build_backbone
from segdcn.models.deeplab import Deform
from segdcn.models.deformable import make_deformable
from segdcn.models.features import Backbone, Features
from segdcn.models.frozen import freeze_batch_norm, freeze_stages
from segdcn.models.weights import load_weights, read_weights
from segdcn.ops import DeformPSRoIPool, DeformRoIPool, deform_ps_roi_pool

POOLINGS = {
    "faster_rcnn": ("roi_pool", "roi_align", "deformable", "modulated"),
    "rfcn": ("plain", "deformable", "modulated"),
    "rpn": ("none",),
}
"""The detectors, and how each may pool its regions."""

BETA = 1 / 9  # where torchvision's smooth L1 loss turns linear


class Resize(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's, which has no words for an image of whose shorter side nothing is left."""

    def resize(self, image: Tensor, target: Any = None) -> Any:
        height, width = image.shape[1:]
        if min(height, width) * self.max_size <= max(height, width):
            raise UserError(
                f"an image of {width}x{height} pixels (width x height) has no width or height left at"
                f" model.long_side={self.max_size}: cut it, or leave it out"
            )
        return super().resize(image, target)


class DetectorBackbone(nn.Module):
    """Image -> a thinner map of the last stage, for regions, and that of the stage before it, for proposals.

    proposing: whether there are proposals.
    """

    def __init__(self, body: Backbone, channels: int, proposing: bool) -> None:
        super().__init__()
        self.body = body
        self.reduce = nn.Conv2d(body.out_channels, channels, 1)
        self.out_channels, self.proposing = channels, proposing

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features: Features = self.body(image)
        maps = {"regions": F.relu(self.reduce(features.high))}
        return {"proposals": features.middle, **maps} if self.proposing else maps


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's, which takes all maps of a backbone, on the one that is meant for it.

    In training an image without a proposal is one itself: a loss over no region has no value.
    """

    def forward(self, images: Any, features: Mapping[str, Tensor], targets: Any = None) -> Any:
        boxes, losses = super().forward(images, {"proposals": features["proposals"]}, targets)
        if self.training:
            whole = [boxes[0].new_tensor([[0, 0, width, height]]) for height, width in images.image_sizes]
            boxes = [each if len(each) else image for each, image in zip(boxes, whole, strict=True)]
        return boxes, losses


class PlainPSRoIPool(nn.Module):
    """The maps of a ``DeformPSRoIPool``, without offsets."""

    def __init__(
        self, in_channels: int, output_channels: int, output_size: int, spatial_scale: float, sample_per_part: int
    ) -> None:
        super().__init__()
        self.maps = nn.Conv2d(in_channels, output_channels * output_size**2, 1)
        self.settings = (output_size, output_channels, output_size, spatial_scale, sample_per_part)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        return deform_ps_roi_pool(self.maps(input), rois, None, *self.settings)


class RegionPool(nn.Module):
    """Any pooling (map, rois (R, 5)), called as ``RoIHeads`` does."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Any) -> Any:
        image = torch.cat([torch.full_like(each[:, :1], number) for number, each in enumerate(boxes)])
        return self.pool(features["regions"], torch.cat((image, torch.cat(list(boxes))), dim=1))


class PositionSensitive(nn.Module):
    """R-FCN's pooling: map, rois -> scores (R, C + 1, h, w) and boxes (R, 4, h, w) of each bin."""

    def __init__(self, make: Callable[[int, int], nn.Module], classes: int) -> None:
        super().__init__()
        self.scores, self.boxes = make(classes, classes), make(4, 1)

    def forward(self, input: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(input, rois), self.boxes(input, rois)


class Vote(nn.Module):
    """R-FCN's decision: the mean of the bins; the one box is repeated, since ``RoIHeads`` asks for one a class."""

    def forward(self, pooled: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        scores, boxes = (each.mean(dim=(2, 3)) for each in pooled)
        return scores, boxes.repeat(1, scores.shape[1])


class HardRoIHeads(RoIHeads):  # type: ignore[misc]
    """``RoIHeads`` that learn from the regions of an image whose loss is the largest, of all its proposals (OHEM).

    hard: how many.
    Source: Shrivastava et al. 2016; Dai et al. 2016 (R-FCN), section 2.2.
    """

    hard: int

    def forward(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_shapes: Any, targets: Any = None
    ) -> Any:
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        scores, boxes = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        with torch.no_grad():
            kind, place = torch.cat(labels), torch.cat(wanted)
            found = boxes.view(len(kind), -1, 4)[torch.arange(len(kind), device=kind.device), kind]
            off = F.smooth_l1_loss(found, place, beta=BETA, reduction="none").sum(dim=1)
            # a region on no object has no place to be, which may be infinitely far
            loss = F.cross_entropy(scores, kind, reduction="none") + off.where(kind > 0, 0)
            hard, start = [], 0
            for count in map(len, labels):
                hard.append(start + loss[start : start + count].topk(min(self.hard, count)).indices)
                start += count
            chosen = torch.cat(hard)
        classifier, regression = fastrcnn_loss(scores[chosen], boxes[chosen], [kind[chosen]], [place[chosen]])
        return [], {"loss_classifier": classifier, "loss_box_reg": regression}


class ClassAwareHead(nn.Module):
    """The class-aware RPN: at each anchor a softmax over C + 1 classes and a box; a head for ``RetinaNet``.

    sampled: anchors of an image from which it learns, at most half of them on objects.
    """

    def __init__(self, in_channels: int, anchors: int, classes: int, sampled: int = 256) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.scores, self.boxes = (nn.Conv2d(in_channels, anchors * each, 1) for each in (classes, 4))
        for layer in (self.conv, self.scores, self.boxes):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.anchors = anchors
        self.sampler, self.coder = BalancedPositiveNegativeSampler(sampled, 0.5), BoxCoder((1.0, 1.0, 1.0, 1.0))

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        shared = F.relu(self.conv(maps[0]))
        scores, boxes = (  # (N, anchors * K, H, W) -> (N, H * W * anchors, K)
            layer(shared).unflatten(1, (self.anchors, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            for layer in (self.scores, self.boxes)
        )
        if not self.training:  # of which RetinaNet takes the sigmoid, class by class
            scores = scores.softmax(dim=-1).clamp(1e-6, 1 - 1e-6).logit()
            scores[..., 0] = -torch.inf  # the background is not found
        return {"cls_logits": scores, "bbox_regression": boxes}

    def compute_loss(
        self,
        targets: Sequence[Any],
        outputs: Mapping[str, Tensor],
        anchors: Sequence[Tensor],
        matched: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """matched: of each anchor the number of its object, -1 for none, -2 for one that is between."""
        classifier, regression = [], []
        images = zip(targets, outputs["cls_logits"], outputs["bbox_regression"], anchors, matched, strict=True)
        for target, scores, boxes, own, match in images:
            kind = torch.where(match == -2, -1, 0)
            kind[match >= 0] = target["labels"][match[match >= 0]]
            (positive,), (negative,) = self.sampler([kind])
            positive, chosen = positive.nonzero().flatten(), (positive | negative).nonzero().flatten()
            classifier.append(F.cross_entropy(scores[chosen], kind[chosen]))
            wanted = boxes[:0]
            if len(positive):
                wanted = self.coder.encode_single(target["boxes"][match[positive]], own[positive])
            off = F.smooth_l1_loss(boxes[positive], wanted, beta=BETA, reduction="sum")
            regression.append(off / max(1, len(chosen)))
        return {"loss_classifier": torch.stack(classifier).mean(), "loss_box_reg": torch.stack(regression).mean()}


def build_detector(
    num_classes: int,
    head: str = "faster_rcnn",
    backbone: str = "resnet50",
    output_stride: int = 16,
    weights: str | None = "imagenet",
    deform: Deform = Deform(),  # noqa: B008  (it is frozen)
    *,
    pooling: str = "deformable",
    bins: int = 7,
    samples: int = 4,
    gamma: float = 0.1,
    channels: int | None = None,
    hidden: int = 1024,
    anchor_sizes: Sequence[int] = (128, 256, 512),
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    candidates: int = 6000,
    proposals: int = 300,
    proposal_nms: float = 0.7,
    regions: int = 128,
    score_threshold: float = 0.001,
    nms: float = 0.3,
    most: int = 100,
    short_side: int = 600,
    long_side: int = 1000,
    frozen_batch_norm: bool = False,
    frozen_stages: int = 0,
) -> GeneralizedRCNN | RetinaNet:
    """A detector with a new head on a backbone, which is made deformable after its weights are loaded.

    It takes a list of images, float (3, H, W) in 0..1 and of any sizes, and gives of each a mapping of "boxes" (M, 4)
    in its pixels, "scores" (M,) and "labels" (M,), 1..C. In training it takes such a mapping of each image's truth
    besides, and gives a mapping of losses.

    head: ``faster_rcnn``, ``rfcn``, or ``rpn``, the class-aware one.
    backbone, output_stride, weights, deform, frozen_batch_norm, frozen_stages: see ``build_deeplab``.
    pooling: how a region becomes bins: of Faster R-CNN ``roi_pool`` (the maximum over whole cells, of the paper),
        ``roi_align``, ``deformable`` or ``modulated``; of R-FCN ``plain``, ``deformable`` (offsets for each class) or
        ``modulated``; of the class-aware RPN, which has no regions, ``none``.
    bins: of a region along each axis.  samples: of R-FCN's bins along each axis.  gamma: see ``deform_roi_pool``.
    channels: of the 1x1 convolution on the last stage; None is 256, of R-FCN 1024.
    hidden: width of Faster R-CNN's two fully connected layers.
    anchor_sizes, anchor_ratios: sides in pixels of the resized image, and height by width.
    candidates, proposals, proposal_nms: how many anchors are looked at, and how many of them are left, when those that
        overlap a better one by more than this are dropped. The class-aware RPN has candidates alone, an anchor with a
        class each.
    regions: of an image from which the head learns, a quarter of them on objects; R-FCN takes those of all proposals
        whose loss is the largest.  Of the class-aware RPN: anchors, half of them on objects.
    score_threshold, nms, most: detections below it, or that overlap a better one of their class by more, are dropped,
        and those of an image beyond the best so many.
    short_side, long_side: to which an image is resized, in pixels.

    Raises: UserError or FileNotFoundError, one line, for a wrong setting or missing weights.
    Source: Dai et al. 2017, sections 3.2 and 4.2; Ren et al. 2015; Dai et al. 2016 (R-FCN).
    """
    if head not in POOLINGS:
        raise UserError(f"head must be one of {', '.join(POOLINGS)}, got {head!r}")
    if pooling not in POOLINGS[head]:
        raise UserError(f"pooling must be one of {', '.join(POOLINGS[head])} with head={head}, got {pooling!r}")
    if num_classes < 1:
        raise UserError(f"num_classes must be 1 or more, got {num_classes}")
    for name, least in {"bins": bins, "samples": samples, "hidden": hidden, "regions": regions, "most": most}.items():
        if least < 1:
            raise UserError(f"{name} must be 1 or more, got {least}")
    sides = [short_side, long_side, *anchor_sizes, *anchor_ratios, candidates, proposals]
    if not (anchor_sizes and anchor_ratios and min(sides) > 0):
        raise UserError(
            "anchor_sizes, anchor_ratios, short_side, long_side, candidates and proposals must be positive, got"
            f" {list(anchor_sizes)}, {list(anchor_ratios)}, {short_side}, {long_side}, {candidates} and {proposals}"
        )
    read = None if weights in (None, "imagenet") else read_weights(str(weights))
    whole = read is not None and read.of_segmentation
    body = build_backbone(backbone, output_stride, None if whole else read or weights)
    freeze_stages(body, frozen_stages)
    if frozen_batch_norm:
        freeze_batch_norm(body)
    make_deformable(body, deform.layers, deform.modulated, deform.offset_groups)
    width = (1024 if head == "rfcn" else 256) if channels is None else channels
    shared = DetectorBackbone(body, width, proposing=head != "rpn")
    transform = Resize(short_side, long_side, list(IMAGENET_MEAN), list(IMAGENET_STD))
    anchors = AnchorGenerator((tuple(anchor_sizes),), (tuple(anchor_ratios),))
    per_cell, classes, scale = len(anchor_sizes) * len(anchor_ratios), num_classes + 1, 1 / output_stride
    if head == "rpn":
        model: Any = RetinaNet(
            shared,
            classes,
            anchor_generator=anchors,
            head=ClassAwareHead(width, per_cell, classes, regions),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            score_thresh=score_threshold,
            nms_thresh=nms,
            detections_per_img=most,
            topk_candidates=candidates,
        )
        model.transform = transform
    else:
        proposing = ProposalNetwork(
            anchors,
            RPNHead(body.middle_channels, per_cell),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": candidates, "testing": candidates},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=proposal_nms,
        )
        if head == "rfcn":
            make = _position_sensitive(pooling, width, bins, scale, samples, gamma)
            pool: nn.Module = PositionSensitive(make, classes)
            box_head, predictor = nn.Identity(), Vote()
            # all proposals and objects are looked at, whatever their number
            kind, sampled, share = HardRoIHeads, proposals * 10, 1.0
        else:
            pool = _region_pool(pooling, width, bins, scale, gamma)
            box_head, predictor = TwoMLPHead(width * bins**2, hidden), FastRCNNPredictor(hidden, classes)
            kind, sampled, share = RoIHeads, regions, 0.25
        heads = kind(RegionPool(pool), box_head, predictor, 0.5, 0.5, sampled, share, None, score_threshold, nms, most)
        if isinstance(heads, HardRoIHeads):
            heads.hard = regions
        model = GeneralizedRCNN(shared, proposing, heads, transform)
    if read is not None and whole:
        load_weights(model, read)
    return model


def _region_pool(pooling: str, channels: int, bins: int, scale: float, gamma: float) -> nn.Module:
    if pooling == "roi_pool":
        pool: nn.Module = RoIPool(bins, scale)
    elif pooling == "roi_align":
        pool = RoIAlign(bins, scale, sampling_ratio=-1, aligned=True)
    else:
        hidden = (1024, 1024) if pooling == "modulated" else ()  # as published, each
        pool = DeformRoIPool(channels, bins, scale, gamma=gamma, modulated=pooling == "modulated", hidden=hidden)
    return pool


def _position_sensitive(
    pooling: str, channels: int, bins: int, scale: float, samples: int, gamma: float
) -> Callable[[int, int], nn.Module]:
    """Makes the pooling of so many output channels with so many sets of offsets."""

    def make(outputs: int, offset_classes: int) -> nn.Module:
        pool: nn.Module
        if pooling == "plain":
            pool = PlainPSRoIPool(channels, outputs, bins, scale, samples)
        else:
            modulated = pooling == "modulated"
            pool = DeformPSRoIPool(
                channels, outputs, bins, scale, samples, gamma, offset_classes=offset_classes, modulated=modulated
            )
        maps: Any = pool.maps
        nn.init.normal_(maps.weight, std=0.01)
        nn.init.zeros_(maps.bias)
        return pool

    return make
