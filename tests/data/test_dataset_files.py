"""Reading image and mask files: conversions that keep what is meant, and one clear line otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segdcn.data.dataset import DataError, ImageMaskFiles, ImageMaskPair, read_image, read_label, voc_palette

H, W = 5, 8
RGB = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
LABEL = np.random.default_rng(1).integers(0, 4, (H, W), dtype=np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def test_rgb_is_read_as_stored(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", RGB)), RGB)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = RGB[..., 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", grey)), np.stack([grey] * 3, axis=2))


def test_alpha_is_dropped_and_colours_stay(tmp_path: Path) -> None:
    rgba = np.dstack([RGB, np.linspace(0, 255, H * W).reshape(H, W).astype(np.uint8)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", rgba)), RGB)


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
def test_palette_image_gets_its_colours(tmp_path: Path, transparency: int | bytes | None) -> None:
    colors = np.array([[10, 20, 30], [200, 0, 1], [7, 250, 90]], dtype=np.uint8)
    indices = np.random.default_rng(2).integers(0, 3, (H, W), dtype=np.uint8)
    image = Image.fromarray(indices, mode=None).convert("L")
    image.putpalette(colors.tobytes())
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colors[indices])


def test_16_bit_grey_is_scaled_to_8_bit(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 65535], [32896, 1000, 60000]], dtype=np.uint16)
    image = read_image(save(tmp_path / "a.png", grey))
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image[..., 1], grey / 65535 * 255, atol=1)
    assert image[0, 2, 0] == 255


def test_float_image_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "depth.tif", np.ones((H, W), np.float32))
    with pytest.raises(DataError, match=r"depth\.tif holds floating-point pixels"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_truncated_image_is_an_error_that_names_it(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    path = save(tmp_path / f"half{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"half.*corrupt or truncated") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\nrubbish" * 9])
@pytest.mark.parametrize("read", [read_image, lambda path: read_label(path, 4)])
def test_corrupt_file_is_named(tmp_path: Path, content: bytes, read: object) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png.*corrupt"):
        read(path)  # type: ignore[operator]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        read_image(tmp_path / "gone.png")


def test_grey_and_palette_masks_give_their_numbers(tmp_path: Path) -> None:
    grey = save(tmp_path / "grey.png", LABEL)
    indexed = Image.fromarray(LABEL)
    indexed.putpalette([value for color in voc_palette(4) for value in color])
    indexed.save(tmp_path / "palette.png")
    with Image.open(tmp_path / "palette.png") as stored:
        assert stored.mode == "P"
    for path in (grey, tmp_path / "palette.png"):
        label = read_label(path, num_classes=4)
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, LABEL)


def test_255_stays_and_labels_are_mapped(tmp_path: Path) -> None:
    stored = np.array([[0, 11, 255], [3, 10, 11]], dtype=np.uint8)
    label = read_label(save(tmp_path / "a.png", stored), num_classes=11, mapping={11: 255})
    np.testing.assert_array_equal(label, [[0, 255, 255], [3, 10, 255]])


@pytest.mark.parametrize(("dtype", "wrong"), [(np.uint8, 4), (np.uint8, 254), (np.uint16, 300)])
def test_label_out_of_range_names_file_label_and_range(tmp_path: Path, dtype: type, wrong: int) -> None:
    stored = LABEL.astype(dtype)
    stored[2, 3] = wrong
    path = save(tmp_path / "mask.png", stored)
    with pytest.raises(DataError, match=rf"mask\.png holds label {wrong}: .*0\.\.3 and 255"):
        read_label(path, num_classes=4)


def test_colour_mask_and_lossy_mask_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"colour\.png is RGB"):
        read_label(save(tmp_path / "colour.png", RGB), 4)
    with pytest.raises(DataError, match=r"lossy\.jpg is a JPEG"):
        read_label(save(tmp_path / "lossy.jpg", LABEL), 4)


def test_size_mismatch_names_both_files(tmp_path: Path) -> None:
    image = save(tmp_path / "image.png", RGB)
    mask = save(tmp_path / "mask.png", LABEL[:, :-1])
    with pytest.raises(DataError, match=r"image\.png is 5x8 .*mask\.png is 5x7"):
        ImageMaskFiles([ImageMaskPair(image, mask, "a")], 4)[0]


def test_mask_drawn_on_the_turned_photograph_gets_a_hint(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    Image.fromarray(RGB).save(tmp_path / "image.jpg", exif=exif)
    mask = save(tmp_path / "mask.png", np.ascontiguousarray(LABEL.T))
    with pytest.raises(DataError, match="EXIF"):
        ImageMaskFiles([ImageMaskPair(tmp_path / "image.jpg", mask, "a")], 4)[0]


def test_files_are_a_sequence_of_samples(tmp_path: Path) -> None:
    pairs = [
        ImageMaskPair(save(tmp_path / f"{i}.png", RGB + i), save(tmp_path / f"m{i}.png", LABEL), str(i))
        for i in range(3)
    ]
    files = ImageMaskFiles(pairs, 4)
    assert [sample.name for sample in files] == ["0", "1", "2"]
    assert [sample.name for sample in files[1:]] == ["1", "2"]
    np.testing.assert_array_equal(files[-1].image, RGB + 2)
    np.testing.assert_array_equal(files[-1].label, LABEL)


def test_voc_palette_has_the_published_colours() -> None:
    palette = voc_palette(256)
    assert palette[:5] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert palette[11] == (192, 128, 0)
    assert palette[20] == (0, 64, 128)
    assert palette[255] == (224, 224, 192)
    assert len(set(palette)) == 256
