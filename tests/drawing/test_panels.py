from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segdcn.drawing.panels import GREEN, RED, WRONG, central_pixels, colorize, comparison_panel, overlay, sampling_panel

PALETTE = [(10, 20, 30), (200, 100, 0), (0, 150, 250)]
NAMES = ["background", "disc", "star"]


def pixels(panel: object) -> np.ndarray:
    return np.asarray(panel)


def count(panel: object, colour: tuple[int, int, int]) -> int:
    return int((pixels(panel) == colour).all(axis=2).sum())


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_colorize(dtype: type) -> None:
    label = np.array([[0, 1, 2], [2, 255, 1]], dtype=dtype)
    picture = colorize(label, PALETTE)
    assert picture.dtype == np.uint8
    assert picture.shape == (2, 3, 3)
    for (y, x), value in np.ndenumerate(label):
        if value != 255:
            assert tuple(picture[y, x]) == PALETTE[value]


def test_ignored_pixels_are_hatched_in_grey() -> None:
    picture = colorize(np.full((20, 30), 255, np.uint8), PALETTE)
    assert (picture == picture[:, :, :1]).all()  # grey
    assert picture.max() < 128
    assert len(np.unique(picture)) == 2  # a pattern, no plain colour, so never mistaken for a class


@pytest.mark.parametrize("value", [3, 254])
def test_label_without_a_colour_is_named(value: int) -> None:
    with pytest.raises(ValueError, match=f"label {value} has no colour: the palette has 3"):
        colorize(np.full((2, 3), value), PALETTE)


def shown(height: int = 24, width: int = 36) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grey image, a truth with classes 0 and 1 and ignored rows, and a prediction with a wrong block."""
    label = np.zeros((height, width), np.uint8)
    label[:, width // 2 :] = 1
    label[:4] = 255
    prediction = label.copy()
    prediction[:4] = 0
    prediction[-6:, :10] = 2
    return np.full((height, width, 3), 90, np.uint8), label, prediction


def test_small_images_are_enlarged_by_a_whole_factor() -> None:
    image, label, prediction = shown(24, 36)
    panel = comparison_panel(image, label, prediction, NAMES, PALETTE, "epoch 3")
    factor = 480 // 36
    assert panel.width > 4 * 36 * factor
    assert panel.height > 24 * factor
    wrong = 6 * 10 * factor**2  # in the error map, each wrong pixel becomes a block
    assert wrong < count(panel, WRONG) < wrong + 20 * 20  # and the swatch of the legend
    # class 2 is only in the prediction, which shows it as the same block, and in the legend
    assert wrong < count(panel, PALETTE[2]) < wrong + 20 * 20


def test_legend_lists_only_what_is_there() -> None:
    image, label, _ = shown()
    label[:4] = 0
    panel = comparison_panel(image, label, label, NAMES, PALETTE)
    assert count(panel, WRONG) == 0
    assert count(panel, PALETTE[2]) == 0
    bottom = pixels(panel)[-30:]  # the legend's only line
    assert count(bottom, PALETTE[0]) > 100
    assert count(bottom, PALETTE[1]) > 100

    with_ignored = comparison_panel(image, shown()[1], label, NAMES, PALETTE)
    hatch = tuple(colorize(np.array([[255]]), PALETTE)[0, 0])
    assert count(pixels(with_ignored)[-30:], hatch) > 40 > count(bottom, hatch)  # a few are edges of letters


def test_large_images_are_shrunk() -> None:
    image, label, prediction = shown(512, 1024)
    panel = comparison_panel(image, label, prediction, NAMES, PALETTE)
    assert 4 * 480 < panel.width < 4 * 520
    assert 240 < panel.height < 340


def test_legend_of_many_classes_wraps() -> None:
    names = [f"a class with a long name {k}" for k in range(21)]
    palette = [(k * 12, 255 - k * 12, 7 * k) for k in range(21)]
    label = np.arange(21 * 40, dtype=np.uint8).reshape(40, 21) % 21
    panel = comparison_panel(np.zeros((40, 21, 3), np.uint8), label, label, names, palette)
    legend = pixels(panel)[-200:]
    for colour in palette:
        assert count(legend, colour) >= 14 * 14
    assert (pixels(panel)[:, -4:] == 255).all()  # nothing is cut off at the right


def test_image_without_a_label() -> None:
    image, label, prediction = shown()
    panel = comparison_panel(image, np.full_like(label, 255), prediction, NAMES, PALETTE)
    assert count(panel, WRONG) == 0


def test_inputs_that_do_not_fit_are_named() -> None:
    image, label, prediction = shown()
    with pytest.raises(ValueError, match=r"prediction \(36, 24\) and image \(24, 36\)"):
        comparison_panel(image, label, prediction.T, NAMES, PALETTE)
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\), got float64"):
        comparison_panel(image / 255, label, prediction, NAMES, PALETTE)
    with pytest.raises(ValueError, match="2 class names, but 3 colours"):
        comparison_panel(image, label, prediction, NAMES[:2], PALETTE)
    with pytest.raises(ValueError, match="prediction 300 has no colour"):
        comparison_panel(image, label, np.full((24, 36), 300), NAMES, PALETTE)


def test_sampling_points_are_drawn_where_they_are() -> None:
    image = np.full((30, 48, 3), 100, np.uint8)  # enlarged by 10
    points = np.array([[20.0, 40.0], [5.0, 10.0], [-3.0, 10.0], [29.6, 5.0], [12.0, 48.0]])
    panel = pixels(sampling_panel(image, [((10, 25), points)]))
    dimmed = (panel == 70).all(axis=2)  # the photograph, and a few edges of letters
    tile_top, tile_left = (dimmed.sum(axis=1) > 100).argmax(), (dimmed.sum(axis=0) > 100).argmax()
    red, green = (np.argwhere((panel == colour).all(axis=2)) for colour in (RED, GREEN))
    centre = green.mean(axis=0) - (tile_top, tile_left)
    np.testing.assert_allclose(centre, [10.5 * 10 - 0.5, 25.5 * 10 - 0.5], atol=1)
    found = red - (tile_top, tile_left)
    expected = np.array([[204.5, 404.5], [54.5, 104.5]])
    distance = np.linalg.norm(found[:, None] - expected, axis=2)
    assert (distance.min(axis=1) < 4).all()  # no red anywhere else: the three points outside are not drawn
    assert (distance.min(axis=0) < 2).all()


def test_sampling_panel_has_a_tile_for_each_pixel() -> None:
    image = np.zeros((48, 48, 3), np.uint8)
    chosen = [((k, 2 * k), np.zeros((0, 2))) for k in (3, 8, 13, 18, 22)]
    panel = sampling_panel(image, chosen, "five pixels")
    assert panel.height > 2 * 480  # two rows
    alone = sampling_panel(image, chosen[:1], "one pixel")
    assert count(panel, GREEN) == pytest.approx(5 * count(alone, GREEN), rel=0.02)


def test_an_image_without_a_labelled_pixel_is_shown_with_a_word_about_it() -> None:
    image = np.full((48, 48, 3), 100, np.uint8)
    alone = pixels(sampling_panel(image, [], "nothing labelled"))
    assert (alone == 70).all(axis=2).sum() >= 480 * 480  # the photograph, dimmed as in the other tiles
    assert count(alone, GREEN) == count(alone, RED) == 0
    assert (alone[:70] < 100).any()  # a title and a caption


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (20000, 20), (20, 20000)])
def test_images_of_any_shape_stay_within_bounds(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    label = rng.integers(0, 3, (height, width), np.uint8)
    names = ["road", "a name of many words " * 10, "sky"]
    points = [((height // 2, width // 2), rng.normal(0, 20, (50, 2)))]
    for panel in (
        comparison_panel(image, label, np.roll(label, 1), names, PALETTE, "a/folder/" * 30),
        sampling_panel(image, points, "a/folder/" * 30),
        sampling_panel(image, []),
    ):
        assert panel.width < 2100
        assert panel.height < 700
    drawn = overlay(image, label, names, PALETTE)
    np.testing.assert_array_equal(
        np.asarray(drawn)[:height, :width], np.asarray(overlay(image, label, names, PALETTE, legend="none"))
    )
    assert drawn.width < width + 600
    assert drawn.height < height + 400
    assert overlay(image, np.full_like(label, 255), names, PALETTE).width == width  # nothing to name


@pytest.mark.filterwarnings("ignore:no font on this machine")
@settings(max_examples=40)
@given(names=st.lists(st.text(max_size=200), min_size=3, max_size=3), title=st.text(max_size=200))
def test_any_name_and_title_can_be_drawn(names: list[str], title: str) -> None:
    image, label, prediction = shown()
    panel = comparison_panel(image, label, prediction, names, PALETTE, title)
    small = overlay(image, prediction, names, PALETTE)
    assert 1800 < panel.width < 2100
    assert panel.height < 600
    assert small.width < 36 + 600
    assert small.height < 24 + 150
    for colour in PALETTE:
        assert count(small, colour) >= 14 * 14  # the swatch stands, whatever the name


def test_names_need_not_be_strings() -> None:
    image, label, prediction = shown()
    named = comparison_panel(image, label, prediction, ["7", "1.5", "None"], PALETTE)
    assert comparison_panel(image, label, prediction, [7, 1.5, None], PALETTE) == named
    assert overlay(image, prediction, [0, 1, 2], PALETTE) == overlay(image, prediction, ["0", "1", "2"], PALETTE)
    assert overlay(image, prediction, ["", " ", "\n"], PALETTE) == overlay(
        image, prediction, ["class 0", "class 1", "class 2"], PALETTE
    )


def test_central_pixels_lie_deepest_inside_the_most_frequent_classes() -> None:
    label = np.full((20, 31), 255, np.uint8)
    label[:, :21] = 0
    label[5:14, 22:31] = 4
    label[0, 30] = 2
    (row, column), other, last = central_pixels(label)
    assert (other, last) == ((9, 26), (0, 30))
    assert row in (9, 10)
    assert column in range(9, 12)


def test_an_image_without_labels_has_no_central_pixels() -> None:
    assert central_pixels(np.full((4, 5), 255, np.uint8)) == []
