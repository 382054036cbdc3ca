"""segdcn-report: runs or a sweep as one HTML page to look at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdcn.commands.console import plain_script
from segdcn.errors import UserError
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
        page = sweep_page(collect(folders[0]), image_options)
    elif len(folders) == 1:
        page = run_page(read_finished(folders[0]), image_options)
    else:
        page = runs_page([read_finished(folder) for folder in folders], image_options)
    return page.write(output or (folders[0] / FILE if len(folders) == 1 else Path(FILE)))


@plain_script
def main() -> None:
    """Console script."""
    options = parse_arguments()
    path = run(options)
    print(f"report in {shown(path)} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
