"""Pictures of an analysis: offset lengths, sampling points, receptive fields. Legend: H x W pixels, M points.

Without pyplot, whose figures are shared by all that runs in a process.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from segdcn.drawing.fonts import drawable, shortened, text_style

Array = NDArray[Any]
Pixel = tuple[int, int]

DOTS_PER_INCH = 130
LEARNED, REGULAR, UNIT = "#ff4534", "#35c5ff", "#3ddc64"
BAR, QUIET = "#1f4e79", "#6e6e6e"
TILE = 2.6  # inches


def length_picture(study: Mapping[str, Any]) -> bytes:
    """A PNG: the histogram of offset lengths of each layer, the last layer on top, on one axis."""
    layers = study["layers"][::-1]
    figure = Figure(figsize=(7.0, 0.8 + 1.3 * len(layers)), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, layer in zip(figure.subplots(len(layers), sharex=True, squeeze=False)[:, 0], layers, strict=True):
        edges, counts = np.array(layer["histogram"]["edges"]), np.array(layer["histogram"]["counts"])
        total = counts.sum() + layer["histogram"]["beyond"]
        axes.bar(edges[:-1], 100 * counts / total, np.diff(edges), align="edge", color=BAR, edgecolor="white", lw=0.3)
        length = layer["length"]
        for value, style in ((length["mean"], "-"), (length["p95"], "--")):
            axes.axvline(value, color=LEARNED, linewidth=1.2, linestyle=style)
        words = f"mean {length['mean']:.2f}, 95 % below {length['p95']:.2f}, longest {length['max']:.1f}"
        (name,) = drawable([layer["name"]])
        axes.set_title(f"{shortened(name, 60)}: {words}", fontsize=8, loc="left", **text_style(name))
        axes.set_ylabel("samples, %", fontsize=8)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    axes.set_xlabel("length of an offset, in pixels of the layer's input map", fontsize=8)
    axes.set_xlim(0)
    return _png(figure)


def sampling_picture(
    image: Array, pixels: Sequence[Pixel], learned: Sequence[Sequence[Array]], regular: Sequence[Array], title: str
) -> bytes:
    """A PNG: a row per pixel with its points after each layer in red, and the grid without offsets in blue.

    Args:
        image: uint8 (H, W, 3).
        learned: for each pixel the points (M, 2) after one layer, after two, ...; (y, x) in image pixels.
        regular: for each pixel those of the same layers without offsets; empty leaves the column out.
    """
    columns = [[*depths] for depths in learned]
    tiles = len(columns[0]) + bool(regular)
    figure, grid = _tiles(image, len(pixels), tiles, title)
    for row, pixel in enumerate(pixels):
        for column, points in enumerate([*learned[row], *regular[row : row + 1]]):
            axes = grid[row, column]
            last = column == len(learned[row])
            _photograph(axes, image, 0.65)
            size, colour = 10 if len(points) < 100 else 5, REGULAR if last else LEARNED
            axes.scatter(points[:, 1], points[:, 0], s=size, c=colour, linewidths=0, alpha=0.8)
            _unit(axes, pixel)
            words = "without offsets" if last else f"{column + 1} layer{'s' if column else ''}"
            axes.set_title(f"{words}: {_count(points, image.shape)}", fontsize=7)
        grid[row, 0].set_ylabel(f"row {pixel[0]}, column {pixel[1]}", fontsize=7)
    return _png(figure)


def field_picture(
    image: Array, pixels: Sequence[Pixel], fields: Array, points: Sequence[Array | None], title: str
) -> bytes:
    """A PNG: for each pixel what moves its score, as heat over the image, and its sampling points on top.

    Args:
        image: uint8 (H, W, 3).
        fields: float (P, H, W), see ``effective_receptive_field``; shown by its square root and as if its brightest
            pixels were alike, else a few of them would be all there is to see.
        points: for each pixel its points (M, 2), (y, x) in image pixels, or None.
    """
    figure, grid = _tiles(image, 1, len(pixels), title)
    for axes, pixel, field, reached in zip(grid[0], pixels, fields, points, strict=True):
        bright = max(float(np.quantile(field, 0.999)), np.finfo(np.float32).tiny)
        heat = np.sqrt(np.minimum(1, field / bright))
        _photograph(axes, image, 0.4)
        axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=np.minimum(1, 2 * heat))
        if reached is not None:
            axes.scatter(reached[:, 1], reached[:, 0], s=1.5, c=REGULAR, linewidths=0, alpha=0.6)
        _unit(axes, pixel)
        axes.set_title(f"row {pixel[0]}, column {pixel[1]}", fontsize=7)
    return _png(figure)


def _tiles(image: Array, rows: int, columns: int, title: str) -> tuple[Figure, Array]:
    shape = image.shape[0] / image.shape[1]
    size = (TILE * columns, (TILE * min(max(shape, 0.4), 3.0) + 0.25) * rows + 0.3)  # a strip stays within bounds
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    (title,) = drawable([title])
    figure.suptitle(shortened(title, 40 * columns), fontsize=8, x=0.01, ha="left", **text_style(title))
    return figure, np.asarray(figure.subplots(rows, columns, squeeze=False))


def _photograph(axes: Axes, image: Array, brightness: float) -> None:
    axes.imshow((image * brightness).astype(np.uint8))
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _unit(axes: Axes, pixel: Pixel) -> None:
    axes.plot(pixel[1], pixel[0], "o", color=UNIT, markersize=4, markeredgecolor="black", markeredgewidth=0.6)


def _count(points: Array, shape: tuple[int, ...]) -> str:
    inside = ((points >= -0.5) & (points < np.array(shape[:2]) - 0.5)).all(axis=1)
    return f"{len(points)} points" + ("" if inside.all() else f", {(~inside).sum()} outside")


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # which would name a version
    return file.getvalue()
