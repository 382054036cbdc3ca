"""segdcn-report: runs or a sweep as one HTML page to look at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdcn.commands.console import plain_script
from segdcn.commands.dispatch import of_boxes
from segdcn.errors import UserError
from segdcn.runs.files import shown
from segdcn.runs.folder import make_folder

if TYPE_CHECKING:
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
        kind = _kind_of([run.record for run in results.runs])
        page = kind.sweep_page(results, image_options)
    else:
        records = [read_finished(folder) for folder in folders]
        kind = _kind_of(records)
        page = kind.run_page(records[0], image_options) if len(records) == 1 else kind.runs_page(records, image_options)
    path: Path = page.write(output or (folders[0] / FILE if len(folders) == 1 else Path(FILE)))
    return path


def _kind_of(records: Sequence[RunRecord]) -> Any:
    """The module that makes pages of such runs; UserError where they are of both kinds."""
    from segdcn.detection import pages as of_detectors
    from segdcn.report import pages

    detectors = [record for record in records if of_boxes(record.config)]
    others = [record for record in records if record.config and not of_boxes(record.config)]
    if detectors and others:
        raise UserError(
            f"{shown(detectors[0].folder)} is of a detector and {shown(others[0].folder)} is not: they have no figure"
            " in common"
        )
    return of_detectors if detectors else pages


@plain_script
def main() -> None:
    """Console script."""
    options = parse_arguments()
    path = run(options)
    print(f"report in {shown(path)} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
