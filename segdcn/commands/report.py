"""segdcn-report: runs or a sweep as one HTML page to look at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdcn import UserError
from segdcn.commands.console import plain_script
from segdcn.runs.files import shown
from segdcn.runs.folder import make_folder

if TYPE_CHECKING:
    from segdcn.runs.checkpoint import Checkpoint


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
    """Write the page; returns where it is."""
    from segdcn.report.comparison import report_runs, report_sweep
    from segdcn.report.contents import FILE, report_run

    folders = options.folders

    def open_dataset(checkpoint: Checkpoint) -> Any:
        # some data sets are generated, and have none
        return checkpoint.dataset({"root": options.data} if "root" in checkpoint.groups["dataset"] else {})

    if options.output is not None and options.output.is_dir():
        page = options.output / FILE
        raise UserError(f"--output {shown(options.output)} is a folder: give a file, such as {shown(page)}")
    target = folders[0] if options.output is None else options.output.parent
    if options.output is not None or target.is_dir():  # before the page is made, which takes a while
        make_folder(target, "--output FILE")
    sweeps = [folder for folder in folders if (folder / "sweep.json").is_file()]
    if sweeps and len(folders) > 1:
        raise UserError(f"{sweeps[0]} is a sweep: give it alone, or runs only")
    if sweeps:
        return report_sweep(folders[0], open_dataset, options.output, trust=options.trust)
    if len(folders) == 1:
        return report_run(folders[0], open_dataset, options.output, trust=options.trust)
    return report_runs(folders, open_dataset, options.output or Path(FILE), trust=options.trust)


@plain_script
def main() -> None:
    """Console script."""
    options = parse_arguments()
    path = run(options)
    print(f"report in {shown(path)} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
