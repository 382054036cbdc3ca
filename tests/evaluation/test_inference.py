"""Windows, scales and mirror images: what must not change the logits, and which pixels are averaged how."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from segdcn.inference import Inference
from segdcn.inference.windows import slide

side = st.integers(1, 12)
sizes = st.tuples(side, side)


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int]]:
    """A window and a stride no longer than it."""
    window = draw(sizes)
    return window, (draw(st.integers(1, window[0])), draw(st.integers(1, window[1])))


def picture(size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def pixelwise(image: Tensor) -> Tensor:
    """Four logits from each pixel alone."""
    return torch.cat((image, image.prod(dim=1, keepdim=True)), dim=1)


def blurred(image: Tensor) -> Tensor:
    """Logits that depend on the neighbours and on where the input ends; equivariant to mirroring."""
    return F.avg_pool2d(image, 3, stride=1, padding=1)


def lopsided(image: Tensor) -> Tensor:
    """Logits that depend on the position within the input, left to right and top to bottom."""
    rows, columns = (torch.arange(1.0, n + 1) for n in image.shape[2:])
    return image * rows[:, None] + columns


@given(size=sizes, sliding=windows())
@settings(max_examples=60)
def test_windows_leave_a_pixelwise_network_as_it_is(
    size: tuple[int, int], sliding: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    image = picture(size)
    torch.testing.assert_close(slide(pixelwise, image, *sliding), pixelwise(image))


@given(size=sizes, sliding=windows())
@settings(max_examples=60)
def test_windows_are_averaged_with_the_right_counts(
    size: tuple[int, int], sliding: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """Against a loop that places windows as a person would: step on until one would leave, then end at the border."""
    image, (window, stride) = picture(size), sliding
    total, count = torch.zeros_like(image), torch.zeros(size)
    height, width = min(window[0], size[0]), min(window[1], size[1])
    top = 0
    while True:
        top = min(top, size[0] - height)
        left = 0
        while True:
            left = min(left, size[1] - width)
            tile = lopsided(image[:, :, top : top + height, left : left + width])
            for y in range(height):
                for x in range(width):
                    total[:, :, top + y, left + x] += tile[:, :, y, x]
                    count[top + y, left + x] += 1
            if left + width == size[1]:
                break
            left += stride[1]
        if top + height == size[0]:
            break
        top += stride[0]
    assert count.min() >= 1
    torch.testing.assert_close(slide(lopsided, image, window, stride), total / count)


@given(size=sizes, more=sizes)
def test_a_window_as_large_as_the_image_is_the_whole_image(size: tuple[int, int], more: tuple[int, int]) -> None:
    image, window = picture(size), (size[0] + more[0] - 1, size[1] + more[1] - 1)
    assert torch.equal(Inference(window=window)(lopsided, image), lopsided(image))


@given(size=sizes)
def test_mirroring_a_symmetric_network_is_exact(size: tuple[int, int]) -> None:
    image = picture(size)
    assert torch.equal(Inference(flip=True)(pixelwise, image), pixelwise(image))
    # its own sums over neighbours are rounded in another order on the mirrored image
    torch.testing.assert_close(Inference(flip=True)(blurred, image), blurred(image))


def test_mirrored_logits_are_mirrored_back() -> None:
    image = picture((3, 5))
    expected = (lopsided(image) + lopsided(image.flip(3)).flip(3)) / 2
    torch.testing.assert_close(Inference(flip=True)(lopsided, image), expected)


@pytest.mark.parametrize("options", [{"flip": True}, {"window": (2, 3)}, {"scales": (1.0, 1.0)}])
def test_input_stays_as_it_is_and_half_precision_is_summed_in_full(options: dict[str, object]) -> None:
    image = picture((4, 5)).half()
    before = image.clone()
    logits = Inference(**options)(lambda values: values, image)  # type: ignore[arg-type]
    assert logits.dtype == torch.float32
    assert torch.equal(image, before)
    torch.testing.assert_close(logits, before.float())


def test_default_is_the_network_itself() -> None:
    image = picture((5, 7))
    assert torch.equal(Inference()(lopsided, image), lopsided(image))


def test_scales_windows_and_mirroring_combine() -> None:
    """Written out by hand: every run at its scale, back to the image's size, one mean of all."""
    image, scales, window, stride = picture((10, 14)), (0.5, 1.0, 1.75), (6, 8), (4, 5)
    runs = []
    for height, width in ((5, 7), (10, 14), (18, 24)):  # 17.5 and 24.5 are rounded to even
        scaled = F.interpolate(image, (height, width), mode="bilinear", align_corners=False)
        for flip in (False, True):
            logits = slide(lopsided, scaled.flip(3) if flip else scaled, window, stride)
            logits = F.interpolate(logits, (10, 14), mode="bilinear", align_corners=False)
            runs.append(logits.flip(3) if flip else logits)
    inference = Inference(scales, flip=True, window=window, stride=stride)
    torch.testing.assert_close(inference(lopsided, image), torch.stack(runs).mean(dim=0))


def test_logits_of_the_runs_never_live_together() -> None:
    """Six scales, mirrored, in windows: when the network is called, at most its last logits are still alive."""
    alive: list[weakref.ref[Tensor]] = []
    most, size, classes = 0, (64, 128), 19

    def network(image: Tensor) -> Tensor:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        logits = image.new_zeros(len(image), classes, *image.shape[2:])
        alive.append(weakref.ref(logits))
        return logits

    scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    Inference(scales, flip=True)(network, torch.zeros(1, 3, *size))
    assert len(alive) == 12
    assert most <= 1
    alive.clear()
    Inference(scales, flip=True, window=(32, 32))(network, torch.zeros(1, 3, *size))
    assert most <= 1


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, 0.0)}, "scales"),
        ({"stride": (3, 3)}, "needs inference.window"),
        ({"window": (8, 8), "stride": (9, 8)}, "gaps"),
        ({"window": (8, 8), "stride": (0, 8)}, "gaps"),
        ({"window": (8,)}, "HEIGHT,WIDTH"),
        ({"window": (8.5, 8)}, "HEIGHT,WIDTH"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Inference(**options)  # type: ignore[arg-type]


def test_words() -> None:
    assert str(Inference()) == "whole image, single scale"
    inference = Inference((0.5, 1.0), flip=True, window=(769, 513))
    third = (math.ceil(769 * 2 / 3), math.ceil(513 * 2 / 3))
    assert str(inference) == f"window 769×513, stride {third[0]}×{third[1]}, scales 0.5, 1, mirrored too"
