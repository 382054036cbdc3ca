"""Text in pictures: classes, files and overrides are named in any script, and one font has the letters of a few.

Pillow's own font has those of English, DejaVu Sans (matplotlib's) those of some fifty scripts; the machine's fonts are
looked through only for what is left. What no font has is drawn as a box, and said once.
"""

from __future__ import annotations

import io
import textwrap
import unicodedata
import warnings
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib import get_data_path
from PIL import ImageDraw, ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

OWN = "own"  # in place of a font file: Pillow's own font
DEJAVU = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
ADVICE = "install fonts that have them, such as Noto (Debian: fonts-noto-cjk, fonts-noto-core; emoji: fonts-symbola)"
BOX, REPLACEMENT = "\N{WHITE SQUARE}", "\N{REPLACEMENT CHARACTER}"
_STYLED = ("bold", "italic", "oblique", "light", "thin", "black", "medium", "condensed", "mono", "serif")
_told: set[str] = set()


def drawable(texts: Iterable[object]) -> list[str]:
    """Texts as lines that can be drawn: breaks are spaces, letters of no font are boxes. Lines are what the rest takes.

    Warns of the texts whose letters this machine lacks, once in a process for each script.
    """
    lines = [_line(text) for text in texts]
    lacking = [line for line in dict.fromkeys(lines) if _missing(line)]
    scripts = {unicodedata.name(chr(c), "").split(" ")[0] for line in lacking for c in _missing(line)}
    if not scripts <= _told:
        _told.update(scripts)
        names = ", ".join(shortened(line, 40) for line in lacking[:5])
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        warnings.warn(
            f"no font on this machine has all letters of {names}{more}: pictures show boxes in their place; {ADVICE}",
            stacklevel=2,
        )
    return ["".join(BOX if ord(c) in _missing(line) else c for c in line) for line in lines]


def shortened(line: str, letters: int) -> str:
    """A line of so many letters at most, without its middle: names often differ at either end."""
    if len(line) <= letters:
        return line
    tail = (letters - 1) // 2
    return f"{line[: letters - 1 - tail]}…{line[len(line) - tail :]}"


def wrapped(line: str, letters: int) -> str:
    """A line as several of so many letters, of which those of East Asia count twice; about four at most."""
    wide = any(unicodedata.east_asian_width(c) in "WF" for c in line)
    width = letters // 2 if wide else letters
    return textwrap.fill(shortened(line, 4 * width), width, break_on_hyphens=False)


def fitted(line: str, size: int, width: float) -> str:
    """A line of at most ``width`` pixels at a font size, shortened as by ``shortened``."""
    line = shortened(line, 200)
    if text_width(line, size) <= width:
        return line
    low, high = 1, len(line)  # letters that fit, and that do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if text_width(shortened(line, middle), size) <= width else (low, middle)
    return shortened(line, low)


def text_width(line: str, size: int) -> float:
    """Pixels that ``draw_text`` takes for a line."""
    return sum(_loaded(file, size).getlength(part) for file, part in _runs(line))


def draw_text(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], line: str, size: int, colour: tuple[int, int, int]
) -> None:
    """Draw a line with its upper left corner there; all fonts stand on one base line."""
    x, base = corner[0], corner[1] + _ascent(size)
    for file, part in _runs(line):
        font = _loaded(file, size)
        draw.text((x, base), part, colour, font, anchor="ls")
        x += font.getlength(part)


def text_style(*lines: str) -> dict[str, Any]:
    """For matplotlib's texts: fonts for the letters of these lines, and no formula where there is a dollar sign."""
    from matplotlib import font_manager

    fonts = font_manager.fontManager
    files = [file for file in _files_for("".join(lines)) if file != OWN]
    for file in set(files) - {entry.fname for entry in fonts.ttflist}:  # installed after matplotlib made its list
        fonts.addfont(file)
    names = {entry.fname: entry.name for entry in reversed(fonts.ttflist)}
    return {"family": [names[file] for file in files], "parse_math": False}


def _line(text: object) -> str:
    """One line without control characters and halves of characters."""
    letters = unicodedata.normalize("NFC", str(text))
    kinds = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": REPLACEMENT, "Cn": REPLACEMENT}
    return " ".join("".join(kinds.get(unicodedata.category(c), c) for c in letters).split())


@lru_cache(maxsize=4096)
def _runs(line: str) -> tuple[tuple[str, str], ...]:
    """A line as pairs of a font file and what it draws: all of the line, else whole words, else single letters."""
    files = _files_for(line)
    runs: list[tuple[str, str]] = []
    for word in [line] if _having(_visible(line), files) else line.split(" "):
        gap = " " if runs else ""
        for part in [word] if _having(_visible(word), files) else word:
            file = _having(_visible(part), files) or DEJAVU
            shown = "".join(c for c in part if not _is_invisible(c) or ord(c) in _letters(file))
            # a font lays out neighbouring words together, since some run from the right
            if runs and runs[-1][0] == file and _visible(gap) <= _letters(file):
                shown = runs.pop()[1] + gap + shown
            elif gap:
                runs.append((OWN, gap))
            runs.append((file, shown))
            gap = ""
    return tuple(runs)


def _having(letters: set[int], files: Iterable[str]) -> str | None:
    """The first file that has all of these."""
    return next((file for file in files if letters <= _letters(file)), None)


def _missing(line: str) -> set[int]:
    return _visible(line).difference(*map(_letters, _files_for(line)))


def _visible(line: str) -> set[int]:
    """The code points that need a glyph."""
    return {ord(c) for c in line if not _is_invisible(c)}


def _is_invisible(letter: str) -> bool:
    """Joiners, marks of direction, selectors of a letter's variant."""
    return unicodedata.category(letter) == "Cf" or 0xFE00 <= ord(letter) <= 0xFE0F


@lru_cache(maxsize=4096)
def _files_for(line: str) -> tuple[str, ...]:
    """Font files that have the line's letters together, as far as any have."""
    files = [OWN, DEJAVU]
    left = _visible(line).difference(*map(_letters, files))
    while left:
        best = _having(left, _system_fonts()) or max(
            _system_fonts(), key=lambda f: len(left & _letters(f)), default=OWN
        )
        if not left & _letters(best):
            break
        files.append(best)
        left -= _letters(best)
    return tuple(files)


@cache
def _system_fonts() -> tuple[str, ...]:
    """Every font file of the machine, upright sans-serif ones first."""
    from matplotlib.font_manager import findSystemFonts

    def order(file: str) -> tuple[object, ...]:
        name = Path(file).stem.lower()
        return sum(word in name for word in _STYLED), "sans" not in name, name, file

    return tuple(sorted(findSystemFonts(), key=order))


@cache
def _letters(file: str) -> frozenset[int]:
    """The code points that a font file draws; none where it is broken or has no outlines, as coloured emoji have."""
    from fontTools.ttLib import TTFont

    if "lastresort" in file.lower():  # has a box for everything
        return frozenset()
    try:
        with _opened(file) as stream, TTFont(stream, fontNumber=0, lazy=True) as font:  # a collection's first
            if "COLR" in font or not ("glyf" in font or "CFF " in font or "CFF2" in font):
                return frozenset()
            return frozenset(font.getBestCmap() or ())
    except Exception:  # of many kinds
        return frozenset()


def _opened(file: str) -> BinaryIO:
    if file != OWN:
        return Path(file).open("rb")
    font = ImageFont.load_default(size=10)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert isinstance(font.path, io.BytesIO)
    return io.BytesIO(font.path.getvalue())


@cache
def _loaded(file: str, size: int) -> Font:
    return ImageFont.load_default(size=size) if file == OWN else ImageFont.truetype(file, size)


def _ascent(size: int) -> int:
    font = _loaded(OWN, size)
    return font.getmetrics()[0] if isinstance(font, ImageFont.FreeTypeFont) else size
