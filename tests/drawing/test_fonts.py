"""Text in any script, with a font made here: each of its letters is a black square, so that it is known when seen."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from segdcn.analysis.pictures import length_picture, sampling_picture
from segdcn.drawing import fonts
from segdcn.drawing.panels import comparison_panel, overlay

NAMES = ["道路 Straße", "δρόμος 자동차", "सड़क 🚗"]  # Han, German, Greek, Korean, Hindi, a picture
PALETTE = [(250, 200, 200), (200, 250, 200), (200, 200, 250)]


def make_font(file: Path, letters: str, drawn: bool = True) -> Path:
    """A font of squares, 0.8 of its size, or of coloured pictures without outlines, as fonts of emoji are."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    order = [".notdef", *(f"g{k}" for k in range(len(letters)))]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({ord(letter): f"g{k}" for k, letter in enumerate(letters)})
    builder.setupGlyf(dict.fromkeys(order, square))
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1000, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": file.stem, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900)
    builder.setupPost()
    if not drawn:
        builder.setupCOLR({name: [(name, 0)] for name in order[1:]})
        builder.setupCPAL([[(1.0, 0.0, 0.0, 1.0)]])
    builder.save(file)
    return file


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes these the only fonts of the machine, and forgets what was said and found before."""
    known = list(font_manager.fontManager.ttflist)

    def forget() -> None:
        for found in (fonts._runs, fonts._files_for, fonts._system_fonts):
            found.cache_clear()
        fonts._told.clear()

    def only(*files: Path) -> None:
        forget()
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(map(str, files)))

    yield only
    forget()
    font_manager.fontManager.ttflist[:] = known


def dark(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L")) < 60


def squares(picture: Image.Image, side: int = 12) -> int:
    """Black squares of at least this side, by the upper left corners of such blocks of pixels."""
    blocks = np.lib.stride_tricks.sliding_window_view(dark(picture), (side, side)).all(axis=(2, 3))
    corner = np.pad(blocks, 1)
    return int((corner[1:-1, 1:-1] & ~corner[:-2, 1:-1] & ~corner[1:-1, :-2]).sum())


def shown(names: list[str]) -> Image.Image:
    label = np.repeat(np.arange(3, dtype=np.uint8), 20)[None].repeat(30, axis=0)
    return overlay(np.full((30, 60, 3), 200, np.uint8), label, names, PALETTE)


@pytest.mark.filterwarnings("error")  # nothing is missing
def test_each_letter_comes_from_a_font_that_has_it(install: Install, tmp_path: Path) -> None:
    han = make_font(tmp_path / "SquaresHan.ttf", "道路")
    rest = make_font(tmp_path / "SquaresRest.ttf", "자동차सड़क🚗")
    (tmp_path / "Broken.ttf").write_bytes(b"no font")
    coloured = make_font(tmp_path / "Coloured.ttf", "道路자동차सड़क🚗", drawn=False)
    last = make_font(tmp_path / "LastResort.ttf", "道路자동차सड़क🚗")
    install(tmp_path / "Broken.ttf", coloured, last, rest, han)
    assert squares(shown(NAMES)) == 2 + 3 + 4 + 1
    # what is left is drawn as in a name of its own
    assert fonts.text_width("Straße", 16) == pytest.approx(
        fonts.text_width("道路 Straße", 16) - fonts.text_width("道路 ", 16), abs=1
    )


def test_a_font_with_all_letters_draws_all_of_them(install: Install, tmp_path: Path) -> None:
    install(make_font(tmp_path / "SquaresA.ttf", "道"), make_font(tmp_path / "SquaresB.ttf", "道路abc"))
    assert squares(shown(["道路abc", "x", "y"])) == 5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["δρόμος", "дорога", "naïve café", "طريق", "Straße", "łąka", "đường"])
def test_scripts_of_matplotlibs_font_need_no_other(install: Install, name: str) -> None:
    install()
    assert shown([name, "b", "c"]) != shown([fonts.BOX * len(name), "b", "c"])


def test_what_no_font_has_is_told_once_and_drawn_as_boxes(install: Install) -> None:
    install()
    image, label = np.zeros((30, 60, 3), np.uint8), np.zeros((30, 60), np.uint8)
    with pytest.warns(UserWarning, match="no font on this machine") as told:
        panel = comparison_panel(image, label, label, NAMES, PALETTE, "道路/1")
    (warning,) = told  # class names are told together, and files in the same script no more
    for word in (*NAMES[:2], "🚗", "fonts-noto-cjk", "boxes"):
        assert word in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison_panel(image, label, label, NAMES, PALETTE, "道路/2")
        shown(NAMES)
    assert panel == comparison_panel(image, label, label, ["□□ Straße", "", ""], PALETTE, "□□/1")


def test_a_long_list_of_names_makes_a_short_warning(install: Install) -> None:
    install()
    with pytest.warns(UserWarning, match="and 15 more") as told:
        fonts.drawable(f"道{k}" * 30 for k in range(20))
    assert len(str(told[0].message)) < 600


def test_texts_become_lines() -> None:
    assert fonts.drawable([" a\n\tb\r\n ", "\0", "x\ud800y", "e\u0301", 3, None]) == [
        "a b",
        "",
        "x\N{REPLACEMENT CHARACTER}y",
        "é",
        "3",
        "None",
    ]


def test_long_texts_lose_their_middle() -> None:
    name = "".join(chr(ord("a") + k % 26) for k in range(200))
    assert fonts.shortened(name, 9) == f"abcd…{name[-4:]}"
    assert fonts.shortened(name, 200) == name
    fitting = fonts.fitted(name, 16, 300)
    assert 250 < fonts.text_width(fitting, 16) <= 300
    assert name.startswith(fitting.split("…")[0])
    assert name.endswith(fitting.split("…")[1])
    assert fonts.wrapped("two words", 5) == "two\nwords"
    assert max(map(len, fonts.wrapped("道" * 60, 20).splitlines())) == 10


@pytest.mark.filterwarnings("error")
def test_invisible_letters_need_no_font(install: Install) -> None:
    install()
    (line,) = fonts.drawable(["ro\u200dad\ufe0f"])
    assert fonts.text_width(line, 16) == fonts.text_width("road", 16)


def layer(name: str) -> dict[str, object]:
    histogram = {"edges": [0.0, 1.0, 2.0], "counts": [3, 1], "beyond": 1}
    return {"name": name, "histogram": histogram, "length": {"mean": 0.5, "p95": 1.5, "max": 2.5}}


@pytest.mark.filterwarnings("error")  # matplotlib's, of a glyph that is missing
def test_matplotlib_takes_the_same_fonts_and_no_dollar_for_a_formula(install: Install, tmp_path: Path) -> None:
    install(make_font(tmp_path / "SquaresForMatplotlib.ttf", "道路자동차सड़क🚗"))
    image = np.full((30, 40, 3), 255, np.uint8)
    found = decoded(sampling_picture(image, [(3, 4)], [[np.zeros((1, 2))]], [], "道路/자동차 $\\frac{"))
    lengths = decoded(length_picture({"layers": [layer("道路 $x_{"), layer("b\nc")]}))
    assert squares(found, 8) >= 5
    assert squares(lengths, 8) >= 2


def decoded(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1)])
def test_matplotlibs_pictures_of_any_shape_stay_within_bounds(height: int, width: int) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    picture = decoded(sampling_picture(image, [(0, 0)], [[np.zeros((1, 2))]], [np.zeros((1, 2))], "a/folder/" * 40))
    assert max(picture.size) < 1500
