"""The page of a run, from what it left behind, and the parts that all pages share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segdcn.drawing.decoration import one_line
from segdcn.report import curves, tables
from segdcn.report.images import OpenDataset, Subject, chosen_images, gallery, offset_study, open_subject, viewer
from segdcn.report.page import render
from segdcn.report.records import RunRecord, read_run
from segdcn.runs.files import write_text

log = logging.getLogger(__name__)

FILE = "report.html"
# Floating point operations that receptive fields may take, and effective dilations as many again: at the end of a
# training (some four seconds of a CPU core, or of a long training about a fiftieth of its time), and in a command of
# its own
QUICK, PER_TRAINING_SECOND, THOROUGH = 130e9, 0.6e9, 2500e9
MOVE_THE_LINE = "Move the line in a picture to see what lies under it."


def report_run(
    folder: Path,
    open_dataset: OpenDataset,
    output: Path | None = None,
    budget: float | None = THOROUGH,
    trust: bool = False,
) -> Path:
    """Write the page of one run, by default into its folder; returns where it is.

    budget: floating point operations that receptive fields may take, and effective dilations as many again; None takes
        what fits the end of a training.
    trust: whether networks and data sets other than segdcn's may be built.

    Raises: FileNotFoundError, ValueError, OSError, one line: no finished run in the folder, or a damaged file of it.
    """
    record = read_run(folder)
    if budget is None:
        budget = max(QUICK, PER_TRAINING_SECOND * (record.metrics.get("training_seconds") or 0))
    notes = list(record.notes)
    contents: dict[str, Any] = {
        "title": record.name,
        "kind": "a training run",
        "subtitle": ", ".join(filter(None, (tables.network_of(record), f"seed {record.seed}"))),
        "notes": notes,
    }
    subjects, why_not = open_subjects([record], open_dataset, trust)
    palette: Sequence[Sequence[int]] = subjects[0].predictor.palette if subjects else ()
    contents |= made(
        {
            "tiles": lambda: tables.tiles(record),
            "charts": lambda: curves.run_charts(record.epochs, record.split),
            "epoch_tables": lambda: curves.epoch_table(record.epochs, record.split),
            "provenance": lambda: [("What these figures depend on", tables.provenance(record))],
            "classes": lambda: _classes(record, palette),
            "confusion": lambda: None if record.counts is None else tables.confusion(record.counts),
        },
        notes,
    )
    if subjects:
        contents |= look(subjects, budget, notes)
    if contents.get("gallery"):
        counted = record.counts is not None
        contents["gallery"] |= {
            "heading": "Best, median and worst images" if counted else "Images",
            "lead": ("By the mean IoU over the classes that occur in the image. " if counted else "") + MOVE_THE_LINE,
        }
    notes += why_not
    return write_page(contents, output or folder / FILE)


def made(parts: Mapping[str, Callable[[], Any]], notes: list[str]) -> dict[str, Any]:
    """The parts of a page that can be made, each by itself; of another one ``notes`` is told why it is not there."""
    found = {}
    for name, make in parts.items():
        try:
            found[name] = make()
        except Exception as error:  # memory that ends, a damaged file, a network or data set of a user's own
            notes.append(f"Without {name.replace('_', ' ')}: {one_line(error)}.")
    return found


def _classes(record: RunRecord, palette: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    rows = tables.classes(record, palette)
    return {"rows": rows, "intervals": record.counts is not None} if rows else None


def open_subjects(
    records: Sequence[RunRecord], open_dataset: OpenDataset, trust: bool
) -> tuple[list[Subject], list[str]]:
    """The runs with networks and data, or none of them and why."""
    try:
        return [open_subject(record, open_dataset, trust) for record in records], []
    except Exception as error:  # a data set of a user's own may raise anything
        reason = one_line(error).replace("trust=true", "--trust")  # as this command has it
        return [], [
            f"Images, viewer and offsets are left out: {reason}. A data set that was moved is found by --data ROOT."
        ]


def look(subjects: Sequence[Subject], budget: float, notes: list[str]) -> dict[str, Any]:
    """Gallery, viewer and offsets of runs on the same images; see ``report_run`` for ``budget``.

    What a network or its data do not allow is left out, which ``notes`` is told.
    """
    images = made({"images": lambda: chosen_images(subjects, notes)}, notes).get("images")
    if not images:
        return {}
    return made(
        {
            "gallery": lambda: gallery(subjects, images),
            "viewer": lambda: viewer(subjects, images, budget),
            "dilations": lambda: _dilations(subjects, budget),
        },
        notes,
    )


def _dilations(subjects: Sequence[Subject], budget: float) -> list[tables.Dilations]:
    found = []
    for subject in subjects:
        measured = offset_study(subject, budget)
        if measured is not None:
            study, text = measured
            found.append(tables.dilations(study, subject.record.name, text, curves.length_histogram(study)))
    return found


def write_page(contents: dict[str, Any], output: Path) -> Path:
    """Render the page with links to the sections that it has, and write it; returns where it is.

    What it does without is logged too.
    """
    sections = (
        ("comparison", "Comparison", "comparison"),
        ("viewer", "Viewer", "viewer"),
        ("images", "Images", "gallery"),
        ("classes", "Classes", "classes"),
        ("classes", "Classes", "class_comparison"),
        ("offsets", "Offsets", "dilations"),
        ("training", "Training", "charts"),
        ("provenance", "Provenance", "provenance"),
    )
    contents["sections"] = [(anchor, label) for anchor, label, key in sections if contents.get(key)]
    write_text(output, render(contents))
    for note in contents["notes"]:
        log.info("note     %s", " ".join(note.split()))
    return output
