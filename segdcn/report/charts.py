"""Curves and histograms as inline SVG whose colours are the page's own, light and dark alike.

matplotlib draws with colours that nothing else uses; each is then replaced by a CSS variable.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = 8  # --s0 to --s7 of style.css; more series begin again
TEXT, RULE = "#fe00f0", "#fe00f1"
SIZE = (3.6, 2.15)  # inches of 72 px: a chart is as wide as a phone's column


@dataclass(frozen=True)
class Series:
    """A line of a chart: values over epochs or bins; NaN is a gap.

    colour: which one of the page's series colours; dashed: a second figure of the same thing.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    dashed: bool = False

    @property
    def drawn(self) -> bool:
        return any(map(math.isfinite, self.y))


@dataclass(frozen=True)
class Chart:
    """A drawn chart and what it shows, for a table beside it."""

    title: str
    svg: Markup
    series: tuple[Series, ...]


def line_chart(
    title: str, series: Sequence[Series], x_label: str = "epoch", steps: bool = False, unit: str = ""
) -> Chart | None:
    """Lines over epochs, or with ``steps`` a histogram's outline; None where there is nothing to draw."""
    drawn = tuple(one for one in series if one.drawn)
    if not drawn:
        return None
    # paths stay paths, text stays text: readable, searchable, in the page's font
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "path.simplify": False}):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for one in drawn:
            line: dict[str, Any] = {
                "color": _sentinel(one.colour),
                "linewidth": 1.6,
                "linestyle": (0, (3, 2)) if one.dashed else "-",
            }
            alone = sum(map(math.isfinite, one.y)) == 1  # one epoch is a dot
            if steps:
                axes.step(one.x, one.y, where="mid", **line)
            else:
                gaps = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
                axes.plot(*zip(*gaps, strict=True), marker="o", markersize=4 if alone else 2.2, **line)
        _style(axes, x_label, unit)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Chart(title, _embedded(file.getvalue(), title, drawn), drawn)


def _style(axes: Axes, x_label: str, unit: str) -> None:
    axes.set_xlabel(x_label, color=TEXT, fontsize=8)
    if unit:
        axes.set_ylabel(unit, color=TEXT, fontsize=8)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, labelsize=8, length=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)


def _sentinel(colour: int) -> str:
    return f"#fe00{colour % COLOURS:02x}"


def _embedded(svg: str, title: str, series: Sequence[Series]) -> Markup:
    """For use within a page: no prologue, no ids that two charts share, a name and a summary for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    for number in range(COLOURS):
        svg = svg.replace(_sentinel(number), f"var(--s{number})")
    svg = svg.replace(TEXT, "currentColor").replace(RULE, "var(--rule)")
    svg = re.sub(
        r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", svg
    )  # shorthand of an old matplotlib
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would style the whole page
    size = re.search(r'viewBox="([^"]+)"', svg)
    summary = "; ".join(f"{one.label}: {_ends(one)}" for one in series)
    head = (
        f'<svg role="img" class="chart" viewBox="{size[1] if size else ""}" xmlns="http://www.w3.org/2000/svg"'
        f' xmlns:xlink="http://www.w3.org/1999/xlink"><title>{html.escape(title)}</title>'
        f"<desc>{html.escape(summary)}</desc>"
    )
    return Markup(head + svg[svg.index(">") + 1 :])


def _ends(series: Series) -> str:
    values = [value for value in series.y if math.isfinite(value)]
    return f"{values[0]:.4g}" if len(values) == 1 else f"from {values[0]:.4g} to {values[-1]:.4g}"
