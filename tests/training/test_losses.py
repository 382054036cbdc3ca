from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from running import BARE, call, one_line
from torch import Tensor

from segdcn.commands.train import main
from segdcn.training.losses import Region, SegmentationLoss

WEIGHTS = [0.5, 2.0, 1.0, 0.1]


def random_batch(seed: int = 0, ignored_share: float = 0.3) -> tuple[Tensor, Tensor]:
    """Logits (2, 4, 5, 7) and a label (2, 5, 7) with ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 5, 7, generator=generator, requires_grad=True)
    label = torch.randint(0, 4, (2, 5, 7), generator=generator)
    label[torch.rand(2, 5, 7, generator=generator) < ignored_share] = 255
    return logits, label


def test_loss_by_the_definition() -> None:
    logits, label = random_batch()
    total, count = 0.0, 0
    for n in range(2):
        for y in range(5):
            for x in range(7):
                if label[n, y, x] != 255:
                    probabilities = logits[n, :, y, x].exp() / logits[n, :, y, x].exp().sum()
                    total -= probabilities[label[n, y, x]].log().item()
                    count += 1
    assert 0 < count < label.numel()
    assert SegmentationLoss()(logits, label).item() == pytest.approx(total / count, rel=1e-5)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    weights=st.sampled_from([None, WEIGHTS]),
    smoothing=st.sampled_from([0.0, 0.1, 0.6]),
    ignored_share=st.floats(0.0, 0.9),
)
def test_loss_and_gradient_equal_torch(
    seed: int, weights: list[float] | None, smoothing: float, ignored_share: float
) -> None:
    logits, label = random_batch(seed, ignored_share)
    label[0, 0, 0] = 1  # torch's own mean is NaN without a labelled pixel
    loss = SegmentationLoss(class_weights=weights, label_smoothing=smoothing)(logits, label)
    expected = F.cross_entropy(
        logits,
        label,
        weight=None if weights is None else torch.tensor(weights),
        ignore_index=255,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("ohem_threshold", [None, 0.7])
@pytest.mark.parametrize("ohem_fraction", [None, 0.25])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_without_a_labelled_pixel_loss_and_gradient_are_zero(
    ohem_threshold: float | None,
    ohem_fraction: float | None,
    class_weights: list[float] | None,
    label_smoothing: float,
) -> None:
    logits, label = random_batch(ignored_share=1.1)
    loss = SegmentationLoss(255, class_weights, label_smoothing, ohem_fraction, ohem_threshold)(logits, label)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.7, 1.0])
def test_ohem_averages_the_hardest_labelled_pixels(fraction: float) -> None:
    logits, label = random_batch()
    per_pixel = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    ranked = sorted(per_pixel[label != 255].tolist(), reverse=True)
    kept = ranked[: max(1, round(fraction * len(ranked)))]
    loss = SegmentationLoss(ohem_fraction=fraction)(logits, label)
    assert loss.item() == pytest.approx(sum(kept) / len(kept), rel=1e-5)

    loss.backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(dim=1) > 0).sum() == len(kept)


def test_ohem_divides_by_the_class_weights_of_the_kept_pixels() -> None:
    logits, label = random_batch()
    weights = torch.tensor(WEIGHTS)
    per_pixel = F.cross_entropy(logits, label, weight=weights, ignore_index=255, reduction="none")
    pixels = [
        (value, weights[k].item())
        for value, k in zip(per_pixel[label != 255].tolist(), label[label != 255], strict=True)
    ]
    kept = sorted(pixels, reverse=True)[: round(0.25 * len(pixels))]
    loss = SegmentationLoss(class_weights=WEIGHTS, ohem_fraction=0.25)(logits, label)
    assert loss.item() == pytest.approx(sum(v for v, _ in kept) / sum(w for _, w in kept), rel=1e-5)


def mmsegmentation_samples(probabilities: np.ndarray, threshold: float, least: int) -> np.ndarray:
    """Which pixels count, after its OHEMPixelSampler: of the labelled pixels' true classes, (M,) -> (M,) bool."""
    ranked = np.sort(probabilities)
    reached = ranked[least] if least < len(ranked) else np.inf  # the sampler itself leaves the easiest pixel out
    return probabilities < max(threshold, reached)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([0.05, 0.3, 0.7, 0.99]),
    fraction=st.sampled_from([None, 0.1, 0.5, 1.0]),
    weights=st.sampled_from([None, [2.0] * 4]),
)
def test_ohem_by_threshold_keeps_what_mmsegmentation_keeps(
    seed: int, threshold: float, fraction: float | None, weights: list[float] | None
) -> None:
    logits, label = random_batch(seed)
    valid = (label != 255).numpy()
    exponentials = np.exp(logits.detach().numpy().astype(np.float64))
    of_classes = (exponentials / exponentials.sum(1, keepdims=True)).transpose(0, 2, 3, 1)[valid]
    probabilities = of_classes[np.arange(valid.sum()), label.numpy()[valid]]
    kept = mmsegmentation_samples(probabilities, threshold, max(1, round((fraction or 0) * valid.sum())))

    loss = SegmentationLoss(class_weights=weights, ohem_fraction=fraction, ohem_threshold=threshold)(logits, label)
    assert loss.item() == pytest.approx(-np.log(probabilities[kept]).mean(), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    np.testing.assert_array_equal((logits.grad.abs().sum(dim=1) > 0).numpy()[valid], kept)


def test_ohem_threshold_is_of_the_probability_whatever_weighs_the_loss() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 0.1]]).T.reshape(1, 2, 1, 2)  # 0.95 and 0.52 of their classes
    label = torch.tensor([[[0, 1]]])
    loss = SegmentationLoss(class_weights=[100.0, 1.0], ohem_threshold=0.7)(logits, label)
    assert loss.item() == pytest.approx(-math.log(math.exp(0.1) / (1 + math.exp(0.1))), rel=1e-5)


def dice_by_the_definition(probabilities: np.ndarray, label: np.ndarray) -> float:
    """Of labelled pixels, (M, K) and (M,): class by class, the mean over all."""
    losses = []
    for k in range(probabilities.shape[1]):
        true, predicted = (label == k).astype(float), probabilities[:, k]
        overlap = 2 * (true * predicted).sum() / (true.sum() + predicted.sum())
        losses.append(1 - overlap if true.any() else 0.0)
    return float(np.mean(losses))


def lovasz_by_the_definition(probabilities: np.ndarray, label: np.ndarray) -> float:
    """The Lovász extension as an integral: of the Jaccard loss of the pixels whose error reaches a level, over levels.

    Bach 2013, equation 3.4; the code under test sorts the errors and sums differences of the Jaccard index instead.
    """
    losses = []
    for k in np.unique(label):
        true = label == k
        errors = np.abs(true - probabilities[:, k])
        levels = np.unique(np.concatenate(([0.0], errors)))
        total = 0.0
        for below, level in pairwise(levels):
            wrong = errors >= level
            total += (level - below) * wrong.sum() / (true | wrong).sum()
        losses.append(total)
    return float(np.mean(losses))


REGIONS = {"dice": dice_by_the_definition, "lovasz": lovasz_by_the_definition}


@pytest.mark.parametrize("region", REGIONS)
@settings(max_examples=30)
@given(seed=st.integers(0, 1000), ignored_share=st.floats(0.0, 0.97), absent=st.booleans(), factor=st.floats(0, 3))
def test_region_loss_by_its_definition(
    region: Region, seed: int, ignored_share: float, absent: bool, factor: float
) -> None:
    logits, label = random_batch(seed, ignored_share)
    label[0, 0, 0] = 1
    if absent:
        label[label == 2] = 3
    valid = (label != 255).numpy()
    exponentials = np.exp(logits.detach().numpy().astype(np.float64))
    probabilities = (exponentials / exponentials.sum(1, keepdims=True)).transpose(0, 2, 3, 1)[valid]
    expected = REGIONS[region](probabilities, label.numpy()[valid])
    loss = SegmentationLoss(region=region, region_weight=factor)(logits, label)
    assert loss.item() == pytest.approx(SegmentationLoss()(logits, label).item() + factor * expected, rel=1e-4)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad.permute(0, 2, 3, 1)[~torch.from_numpy(valid)].any()


def test_lovasz_of_certain_predictions_is_the_jaccard_loss() -> None:
    _, label = random_batch(3)
    predicted = random_batch(4)[1].clamp(max=3)
    logits = 200.0 * F.one_hot(predicted, 4).permute(0, 3, 1, 2).float()
    valid = label != 255
    jaccard = []
    for k in range(4):
        true, seen = (label == k)[valid], (predicted == k)[valid]
        jaccard.append(1 - (true & seen).sum().item() / (true | seen).sum().item())
    added = SegmentationLoss(region="lovasz")(logits, label) - SegmentationLoss()(logits, label)
    assert added.item() == pytest.approx(np.mean(jaccard), rel=1e-4)


@pytest.mark.parametrize("region", REGIONS)
def test_region_loss_of_a_batch_without_a_labelled_pixel_is_zero(region: Region) -> None:
    logits, label = random_batch(ignored_share=1.1)
    loss = SegmentationLoss(region=region)(logits, label)
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("region", REGIONS)
def test_region_loss_of_half_precision_logits_is_in_float32(region: Region) -> None:
    logits, label = torch.randn(1, 4, 200, 200).bfloat16(), torch.randint(0, 4, (1, 200, 200))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SegmentationLoss(region=region)(logits, label)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, SegmentationLoss(region=region)(logits.float(), label))


def test_missing_package_is_one_line_that_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    assert call(main, *BARE, "loss.region=dice", f"output_dir={tmp_path / 'run'}") == 1
    line = one_line(capsys.readouterr().err)
    assert line.endswith(
        'region=dice needs segmentation-models-pytorch, which is not installed here: pip install -e ".[losses]"'
    )


def test_other_ignore_index() -> None:
    logits, label = random_batch()
    assert torch.equal(
        SegmentationLoss(ignore_index=-1)(logits, label.where(label != 255, -1)),
        SegmentationLoss()(logits, label),
    )


def test_half_precision_logits_are_summed_in_float32() -> None:
    # 40,000 pixels of loss log(2) add up to 27,726, where bfloat16 would count in steps of 128.
    logits = torch.zeros(1, 2, 200, 200, dtype=torch.bfloat16)
    label = torch.zeros(1, 200, 200, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SegmentationLoss()(logits, label)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.6931472, abs=1e-5)


def test_class_weights_are_not_part_of_the_checkpoint() -> None:
    SegmentationLoss(class_weights=WEIGHTS).load_state_dict(SegmentationLoss().state_dict())


@pytest.mark.parametrize("label_shape", [(2, 7, 5), (2, 1, 5, 7), (1, 5, 7)])
def test_wrong_shapes_are_named(label_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 5, 7\)") as error:
        SegmentationLoss()(torch.zeros(2, 4, 5, 7), torch.zeros(label_shape, dtype=torch.int64))
    assert str(label_shape) in str(error.value)


def test_class_weights_must_fit_the_network() -> None:
    with pytest.raises(ValueError, match="class_weights has 3 values, but the network predicts 4 classes"):
        SegmentationLoss(class_weights=[1.0, 1.0, 1.0])(*random_batch())


@pytest.mark.parametrize(
    "setting",
    [
        {"ohem_fraction": 0.0},
        {"ohem_fraction": 1.5},
        {"ohem_threshold": 0.0},
        {"ohem_threshold": 1.0},
        {"region": "jaccard"},
        {"region_weight": -1.0},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"class_weights": [0.0, 0.0]},
        {"class_weights": [1.0, -1.0]},
        {"class_weights": [1.0, float("nan")]},
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        SegmentationLoss(**setting)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        ("ohem_threshold=0.7", "ohem_fraction=0.1", "region=lovasz", "region_weight=0.5"),
        pytest.param(("region=dice",), marks=pytest.mark.slow),
    ],
)
def test_command_trains_with_it(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Two steps and a validation, in which the loss is computed too."""
    small = ("trainer.max_steps=2", "datamodule.batch_size=4", "dataset.val_images=2", f"output_dir={tmp_path}")
    assert call(main, *BARE, *small, *(f"loss.{option}" for option in options)) == 0
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 < figures["val/loss"] < 10
