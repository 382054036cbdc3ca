"""Deformable convolutions, aggregations and RoI poolings beside what they stand for."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from segdcn.benchmarks.agreement import largest_difference, tensor_float_32
from segdcn.benchmarks.stopwatch import Candidate, compare, plain_figures
from segdcn.errors import first_line
from segdcn.ops import deform_aggregate, deform_conv2d, deform_ps_roi_pool, deform_roi_pool
from segdcn.ops.deform_conv import Backend

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

# N, C, H, W -> C, 3x3; dilation: of DeepLab on a ResNet-50 or -101, for crops of 513x513, 769x769 and 512x1024 pixels
DEEPLAB = (
    (16, 512, 33, 33, 2),  # the last stage at output stride 16
    (8, 512, 49, 49, 2),
    (8, 512, 32, 64, 2),
    (8, 512, 65, 65, 4),  # and at 8
    (8, 512, 97, 97, 4),
    (8, 512, 64, 128, 4),
    (16, 256, 33, 33, 1),  # the stage before it, at 16
)
PRECISIONS = {"bfloat16": (torch.bfloat16, True), "TF32": (torch.float32, True), "float32": (torch.float32, False)}
"""By name: dtype of the features, and whether products may be rounded to TF32."""

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


def layers_of_deeplab(
    repeats: int,
    device: torch.device,
    backends: Sequence[str],
    maps: Sequence[tuple[int, int, int, int, int]] = DEEPLAB,
) -> Iterator[dict[str, Any]]:
    """deform_conv2d by each backend beside the plain convolution, a row of each precision and map.

    Features are channels last, contiguous for torchvision's kernel; what it computes in float32 is cast in its time.

    Returns:
        rows with "case", "precision" and, by name, "figures"; "differences" from the first backend, the largest of the
        output and of each gradient as shares of its largest value; "failed": why what is in neither could not be run.
        Where Triton has just tuned its kernels also "tiles": milliseconds of each kernel by tile.
    """
    tuned: dict[str, Any] = {}
    for precision, (dtype, rounded) in PRECISIONS.items():
        for n, channels, height, width, dilation in maps:
            torch.manual_seed(0)
            x = torch.randn(n, channels, height, width, device=device).to(dtype)
            weight = (torch.randn(channels, channels, 3, 3, device=device) / math.sqrt(9 * channels)).to(dtype)
            offset = (OFFSET_DEVIATION * torch.randn(n, 18, height, width, device=device)).requires_grad_()
            candidates = _with_backends(x, offset, weight, dilation, backends)
            with tensor_float_32(rounded):
                differences, failed = _differences(candidates)
                figures = compare([one for one in candidates if one.name not in failed], repeats)
            row = {
                "case": f"{n}×{channels}×{height}×{width}, dilation {dilation}",
                "precision": precision,
                "figures": plain_figures(figures),
                "differences": differences,
                "failed": failed,
            }
            if (tiles := _tile_times()) != tuned:
                row["tiles"] = tuned = tiles
            yield row


def _differences(candidates: Sequence[Candidate]) -> tuple[dict[str, float], dict[str, str]]:
    """Of each backend from the first one, and why those that cannot be run here cannot."""
    differences, failed = {}, {}
    expected: dict[str, Tensor] = {}
    for one in candidates:
        try:
            output = one.run()
            gradients = torch.autograd.grad(output, one.leaves, torch.ones_like(output))
        except Exception as error:  # of memory, of a compiler, ...
            failed[one.name] = first_line(error)
            continue
        if one.name != "conv2d":
            found = {"output": output.detach(), **dict(zip(("input", "offset", "weight"), gradients, strict=True))}
            expected = expected or found
            differences[one.name] = largest_difference(found, expected)[1]
    return differences, failed


def _tile_times() -> dict[str, dict[str, float]]:
    """What Triton measured when it last tuned each kernel, in milliseconds by tile; empty where it did not."""
    module = sys.modules.get("segdcn.ops.triton_conv")
    kernels = {} if module is None else vars(module)
    timings = {name: getattr(kernel, "configs_timings", None) for name, kernel in kernels.items()}
    return {
        name: {str(tile): ms[0] if isinstance(ms, list | tuple) else ms for tile, ms in found.items()}
        for name, found in timings.items()
        if found
    }


def _with_backends(
    x: Tensor, offset: Tensor, weight: Tensor, dilation: int, backends: Sequence[str]
) -> list[Candidate]:
    contiguous = x.clone().requires_grad_(), weight.clone().requires_grad_()
    last = (
        x.contiguous(memory_format=torch.channels_last).requires_grad_(),
        weight.contiguous(memory_format=torch.channels_last).requires_grad_(),
    )
    found = [Candidate("conv2d", lambda: F.conv2d(*last, None, 1, dilation, dilation), last)]
    for backend in backends:
        features, filters = contiguous if backend == "torchvision" else last
        arguments = (features, offset, filters, None, 1, dilation, dilation)
        run = partial(deform_conv2d, *arguments, backend=cast(Backend, backend))
        found.append(Candidate(backend, run, (features, offset, filters)))
    return found


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
