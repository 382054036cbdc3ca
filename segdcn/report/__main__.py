"""segdcn-report: runs or a sweep as one HTML page to look at."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> Path:
    """Write the page; returns where it is."""
    from segdcn.report.comparison import report_runs, report_sweep
    from segdcn.report.contents import FILE, report_run

    folders = options.folders

    def open_dataset(config: Mapping[str, Any]) -> Any:
        return _dataset(config, options.data)

    sweeps = [folder for folder in folders if (folder / "sweep.json").is_file()]
    if sweeps and len(folders) > 1:
        raise ValueError(f"{sweeps[0]} is a sweep: give it alone, or runs only")
    if sweeps:
        return report_sweep(folders[0], open_dataset, options.output)
    if len(folders) == 1:
        return report_run(folders[0], open_dataset, options.output)
    return report_runs(folders, open_dataset, options.output or Path(FILE))


def _dataset(config: Mapping[str, Any], root: str | None) -> Any:
    """The data set of a checkpoint's config, at ``root`` where that is given.

    Raises: ValueError or OSError, one line.
    """
    from omegaconf import OmegaConf

    from segdcn.assembly import build_dataset, user_error

    composed = OmegaConf.create(dict(config))
    if root is not None:
        composed.dataset.root = root
    try:
        return build_dataset(composed)
    except Exception as error:
        message = user_error(error)
        if message is None:
            raise
        raise ValueError(message) from error


def main() -> None:
    """Console script."""
    options = parse_arguments()
    try:
        from segdcn.run_folder import shown

        path = run(options)
        print(f"report in {shown(path)} ({path.stat().st_size / 1e6:.1f} MB)")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
