"""segdcn-report's pages: of one run, of several, of a sweep; records of runs go in, and a page comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from segdcn.analysis.tables import SIZES
from segdcn.errors import UserError
from segdcn.report import comparison, curves, tables
from segdcn.report.gallery import gallery
from segdcn.report.images import ImageOptions, OpenedRun, choose_images, offset_study, open_runs
from segdcn.report.page import FILE, Page
from segdcn.report.runs import PageRun, check_comparable, page_run, read_finished, readable, unique_names
from segdcn.report.viewer import viewer
from segdcn.runs.files import shown, typed
from segdcn.runs.record import RunRecord
from segdcn.sweep.results import Results

Shown = TypeVar("Shown", bound=PageRun)

MAX_NETWORKS = 4  # in a viewer
# Floating point operations of a page at the end of a training: some four seconds of a CPU core, or of a long training
# about a fiftieth of its time
QUICK, PER_TRAINING_SECOND = 130e9, 0.6e9


def report_training(folder: Path, dataset: Any) -> Path:
    """Write the page of a run that has just ended into its folder, in little time; returns where it is.

    dataset: the one that it was trained on.
    """
    record = read_finished(folder)
    budget = max(QUICK, PER_TRAINING_SECOND * (record.number("training_seconds") or 0))
    return run_page(record, ImageOptions(lambda _: dataset, trust=True, budget=budget)).write(folder / FILE)


def run_page(record: RunRecord, options: ImageOptions) -> Page:
    """The page of one run."""
    run = page_run(record)
    page = Page(run.name, "a training run", ", ".join(filter(None, (tables.network_of(record), f"seed {record.seed}"))))
    if run.lacking:
        page.notes.append(run.lacking)
    opened = _add_opened(page, [run], options)
    page.add(
        tiles=lambda: tables.tiles(record),
        charts=lambda: curves.run_charts(record.epochs, record.split),
        epoch_tables=lambda: curves.epoch_table(record.epochs, record.split),
        provenance=lambda: [("What these figures depend on", tables.provenance(record))],
        classes=lambda: tables.classes(run, opened[0].colours if opened else {}),
        confusion=lambda: None if run.counts is None else tables.confusion(run.counts),
    )
    return page


def runs_page(records: Sequence[RunRecord], options: ImageOptions) -> Page:
    """The page that compares runs with the first of them.

    Raises: UserError, one line, for runs whose classes differ.
    """
    names = unique_names(records)
    runs = [page_run(record, name) for record, name in zip(records, names, strict=True)]
    page = comparing_page(records)
    add_training(page, runs, range(len(runs)), names)
    opened = _add_opened(page, runs[:MAX_NETWORKS], options)
    page.add(
        comparison=lambda: comparison.runs_table(
            runs,
            {"miou": "mean IoU"},
            lambda _, run: comparison.paired_interval(run, runs[0]),
            {"pixel_accuracy": "pixel accuracy", "boundary_miou": "boundary mIoU"},
        ),
        class_comparison=lambda: comparison.runs_classes(runs, opened[0].colours if opened else {}),
    )
    return page


def comparing_page(records: Sequence[RunRecord]) -> Page:
    """A page for several runs."""
    title = " · ".join(dict.fromkeys(record.name for record in records))
    return Page(title, "a comparison of runs", f"{len(records)} runs")


def sweep_page(results: Results, options: ImageOptions) -> Page:
    """The page of a sweep: its settings compared by seed, baseline against best.

    Raises: UserError, one line, for a sweep without a finished run, or whose runs' classes differ.
    """
    page = Page(results.name, "a sweep", results.command)
    runs, closely = add_sweep(page, results, page_run)
    opened = _add_opened(page, closely, options)
    page.add(
        comparison=lambda: comparison.sweep_table(results),
        class_comparison=lambda: comparison.sweep_classes(
            results, list(runs[0].record.iou), opened[0].colours if opened else {}
        ),
    )
    return page


def add_sweep(
    page: Page,
    results: Results,
    read: Callable[[RunRecord, str], Shown],
    shares: curves.Shares = curves.COMPARED,
    kind: str = "iou",
) -> tuple[list[Shown], list[Shown]]:
    """See ``add_training``, of the finished runs; returns them, and those to look at closely: baseline and best.

    read: makes the run of a page, of that name.

    Raises: UserError, one line, for a sweep without a finished run, or whose runs' classes differ.
    """
    labels = [readable(row.label) for row in results.rows]
    by_folder: dict[str, Shown] = {}
    colours = []
    for number, row in enumerate(results.rows):
        for run in row.runs:
            if run.state == "finished":
                seed = "" if run.job.seed is None else f", seed {run.job.seed}"
                by_folder[run.job.folder] = read(run.record, f"{labels[number]}{seed}")
                colours.append(number)
    if not by_folder:
        folder = results.folder
        raise UserError(
            f"{shown(folder)} has no finished run yet: segdcn-sweep status {typed(folder)} tells how far it is"
        )
    runs = list(by_folder.values())
    add_training(page, runs, colours, labels, shares, kind)
    page.notes += results.warnings
    pair = comparison.baseline_and_best(results)
    return runs, [by_folder[run.job.folder] for run in pair] if pair else runs[:1]


def add_training(
    page: Page,
    runs: Sequence[PageRun],
    colours: Sequence[int],
    labels: Sequence[str],
    shares: curves.Shares = curves.COMPARED,
    kind: str = "iou",
) -> None:
    """Curves and provenance of several runs.

    colours, labels: see ``curves.overlaid``.  shares: the figures of the curves.  kind: of the classes' figures, see
    ``check_comparable``.

    Raises: UserError, one line, for runs whose classes differ.
    """
    check_comparable(runs, kind)
    page.notes += [f"{run.name}: {run.lacking}" for run in runs if run.lacking]
    page.add(
        charts=lambda: curves.overlaid(runs, colours, labels, shares),
        epoch_tables=lambda: curves.overlaid_tables(runs, shares),
        provenance=lambda: [(run.name, tables.provenance(run.record)) for run in runs],
    )


def _add_opened(page: Page, runs: Sequence[PageRun], options: ImageOptions) -> list[OpenedRun]:
    """What needs networks and images; returns the runs, opened."""
    opened = open_runs(runs, options, page.notes)
    _add_images(page, opened, options.budget)
    return opened


def _add_images(page: Page, runs: Sequence[OpenedRun], budget: float) -> None:
    """Gallery, viewer and offsets of runs on the same images."""
    images = page.attempt("images", lambda: choose_images(runs, page.notes)) if runs else None
    if images:
        page.add(
            gallery=lambda: gallery(runs, images),
            viewer=lambda: viewer(runs, images, budget),
            dilations=lambda: _dilations(runs, budget),
        )


def _dilations(runs: Sequence[OpenedRun], budget: float) -> Mapping[str, Any] | None:
    studies = []
    for run in runs:
        measured = offset_study(run, budget)
        if measured is not None:
            study, text = measured
            studies.append(tables.dilations(study, run.name, text, curves.length_histogram(study)))
    return {"studies": studies, "sizes": SIZES, "paper": tables.PAPER_DILATIONS} if studies else None
