"""segdcn-report: runs or a sweep as one HTML page to look at."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdcn.commands.console import plain_script
from segdcn.commands.dispatch import of_boxes
from segdcn.errors import UserError, one_line
from segdcn.runs.files import shown
from segdcn.runs.folder import make_folder

if TYPE_CHECKING:
    from segdcn.report.page import Page
    from segdcn.runs.checkpoint import Checkpoint
    from segdcn.runs.record import RunRecord


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options; exits with a line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="segdcn-report",
        description="Writes one self-contained HTML page that opens from disk: what a run learned and where its kernels"
        " reach; of several runs or a sweep, how they differ.",
    )
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run folder, several to compare with the first, or a sweep's folder",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html in the run's or the sweep's folder; of several runs ./report.html)",
    )
    parser.add_argument(
        "--data",
        metavar="ROOT",
        help="where the data set is now (dataset.root); without its images the page has no pictures",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="build data sets and networks that are not segdcn's: of runs whose origin you know",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> Path:
    """Read, make the page, write it; returns where it is."""
    from segdcn.report.images import ImageOptions
    from segdcn.report.page import FILE
    from segdcn.report.pages import run_page, runs_page, sweep_page
    from segdcn.report.runs import read_finished
    from segdcn.sweep.collect import collect

    folders, output = options.folders, options.output

    def open_dataset(checkpoint: Checkpoint) -> Any:
        # some data sets are generated, and have none
        return checkpoint.dataset({"root": options.data} if "root" in checkpoint.groups["dataset"] else {})

    if output is not None and output.is_dir():
        raise UserError(f"--output {shown(output)} is a folder: give a file, such as {shown(output / FILE)}")
    target = folders[0] if output is None else output.parent
    if output is not None or target.is_dir():  # before the page is made, which takes a while
        make_folder(target, "--output FILE")
    sweeps = [folder for folder in folders if (folder / "sweep.json").is_file()]
    if sweeps and len(folders) > 1:
        raise UserError(f"{sweeps[0]} is a sweep: give it alone, or runs only")
    image_options = ImageOptions(open_dataset, options.trust)
    if sweeps:
        results = collect(folders[0])
        if any(of_boxes(run.record.config) for row in results.rows for run in row.runs):
            raise UserError(f"{sweeps[0]} is of detectors, whose table segdcn-sweep collect {sweeps[0]} makes")
        page = sweep_page(results, image_options)
    else:
        records = [read_finished(folder) for folder in folders]
        if any(of_boxes(record.config) for record in records):
            page = _detector_page(records, options, open_dataset)
        else:
            page = run_page(records[0], image_options) if len(records) == 1 else runs_page(records, image_options)
    return page.write(output or (folders[0] / FILE if len(folders) == 1 else Path(FILE)))


def _detector_page(
    records: Sequence[RunRecord], options: argparse.Namespace, open_dataset: Callable[[Checkpoint], Any]
) -> Page:
    from segdcn.detection.pages import run_page
    from segdcn.runs.checkpoint import read_checkpoint

    if len(records) > 1:
        raise UserError("runs of detectors are shown one by one: give one of them; segdcn-sweep collect compares")
    notes, dataset, network = [], None, None
    try:
        checkpoint = read_checkpoint(records[0].checkpoint, options.trust)
        dataset, network = open_dataset(checkpoint), checkpoint.module()
    except (UserError, OSError) as error:
        notes.append(f"Images are left out: {one_line(error)}.")
    page = run_page(records[0], dataset, network)
    page.notes += notes
    return page


@plain_script
def main() -> None:
    """Console script."""
    options = parse_arguments()
    path = run(options)
    print(f"report in {shown(path)} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
