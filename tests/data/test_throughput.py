"""The loading benchmark measures what it says, on made-up images where there are no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_transforms import blocks

from segdcn.benchmarks.loading import make_streets, measure, naive_train_transform
from segdcn.data.cityscapes import Cityscapes
from segdcn.data.transforms import TrainTransform


def test_made_up_streets_are_like_the_data_sets_own(tmp_path: Path) -> None:
    (sample,) = Cityscapes(make_streets(tmp_path, images=1)).split("train")
    assert sample.image.shape == (1024, 2048, 3)
    assert len(np.unique(sample.label)) > 5
    (image,) = tmp_path.glob("leftImg8bit/train/*/*.png")
    assert 2e6 < image.stat().st_size < 3e6


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_rates_are_per_worker_and_consistent(tmp_path: Path, workers: int) -> None:
    samples = Cityscapes(make_streets(tmp_path, images=1)).split("train")
    rates = measure(samples, (64, 96), photometric=0.3, workers=workers, seconds=0.15, rounds=1)
    assert set(rates) == {"pipeline", "naive", "naive_order", "decode", "decode_pillow", "speedup"}
    assert all(value > 0 for value in rates.values())
    assert rates["speedup"] == pytest.approx(rates["pipeline"] / rates["naive"])


def test_naive_order_draws_from_the_same_distribution() -> None:
    image, label = blocks(60, 90)
    settings = ((48, 64), (0.5, 2.0), 0.5, 0.0)
    found = []
    for transform in (TrainTransform(*settings), naive_train_transform(*settings)):
        results = [transform(image, label, seed) for seed in range(150)]
        assert all(x.shape == (3, 48, 64) and x.dtype == torch.float32 and y.dtype == torch.int64 for x, y in results)
        assert all((x[:, y == 255].abs() < 0.02).all() for x, y in results)  # the mean colour, perhaps in whole levels
        found.append([float((y == 255).float().mean()) for _, y in results])
    assert np.mean(found[0]) == pytest.approx(np.mean(found[1]), abs=0.06)
