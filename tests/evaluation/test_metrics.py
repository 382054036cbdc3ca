from __future__ import annotations

import math
import random
import warnings
from statistics import mean

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segdcn.evaluation import BoundaryIoU, SegmentationMetrics
from segdcn.evaluation.metrics import ImageCounts, count_pairs

KEYS = {"miou", "iou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou"}


def slow_metrics(prediction: Tensor, label: Tensor, num_classes: int) -> dict[str, float | list[float]]:
    """The definitions, pixel by pixel."""
    pairs = zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True)
    pixels = [(t, p) for t, p in pairs if t != 255]
    iou, recall, weighted = [], [], 0.0
    for k in range(num_classes):
        hit = sum(1 for t, p in pixels if t == k and p == k)
        union = sum(1 for t, p in pixels if t == k or p == k)
        truth = sum(1 for t, _ in pixels if t == k)
        iou.append(hit / union if union else math.nan)
        if truth:
            recall.append(hit / truth)
            weighted += truth / len(pixels) * hit / union
    return {
        "miou": mean(value for value in iou if not math.isnan(value)),
        "iou": iou,
        "pixel_accuracy": sum(t == p for t, p in pixels) / len(pixels),
        "mean_accuracy": mean(recall),
        "frequency_weighted_iou": weighted,
    }


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, Tensor, Tensor]:
    """K, prediction, label with ignored pixels; some classes are absent, some pixels right."""
    num_classes = draw(st.integers(2, 12))
    shape = (draw(st.integers(2, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 7)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    present = draw(st.integers(1, num_classes))
    prediction = torch.randint(0, present, shape, generator=generator)
    label = torch.randint(0, present, shape, generator=generator)
    label = torch.where(torch.rand(shape, generator=generator) < 0.5, prediction, label)
    label[torch.rand(shape, generator=generator) < 0.2] = 255
    label[0, 0, 0] = draw(st.integers(0, num_classes - 1))
    dtype = draw(st.sampled_from([torch.uint8, torch.int64]))
    return num_classes, prediction.to(dtype), label.to(draw(st.sampled_from([torch.uint8, torch.int64])))


def measured(num_classes: int, *pairs: tuple[Tensor, Tensor]) -> SegmentationMetrics:
    metrics = SegmentationMetrics(num_classes)
    for prediction, label in pairs:
        metrics.update(prediction, label)
    return metrics


@settings(max_examples=30)
@given(batches())
def test_metrics_equal_counting_pixel_by_pixel(batch: tuple[int, Tensor, Tensor]) -> None:
    num_classes, prediction, label = batch
    result = measured(num_classes, (prediction, label)).compute()
    expected = slow_metrics(prediction, label, num_classes)
    confusion = result.pop("confusion_matrix")
    assert confusion.sum() == (label != 255).sum()
    assert result.keys() == KEYS == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], torch.tensor(value, dtype=torch.float64), equal_nan=True)


@settings(max_examples=30)
@given(batches())
def test_parts_add_up_to_the_whole(batch: tuple[int, Tensor, Tensor]) -> None:
    num_classes, prediction, label = batch
    whole = measured(num_classes, (prediction, label))
    in_steps = measured(num_classes, (prediction[:1], label[:1]), (prediction[1:], label[1:]))
    merged = measured(num_classes, (prediction[:1], label[:1]))
    merged.compute()  # an earlier result must not be handed out again
    merged.merge_state(measured(num_classes, (prediction[1:], label[1:])))
    added = SegmentationMetrics(num_classes)  # as a sum over processes leaves it, without an update
    added.confusion_matrix = merged.confusion_matrix.clone()
    for other in (in_steps, merged, added):
        assert torch.equal(other.confusion_matrix, whole.confusion_matrix)
        for name, value in whole.compute().items():
            torch.testing.assert_close(other.compute()[name], value, rtol=0, atol=0, equal_nan=True)


def test_rows_are_truth_and_columns_prediction() -> None:
    metrics = measured(3, (torch.tensor([[[2, 2, 0]]]), torch.tensor([[[1, 1, 0]]])))
    assert metrics.confusion_matrix.tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 0]]
    assert metrics.confusion_matrix.dtype == torch.int64


def test_absent_class_is_nan_and_left_out_but_a_predicted_one_counts_as_zero() -> None:
    label = torch.tensor([[[0, 0, 1, 1]]])
    perfect = measured(4, (label, label)).compute()
    assert perfect["iou"].tolist()[:2] == [1.0, 1.0]
    assert perfect["iou"].isnan().tolist() == [False, False, True, True]
    assert perfect["miou"].item() == 1.0

    stray = measured(4, (torch.tensor([[[0, 0, 1, 3]]]), label)).compute()
    assert stray["iou"].nan_to_num(-1.0).tolist() == [1.0, 0.5, -1.0, 0.0]
    assert stray["miou"].item() == 0.5
    assert stray["mean_accuracy"].item() == 0.75  # only classes of the truth have a recall


def test_miou_is_not_a_mean_over_images() -> None:
    # A large image with one wrong pixel, and a small one that is half wrong.
    large_label, large_prediction = (
        torch.zeros(1, 10, 20, dtype=torch.int64),
        torch.zeros(1, 10, 20, dtype=torch.int64),
    )
    large_label[:, 5:] = 1
    large_prediction[:, 5:] = 1
    large_prediction[0, 0, 0] = 1
    small_label, small_prediction = torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]])
    result = measured(2, (large_prediction, large_label), (small_prediction, small_label)).compute()
    # class 0: 99 + 1 right, union 100 + 2; class 1: 100 right, union 101 + 1
    assert result["miou"].item() == pytest.approx((100 / 102 + 100 / 102) / 2)
    per_image = [
        measured(2, (prediction, label)).compute()["miou"].item()
        for prediction, label in ((large_prediction, large_label), (small_prediction, small_label))
    ]
    assert mean(per_image) < 0.7


def test_ignored_pixels_count_nowhere() -> None:
    label = torch.tensor([[[0, 1, 255, 255]]], dtype=torch.uint8)
    prediction = torch.tensor([[[0, 1, 0, 2]]])
    metrics = measured(3, (prediction, label))
    assert metrics.confusion_matrix.sum().item() == 2
    assert metrics.compute()["miou"].item() == 1.0
    assert metrics.compute()["iou"][2].isnan()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_other_ignore_index(dtype: torch.dtype) -> None:
    metrics = SegmentationMetrics(3, ignore_index=0)
    metrics.update(torch.tensor([[[0, 1, 2]]], dtype=dtype), torch.tensor([[[0, 1, 1]]], dtype=dtype))
    assert metrics.confusion_matrix.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("ignore_index", [-100, 1000])
def test_ignore_index_beyond_a_byte(ignore_index: int) -> None:
    metrics = SegmentationMetrics(3, ignore_index=ignore_index)
    metrics.update(torch.tensor([[[0, 1, 2]]]), torch.tensor([[[0, ignore_index, 1]]]))
    assert metrics.confusion_matrix.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match="label holds the value 3"):
        metrics.update(torch.tensor([[[0]]]), torch.tensor([[[3]]]))


@pytest.mark.parametrize("num_classes", [127, 128, 255, 300])
def test_many_classes(num_classes: int) -> None:
    """Around the number of classes at which the pairs no longer fit in 16 bits."""
    label = torch.arange(num_classes)[None, None]
    confusion = count_pairs(label.flip(2), label, num_classes, ignore_index=1000)
    assert torch.equal(confusion, torch.eye(num_classes, dtype=torch.int64).flip(1))


def test_official_voc_rule_pixel_by_pixel() -> None:
    """VOCevalseg.m as described: pooled counts over images of their own size, truth 255 dropped, 21 classes."""
    generator, counts = random.Random(0), [[0] * 21 for _ in range(21)]
    metrics = SegmentationMetrics(21)
    for height, width in ((30, 41), (17, 25), (50, 8)):
        truth = [[generator.choice([*range(20), 255]) for _ in range(width)] for _ in range(height)]
        predicted = [
            [t if t < 255 and generator.random() < 0.6 else generator.randrange(21) for t in row] for row in truth
        ]
        for y in range(height):
            for x in range(width):
                if truth[y][x] != 255:
                    counts[truth[y][x]][predicted[y][x]] += 1
        metrics.update(torch.tensor([predicted]), torch.tensor([truth]))
    iou = [
        counts[k][k] / (sum(counts[k]) + sum(counts[other][k] for other in range(21)) - counts[k][k]) for k in range(21)
    ]
    assert iou[20] == 0.0  # only predicted
    assert metrics.compute()["iou"].tolist() == pytest.approx(iou, rel=0, abs=1e-9)
    assert metrics.compute()["miou"].item() == pytest.approx(sum(iou) / 21, rel=0, abs=1e-9)


def test_absent_class_may_count_zero_in_the_mean_but_stays_absent_itself() -> None:
    metrics = SegmentationMetrics(4, absent_is_zero=True)
    metrics.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]))
    assert metrics.compute()["miou"].item() == 0.5
    assert metrics.compute()["iou"].isnan().tolist() == [False, False, True, True]
    assert SegmentationMetrics(4, absent_is_zero=True).compute()["miou"].isnan()


def test_categories_do_not_mind_mistakes_within_them() -> None:
    metrics = SegmentationMetrics(4, categories={"animal": [0, 1], "thing": [2], "none": [3]})
    metrics.update(torch.tensor([[[1, 0, 1, 2, 0, 2]]]), torch.tensor([[[0, 0, 1, 2, 2, 255]]]))
    result = metrics.compute()
    assert result["category_iou"].nan_to_num(-1).tolist() == [3 / 4, 1 / 2, -1]
    assert result["category_miou"].item() == (3 / 4 + 1 / 2) / 2


def outline(mask: np.ndarray, distance: int) -> np.ndarray:
    """As the authors of Boundary IoU do it: framed with zeros and eroded ``distance`` times by a 3x3 square."""
    framed = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return mask & (cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1] == 0)


@settings(max_examples=30)
@given(batches(), st.floats(0.01, 0.6))
def test_boundary_iou_class_by_class(batch: tuple[int, Tensor, Tensor], share: float) -> None:
    num_classes, prediction, label = batch
    prediction, label = (values.repeat_interleave(5, 1).repeat_interleave(4, 2) for values in (prediction, label))
    metric = BoundaryIoU(num_classes, distance=share)
    metric.update(prediction[:1], label[:1])
    metric.update(prediction[1:], label[1:])
    distance = max(1, round(share * math.hypot(*label.shape[1:])))
    both, either = np.zeros(num_classes), np.zeros(num_classes)
    for predicted, truth in zip(prediction.numpy(), label.numpy(), strict=True):
        for k in range(num_classes):
            bands = [outline(values == k, distance) & (truth != 255) for values in (predicted, truth)]
            both[k] += (bands[0] & bands[1]).sum()
            either[k] += (bands[0] | bands[1]).sum()
    with np.errstate(invalid="ignore"):
        expected = both / either
    np.testing.assert_array_equal(metric.compute()["boundary_iou"].numpy(), expected)
    assert metric.compute()["boundary_miou"].item() == pytest.approx(np.nanmean(expected))


def test_boundary_distance_is_two_percent_of_the_diagonal() -> None:
    label = torch.zeros(1, 300, 400, dtype=torch.int64)  # diagonal 500, so bands of 10 pixels
    metric = BoundaryIoU(2)
    metric.update(label, label)
    assert metric.union.tolist() == [300 * 400 - 280 * 380, 0]


# Counts of images


def image_counts(matrices: list[Tensor], order: list[int]) -> Tensor:
    counts = ImageCounts()
    for index in order:
        counts.update(index, matrices[index] if index >= 0 else torch.zeros_like(matrices[0]))
    return counts.compute()


def some_matrices(images: int, classes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(images)
    scale = torch.randint(0, 3, (images, classes, 1), generator=generator)  # classes are absent from some images
    return list(scale * torch.randint(0, 50, (images, classes, classes), generator=generator))


def test_images_are_in_the_order_of_their_indices_without_padding() -> None:
    matrices = some_matrices(4, 3)
    expected = torch.stack([torch.stack((one.diag(), one.sum(1), one.sum(0))) for one in matrices])
    assert torch.equal(image_counts(matrices, [0, 1, 2, 3]), expected)
    assert torch.equal(image_counts(matrices, [2, -1, 0, 3, -1, 1]), expected)
    assert ImageCounts().compute().shape == (0, 3, 0)


def test_large_counts_stay_exact() -> None:
    metrics = measured(2, (torch.tensor([[[1]]]), torch.tensor([[[0]]])))
    metrics.confusion_matrix[0, 0] = 2**40  # one in a million million is lost in float32
    assert metrics.compute()["pixel_accuracy"].item() == 2**40 / (2**40 + 1) < 1.0


def test_no_data_gives_nan_without_a_warning() -> None:
    only_ignored = measured(3, (torch.zeros(1, 2, 3, dtype=torch.int64), torch.full((1, 2, 3), 255)))
    no_image = measured(3, (torch.zeros(0, 2, 3, dtype=torch.int64), torch.zeros(0, 2, 3, dtype=torch.int64)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metrics in (SegmentationMetrics(3), only_ignored, no_image):
            result = metrics.compute()
            assert not result.pop("confusion_matrix").any()
            assert all(value.isnan().all() for value in result.values())


def test_reset_forgets() -> None:
    metrics = measured(2, (torch.tensor([[[1]]]), torch.tensor([[[0]]])))
    metrics.reset()
    metrics.update(torch.tensor([[[1]]]), torch.tensor([[[1]]]))
    assert metrics.compute()["pixel_accuracy"].item() == 1.0


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        (3, 0, "prediction holds the value 3, but there are 3 classes"),
        (-1, 0, "prediction holds the value -1"),
        (255, 255, "prediction holds the value 255"),
        (0, 3, "label holds the value 3, but there are 3 classes"),
        (0, -1, "label holds the value -1"),
        (0, 254, "label holds the value 254"),
    ],
)
def test_values_out_of_range_are_named(prediction: int, label: int, message: str) -> None:
    metrics = SegmentationMetrics(3)
    with pytest.raises(ValueError, match=message):
        metrics.update(torch.tensor([[[0, prediction]]]), torch.tensor([[[0, label]]]))
    assert metrics.confusion_matrix.sum().item() == 0


@pytest.mark.parametrize("shape", [(1, 7, 5), (1, 3, 5, 7), (5, 7)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="same size") as error:
        SegmentationMetrics(3).update(torch.zeros(shape, dtype=torch.int64), torch.zeros(1, 5, 7, dtype=torch.int64))
    assert str(shape) in str(error.value)


def test_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="argmax"):
        SegmentationMetrics(3).update(torch.zeros(1, 5, 7), torch.zeros(1, 5, 7, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu() -> None:
    prediction = torch.randint(0, 5, (2, 9, 13))
    label = torch.randint(0, 5, (2, 9, 13))
    label[:, 0] = 255
    metrics = SegmentationMetrics(5).cuda()
    metrics.update(prediction.cuda(), label.cuda())
    for name, value in measured(5, (prediction, label)).compute().items():
        torch.testing.assert_close(metrics.compute()[name], value, equal_nan=True)
