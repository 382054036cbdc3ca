"""The results of a sweep as a table to read (Markdown, a terminal) and to compute with (CSV, JSON)."""

from __future__ import annotations

import csv
import io
import re
from typing import Any, NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from segdcn.drawing.numbers import duration, metric_value, three_digits, unit
from segdcn.runs.record import STATES
from segdcn.sweep.estimate import CONFIDENCE
from segdcn.sweep.results import COSTS, Estimate, Results, Row, Run


class _Column(NamedTuple):
    heading: str
    cells: list[str]


def columns(results: Results) -> list[_Column]:
    """The table as text; columns of costs and published figures that nobody knows are left out."""
    rows, metric = results.rows, results.metric
    seeds = list(dict.fromkeys(run.job.seed for run in results.runs))
    shown = [
        _Column("setting", [row.label for row in rows]),
        _Column("runs", [_runs(row) for row in rows]),
        _Column(f"{metric}{unit(metric)}", [_estimate(row.estimate, metric) for row in rows]),
    ]
    if len(seeds) > 1:
        for seed in seeds:
            heading = "no seed given" if seed is None else f"seed {seed}"
            shown.append(_Column(heading, [_of_seed(row, seed, metric) for row in rows]))
    optional = [
        _Column("more than baseline", [_difference(row, metric) for row in rows]) if len(rows) > 1 else None,
        _Column("p", [_p(row.difference) for row in rows]),
        _Column("parameters, M", [_cost(row.cost("parameters"), 1e-6) for row in rows]),
        _Column("GFLOPs", [_cost(row.cost("flops"), 1e-9) for row in rows]),
        _Column("training", [duration(row.cost("training_seconds"), none="") for row in rows]),
        _Column("inference, ms per image", [_cost(row.cost("seconds_per_image"), 1e3) for row in rows]),
        _Column("paper, %", ["" if row.published is None else metric_value(row.published, metric) for row in rows]),
    ]
    return shown + [column for column in optional if column is not None and any(column.cells)]


def _runs(row: Row) -> str:
    """Finished of planned, and what became of the others."""
    others = [f"{count} {state}" for state, count in row.states.items() if state != "finished"]
    return ", ".join([f"{len(row.figures)}/{len(row.runs)}", *others])


def _of_seed(row: Row, seed: str | None, metric: str) -> str:
    run = next((run for run in row.runs if run.job.seed == seed), None)
    if run is None:  # not planned
        return ""
    if run.figure is not None:
        return metric_value(run.figure, metric)
    return "no figure" if run.state == "finished" else run.state


def _estimate(estimate: Estimate | None, metric: str) -> str:
    if estimate is None:
        return "-"
    mean = metric_value(estimate.mean, metric)
    return mean if estimate.half is None else f"{mean} ± {metric_value(estimate.half, metric)}"


def _difference(row: Row, metric: str) -> str:
    if row.is_baseline:
        return "baseline"
    if row.difference is None:
        return "-"
    pairs = "1 pair" if row.difference.count == 1 else f"{row.difference.count} pairs"
    return f"{_estimate(row.difference, metric)} ({pairs})"


def _p(difference: Estimate | None) -> str:
    if difference is None or difference.p is None:
        return ""
    return "< 0.001" if difference.p < 0.001 else f"{difference.p:.3f}"


def _cost(value: float | None, factor: float) -> str:
    return "" if value is None else three_digits(factor * value)


# --- to read ----------------------------------------------------------------------------------------------------------


def as_markdown(results: Results) -> str:
    """The table, its footnotes, and each run without a figure; nothing that a run is called or says is markup."""
    shown = columns(results)
    cells = [[_code(cell) for cell in shown[0].cells], *([_escaped(c) for c in column.cells] for column in shown[1:])]
    lines = [f"# {_escaped(results.name)}", ""]
    if results.command:
        lines += [_code(results.command), ""]
    lines += [_line([_escaped(column.heading) for column in shown]), "|---" * len(shown) + "|"]
    lines += [_line(row) for row in zip(*cells, strict=True)]
    lines += ["", f"![the same figures with their intervals]({results.stem}.png)"]
    lines += ["", *(f"- {_escaped(note)}" for note in results.notes)]
    lines += [f"- **Warning:** {_escaped(warning)}" for warning in results.warnings]
    if results.without_figure:
        lines += ["", "Runs without a figure:", ""]
        lines += [f"- {_code(run.job.folder)}: {_code(_reason(run))}" for run in results.without_figure]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _reason(run: Run) -> str:
    """One line, not longer than a reader wants in a list."""
    reason = " ".join((run.error or run.state).split())
    return reason if len(reason) <= 300 else f"{reason[:300]}…"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A code span; its fence is longer than any run of backticks within, and a table's bar is escaped in it too."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def as_rich(results: Results) -> Group:
    """For a terminal: figures, costs, and what must be known about them; each seed's figure is left to the files."""
    setting, *others = columns(results)
    costs = {"parameters, M", "GFLOPs", "training", "inference, ms per image"}
    figures = [column for column in others if column.heading not in costs and not column.heading.startswith("seed ")]
    parts: list[Table | Text] = [_table([setting, *figures], results)]
    if len(costly := [setting, *(column for column in others if column.heading in costs)]) > 1:
        parts.append(_table(costly, results))
    parts += [Text(note, style="dim") for note in results.notes]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in results.warnings]
    parts += [Text(f"no figure: {run.job.folder}: {_reason(run)}", style="red") for run in results.without_figure]
    return Group(*parts)


def _table(columns: list[_Column], results: Results) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    overrides = [label.split() for label in columns[0].cells]
    short = max(len(one) for label in overrides for one in label) <= 32
    # the figures give way first, an override per line: a setting that is cut up cannot be read
    table.add_column(columns[0].heading, overflow="fold", no_wrap=short)
    for column in columns[1:]:
        table.add_column(column.heading, overflow="fold", justify="left" if column.heading == "runs" else "right")
    for row, label, *cells in zip(results.rows, overrides, *(column.cells for column in columns[1:]), strict=True):
        table.add_row(Text("\n".join(label)), *map(Text, cells), style="bold" if row.is_baseline else "")
    return table


# --- to compute with --------------------------------------------------------------------------------------------------


def as_csv(results: Results) -> str:
    """One line per setting, figures as fractions with all their digits; what does not exist is empty."""
    seeds = list(dict.fromkeys(run.job.seed for run in results.runs))
    lines = []
    for row in results.rows:
        cells = _plain_row(row)
        states = cells.pop("states")
        estimate, difference = cells.pop("estimate") or {}, cells.pop("difference") or {}
        line: dict[str, Any] = {
            "setting": row.label,
            "baseline": str(row.is_baseline).lower(),
            "metric": results.metric,
        }
        line |= {"planned": len(row.runs), "finished": states.get("finished", 0)}
        line |= {state: states.get(state, 0) for state in ("without a figure", *STATES[1:])}
        line |= {key: estimate.get(key) for key in ("mean", "low", "high")}
        line |= {"figure" if seed is None else f"seed {seed}": row.figures.get(seed) for seed in seeds}
        line |= {f"difference_{key}": difference.get(key) for key in ("count", "mean", "low", "high", "p")}
        line |= _costs(row)
        line |= {"paper": row.published, "overrides": " ".join(row.overrides)}
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_json(results: Results) -> dict[str, Any]:
    """Settings and all planned runs; figures are fractions with all their digits."""
    return {
        "name": results.name,
        "command": results.command,
        "metric": results.metric,
        "confidence": CONFIDENCE,
        "notes": list(results.notes),
        "warnings": list(results.warnings),
        "settings": [_plain_row(row) for row in results.rows],
        "runs": [_plain_run(run) for run in results.runs],
    }


def _plain_row(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "overrides": list(row.overrides),
        "baseline": row.is_baseline,
        "planned": len(row.runs),
        "states": row.states,
        "estimate": None if row.estimate is None else _plain_estimate(row.estimate),
        "difference": None if row.difference is None else {**_plain_estimate(row.difference), "p": row.difference.p},
        **_costs(row),
        "paper": row.published,
    }


def _costs(of: Row | Run) -> dict[str, Any]:
    keys = (*COSTS[:2], "flops_input", *COSTS[2:])
    return {key: of.flops_input if key == "flops_input" else of.cost(key) for key in keys}


def _plain_estimate(estimate: Estimate) -> dict[str, Any]:
    return {"count": estimate.count, "mean": estimate.mean, "low": estimate.low, "high": estimate.high}


def _plain_run(run: Run) -> dict[str, Any]:
    return {
        "folder": run.job.folder,
        "overrides": list(run.job.overrides),
        "seed": run.job.seed,
        "state": run.state,
        "error": run.error,
        "figure": run.figure,
        **_costs(run),
        "paper": run.published,
        "git": run.record.environment.get("git"),
        "device": run.record.environment.get("device"),
    }
