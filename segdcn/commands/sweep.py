"""segdcn-sweep: how far a sweep is and what came out of it, from its folder alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from segdcn.commands.console import plain_script
from segdcn.commands.output import end_unread


def show_results(options: argparse.Namespace) -> int:
    """Print the table and write the files; exit status 1 where a planned run has no figure."""
    from segdcn.sweep.collect import collect
    from segdcn.sweep.publish import publish

    return 0 if publish(collect(options.folder, options.metric, options.baseline)) else 1


def show_status(options: argparse.Namespace) -> int:
    """Print how far each job is, once or until all have ended."""
    from segdcn.sweep.status import show, watch

    (watch if options.watch else show)(options.folder)
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options, with ``run`` as the function to call; exits with a line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="segdcn-sweep",
        description="How far a sweep of segdcn-train runs is and what came out of it, from its folder alone.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser(
        "collect",
        help="the table of results",
        description="Prints one row per setting (mean and 95 % interval over seeds, difference to the baseline paired "
        "by seed, cost) and writes it to the sweep's folder: results.csv, .json, .md, .png (of another metric or "
        "baseline to files of another name). The exit status is 1 where a planned run has no figure.",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="the sweep's folder, such as sweeps/NAME")
    command.add_argument(
        "--metric",
        help="a figure of metrics.json, such as val/pixel_accuracy; of the test split, such as test/miou, where"
        " segdcn-evaluate has counted it (default: the sweep's own, val/miou)",
    )
    command.add_argument(
        "--baseline",
        nargs="+",
        metavar="OVERRIDE",
        help="the setting that the others are compared with, by some of its overrides (default: the sweep's own)",
    )
    command.set_defaults(run=show_results)

    command = commands.add_parser(
        "status",
        help="how far it is",
        description="Prints a row per job: its state, epoch, best figure, time so far and left; from the files of the "
        "jobs, so that it may run beside the sweep or long after it.",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="the sweep's folder, such as sweeps/NAME")
    command.add_argument("--watch", action="store_true", help="show it anew every 2 seconds, until Ctrl-C")
    command.set_defaults(run=show_status)

    return parser.parse_args(arguments)


@plain_script
def main() -> None:
    """Console script."""
    options = parse_arguments()
    try:
        sys.exit(options.run(options))
    except BrokenPipeError:
        end_unread()


if __name__ == "__main__":
    main()
