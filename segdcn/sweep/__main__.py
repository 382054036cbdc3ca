"""segdcn-sweep: what came out of a sweep, from its folder alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def collect(options: argparse.Namespace) -> int:
    """Print the table and write the files; exit status 1 where a planned run has no figure."""
    from rich.console import Console

    from segdcn.run_folder import shown
    from segdcn.sweep.results import FILES
    from segdcn.sweep.results import collect as read

    results = read(options.folder, options.metric)
    results.write(options.folder)
    console = Console() if sys.stdout.isatty() else Console(width=160)  # in a file nothing has to be folded
    console.print(results)
    print(f"{', '.join(FILES)} in {shown(options.folder)}", flush=True)
    lacking = len(results.without_figure)
    if lacking:
        print(f"incomplete: {lacking} of {len(results.runs)} runs have no figure", file=sys.stderr)
    return 1 if lacking else 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options, with ``run`` as the function to call; exits with a line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="segdcn-sweep", description="What came out of a sweep of segdcn-train runs, from its folder alone."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser(
        "collect",
        help="the table of results",
        description="Prints one row per setting (mean and 95 % interval over seeds, difference to the baseline paired "
        "by seed, cost) and writes it to the sweep's folder: results.csv, results.json, results.md, results.png. The "
        "exit status is 1 where a planned run has no figure.",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="the sweep's folder, such as sweeps/NAME")
    command.add_argument("--metric", help="a figure of metrics.json (default: the sweep's own, val/miou)")
    command.set_defaults(run=collect)

    return parser.parse_args(arguments)


def main() -> None:
    """Console script."""
    options = parse_arguments()
    try:
        status = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
