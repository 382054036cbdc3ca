"""Deformable convolutions, aggregations and RoI poolings beside what they stand for."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from segdcn.benchmarks.stopwatch import Candidate, compare
from segdcn.ops import deform_aggregate, deform_conv2d, deform_ps_roi_pool, deform_roi_pool

# N, C, H, W -> C, 3x3; groups
CONVOLUTIONS = (
    (4, 256, 40, 40, 1),
    (1, 512, 65, 65, 1),
    (4, 512, 33, 33, 1),
    (1, 256, 64, 64, 1),
    (2, 64, 64, 64, 1),
)

DEPTHWISE = ((4, 256, 40, 40, 256), (1, 512, 65, 65, 512))

# N, H, W, C, groups: the four stages of InternImage-T for an image of 512x512
AGGREGATIONS = ((1, 128, 128, 64, 4), (1, 64, 64, 128, 8), (1, 32, 32, 256, 16), (1, 16, 16, 512, 32))

REGIONS = (64, 300)

OFFSET_DEVIATION = 2.0  # pixels


def convolutions(repeats: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """deform_conv2d, both backends, against torchvision's operator and a plain convolution."""
    rows = []
    for n, channels, height, width, groups in CONVOLUTIONS + DEPTHWISE:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, channels, height, width, generator=generator)
        weight = torch.randn(channels, channels // groups, 3, 3, generator=generator) / math.sqrt(9 * channels / groups)
        offset = OFFSET_DEVIATION * torch.randn(n, 18, height, width, generator=generator)
        x, weight = (t.to(device, dtype).requires_grad_() for t in (x, weight))
        candidates = _convolution_candidates(x, offset.to(device).requires_grad_(), weight, groups)
        case = f"{n}×{channels}×{height}×{width}" + (" depthwise" if groups > 1 else "")
        rows.append({"case": case, "figures": compare(candidates, repeats)})
    return rows


def _convolution_candidates(x: Tensor, offset: Tensor, weight: Tensor, groups: int) -> list[Candidate]:
    wide_x, wide_weight = (t.detach().float().requires_grad_() for t in (x, weight))  # no bfloat16 on a CPU
    return [
        Candidate("conv2d", lambda: F.conv2d(x, weight, padding=1, groups=groups), (x, weight)),
        Candidate(
            "torchvision's own",
            lambda: torchvision.ops.deform_conv2d(wide_x, offset, wide_weight, padding=1),
            (wide_x, offset, wide_weight),
        ),
        Candidate(
            "torchvision",
            lambda: deform_conv2d(x, offset, weight, padding=1, backend="torchvision"),
            (x, offset, weight),
        ),
        Candidate("gather", lambda: deform_conv2d(x, offset, weight, padding=1, backend="gather"), (x, offset, weight)),
    ]


def aggregations(repeats: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """deform_aggregate beside ``grid_sample`` by group, which the authors' own PyTorch code is."""
    rows = []
    for n, height, width, channels, groups in AGGREGATIONS:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, height, width, channels, generator=generator).to(device, dtype).requires_grad_()
        offset = torch.randn(n, height, width, groups * 18, generator=generator).to(device).requires_grad_()
        logit = torch.randn(n, height, width, groups, 9, generator=generator)
        mask = logit.softmax(-1).flatten(3).to(device).requires_grad_()
        given = (x, offset, mask)
        candidates = [
            Candidate("grid_sample", partial(deform_aggregate, *given, padding=1, backend="grid_sample"), given),
            Candidate("gather", partial(deform_aggregate, *given, padding=1, backend="gather"), given),
        ]
        rows.append({"case": f"{n}×{height}×{width}×{channels}", "figures": compare(candidates, repeats)})
    return rows


def poolings(repeats: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The deformable RoI poolings against torchvision's plain ones, on a map of 50×75 pixels."""
    rows = []
    for count in REGIONS:
        generator = torch.Generator().manual_seed(0)
        size = torch.tensor([1200.0, 800.0])
        corner = torch.rand(count, 2, generator=generator) * size * 0.6
        far = corner + torch.rand(count, 2, generator=generator) * size * 0.4
        rois = torch.cat((torch.zeros(count, 1), corner, far), dim=1).to(device)
        x, scores = (
            torch.randn(1, channels, 50, 75, generator=generator).to(device, dtype).requires_grad_()
            for channels in (256, 21 * 49)
        )
        offset = torch.randn(count, 2, 7, 7, generator=generator).to(device).requires_grad_()
        candidates = _pooling_candidates(x, scores, rois, offset)
        rows.append({"case": f"{count} regions", "figures": compare(candidates, repeats)})
    return rows


def _pooling_candidates(x: Tensor, scores: Tensor, rois: Tensor, offset: Tensor) -> list[Candidate]:
    by_class = offset.detach().repeat(1, 21, 1, 1).requires_grad_()  # as in the paper's classification branch
    wide_x, wide_scores = (t.detach().float().requires_grad_() for t in (x, scores))  # no bfloat16 in torchvision's
    return [
        Candidate("roi_align", lambda: torchvision.ops.roi_align(wide_x, rois, 7, 1 / 16, aligned=True), (wide_x,)),
        Candidate("deform_roi_pool", lambda: deform_roi_pool(x, rois, offset, 7, 1 / 16), (x, offset)),
        Candidate(
            "ps_roi_align", lambda: torchvision.ops.ps_roi_align(wide_scores, rois, 7, 1 / 16, 4), (wide_scores,)
        ),
        Candidate(
            "deform_ps_roi_pool",
            lambda: deform_ps_roi_pool(scores, rois, offset, 7, 21, 7, 1 / 16),
            (scores, offset),
        ),
        Candidate(
            "deform_ps_roi_pool by class",
            lambda: deform_ps_roi_pool(scores, rois, by_class, 7, 21, 7, 1 / 16),
            (scores, by_class),
        ),
    ]
