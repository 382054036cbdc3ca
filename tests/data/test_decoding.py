"""Pixels of image files: all that is stored, at its right value, or one line that says why not."""

from __future__ import annotations

import io
import os
from pathlib import Path

import handmade
import numpy as np
import pytest
from handmade import PALETTE, png, spoilt, tiff
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from segdcn.data import decoding
from segdcn.data.dataset import DataError, read_image, read_label
from segdcn.data.decoding import numbers, photograph

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 8, 3), dtype=np.uint8)
SIZES = st.tuples(st.integers(1, 20), st.integers(1, 20))


def draw(size: tuple[int, ...], highest: int, seed: int) -> NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, highest + 1, size).astype(np.uint32)


def palette(colours: int, grey: bool) -> list[list[int]]:
    if grey:  # which some readers take for a grey image
        return [[255 * number // (colours - 1)] * 3 for number in range(colours)]
    return np.random.default_rng(colours).integers(0, 256, (colours, 3)).tolist()


@settings(max_examples=80)
@given(
    size=SIZES,
    bits=st.sampled_from([1, 2, 4, 8, 16]),
    kind=st.sampled_from(["grey", "palette", "grey palette"]),
    transparent=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_png_mask_is_its_stored_numbers(
    size: tuple[int, int], bits: int, kind: str, transparent: bool, seed: int
) -> None:
    if kind == "grey":
        transparency = b"\0\1" if transparent else None
        stored = draw(size, 2**bits - 1, seed)
        data = png(stored, bits, transparency=transparency)
    else:
        bits = min(bits, 8)
        stored = draw(size, 2**bits - 1, seed)
        colours = palette(2**bits, kind == "grey palette")
        data = png(stored, bits, PALETTE, colours, bytes([0, 128]) if transparent else None)
    np.testing.assert_array_equal(numbers(data), stored)


@settings(max_examples=80)
@given(
    size=SIZES,
    bits=st.sampled_from([1, 2, 4, 8, 16]),
    photometric=st.sampled_from([0, 1, 3]),
    endian=st.sampled_from("<>"),
    orientation=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_a_tiff_mask_is_its_stored_numbers(
    size: tuple[int, int], bits: int, photometric: int, endian: str, orientation: int, seed: int
) -> None:
    tags = {274: [orientation]}
    if bits == 16:
        photometric = 1
    if photometric == 3:
        tags[320] = (257 * np.array(palette(2**bits, False)).T.ravel()).tolist()
    stored = draw(size, 2**bits - 1, seed)
    np.testing.assert_array_equal(numbers(tiff(stored, bits, photometric, tags, endian)), stored)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["png", "tiff", "tiff, 0 is white"])
def test_a_grey_photograph_is_spread_over_0_to_255(bits: int, kind: str) -> None:
    stored = draw((5, 9), 2**bits - 1, 0)
    shown = stored.astype(np.int64) * 255 // (2**bits - 1)
    if kind == "png":
        data = png(stored, bits)
    else:
        data = tiff(stored, bits, photometric=1 if kind == "tiff" else 0)
        shown = shown if kind == "tiff" else 255 - shown
    np.testing.assert_array_equal(photograph(data), np.repeat(shown[..., None], 3, axis=2))


@pytest.mark.parametrize("write", [lambda pixels: png(pixels, 16, handmade.RGB), lambda pixels: tiff(pixels, 16, 2)])
def test_16_bit_colours_are_scaled_to_8_bit(write: object) -> None:
    pixels = draw((5, 9, 3), 65535, 0)
    pixels[0, 0] = 65535
    image = photograph(write(pixels))  # type: ignore[operator]
    np.testing.assert_allclose(image, pixels / 65535 * 255, atol=1)
    assert image[0, 0].tolist() == [255, 255, 255]


@settings(max_examples=60)
@given(
    size=SIZES,
    bits=st.integers(8, 16),
    colour_type=st.sampled_from([handmade.GREY, handmade.RGB, handmade.GREY_ALPHA, handmade.RGBA]),
    as_tiff=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bits_tells_the_range_of_a_16_bit_photograph(
    size: tuple[int, int], bits: int, colour_type: int, as_tiff: bool, seed: int
) -> None:
    bands = {handmade.GREY: 1, handmade.RGB: 3, handmade.GREY_ALPHA: 2, handmade.RGBA: 4}[colour_type]
    if as_tiff and bands == 2:
        return  # which Pillow does not read, and says so
    stored = draw((*size, bands), 2**bits - 1, seed)
    data = png(stored, 16, colour_type)
    if as_tiff:
        data = tiff(stored, 16, photometric=1 if bands == 1 else 2, tags={338: [2]} if bands == 4 else {})
    colours = stored[..., : 3 if bands > 2 else 1].astype(np.int64)
    expected = np.broadcast_to(colours * 255 // (2**bits - 1), (*size, 3))
    # 16 bits are all of them: of colours the upper half, as without the option
    np.testing.assert_allclose(photograph(data, bits), expected, atol=int(bits == 16))


@pytest.mark.parametrize("colour_type", [handmade.GREY, handmade.RGB])
def test_a_pixel_beyond_bits_is_refused_by_name(tmp_path: Path, colour_type: int) -> None:
    pixels = np.full((4, 4, 3 if colour_type else 1), 5000, np.uint32)
    (tmp_path / "scan.png").write_bytes(png(pixels, 16, colour_type))
    with pytest.raises(DataError, match=r"scan\.png holds a pixel of 5000, beyond the 0\.\.4095 of bits=12"):
        read_image(tmp_path / "scan.png", bits=12)


def test_pixels_that_no_scale_fits_are_refused(tmp_path: Path) -> None:
    for number in (-5, 70_000):
        (tmp_path / "height.tif").write_bytes(tiff(np.full((3, 3), number, np.int32)))
        with pytest.raises(DataError, match=r"height\.tif holds pixels outside 0\.\.65535: save it as"):
            read_image(tmp_path / "height.tif")


def test_12_bit_tiff_needs_no_option() -> None:
    stored = draw((6, 10), 4095, 0)
    expected = stored.astype(np.int64) * 255 // 4095
    np.testing.assert_array_equal(photograph(tiff(stored, 12))[..., 0], expected)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "lzw", "16 bits"])
def test_orientation_is_applied_when_asked_for_alone(tmp_path: Path, orientation: int, kind: str) -> None:
    """Masks are drawn for the pixels as they are stored; a TIFF is no exception."""
    stored = np.kron(RGB, np.ones((8, 8, 1), np.uint8))
    path, bits = tmp_path / "a", None
    if kind == "16 bits":
        path.write_bytes(tiff(stored.astype(np.uint32) * 16, 16, 2, {274: [orientation]}))
        bits, stored = 12, (stored.astype(np.int64) * 16 * 255 // 4095).astype(np.uint8)
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lzw": {"compression": "tiff_lzw"}, "jpg": {"quality": 100, "subsampling": 0}}.get(kind, {})
        image_format = {"png": "PNG", "jpg": "JPEG"}.get(kind, "TIFF")
        Image.fromarray(stored).save(path, format=image_format, exif=exif, **options)
    tolerance = 6 if kind == "jpg" else 0
    np.testing.assert_allclose(read_image(path, bits).astype(int), stored, atol=tolerance)
    upright = read_image(path, bits, upright=True).astype(int)
    np.testing.assert_allclose(upright, UPRIGHT[orientation](stored), atol=tolerance)


def bands(count: int, photometric: int = 2, dtype: type = np.uint8, extra: list[int] | None = None) -> bytes:
    pixels = RNG.integers(0, 100, (6, 7, count)).astype(dtype)
    return tiff(pixels, photometric=photometric, tags={} if extra is None else {338: extra})


def animation(image_format: str) -> bytes:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 120, 240)]
    file = io.BytesIO()
    frames[0].save(file, format=image_format, save_all=True, append_images=frames[1:])
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bands(5, extra=[0, 0]), r"holds 5 band\(s\).*: save those"),
        (bands(5, extra=[2, 0]), r"holds 5 band\(s\)"),
        (bands(4, extra=[0]), r"holds 4 band\(s\)"),  # red, green, blue and near infrared
        (bands(2, 1, extra=[0]), r"holds 2 band\(s\)"),
        (bands(3, 1, extra=[0, 0]), r"holds 3 band\(s\)"),
        (bands(13, 1, np.uint16, extra=[0] * 12), r"holds 13 band\(s\)"),
        (bands(3, 2, np.float32), "holds floating-point pixels: save"),
        (bands(1, 1, np.float64), "holds floating-point pixels"),
        (bands(1, 32803), r"holds 1 band\(s\), not grey"),  # a camera's raw pixels
        (bands(2, 1, np.uint16, extra=[2]), r"is a TIFF of a kind that is not read \(16 bits\): save"),
        (tiff([RGB, RGB, RGB], photometric=2), "holds 3 pages: save each"),
        (tiff([RGB[::2], RGB], photometric=2, tags=[{254: [1]}, {}]), "holds 2 pages"),  # a thumbnail comes first
        (animation("GIF"), "holds 3 pictures, an animation: save the one"),
        (animation("WEBP"), "holds 3 pictures"),
        (animation("PNG"), "holds 3 pictures"),
        (
            png(RGB, size=(100_000, 100_000)),
            r"is too large: 100000×100000 pixels need about 60\.0 GB, 1\.5 GB are free",
        ),
        (png(RGB, 8, handmade.RGBA, size=(2**31 - 1, 2**31 - 1)), "is too large: 2147483647×2147483647"),
        (png(RGB, 1, size=(60_000, 60_000)), "is too large"),
        (tiff(RGB, photometric=2, tags={256: [2**20], 257: [2**20]}), "is too large"),
    ],
)
def test_what_cannot_be_read_whole_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, reason: str
) -> None:
    monkeypatch.setattr(decoding, "free_memory", lambda: 1_500_000_000)
    path = tmp_path / "image"
    path.write_bytes(data)
    for read in (read_image, lambda path: read_label(path, 4)):
        with pytest.raises(DataError, match=rf"^\S+/image {reason}") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_no_size_is_refused_that_fits_the_memory(tmp_path: Path) -> None:
    """Pillow's own limit ends at 179 megapixels."""
    stored = np.zeros((13_400, 13_400), bool)
    stored[5000:6000, 7000:] = True
    Image.fromarray(stored).save(tmp_path / "large.png")
    assert (read_label(tmp_path / "large.png", 2) == stored).all()


def test_overviews_and_a_telephones_second_picture_are_no_pages(tmp_path: Path) -> None:
    small = RGB[::2, ::2]
    data = tiff([RGB, small, small], photometric=2, tags=[{}, {254: [1]}, {254: [5]}])
    np.testing.assert_array_equal(photograph(data), RGB)
    large = Image.fromarray(np.kron(RGB, np.ones((8, 8, 1), np.uint8)))
    large.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[large.resize((8, 8))])
    with Image.open(tmp_path / "phone.jpg") as image:
        assert image.format == "MPO"
    assert read_image(tmp_path / "phone.jpg").shape == (40, 64, 3)


@pytest.mark.parametrize("image_format", ["BMP", "GIF", "PPM"])
def test_masks_of_other_formats_are_their_numbers_or_refused(tmp_path: Path, image_format: str) -> None:
    label = RNG.integers(0, 4, (6, 9), dtype=np.uint8)
    path = tmp_path / "mask"
    Image.fromarray(label).save(path, format=image_format)
    np.testing.assert_array_equal(read_label(path, 4), label)
    if image_format != "GIF":  # which has no such kind
        Image.fromarray(label > 1).save(path, format=image_format)
        with pytest.raises(DataError, match=f"is a {image_format} whose numbers cannot be read as they are stored"):
            read_label(path, 4)
    path.write_bytes(b"P2 3 1 3 0 1 3")  # 3 is the largest, which is shown as 255
    with pytest.raises(DataError, match="is a PPM whose numbers"):
        read_label(path, 4)


# The fast decoder: the same pixels and the same refusals as Pillow


@settings(max_examples=40)
@given(
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    grey=st.booleans(),
    suffix=st.sampled_from(["png", "jpg"]),
    options=st.sampled_from([{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}]),
    seed=st.integers(0, 99),
)
def test_fast_decoder_gives_pillows_pixels(
    tmp_path_factory: pytest.TempPathFactory, h: int, w: int, grey: bool, suffix: str, options: dict, seed: int
) -> None:
    array = np.random.default_rng(seed).integers(0, 256, (h, w) if grey else (h, w, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("image") / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned, which must not happen
    Image.fromarray(array).save(path, exif=exif, **(options if suffix == "jpg" else {}))
    fast = decoding._decode_plain(path.read_bytes())
    with Image.open(path) as image:
        np.testing.assert_array_equal(fast, np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(read_image(path), fast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "pyspng", None)  # as on a Python without its wheel
        np.testing.assert_array_equal(decoding._decode_plain(path.read_bytes()), fast)


def test_cmyk_jpeg_keeps_pillows_colours(tmp_path: Path) -> None:
    cmyk = Image.fromarray(RGB).convert("CMYK")
    cmyk.save(tmp_path / "a.jpg", quality=100)
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), np.asarray(image.convert("RGB")))


@settings(max_examples=60)
@given(suffix=st.sampled_from(["png", "jpg"]), cut=st.floats(0, 1, exclude_max=True))
def test_file_cut_anywhere_is_refused_or_whole(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, cut: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / f"a.{suffix}"
    Image.fromarray(np.tile(RGB, (9, 7, 1))).save(path)
    data, pixels = path.read_bytes(), read_image(path)
    path.write_bytes(data[: int(cut * len(data))])
    assert decoding._plain_size(path.read_bytes()) is None
    try:
        np.testing.assert_array_equal(read_image(path), pixels)  # only the end mark is lost
    except DataError as error:
        assert "corrupt or truncated" in str(error)  # noqa: PT017 (one of the two must hold)


def test_damaged_pixels_of_a_png_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.tile(RGB, (9, 7, 1))).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.png.*corrupt"):
        read_image(path)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "LZW", "JPEG in TIFF"])
def test_damage_is_one_line_that_names_the_file(
    tmp_path: Path, image_format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    compression = {"LZW": "tiff_lzw", "JPEG in TIFF": "jpeg"}.get(image_format)
    options = {} if compression is None else {"compression": compression}
    for picture in (Image.fromarray(noise), Image.fromarray(noise[..., 0])):
        file = io.BytesIO()
        picture.save(file, format="TIFF" if compression else image_format, **options)
        for damage, data in spoilt(file.getvalue()).items():
            path = tmp_path / "image"
            path.write_bytes(data)
            for read in (read_image, lambda path: read_label(path, 255)):
                try:
                    read(path)
                except DataError as error:
                    assert str(error).startswith(f"{path} "), damage  # noqa: PT017 (some damage leaves good numbers)
                    assert "\n" not in str(error), damage  # noqa: PT017
                else:
                    assert damage == "flipped bits", damage
            said = capfd.readouterr()
            if damage != "flipped bits":  # of which libjpeg and libtiff speak themselves
                assert said == ("", ""), damage


@pytest.mark.parametrize("kind", ["folder", "link to nothing", "link to itself", "pipe"])
def test_what_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("gone.png" if kind == "link to nothing" else "x.png")
    reason = {"folder": "is a folder", "pipe": "is a device", "link to itself": "cannot be read: .*"}.get(
        kind, f"is a {kind}"
    )
    with pytest.raises(DataError, match=rf"x\.png {reason}"):
        read_image(path)
