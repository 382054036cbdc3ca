"""Forward and backward time of deform_conv2d's two backends and of a plain convolution, interleaved.

python scripts/time_deform_conv.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from segdcn.ops import deform_conv2d

SHAPES = [(16, 128, 12, 12), (2, 64, 64, 64), (1, 256, 64, 64), (4, 256, 40, 40)]


def milliseconds(function: Callable[[], Tensor]) -> float:
    """One forward and backward pass."""
    start = time.perf_counter()
    function().sum().backward()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Print one row per shape: medians, and the ratio of the backends within this run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 3x3, fp32, offsets of standard deviation 2")
    print("| N×C×H×W | plain conv2d | gather | torchvision | torchvision / gather |\n|---|---|---|---|---|")
    for n, c, h, w in SHAPES:
        torch.manual_seed(0)
        x = torch.randn(n, c, h, w, requires_grad=True)
        weight = torch.randn(c, c, 3, 3, requires_grad=True)
        offset = (2 * torch.randn(n, 18, h, w)).requires_grad_()
        candidates: list[Callable[[], Tensor]] = [
            lambda: F.conv2d(x, weight, padding=1),  # noqa: B023  (called within this turn of the loop)
            lambda: deform_conv2d(x, offset, weight, padding=1, backend="gather"),  # noqa: B023
            lambda: deform_conv2d(x, offset, weight, padding=1, backend="torchvision"),  # noqa: B023
        ]
        rounds = [[milliseconds(candidate) for candidate in candidates] for _ in range(repeats + 1)][1:]
        plain, gather, torchvision = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(times[2] / times[1] for times in rounds)
        print(f"| {n}×{c}×{h}×{w} | {plain:.0f} ms | {gather:.0f} ms | {torchvision:.0f} ms | {ratio:.1f} |")


if __name__ == "__main__":
    main()
