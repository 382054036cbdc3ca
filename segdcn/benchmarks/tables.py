"""The figures of the benchmarks as Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(_markdown(head, rows))


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _times(row: dict[str, Any]) -> list[str]:
    return [f"{_number(f.forward_ms)} / {_number(f.training_ms)}" for f in row["figures"].values()]


def _number(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1}f}"  # a GPU's times are parts of a millisecond


def _geometric_mean(values: Sequence[float]) -> str:
    return f"{math.exp(statistics.mean(map(math.log, values))):.2f}"


def show_convolutions(rows: list[dict[str, Any]]) -> None:
    """Two tables: time with its ratios, and peak memory."""
    print("\nDeformable convolution 3×3, offsets of standard deviation 2; ms, forward / forward and backward")
    names = list(rows[0]["figures"])
    lines, ratios = [], []
    for row in rows:
        conv, torchvisions, _, gather = (row["figures"][name] for name in names)
        ratio = [
            slow / fast
            for slow, fast in (
                (torchvisions.forward_ms, gather.forward_ms),
                (torchvisions.training_ms, gather.training_ms),
                (gather.forward_ms, conv.forward_ms),
                (gather.training_ms, conv.training_ms),
            )
        ]
        if "depthwise" not in row["case"]:
            ratios.append(ratio)
        pairs = [f"{_number(one)} / {_number(other)}" for one, other in (ratio[:2], ratio[2:])]
        lines.append([row["case"], *_times(row), *pairs])
    means = [_geometric_mean(column) for column in zip(*ratios, strict=True)]
    mean_line = ["geometric mean, not depthwise", *[""] * len(names), " / ".join(means[:2]), " / ".join(means[2:])]
    _table(["N×C×H×W", *names, "torchvision's / gather", "gather / conv2d"], [*lines, mean_line])
    show_memory(rows)


def show_aggregations(rows: list[dict[str, Any]]) -> None:
    """Time with its ratio, and peak memory."""
    print("\nDeformable aggregation 3×3 of groups of 16 channels, offsets of deviation 1; ms, forward / with backward")
    lines = []
    for row in rows:
        slow, fast = row["figures"].values()
        ratio = f"{slow.forward_ms / fast.forward_ms:.2f} / {slow.training_ms / fast.training_ms:.2f}"
        lines.append([row["case"], *_times(row), ratio])
    _table(["N×H×W×C", *rows[0]["figures"], "grid_sample / gather"], lines)
    show_memory(rows)


def show_memory(rows: list[dict[str, Any]]) -> None:
    """Peak memory of each case."""
    print("\nPeak memory above what was held before; MB, forward / forward and backward")
    cells = [
        [row["case"], *(f"{f.forward_mb:.0f} / {f.training_mb:.0f}" for f in row["figures"].values())] for row in rows
    ]
    _table(["case", *rows[0]["figures"]], cells)


def show_poolings(rows: list[dict[str, Any]]) -> None:
    """Time of the poolings, and their peak memory."""
    print(
        "\nRoI pooling of 1×256×50×75 (1×1029×50×75 position-sensitive), 7×7 bins; ms, forward / forward and backward"
    )
    _table(["case", *rows[0]["figures"]], [[row["case"], *_times(row)] for row in rows])
    show_memory(rows)


def show_training_steps(rows: list[dict[str, Any]]) -> None:
    """One line per network, beside the one without deformable layers."""
    print("\nTraining step of DeepLabv3, ResNet-50, output stride 16, 4×3×256×256")
    plain = rows[0]["step_ms"]
    _table(
        ["layers, backend", "ms", "of the plain network"],
        [[row["case"], f"{row['step_ms']:.0f}", f"{row['step_ms'] / plain:.2f}"] for row in rows],
    )


def show_light_networks(rows: list[dict[str, Any]]) -> None:
    """A table for training and one for evaluation; one line per network, beside the first."""
    for what, group in groupby(rows, itemgetter("what")):
        print(f"\n{what}, MobileNetV2 with three deformable layers")
        first, *others = group
        lines = []
        for row in (first, *others):
            speed, factor = 1000 * row["images"] / row["ms"], first["ms"] / row["ms"]
            lines.append([row["case"], f"{row['ms']:.0f}", f"{speed:.1f}", f"{factor:.2f}"])
        _table(["network", "ms", "images per second", "times as fast as the first"], lines)


def show_loading(rows: list[dict[str, Any]]) -> None:
    """One line per number of workers."""
    print("\nLoading of training images; images per second and worker")
    columns = list(rows[0])[1:]
    _table(
        ["workers", *(name.replace("_", ", ") for name in columns)],
        [
            [row["case"], *(f"{row[name]:.2f}" if name == "speedup" else f"{row[name]:.1f}" for name in columns)]
            for row in rows
        ],
    )


def show_runtimes(rows: list[dict[str, Any]], networks: str) -> None:
    """One line per image size and runtime; networks: what they are, in words."""
    print(
        f"\n{networks}; ms, and peak MB above what the process held before it"
        "\nhad a network (weights included); logits: the largest difference from eager PyTorch's, of their range"
    )
    columns = [key for key in rows[0] if key not in ("case", "runtime")]
    head = [f"{column}, {unit}" for column in columns for unit in ("ms", "MB", "logits")]
    lines = []
    for row in rows:
        cells = [_runtime_cells(row[column]) for column in columns]
        lines.append([row["case"], row["runtime"], *(text for cell in cells for text in cell)])
    _table(["N×C×H×W", "runtime", *head], lines)


def _runtime_cells(cell: dict[str, Any] | None) -> list[str]:
    if cell is None or "missing" in cell:
        return [cell["missing"] if cell else "", "", ""]
    memory = "" if cell["mb"] is None else str(cell["mb"])
    return [f"{cell['ms']:.0f}", memory, f"{cell['difference']:.0e}" if cell.get("difference") else ""]


# --- what scripts/gpu_evidence.py measures, from the rows of its JSON file ------------------------------------------


def agreement_table(rows: Sequence[dict[str, Any]]) -> str:
    """Of each backend how many checks were right, and the largest difference; see ``agreement.compare_backends``."""
    kinds = list(dict.fromkeys((row["dtype"], row["compiled"]) for row in rows if "dtype" in row))
    lines = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        cells = []
        for kind in kinds:
            of_kind = [row for row in rows if (row.get("dtype"), row.get("compiled")) == kind]
            checks = [row for row in of_kind if row["backend"] == backend and "right" in row]
            known = [d for row in checks if (d := row.get("difference")) is not None and not math.isnan(d)]
            worst = f", {max(known):.0e}" if known else ""
            cells.append(f"{sum(row['right'] for row in checks)} of {len(checks)}{worst}" if checks else "")
        lines.append([backend, *cells])
    missing = [f"{row['backend']}: {row['missing']}" for row in rows if "missing" in row]
    table = _markdown(["right of, largest difference", *(f"{t}, compiled" if c else t for t, c in kinds)], lines)
    return "\n".join([table, *missing])


def layers_table(rows: Sequence[dict[str, Any]]) -> str:
    """Times and memory of each precision and map, then geometric means of ratios; see ``layers_of_deeplab``."""
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    parts = []
    for precision, of_precision in _by("precision", rows).items():
        lines = []
        for row in of_precision:
            found = [row["figures"].get(name) for name in names]
            times = [_pair(one, "forward_ms", "training_ms") for one in found]
            memory = [_pair(one, "forward_mb", "training_mb", 0) for one in found]
            lines.append([row["case"], *times, *memory])
        head = [precision, *(f"{name}, ms" for name in names), *(f"{name}, MB" for name in names)]
        parts.append(_markdown(head, lines))
    pairs = [("torchvision", "triton"), *((name, "conv2d") for name in names if name != "conv2d")]
    ratios = []
    for one, other in pairs:
        cells = [_mean_ratio(of_precision, one, other) for of_precision in _by("precision", rows).values()]
        if any(cells):
            ratios.append([f"{one} / {other}", *cells])
    parts.append(_markdown(["geometric mean of times", *_by("precision", rows)], ratios))
    if tiles := [row["tiles"] for row in rows if row.get("tiles")]:
        lines = [[k, tile, _number(ms)] for each in tiles for k, times in each.items() for tile, ms in times.items()]
        parts.append(_markdown(["Triton kernel", "tile", "ms"], lines))
    return "\n\n".join(parts)


def _by(key: str, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {value: [row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)}


def _pair(figures: dict[str, float | None] | None, one: str, other: str, digits: int | None = None) -> str:
    if figures is None:
        return ""
    values = (figures[one], figures[other])
    return " / ".join("" if v is None else _number(v) if digits is None else f"{v:.{digits}f}" for v in values)


def _mean_ratio(rows: Sequence[dict[str, Any]], one: str, other: str) -> str:
    """How many times as long one takes as the other, forward / forward and backward; empty where one is not there."""
    both = [row["figures"] for row in rows if {one, other} <= row["figures"].keys()]
    kinds = ("forward_ms", "training_ms")
    return " / ".join(_geometric_mean([f[one][kind] / f[other][kind] for f in both]) for kind in kinds) if both else ""


def mixed_steps_table(rows: Sequence[dict[str, Any]]) -> str:
    """Of each network and backend the step as it is and compiled; see ``networks.mixed_steps``."""
    cells: dict[tuple[str, str, str], dict[bool, str]] = {}
    for row in rows:
        key = (row["backbone"], str(row["layers"]), row["backend"])
        memory = "" if row.get("mb") is None else f", {row['mb']:.0f} MB"
        text = row.get("error") or f"{row['step_ms']:.1f} ms, {row['images_per_second']:.1f} images/s{memory}"
        cells.setdefault(key, {})[row["compiled"]] = text
    head = ["backbone", "deformable layers", "backend", "as it is", "task.compile=true"]
    return _markdown(head, [[*key, found.get(False, ""), found.get(True, "")] for key, found in cells.items()])


def records_table(rows: Sequence[dict[str, Any]]) -> str:
    """Whatever was found, a line each, under the names of all values."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    shown = [[f"{v:.4g}" if isinstance(v := row.get(name, ""), float) else str(v) for name in columns] for row in rows]
    return _markdown(columns, shown)
