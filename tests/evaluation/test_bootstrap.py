"""Intervals over images against a slow loop: draw images, count them again, take the quantiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from segdcn.evaluation import SegmentationMetrics, bootstrap_difference, bootstrap_iou, bootstrap_miou
from segdcn.evaluation.bootstrap import RESAMPLES


def some_matrices(images: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randint(0, 3, (images, classes, 1), generator=generator)  # classes are absent from some images
    return scale * torch.randint(0, 50, (images, classes, classes), generator=generator)


def counts(matrices: Tensor) -> Tensor:
    return torch.stack((matrices.diagonal(dim1=1, dim2=2), matrices.sum(dim=2), matrices.sum(dim=1)), dim=1)


def drawn(matrices: Tensor, seed: int, absent_is_zero: bool = False) -> list[dict[str, Tensor]]:
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(0, RESAMPLES, 100):
        for draw in torch.randint(len(matrices), (100, len(matrices)), generator=generator).tolist():
            metrics = SegmentationMetrics(matrices.shape[1], absent_is_zero=absent_is_zero)
            for index in draw:
                metrics.confusion_matrix += matrices[index]
            found.append(metrics.compute())
    return found


@pytest.mark.parametrize("absent_is_zero", [False, True])
def test_intervals_against_a_slow_loop(absent_is_zero: bool) -> None:
    matrices = some_matrices(4, 5)
    found = drawn(matrices, 3, absent_is_zero)
    expected = np.quantile([one["miou"].item() for one in found], [0.025, 0.975])
    low, high = bootstrap_miou(counts(matrices), 3, absent_is_zero)
    assert (low, high) == pytest.approx(tuple(expected), rel=1e-12)
    assert low < high
    classes = np.nanquantile(torch.stack([one["iou"] for one in found]).numpy(), [0.025, 0.975], axis=0)
    np.testing.assert_allclose(bootstrap_iou(counts(matrices), 3).numpy(), classes.T, rtol=1e-12)


def test_difference_pairs_the_images() -> None:
    one, two = some_matrices(4, 5), some_matrices(4, 5, seed=1)
    pairs = zip(drawn(one, 0), drawn(two, 0), strict=True)
    expected = np.quantile([(a["miou"] - b["miou"]).item() for a, b in pairs], [0.025, 0.975])
    assert bootstrap_difference(counts(one), counts(two)) == pytest.approx(tuple(expected), rel=1e-12)
    assert bootstrap_difference(counts(one), counts(one)) == (0, 0)
    with pytest.raises(ValueError, match="same images"):
        bootstrap_difference(counts(one), counts(two)[:3])


def test_interval_repeats_and_follows_its_seed() -> None:
    some = counts(some_matrices(9, 4))
    assert bootstrap_miou(some) == bootstrap_miou(some.clone()) != bootstrap_miou(some, seed=1)


def test_no_interval_without_labels() -> None:
    for nothing in (torch.zeros(0, 3, 5, dtype=torch.int64), torch.zeros(4, 3, 5, dtype=torch.int64)):
        assert all(math.isnan(end) for end in bootstrap_miou(nothing))
        assert bootstrap_iou(nothing).shape == (5, 2)
        assert bootstrap_iou(nothing).isnan().all()


def test_a_class_that_no_image_holds_has_no_interval() -> None:
    matrices = some_matrices(6, 3)
    matrices[:, 1], matrices[:, :, 1] = 0, 0
    assert bootstrap_iou(counts(matrices)).isnan().all(dim=1).tolist() == [False, True, False]
