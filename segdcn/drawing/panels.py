"""Pictures of predictions and of sampling points. Legend: H x W pixels, K classes, M points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from segdcn.data.dataset import IGNORE_INDEX
from segdcn.drawing.fonts import draw_text, drawable, fitted, text_width
from segdcn.errors import UserError

TILE_SIZE = 480  # longest side of a tile in pixels
MIN_TILE_WIDTH = 240  # room for a caption
TILES_PER_ROW = 4
MARGIN = 12
SWATCH_SIZE = 16  # and that of the letters beside it
TITLE_SIZE = 20
LINE = 24
LONGEST_NAME = 24  # widths of a letter's height: a longer name in a legend loses its middle

BACKGROUND = (255, 255, 255)
TEXT = (30, 30, 30)
WRONG = (230, 40, 40)
OUTLINE = (255, 220, 0)
TINT = 0.15  # of the outline's colour within it
GREEN, RED = (40, 230, 90), (255, 50, 40)
HATCH_DARK, HATCH_LIGHT = (48, 48, 48), (104, 104, 104)

Array = NDArray[Any]
Bytes = NDArray[np.uint8]


def colorize(label: Array, palette: Sequence[Sequence[int]]) -> Bytes:
    """Colour a label map; ignored pixels (255) are hatched in dark grey, a pattern that no class can have.

    Args:
        label: integers (H, W), 0..K-1 or 255.
        palette: K colours (red, green, blue), 0..255 each.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: a label without a colour.
    """
    _check_labels("label", label, len(palette))
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = np.asarray(palette, np.uint8)
    picture: Bytes = colours[label]
    ignored = label == IGNORE_INDEX
    picture[ignored] = _hatch(*label.shape)[ignored]
    return picture


def comparison_panel(
    image: Bytes,
    label: Array,
    prediction: Array,
    class_names: Sequence[object],
    palette: Sequence[Sequence[int]],
    title: str = "",
) -> Image.Image:
    """Input, truth, prediction and errors side by side, and a legend of the classes that occur.

    Wrong pixels are red in the error map; pixels ignored in the truth are hatched and count neither way.

    Args:
        image: uint8 (H, W, 3), not normalised.
        label, prediction: integers (H, W); 255 in the label is ignored.
        class_names, palette: K names and K colours; a name is anything, shown as its ``str``.

    Raises:
        ValueError: sizes differ, names and colours differ in number, or a class has no colour.
    """
    _check_image(image)
    if len(class_names) != len(palette):
        raise UserError(f"there are {len(class_names)} class names, but {len(palette)} colours")
    for name, values in (("label", label), ("prediction", prediction)):
        if values.shape != image.shape[:2]:
            raise UserError(f"{name} {values.shape} and image {image.shape[:2]} must have the same height and width")
        _check_labels(name, values, len(palette))

    valid = label != IGNORE_INDEX
    wrong = valid & (label != prediction)
    errors = f"errors, {wrong.sum() / valid.sum():.1%} of labelled pixels" if valid.any() else "errors, no labels"
    photograph = resize(image, Image.Resampling.BICUBIC)
    shown_label, shown_prediction, shown_wrong = (
        resize(values, Image.Resampling.NEAREST) for values in (label, prediction, wrong)
    )
    tiles = [
        ("input", photograph),
        ("truth", colorize(shown_label, palette)),
        ("prediction", colorize(shown_prediction, palette)),
        (errors, _error_map(photograph, shown_label, shown_wrong)),
    ]
    present = np.union1d(label[valid], prediction[prediction != IGNORE_INDEX])
    names = _shown(class_names)
    legend = [(names[k], swatch(palette[k], SWATCH_SIZE)) for k in present]
    if wrong.any():
        legend.append(("wrong", swatch(WRONG, SWATCH_SIZE)))
    if not valid.all():
        legend.append(("ignored", _hatch(SWATCH_SIZE, SWATCH_SIZE)))
    return sheet(tiles, legend, title)


def overlay(
    image: Bytes,
    label: Array,
    class_names: Sequence[object],
    palette: Sequence[Sequence[int]],
    alpha: float = 0.5,
    legend: str = "present",
) -> Image.Image:
    """The image at its own size with the classes' colours over it, above a legend whose letters grow with it.

    Args:
        image: uint8 (H, W, 3), not normalised.
        label: integers (H, W), 0..K-1.
        class_names, palette: K names and K colours; a name is anything, shown as its ``str``.
        alpha: share of the colours, 0 (image alone) to 1 (colours alone).
        legend: "present" names the classes that occur, "all" every class (frames of a video keep one size), "none"
            leaves the legend out.

    Raises:
        ValueError: sizes differ, a class has no colour, or alpha or legend is none of the above.
    """
    _check_image(image)
    if label.shape != image.shape[:2]:
        raise UserError(f"label {label.shape} and image {image.shape[:2]} must have the same height and width")
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha must be in 0..1, got {alpha}")
    if legend not in ("present", "all", "none"):
        raise UserError(f"legend must be present, all or none, got {legend!r}")
    colours = colorize(label, palette)
    blended = Image.fromarray(cv2.addWeighted(image, 1 - alpha, colours, alpha, 0).astype(np.uint8, copy=False))
    if legend == "none":
        return blended
    # letters that can be read where the whole picture is seen, in a strip of an image no larger than in another
    size = max(SWATCH_SIZE, round(min(max(label.shape) / 50, label.size**0.5 / 30)))
    names = _shown(class_names)
    present = np.unique(label[label != IGNORE_INDEX]) if legend == "present" else range(len(palette))
    entries = [(fitted(names[k], size, LONGEST_NAME * size), swatch(palette[k], size)) for k in present]
    places, bottom = _legend_places(entries, blended.width, blended.height + size // 2, size)
    # an image narrower than a class's name is given room for it
    widths = [x + 2 * size + round(text_width(name, size)) for (name, _), (x, _) in zip(entries, places, strict=True)]
    sheet = Image.new("RGB", (max([blended.width, *widths]), bottom + size // 4), BACKGROUND)
    sheet.paste(blended)
    _draw_legend(sheet, entries, places, size)
    return sheet


def sampling_panel(image: Bytes, points: Sequence[tuple[tuple[int, int], Array]], title: str = "") -> Image.Image:
    """One tile per chosen pixel: the pixel in green, the points that the network samples for it in red.

    Points outside the image are not drawn; the caption counts them. Without a pixel the image stands alone, and the
    caption says that it has no labelled pixel.

    Args:
        image: uint8 (H, W, 3), not normalised.
        points: pairs of a pixel (row, col) and its sampling points (M, 2), (y, x) in image pixels.
    """
    _check_image(image)
    height, width = image.shape[:2]
    # Dots are drawn on a larger canvas and shrunk, since Pillow draws circles with hard edges.
    dimmed = Image.fromarray((resize(image, Image.Resampling.BICUBIC) * 0.7).astype(np.uint8))
    canvas_size = (2 * dimmed.width, 2 * dimmed.height)
    scale = np.array([canvas_size[1] / height, canvas_size[0] / width])
    tiles = [] if points else [("no labelled pixel", np.asarray(dimmed))]
    for pixel, point_list in points:
        samples = np.asarray(point_list)
        inside = ((samples >= -0.5) & (samples < np.array([height, width]) - 0.5)).all(axis=1)
        canvas = dimmed.resize(canvas_size)
        draw = ImageDraw.Draw(canvas)
        for y, x in (samples[inside] + 0.5) * scale:
            draw.circle((x, y), 4, fill=RED)
        y, x = (np.array(pixel) + 0.5) * scale
        draw.circle((x, y), 12, fill=GREEN, outline=(0, 0, 0), width=3)
        caption = f"({pixel[0]}, {pixel[1]}): {len(samples)} points"
        if not inside.all():
            caption += f", {(~inside).sum()} outside"
        tiles.append((caption, np.asarray(canvas.resize(dimmed.size, Image.Resampling.BOX))))
    return sheet(tiles, [], title)


def class_sheet(examples: Iterable[tuple[str, str, Bytes, Array]]) -> Image.Image:
    """One tile per class: its pixels in colour within an outline, the rest of the image dark and grey.

    Args:
        examples: two lines of a caption, the image as uint8 (H, W, 3), and which of its pixels are of the class as
            bool (H, W).
    """
    tiles = []
    for title, source, image, inside in examples:
        _check_image(image)
        picture = resize(image, Image.Resampling.BICUBIC)
        within = resize(inside * 255, Image.Resampling.BOX)  # in which a speck of a large image stays
        grey = np.asarray(Image.fromarray(picture).convert("L"))[..., None] // 2
        lit = cv2.addWeighted(picture, 1 - TINT, np.full_like(picture, OUTLINE), TINT, 0)
        tile = np.where(within[..., None] > 0, lit, grey).astype(np.uint8)
        around = cv2.dilate(within, np.ones((5, 5), np.uint8))  # beside the class, however thin it is
        tile[(around > 0) & (within == 0)] = OUTLINE
        tiles.append((drawable([title, source]), tile))
    width = max(MIN_TILE_WIDTH, *(tile.shape[1] for _, tile in tiles))
    captions = ("\n".join(fitted(line, SWATCH_SIZE, width) for line in lines) for lines, _ in tiles)
    return sheet([(caption, tile) for caption, (_, tile) in zip(captions, tiles, strict=True)], [], "")


def central_pixels(label: Array, count: int = 3) -> list[tuple[int, int]]:
    """For each of the ``count`` most frequent classes of a label map, its pixel (row, column) deepest inside it."""
    classes, sizes = np.unique(label[label != IGNORE_INDEX], return_counts=True)
    chosen = []
    for index in classes[np.argsort(-sizes, kind="stable")[:count]]:
        inside = np.pad((label == index).astype(np.uint8), 1)  # the border of the image is a border of the class
        depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        chosen.append((int(row), int(column)))
    return chosen


def _check_image(image: Bytes) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"a panel needs the image as uint8 (H, W, 3), got {image.dtype} {image.shape}")


def _check_labels(name: str, values: Array, num_classes: int) -> None:
    unknown = values[((values < 0) | (values >= num_classes)) & (values != IGNORE_INDEX)]
    if unknown.size:
        raise UserError(f"{name} {unknown[0]} has no colour: the palette has {num_classes} colours")


def _hatch(height: int, width: int) -> Bytes:
    """Diagonal stripes, uint8 (height, width, 3)."""
    stripe = (np.arange(height)[:, None] + np.arange(width)) % 8 < 2
    return np.where(stripe[..., None], HATCH_LIGHT, HATCH_DARK).astype(np.uint8)


def resize(values: Array, resampling: Image.Resampling) -> Bytes:
    """Enlarge by a whole factor, or shrink, until the longest side fits the tile size."""
    height, width = values.shape[:2]
    longest = max(height, width)
    factor = TILE_SIZE // longest if longest <= TILE_SIZE else TILE_SIZE / longest
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(values.astype(np.uint8)).resize(size, resampling))


def _error_map(photograph: Bytes, label: Bytes, wrong: Bytes) -> Bytes:
    """Wrong pixels in red over the photograph in pale grey, ignored ones hatched."""
    grey = np.asarray(Image.fromarray(photograph).convert("L")) // 2 + 100
    picture = np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)
    picture[wrong > 0] = WRONG
    ignored = label == IGNORE_INDEX
    picture[ignored] = _hatch(*label.shape)[ignored]
    return picture


def sheet(tiles: list[tuple[str, Bytes]], legend: list[tuple[str, Bytes]], title: str) -> Image.Image:
    """Tiles with their captions, row by row in cells of one size, under a title and above a legend that wraps."""
    (title,) = drawable([title])
    tile_height, tile_width = (max(tile.shape[axis] for _, tile in tiles) for axis in (0, 1))
    cell_width = max(tile_width, MIN_TILE_WIDTH) + MARGIN
    caption_height = LINE * max(len(caption.split("\n")) for caption, _ in tiles)
    cell_height = caption_height + tile_height + MARGIN
    columns = min(len(tiles), TILES_PER_ROW)
    rows = -(-len(tiles) // TILES_PER_ROW)
    width = MARGIN + columns * cell_width
    top = MARGIN + (LINE + 8 if title else 0)

    longest = min(LONGEST_NAME * SWATCH_SIZE, width - MIN_TILE_WIDTH // 4)
    legend = [(fitted(name, SWATCH_SIZE, longest), swatch) for name, swatch in legend]
    places, bottom = _legend_places(legend, width, top + rows * cell_height, SWATCH_SIZE)
    height = bottom + (MARGIN // 2 if legend else 0)

    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw_text(draw, (MARGIN, MARGIN), fitted(title, TITLE_SIZE, width - 2 * MARGIN), TITLE_SIZE, TEXT)
    for index, (caption, tile) in enumerate(tiles):
        row, column = divmod(index, TILES_PER_ROW)
        x, y = MARGIN + column * cell_width, top + row * cell_height
        for number, line in enumerate(caption.split("\n")):
            draw_text(draw, (x, y + number * LINE), line, SWATCH_SIZE, TEXT)
        sheet.paste(Image.fromarray(tile), (x, y + caption_height))
    _draw_legend(sheet, legend, places, SWATCH_SIZE)
    return sheet


def _shown(class_names: Sequence[object]) -> list[str]:
    """Names as they are drawn; a number for one without letters."""
    return [name or f"class {k}" for k, name in enumerate(drawable(class_names))]


def swatch(colour: Sequence[int], size: int) -> Bytes:
    """A square of one colour, for a legend."""
    return np.full((size, size, 3), colour, np.uint8)


def _legend_places(
    legend: list[tuple[str, Bytes]], width: int, top: int, size: int
) -> tuple[list[tuple[int, int]], int]:
    """Upper left corner of each entry, in lines that wrap at ``width``, and where the last line ends."""
    line, gap, margin = 3 * size // 2, 3 * size // 8, 3 * size // 4
    places, x, y = [], margin, top
    for name, _ in legend:
        entry_width = size + gap + round(text_width(name, size)) + 5 * size // 4
        if x > margin and x + entry_width > width:
            x, y = margin, y + line
        places.append((x, y))
        x += entry_width
    return places, y + (line if legend else 0)


def _draw_legend(sheet: Image.Image, legend: list[tuple[str, Bytes]], places: list[tuple[int, int]], size: int) -> None:
    draw = ImageDraw.Draw(sheet)
    for (name, swatch), (x, y) in zip(legend, places, strict=True):
        sheet.paste(Image.fromarray(swatch), (x, y + 2))
        draw.rectangle((x, y + 2, x + size - 1, y + 1 + size), outline=TEXT)
        draw_text(draw, (x + size + 3 * size // 8, y), name, size, TEXT)
