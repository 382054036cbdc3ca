"""Time to count one 2048×1024 prediction into the 19-class confusion matrix, beside torchmetrics' own metric.

python scripts/time_confusion.py [--repeats 21]
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from segdcn.benchmarks.stopwatch import interleaved
from segdcn.evaluation import SegmentationMetrics

CLASSES = 19


def street(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A prediction and a label (1, 1024, 2048): blocks of classes, a tenth of the pixels wrong, a tenth ignored."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(CLASSES, (1, 8, 16), generator=generator)
    label = blocks.repeat_interleave(128, dim=1).repeat_interleave(128, dim=2)
    wrong, ignored = torch.rand((2, *label.shape), generator=generator) < 0.1
    prediction = label.where(~wrong, 0)
    return prediction.to(dtype), label.where(~ignored, 255).to(dtype)


def measure(dtype: torch.dtype, repeats: int) -> tuple[float, float]:
    """Medians of interleaved updates in milliseconds: SegmentationMetrics, torchmetrics' MulticlassConfusionMatrix."""
    ours, theirs = (
        SegmentationMetrics(CLASSES),
        MulticlassConfusionMatrix(CLASSES, ignore_index=255, validate_args=False),
    )
    # torchmetrics multiplies in the labels' own type, which overflows in a byte
    calls = {"ours": partial(ours.update, *street(dtype)), "theirs": partial(theirs.update, *street(torch.int64))}
    medians = interleaved(calls, repeats, torch.device("cpu"))
    assert torch.equal(ours.confusion_matrix, theirs.confmat)
    return medians["ours"], medians["theirs"]


def main() -> None:
    """Print one row per integer type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21)
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 2048×1024 pixels, {CLASSES} classes")
    print("| labels | SegmentationMetrics | torchmetrics (int64) | torchmetrics / ours |\n|---|---|---|---|")
    for dtype in (torch.int64, torch.uint8):
        ours, theirs = measure(dtype, repeats)
        print(f"| {str(dtype).removeprefix('torch.')} | {ours:.1f} ms | {theirs:.1f} ms | {theirs / ours:.1f} |")


if __name__ == "__main__":
    main()
