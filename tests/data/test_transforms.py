"""Augmentation: image and label stay aligned, padding is ignored, the seed decides everything."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import BARE, call, one_line

from segdcn.commands.train import main
from segdcn.data.transforms import IMAGENET_MEAN, IMAGENET_STD, EvalTransform, TrainTransform, _RandomScaledCrop
from segdcn.evaluation import get_protocol


def blocks(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels 0 to 5 in blocks of 8 pixels; an image with 40 times the label in red and noise elsewhere."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 6, (height // 8 + 1, width // 8 + 1), dtype=np.uint8)
    label = np.kron(coarse, np.ones((8, 8), np.uint8))[:height, :width]
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[..., 0] = 40 * label
    return image, np.ascontiguousarray(label)


def pixels(image: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: (3, H, W) in 0..255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (image * std + mean) * 255


sizes = st.integers(20, 90)
crops = st.integers(32, 80)


@settings(max_examples=30)
@given(h=sizes, w=sizes, crop_h=crops, crop_w=crops, seed=st.integers(0, 2**64 - 1))
def test_shape_dtype_alignment_and_padding(h: int, w: int, crop_h: int, crop_w: int, seed: int) -> None:
    image, label = blocks(h, w)
    x, y = TrainTransform((crop_h, crop_w), scale=(0.5, 2.0))(image, label, seed)
    assert x.shape == (3, crop_h, crop_w)
    assert x.dtype == torch.float32
    assert y.shape == (crop_h, crop_w)
    assert y.dtype == torch.int64
    padded = y == 255
    assert set(y.unique().tolist()) <= {0, 1, 2, 3, 4, 5, 255}  # no invented classes
    assert (x[:, padded] == 0).all()
    seen = ~padded
    # The window that holds the image is a whole rectangle.
    assert int(seen.sum()) == int(seen.any(0).sum()) * int(seen.any(1).sum())
    # The red channel tells the label, except where bilinear resizing mixes it at borders between blocks.
    agree = (pixels(x)[0] / 40).round()[seen] == y[seen]
    assert agree.float().mean() > 0.6


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_without_scaling_image_and_label_are_the_same_exact_window(flip: float) -> None:
    image, label = blocks(60, 75)
    transform = TrainTransform((33, 48), scale=(1, 1), flip=flip)
    source = image[:, ::-1] if flip else image
    for seed in range(5):
        x, y = transform(image, label, seed)
        got = pixels(x).round().to(torch.uint8).permute(1, 2, 0).numpy()
        windows = np.lib.stride_tricks.sliding_window_view(source, (33, 48, 3))[:, :, 0]
        top, left = np.argwhere((windows[:, :, 0] == got[0]).all(axis=(2, 3)))[0]
        np.testing.assert_array_equal(got, source[top : top + 33, left : left + 48])
        np.testing.assert_array_equal(y.numpy() * 40, got[..., 0])


@pytest.mark.parametrize("factor", [0.6, 0.75, 0.9, 1.25])
@pytest.mark.parametrize("axis", [0, 1])
def test_scaled_label_is_not_shifted_against_the_image(factor: float, axis: int) -> None:
    stripes = (np.arange(96) // 5).astype(np.uint8)  # grow along the axis, so that a shift has a sign
    label = np.ascontiguousarray(np.broadcast_to(stripes if axis else stripes[:, None], (96, 96)))
    image = np.stack([12 * label] * 3, axis=2)
    side = round(96 * factor)
    x, y = TrainTransform((side, side), scale=(factor, factor), flip=0)(image, label, 0)
    assert (y != 255).all()
    shift = float((pixels(x)[0] / 12 - y).mean()) * 5  # in pixels of the source, as one stripe is 5 wide
    assert abs(shift) < 0.25


def test_photometric_changes_colours_but_neither_geometry_nor_padding() -> None:
    image, label = blocks(40, 50)
    plain = TrainTransform((64, 72), photometric=0)
    colour = TrainTransform((64, 72), photometric=0.5)
    changed = 0
    for seed in range(6):
        (x, y), (x_colour, y_colour) = plain(image, label, seed), colour(image, label, seed)
        assert (x_colour[:, y_colour == 255] == 0).all()
        assert y_colour.shape == y.shape
        values = pixels(x_colour)
        assert values.min() > -0.01
        assert values.max() < 255.01
        changed += not torch.equal(x[:, y != 255].mean(), x_colour[:, y_colour != 255].mean())
    assert changed == 6


def test_seed_decides_and_nothing_else_does() -> None:
    image, label = blocks(70, 90)
    transform = TrainTransform((40, 56), photometric=0.4)
    x, y = transform(image, label, 7)
    for other in (1, 2, 3):
        transform(image, label, other)
    random.seed(3)
    np.random.seed(3)
    again_x, again_y = TrainTransform((40, 56), photometric=0.4)(image, label, 7)
    assert torch.equal(x, again_x)
    assert torch.equal(y, again_y)
    results = [transform(image, label, seed)[0] for seed in range(20)]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_inputs_are_left_alone() -> None:
    image, label = blocks(40, 50)
    before = image.copy(), label.copy()
    x, y = TrainTransform((32, 32), scale=(1, 1), photometric=0.5)(image, label, 0)
    eval_x, eval_y = EvalTransform()(image, label)
    for tensor in (x, y, eval_x, eval_y):
        tensor.zero_()
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(label, before[1])


def test_scale_and_flip_are_drawn_independently() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    image[:, :50] = 255
    label = np.zeros((100, 100), np.uint8)
    transform = TrainTransform((200, 200), scale=(0.5, 2.0))
    sizes, flipped = [], []
    for seed in range(400):
        x, y = transform(image, label, seed)
        inside = x[0][:, (y != 255).any(0)][(y != 255).any(1)]
        sizes.append(inside.shape[0])
        flipped.append(bool(inside[0, 0] < inside[0, -1]))
    assert 50 <= min(sizes) < 60
    assert 190 < max(sizes) <= 200
    assert abs(np.mean(sizes) - 125) < 8  # uniform between 50 and 200
    assert 0.4 < np.mean(flipped) < 0.6
    small = np.array(sizes) < 125
    assert abs(np.mean(np.array(flipped)[small]) - np.mean(np.array(flipped)[~small])) < 0.15


def test_eval_sees_the_whole_image_at_its_own_size() -> None:
    image, label = blocks(37, 51)
    x, y = EvalTransform()(image, label)
    expected = (torch.from_numpy(image) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(x, expected.permute(2, 0, 1), atol=1e-5, rtol=0)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    np.testing.assert_array_equal(y.numpy(), label)


def resized(image: np.ndarray, label: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The definition, pixel by pixel: bilinear between pixel centres, and the label of the nearest centre."""
    out, out_label = np.empty((*size, 3)), np.empty(size, np.uint8)
    for row, column in np.ndindex(size):
        y, x = (
            (place + 0.5) * source / target - 0.5
            for place, source, target in zip((row, column), label.shape, size, strict=True)
        )
        value = np.zeros(3)
        for near_y, near_x in np.floor((y, x)) + np.array(list(np.ndindex(2, 2))):
            share = (1 - abs(y - near_y)) * (1 - abs(x - near_x))
            inside = (int(np.clip(near_y, 0, label.shape[0] - 1)), int(np.clip(near_x, 0, label.shape[1] - 1)))
            value += share * image[inside]
        out[row, column] = value
        out_label[row, column] = label[int(np.floor(y + 0.5)), int(np.floor(x + 0.5))]
    return out, out_label


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((50, 75), {"short_side": 36, "long_side": 60}, (36, 54)),
        ((75, 50), {"short_side": 36, "long_side": 60}, (54, 36)),
        ((33, 47), {"short_side": 36, "long_side": 60}, (36, 51)),
        ((40, 99), {"short_side": 36, "long_side": 60}, (24, 60)),  # the longer side decides
        ((40, 99), {"short_side": 36}, (36, 89)),
        ((41, 53), {}, (41, 53)),
        ((40, 60), {"short_side": 32, "scale": (1.5, 1.5)}, (48, 72)),  # scale multiplies the resized image
    ],
)
@pytest.mark.parametrize("flip", [0, 1])
def test_whole_images_are_resized_once_and_lose_nothing(
    size: tuple[int, int], options: dict[str, object], expected: tuple[int, int], flip: int
) -> None:
    image, label = blocks(*size)
    transform = TrainTransform(None, **{"scale": (1, 1), "flip": flip, **options})  # type: ignore[arg-type]
    x, y = transform(image, label, 3)
    want, want_label = resized(image, label, expected)
    if flip:
        want, want_label = want[:, ::-1], want_label[:, ::-1]
    assert tuple(y.shape) == expected
    # OpenCV's weights have 11 bits and its result is a whole level
    np.testing.assert_allclose(pixels(x).permute(1, 2, 0).numpy(), want, atol=1.01)
    np.testing.assert_array_equal(y.numpy(), want_label)


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (281, 500), (500, 332), (442, 500), (500, 500), (120, 500)])
def test_training_sees_images_as_the_papers_protocol_evaluates_them(size: tuple[int, int]) -> None:
    image, label = blocks(*size)
    x, y = TrainTransform(None, scale=(1, 1), flip=0, short_side=360, long_side=600)(image, label, 0)
    whole, _ = EvalTransform()(image, label)
    evaluated = get_protocol("paper", 21).prepare(whole[None])[0]
    assert y.shape == evaluated.shape[1:]
    assert (x - evaluated).abs().max() < 1.5 / 255 / min(IMAGENET_STD)


def test_crops_are_of_the_resized_image() -> None:
    stripes = np.repeat(np.arange(10, dtype=np.uint8), 12)  # 120 pixels
    label = np.ascontiguousarray(np.broadcast_to(stripes, (120, 120)))
    image = np.stack([20 * label] * 3, axis=2)
    starts = set()
    for seed in range(12):
        x, y = TrainTransform((32, 40), scale=(1, 1), flip=0, short_side=60)(image, label, seed)
        assert y.shape == (32, 40)
        steps = y[0].diff().nonzero().flatten()
        assert set(steps.diff().tolist()) == {6}  # 12 pixels at half the size
        starts.add((int(y[0, 0]), int(steps[0])))
        assert (pixels(x)[0] / 20 - y).abs().mean() < 0.2
    assert len(starts) > 4


def test_a_whole_image_is_scaled_at_random_too() -> None:
    image, label = blocks(40, 60)
    transform = TrainTransform(None, scale=(0.5, 2.0))
    sizes = {tuple(transform(image, label, seed)[1].shape) for seed in range(20)}
    assert len(sizes) > 10
    assert all(abs(width - 1.5 * height) <= 1.5 for height, width in sizes)


def mixed(label: np.ndarray, ratio: float) -> bool:
    """As mmsegmentation's RandomCrop says it."""
    labels, count = np.unique(label, return_counts=True)
    count = count[labels != 255]
    return bool(len(count) > 1 and np.max(count) / np.sum(count) < ratio)


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.3, 0.5, 0.75, 0.95]), ignored=st.floats(0, 1))
def test_of_ten_windows_the_first_that_is_mixed_is_taken_or_else_the_last(
    seed: int, ratio: float, ignored: float
) -> None:
    _, label = blocks(96, 120, seed)
    label[np.random.default_rng(seed).random(label.shape) < ignored] = 255
    crop = _RandomScaledCrop((32, 40), (1.5, 1.5), None, None, ratio)
    crop.set_random_state(np.random.default_rng(seed), random.Random(seed))
    window = crop.get_params_dependent_on_data({"shape": (96, 120, 3)}, {"mask": label})["window"]

    draws = random.Random(seed)
    draws.uniform(1.5, 1.5)
    height, width = 21, 27  # 32 and 40 pixels, before they are scaled
    corners = [(draws.randint(0, 96 - height), draws.randint(0, 120 - width)) for _ in range(10)]
    windows = [(slice(top, top + height), slice(left, left + width)) for top, left in corners]
    assert window == next((one for one in windows if mixed(label[one], ratio)), windows[-1])


def test_crops_of_one_class_are_drawn_again_and_others_are_what_they_were() -> None:
    label = np.zeros((64, 256), np.uint8)
    label[:, 160:] = np.arange(96) // 12 % 3  # the left is one class
    label[:32] = 255
    image = np.stack([40 * label] * 3, axis=2)
    plain, choosing = TrainTransform((40, 40)), TrainTransform((40, 40), cat_max_ratio=0.75)
    changed, found = 0, []
    for seed in range(100):
        (x, y), (x_chosen, y_chosen) = plain(image, label, seed), choosing(image, label, seed)
        found.append(mixed(y_chosen.numpy(), 0.78))  # resized labels are not counted
        if mixed(y.numpy(), 0.7):
            assert torch.equal(x, x_chosen)
            assert torch.equal(y, y_chosen)
        changed += not torch.equal(y, y_chosen)
    assert changed > 30
    assert np.mean(found) > 0.95
    one = TrainTransform((40, 40), cat_max_ratio=0.75)(image, np.zeros_like(label), 0)[1]
    assert (one[one != 255] == 0).all()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("cat_max_ratio", 0),
        ("cat_max_ratio", 1),
        ("short_side", 31),
        ("long_side", 600),
        ("crop_size", (31, 64)),
        ("crop_size", (64,)),
        ("scale", (2, 1)),
        ("scale", (0, 1)),
        ("flip", 1.5),
        ("photometric", -1),
    ],
)
def test_wrong_settings_are_refused_by_name(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        TrainTransform(**{"crop_size": (64, 64), argument: value})  # type: ignore[arg-type]


def test_import_asks_no_server() -> None:
    code = (
        "import urllib.request, urllib.error\n"
        "def fail(*a, **k): raise SystemExit('network call at import')\n"
        "urllib.request.OpenerDirector.open = fail\n"
        "import segdcn.data.transforms"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_whole_images_offer_no_choice_of_crops() -> None:
    with pytest.raises(ValueError, match=r"^cat_max_ratio chooses among crops, and crop_size=null makes none"):
        TrainTransform(None, cat_max_ratio=0.75)


def test_command_trains_on_chosen_crops_and_refuses_a_wrong_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*BARE, "trainer.max_steps=2", "datamodule.batch_size=4", "dataset.val_images=2")
    losses = []
    for ratio in ("null", "0.6"):
        run = tmp_path / ratio
        assert call(main, *settings, f"datamodule.cat_max_ratio={ratio}", f"output_dir={run}") == 0
        losses.append((run / "metrics.csv").read_text().splitlines()[1].split(",")[2])
    assert losses[0] != losses[1]
    capsys.readouterr()
    assert call(main, *settings, "datamodule.cat_max_ratio=1.5", f"output_dir={tmp_path / 'no'}") == 1
    assert "cat_max_ratio must be above 0 and below 1 (null: any crop), got 1.5" in one_line(capsys.readouterr().err)
