"""Each protocol brings image, prediction and truth together as its source does."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Resize
from torchvision.transforms import InterpolationMode as Mode

from segdcn.evaluation import Evaluator, get_protocol

sides = st.integers(40, 700)


def assert_nearest(ours: torch.Tensor, theirs: np.ndarray, ties: Callable[[int, int], np.ndarray]) -> None:
    """Maps that hold their own source rows: equal, but for ties, which the libraries break by rounding errors."""
    apart = np.abs(ours[0].numpy() - theirs)
    assert apart.max() <= 1
    assert not apart[~ties(*theirs.shape)].any()


def rows(height: int, width: int) -> np.ndarray:
    return np.repeat(np.arange(height, dtype=np.int32)[:, None], width, axis=1)


@pytest.mark.parametrize(("name", "classes"), [("native", 6), ("voc", 21), ("cityscapes", 19)])
def test_own_size(name: str, classes: int) -> None:
    protocol = get_protocol(name, classes)
    image, truth = torch.rand(1, 3, 37, 51), torch.zeros(1, 37, 51, dtype=torch.int64)
    assert protocol.prepare(image) is image
    prediction, same = protocol.meet(truth + 1, truth)
    assert prediction.shape == same.shape == truth.shape


@settings(max_examples=30)
@given(height=sides, width=sides)
def test_paper_voc_resizes_the_truth_as_opencv_does(height: int, width: int) -> None:
    protocol = get_protocol("paper", 21)
    image = protocol.prepare(torch.rand(1, 3, height, width))
    short, long = min(image.shape[2:]), max(image.shape[2:])
    assert (short == 360 and long <= 600) or (short <= 360 and long == 600)
    factor = min(360 / min(height, width), 600 / max(height, width))
    assert (image.shape[2], image.shape[3]) == (round(factor * height), round(factor * width))
    truth = rows(height, width)
    prediction = torch.zeros(1, *image.shape[2:], dtype=torch.int64)
    compared, resized = protocol.meet(prediction, torch.from_numpy(truth)[None])
    assert compared is prediction
    expected = cv2.resize(truth.astype(np.float32), (image.shape[3], image.shape[2]), interpolation=cv2.INTER_NEAREST)
    assert_nearest(resized, expected, lambda h, w: rows(h, w) * height % h == 0)


def test_paper_resizes_images_as_opencv_does() -> None:
    pixels = np.random.default_rng(0).random((50, 75, 3), dtype=np.float32)
    ours = get_protocol("paper", 21).prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    theirs = cv2.resize(pixels, (540, 360), interpolation=cv2.INTER_LINEAR)
    torch.testing.assert_close(ours[0].permute(1, 2, 0), torch.from_numpy(theirs), atol=1e-3, rtol=0)


def test_paper_cityscapes_resizes_the_prediction() -> None:
    protocol = get_protocol("paper", 19)
    assert protocol.prepare(torch.rand(1, 3, 64, 128)).shape == (1, 3, 1024, 2048)
    truth = torch.zeros(1, 64, 128, dtype=torch.int64)
    prediction, same = protocol.meet(torch.arange(1024).view(1, -1, 1).expand(1, 1024, 2048), truth)
    assert same is truth
    assert prediction[0, :, 0].tolist() == list(range(0, 1024, 16))


@settings(max_examples=20)
@given(height=sides, width=sides)
def test_crop513_is_torchvisions_resize_and_centre_crop(height: int, width: int) -> None:
    protocol, truth = get_protocol("crop513", 5), rows(height, width)
    image = protocol.prepare(torch.from_numpy(truth).expand(1, 3, -1, -1).float())
    _, cropped = protocol.meet(torch.zeros(1, 513, 513, dtype=torch.int64), torch.from_numpy(truth)[None])
    crop, resized = CenterCrop(513), Resize(513, Mode.NEAREST)(Image.fromarray(truth))
    assert image.shape[2:] == cropped.shape[1:] == (513, 513)
    ties = (2 * rows(resized.height, resized.width) + 1) * height % (2 * resized.height) == 0
    assert_nearest(cropped, np.asarray(crop(resized)), lambda h, w: np.asarray(crop(Image.fromarray(ties))))
    smooth = crop(Resize(513, Mode.BILINEAR)(Image.fromarray(truth.astype(np.float32))))
    np.testing.assert_allclose(image[0, 0].numpy(), np.asarray(smooth), atol=2e-2)


def mmcv_size(height: int, width: int) -> tuple[int, int]:
    """Of an image within (2048, 512) with its ratio kept; halves are rounded up."""
    factor = Fraction(512, min(height, width))
    factor = min(factor, Fraction(2048, max(height, width)))
    return tuple(math.floor(factor * side + Fraction(1, 2)) for side in (height, width))  # type: ignore[return-value]


def by_hand(pixels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a network sees, and classes at the image's size, where logits are colours times weights; by OpenCV."""
    height, width = mmcv_size(*pixels.shape[:2])
    seen = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    seen = cv2.resize(seen, (-width // 32 * -32, -height // 32 * -32), interpolation=cv2.INTER_LINEAR)
    size = (pixels.shape[1], pixels.shape[0])
    logits = [cv2.resize(seen @ weight, size, interpolation=cv2.INTER_LINEAR) for weight in weights]
    return seen, np.argmax(logits, axis=0)


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((683, 1024), (512, 768)),
        ((512, 683), (512, 704)),
        ((1024, 1025), (512, 544)),  # 512.5 columns, rounded up
        ((300, 2000), (320, 2048)),
        ((90, 60), (768, 512)),
    ],
)
def test_short512_is_mmsegmentations_pipeline_for_ade20k(size: tuple[int, int], seen: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    coarse = generator.random((9, 9, 3), dtype=np.float32)
    pixels = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    weights = generator.standard_normal((5, 3)).astype(np.float32)
    expected, classes = by_hand(pixels, weights)
    assert expected.shape[:2] == seen
    protocol, image = get_protocol("short512", 5), torch.from_numpy(pixels).permute(2, 0, 1)[None]
    ours = protocol.prepare(image)
    torch.testing.assert_close(ours[0].permute(1, 2, 0), torch.from_numpy(expected), atol=2e-3, rtol=0)

    sizes = []

    class Colours(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(image.shape[2:]))
            return torch.einsum("kc,nchw->nkhw", torch.from_numpy(weights), image)

    # a truth of two classes here and there; the figures are those of the classes by hand
    truth = generator.integers(0, 5, size)
    truth[: size[0] // 3] = classes[: size[0] // 3]
    evaluator = Evaluator([str(k) for k in range(5)], protocol=protocol)
    logits, at_logits = evaluator.update(
        Colours(), {"image": image, "label": torch.from_numpy(truth)[None], "name": ["a"]}
    )
    assert sizes == [seen]
    assert logits.shape[2:] == at_logits.shape[1:] == seen
    found = evaluator.compute().counts.confusion.numpy()
    confusion = np.bincount(5 * truth.ravel() + classes.ravel(), minlength=25).reshape(5, 5)
    assert np.abs(found - confusion).sum() <= 2e-3 * truth.size  # pixels at which two classes are as likely


@pytest.mark.parametrize(
    ("name", "size", "seen"),
    [
        ("short640", (683, 1024), (640, 960)),
        ("short640", (300, 2000), (384, 2560)),
        ("short896", (683, 1024), (896, 1344)),
        ("short896", (300, 2000), (544, 3584)),  # 537.6 rows
    ],
)
def test_larger_networks_of_the_authors_see_larger_images(
    name: str, size: tuple[int, int], seen: tuple[int, int]
) -> None:
    assert tuple(get_protocol(name, 150).prepare(torch.zeros(1, 3, *size)).shape[2:]) == seen


def test_logits_that_are_resized_give_other_classes_than_resized_classes() -> None:
    logits = torch.tensor([[[[4.0, 0, 0, 0]], [[0, 1, 1, 1]]]])  # 1x4 pixels
    protocol, truth = get_protocol("short512", 2), torch.zeros(1, 1, 8, dtype=torch.int64)
    prediction, _ = protocol.meet(protocol.classes(logits, (1, 8)), truth)
    # the first class reaches beyond its pixel's border: 4 * 0.25 against 0.75 in the third column
    assert prediction.tolist() == [[[0, 0, 0, 1, 1, 1, 1, 1]]]
    plain = get_protocol("native", 2)
    prediction, _ = plain.meet(plain.classes(logits, (1, 8)), truth)
    assert prediction.tolist() == [[[0, 0, 1, 1, 1, 1, 1, 1]]]


def test_absent_classes_count_zero_in_the_paper_only() -> None:
    truth = torch.zeros(1, 40, 60, dtype=torch.int64)
    truth[:, :, 30:] = 1

    class Perfect(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(image[:, 0].round().long(), 21).movedim(-1, 1).float()

    batch = {"image": truth[:, None].expand(-1, 3, -1, -1).float(), "label": truth, "name": ["a"]}
    miou = {}
    for name in ("voc", "paper"):
        evaluator = Evaluator([str(k) for k in range(21)], protocol=get_protocol(name, 21))
        evaluator.update(Perfect(), batch)
        miou[name] = evaluator.compute().figures
    assert miou["voc"]["miou"] == miou["voc"]["miou_low"] == 1.0
    assert miou["paper"]["miou"] == pytest.approx(2 / 21, abs=1e-3)
    assert miou["paper"]["miou_high"] == pytest.approx(miou["paper"]["miou"])
    assert np.isnan(miou["paper"]["iou/7"])


@pytest.mark.parametrize(
    ("name", "classes", "parts"),
    [
        ("pascal", 21, ("'pascal'", "native, voc, cityscapes, paper, crop513, short512, short640, short896")),
        ("voc", 11, ("protocol=voc", "21 classes", "has 11")),
        ("paper", 11, ("21 or 19", "has 11")),
    ],
)
def test_unknown_or_unfit_protocol_is_named(name: str, classes: int, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="protocol") as error:
        get_protocol(name, classes)
    assert all(part in str(error.value) for part in parts)
