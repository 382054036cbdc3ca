"""The three detectors train and detect whatever they are given; an untrained deformable one is the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from segdcn.detection.networks import BETA, POOLINGS, ClassAwareHead, HardRoIHeads, build_detector
from segdcn.errors import UserError
from segdcn.models import Deform
from segdcn.ops import DeformPSRoIPool, DeformRoIPool

SMALL: dict[str, Any] = {
    "backbone": "resnet_tiny",
    "output_stride": 8,
    "weights": None,
    "deform": Deform(layers=0),
    "channels": 16,
    "hidden": 16,
    "bins": 3,
    "samples": 2,
    "anchor_sizes": (16, 32),
    "anchor_ratios": (1.0,),
    "candidates": 50,
    "proposals": 10,
    "regions": 8,
    "short_side": 64,
    "long_side": 64,
}
KINDS = [(head, pooling) for head, poolings in POOLINGS.items() for pooling in poolings]


def network(head: str, pooling: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_detector(3, head, pooling=pooling, **{**SMALL, **more})


def target(boxes: list[list[float]], labels: list[int]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}


@pytest.mark.parametrize(("head", "pooling"), KINDS)
def test_images_of_any_size_with_and_without_objects_train_and_are_detected(head: str, pooling: str) -> None:
    model = network(head, pooling, deform=Deform(layers=1))
    images = [torch.rand(3, 64, 48), torch.rand(3, 40, 64), torch.rand(3, 64, 64)]
    targets = [target([[5.0, 5, 40, 30], [0, 0, 2, 2]], [1, 3]), target([], []), target([[0.0, 0, 64, 64]], [2])]
    losses = model(images, targets)
    assert set(losses) >= {"loss_classifier", "loss_box_reg"}
    sum(losses.values()).backward()
    learned = {name for name, one in model.named_parameters() if one.grad is not None and one.grad.isfinite().all()}
    assert learned == {name for name, _ in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        found = model(images)
    for image, one in zip(images, found, strict=True):
        boxes = one["boxes"]
        assert boxes.shape == (len(one["scores"]), 4)
        assert set(one["labels"].tolist()) <= {1, 2, 3}
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor(image.shape[1:]).flip(0).repeat(2) + 1e-3).all()
        assert (one["scores"].diff() <= 0).all()


@pytest.mark.parametrize("sides", [(1, 64), (200, 3)])
def test_an_image_of_which_nothing_is_left_is_one_line(sides: tuple[int, int]) -> None:
    model = network("faster_rcnn", "roi_align").eval()
    with pytest.raises(UserError, match=rf"image of {sides[1]}x{sides[0]} pixels .* no width or height left .*=64"):
        model([torch.rand(3, *sides)])
    assert len(model([torch.rand(3, 1, 60)])) == 1


@pytest.mark.parametrize(("head", "pooling"), KINDS)
def test_no_proposal_is_no_detection(head: str, pooling: str) -> None:
    model = network(head, pooling).eval()
    if head == "rpn":
        pytest.skip("it proposes nothing")
    model.rpn.filter_proposals = lambda proposals, *_: ([each[0, :0] for each in proposals[:, None]], [])
    with torch.no_grad():
        (found,) = model([torch.rand(3, 64, 64)])
    assert {name: len(values) for name, values in found.items()} == {"boxes": 0, "scores": 0, "labels": 0}


@pytest.mark.parametrize(("head", "pooling"), KINDS)
def test_a_batch_without_proposals_and_objects_has_losses(head: str, pooling: str) -> None:
    model = network(head, pooling)
    if head != "rpn":
        model.rpn.filter_proposals = lambda proposals, *_: ([each[0, :0] for each in proposals[:, None]], [])
    losses = model([torch.rand(3, 64, 64)] * 2, [target([], [])] * 2)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("head", "plain", "deformable"),
    [
        ("faster_rcnn", "roi_align", "deformable"),
        ("faster_rcnn", "roi_align", "modulated"),
        ("rfcn", "plain", "deformable"),
        ("rfcn", "plain", "modulated"),
    ],
)
def test_an_untrained_deformable_head_computes_what_the_plain_one_does(head: str, plain: str, deformable: str) -> None:
    one, other = (network(head, pooling).eval() for pooling in (plain, deformable))
    weights = {key: value for key, value in one.state_dict().items() if key in other.state_dict()}
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("offset" in name or "branch" in name or "mask" in name for name in missing)
    images = [torch.rand(3, 64, 48), torch.rand(3, 30, 64)]
    with torch.no_grad():
        for plainly, deformed in zip(one(images), other(images), strict=True):
            for key in ("boxes", "scores", "labels"):
                torch.testing.assert_close(deformed[key], plainly[key], rtol=1e-4, atol=1e-4)


def test_the_bins_of_a_region_move_where_the_offsets_say() -> None:
    torch.manual_seed(0)
    input, rois = torch.rand(1, 4, 10, 12), torch.tensor([[0.0, 8, 8, 56, 40]])
    regional = DeformRoIPool(4, 3, 1 / 8, gamma=0.1)
    sensitive = DeformPSRoIPool(4, 6, 3, 1 / 8, gamma=0.1, offset_classes=2)
    assert regional.bin_offsets(input, rois).shape == (1, 1, 2, 3, 3)
    assert sensitive.bin_offsets(input, rois).shape == (1, 2, 2, 3, 3)
    # a bias alone: the same offset everywhere, times gamma
    nn.init.constant_(regional.branch[-1].bias, 2.0)
    nn.init.constant_(sensitive.offset.bias, 2.0)
    for pool in (regional, sensitive):
        torch.testing.assert_close(pool.bin_offsets(input, rois), torch.full_like(pool.bin_offsets(input, rois), 0.2))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_the_hardest_regions_of_each_image_are_learned(seed: int, hard: int) -> None:
    model = network("rfcn", "plain", regions=hard)
    heads = model.roi_heads
    assert isinstance(heads, HardRoIHeads)
    torch.manual_seed(seed)
    corners = torch.rand(2, 9, 2) * 40
    proposals = [torch.cat((each, each + 5 + 20 * torch.rand(9, 2)), dim=1) for each in corners]
    targets = [target([[5.0, 5, 40, 30]], [1]), target([], [])]
    maps = {"regions": torch.randn(2, 16, 8, 8)}
    _, losses = heads(maps, list(proposals), [(64, 64)] * 2, targets)

    # one region after the other
    classifier, regression, chosen = [], [], 0
    for number, (boxes, truth) in enumerate(zip(proposals, targets, strict=True)):
        boxes = torch.cat((boxes, truth["boxes"]))
        rows = []
        for box in boxes:
            kind, wanted = 0, torch.zeros(4)
            if len(truth["boxes"]):
                overlap = box_iou(box[None], truth["boxes"])[0]
                if overlap.max() >= 0.5:
                    kind = int(truth["labels"][overlap.argmax()])
                    wanted = heads.box_coder.encode_single(truth["boxes"][overlap.argmax()][None], box[None])[0]
            pooled = heads.box_roi_pool.pool(maps["regions"], torch.cat((torch.tensor([float(number)]), box))[None])
            scores, offsets = heads.box_predictor(pooled)
            off = F.smooth_l1_loss(offsets[0, :4], wanted, beta=BETA, reduction="sum") if kind else torch.zeros(())
            rows.append((F.cross_entropy(scores, torch.tensor([kind])), off))
        rows.sort(key=lambda row: -(row[0] + row[1]).item())
        rows = rows[:hard]
        chosen += len(rows)
        classifier += [row[0] for row in rows]
        regression += [row[1] for row in rows]
    torch.testing.assert_close(losses["loss_classifier"], torch.stack(classifier).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss_box_reg"], torch.stack(regression).sum() / chosen, rtol=1e-4, atol=1e-6)


def test_the_class_aware_head_gives_probabilities_of_classes_and_none_of_background() -> None:
    torch.manual_seed(0)
    head = ClassAwareHead(8, anchors=2, classes=4).eval()
    maps = torch.randn(2, 8, 3, 5)
    outputs = head([maps])
    assert outputs["cls_logits"].shape == (2, 3 * 5 * 2, 4)
    assert outputs["bbox_regression"].shape == (2, 3 * 5 * 2, 4)
    found = outputs["cls_logits"].sigmoid()
    assert (found[..., 0] == 0).all()
    raw = head.train()([maps])["cls_logits"]
    torch.testing.assert_close(found[..., 1:], raw.softmax(dim=-1)[..., 1:], rtol=1e-4, atol=2e-6)
    # anchors lie cell by cell, row by row, and within a cell one after the other, as AnchorGenerator gives them
    place = head.scores(F.relu(head.conv(maps)))[1, 4:, 2, 3]
    torch.testing.assert_close(raw[1, (2 * 5 + 3) * 2 + 1], place)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"head": "yolo"}, "head must be one of faster_rcnn, rfcn, rpn"),
        ({"head": "rfcn", "pooling": "roi_align"}, "plain, deformable, modulated"),
        ({"num_classes": 0}, "num_classes must be 1 or more"),
        ({"output_stride": 5}, "output_stride must be 8, 16 or 32"),
        ({"bins": 0}, "bins must be 1 or more"),
        ({"regions": 0}, "regions must be 1 or more"),
        ({"anchor_sizes": []}, "anchor_sizes, anchor_ratios, short_side, long_side"),
        ({"short_side": 0}, "must be positive"),
    ],
)
def test_a_wrong_setting_is_one_line(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part) as raised:
        build_detector(**{"num_classes": 3, **SMALL, **settings})
    assert len(str(raised.value).splitlines()) == 1
