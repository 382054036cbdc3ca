"""Shapes as pixels, against points tested one by one and against what the COCO API writes."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from segdcn.data.polygons import Patch, Size, disc_pixels, polygon_pixels, run_lengths, run_pixels
from segdcn.errors import UserError


def whole(patch: Patch, size: Size) -> np.ndarray:
    pixels = np.zeros(size, bool)
    pixels[patch.top : patch.top + len(patch.inside), patch.left : patch.left + patch.inside.shape[1]] = patch.inside
    return pixels


def centres(size: Size) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    return np.stack([columns, rows], axis=-1)


def star(rng: np.random.Generator, size: Size, corners: int) -> np.ndarray:
    """A polygon that does not cross itself; some of it may lie outside."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radii = rng.uniform(0.1, 0.7, corners) * min(size)
    return np.array(size[::-1]) / 2 + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


@pytest.mark.parametrize("seed", range(20))
def test_a_pixel_is_inside_where_its_centre_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(8, 60)), int(rng.integers(8, 60)))
    polygon = star(rng, size, int(rng.integers(3, 15)))
    expected = Outline(polygon).contains_points(centres(size).reshape(-1, 2)).reshape(size)
    found = whole(polygon_pixels([polygon], size), size)
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(whole(polygon_pixels([polygon[::-1]], size), size), expected)


def test_corners_on_whole_numbers_are_pixels_edges() -> None:
    square = np.array([(2, 1), (6, 1), (6, 4), (2, 4)], float)
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(whole(polygon_pixels([square], (6, 8)), (6, 8)), expected)


def test_polygons_of_one_annotation_are_a_union_and_one_that_crosses_itself_is_even_odd() -> None:
    size, outer = (12, 12), np.array([(1, 1), (11, 1), (11, 11), (1, 11)], float)
    inner = np.array([(4, 4), (8, 4), (8, 8), (4, 8)], float)
    assert whole(polygon_pixels([outer, inner], size), size).sum() == 100
    around_a_hole = np.concatenate([outer, outer[:1], inner, inner[:1]])
    found = whole(polygon_pixels([around_a_hole], size), size)
    assert found.sum() == 100 - 16
    assert not found[4:8, 4:8].any()


@pytest.mark.parametrize("step", [1.0, 0.5, 0.1])
def test_polygons_that_share_edges_cover_each_pixel_once(step: float) -> None:
    """Also where the edges run through centres of pixels, which coordinates of halves do."""
    rng, size = np.random.default_rng(3), (24, 30)
    inner = np.round(rng.uniform(4, 20, (40, 2)) / step) * step
    corners = np.array([(0, 0), (30, 0), (30, 24), (0, 24)], float)
    for middle in inner:
        fan = [np.array([middle, corners[k], corners[(k + 1) % 4]]) for k in range(4)]
        total = sum(whole(polygon_pixels([part], size), size).astype(int) for part in fan)
        np.testing.assert_array_equal(total, np.ones(size, int))


def test_what_lies_outside_is_cut_off() -> None:
    size = (5, 7)
    assert whole(polygon_pixels([np.array([(-9, -9), (90, -9), (90, 90), (-9, 90)], float)], size), size).all()
    assert not polygon_pixels([np.array([(-9, -9), (-2, -9), (-2, 90)], float)], size).inside.any()
    assert not polygon_pixels([np.array([(20, 1), (30, 1), (30, 4)], float)], size).inside.any()


def test_disc() -> None:
    size = (20, 30)
    expected = ((centres(size) - (14.2, 9.0)) ** 2).sum(axis=-1) <= 7.3**2
    np.testing.assert_array_equal(whole(disc_pixels(np.array([14.2, 9.0]), 7.3, size), size), expected)
    near_a_corner = whole(disc_pixels(np.array([1.0, 1.0]), 5.0, size), size)
    np.testing.assert_array_equal(near_a_corner, ((centres(size) - 1) ** 2).sum(axis=-1) <= 25)


def test_compressed_run_lengths_are_those_that_the_coco_api_writes() -> None:
    """The texts are what pycocotools 2.0.11 wrote for these masks."""
    small = np.zeros((7, 9), bool)
    small[2:5, 1:4] = small[6, 8] = small[0, 5:8] = True
    rows, columns = np.mgrid[:30, :40]
    ellipse = (columns - 20) ** 2 / 4 + (rows - 12) ** 2 < 64
    ellipse[5:20, 18:22] = False
    written = "P55h02N2N2O0O2O000O2O0000000h30XL0000000001N10001N101N2N2N_3"
    for mask, text in ((small, "9340005NM00060"), (ellipse, written)):
        runs = run_lengths(text, mask.shape)
        np.testing.assert_array_equal(run_pixels(runs, mask.shape).inside, mask)
        np.testing.assert_array_equal(run_lengths(runs.tolist(), mask.shape), runs)


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_go_down_the_columns(seed: int) -> None:
    mask = np.random.default_rng(seed).random((9, 13)) < 0.3
    mask[0, 0] = seed % 2
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    counts = [0, *counts] if flat[0] else counts
    np.testing.assert_array_equal(run_pixels(run_lengths(counts, mask.shape), mask.shape).inside, mask)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([5, 5], "10 pixels in an image of 63"),
        ([70, -7], "below 0"),
        ([60.0, 3], "whole numbers"),
        (None, "whole numbers"),
        ("9340005NM0006", "pixels in an image"),
        ("9340005NM0006o", "break off"),
        ("93 0005", "damaged"),
        ("é", "damaged"),
    ],
)
def test_run_lengths_that_are_none(counts: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run_lengths(counts, (7, 9))  # type: ignore[arg-type]
