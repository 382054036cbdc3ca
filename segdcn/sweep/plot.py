"""The results of a sweep as a picture: means with their intervals, each seed, the baseline and the paper's figures."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from segdcn.drawing.fonts import drawable, text_style, wrapped
from segdcn.drawing.numbers import is_loss
from segdcn.sweep.results import Results

DOTS_PER_INCH = 150
OURS, SEED, PAPER, QUIET = "#1f4e79", "#7fa8d1", "#c8501e", "#6e6e6e"


def plot(results: Results) -> bytes:
    """A PNG: a line per setting, in the sweep's order from the top, over the metric.

    Without pyplot, whose figures are shared by all that runs in a process.
    """
    rows, factor = results.rows, 1.0 if is_loss(results.metric) else 100.0
    labels = [wrapped(label, 44) for label in drawable(row.label for row in rows)]
    (metric,) = drawable([results.metric])
    heights = [max(1.0, 0.55 * (1 + label.count("\n"))) for label in labels]
    centres = [sum(heights[:i]) + heights[i] / 2 for i in range(len(rows))]

    figure = Figure(figsize=(8.0, 1.5 + 0.5 * sum(heights)), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    marks: dict[str, Any] = {}  # what the legend explains: only what there is

    base = results.baseline.estimate
    if base is not None and len(rows) > 1:
        marks["baseline"] = axes.axvline(factor * base.mean, color=QUIET, linewidth=1, linestyle="--", zorder=1)
    for row, y in zip(rows, centres, strict=True):
        figures = [factor * value for value in row.figures.values()]
        if row.estimate is not None and len(figures) > 1:
            half = row.estimate.half
            marks["mean"] = axes.errorbar(
                factor * row.estimate.mean,
                y,
                xerr=None if half is None else factor * half,
                fmt="o",
                color=OURS,
                markersize=6,
                linewidth=1.8,
                capsize=4,
                zorder=3,
            )
        if figures:  # below the mean, so that neither hides the other; one alone is no mean
            below = 0.22 if len(figures) > 1 else 0.0
            (marks["one seed"],) = axes.plot(
                figures, [y + below] * len(figures), "o", color=SEED, markersize=5, markeredgewidth=0, zorder=2
            )
        if row.published is not None:
            (marks["paper"],) = axes.plot(
                factor * row.published, y, "D", markerfacecolor="none", markeredgecolor=PAPER, markersize=9, zorder=4
            )
        count = f"{len(figures)} of {len(row.runs)}"
        colour = QUIET if len(figures) == len(row.runs) else PAPER
        axes.annotate(count, (1.01, y), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=8)

    axes.annotate("runs", (1.01, 1.01), xycoords="axes fraction", va="bottom", color=QUIET, fontsize=8)
    axes.set_ylim(sum(heights), 0)
    axes.set_yticks(centres, labels, fontsize=9, **text_style(*labels))
    axes.margins(x=0.06)
    unit = "" if is_loss(results.metric) else " (%)"
    axes.set_xlabel(f"{metric}{unit}", **text_style(metric))
    axes.set_ylabel("setting")
    axes.grid(axis="x", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    names = {
        "mean": "mean over seeds, 95 % interval",
        "one seed": "one seed",
        "baseline": "baseline",
        "paper": "paper",
    }
    shown = {names[key]: marks[key] for key in names if key in marks}
    if shown:
        figure.legend(
            shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), frameon=False, fontsize=8
        )
    else:
        axes.set_xticks([])
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # which would name a version
    return file.getvalue()
