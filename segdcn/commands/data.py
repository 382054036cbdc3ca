"""segdcn-data check dataset=NAME dataset.root=PATH: read every file of a data set before a training does."""

from __future__ import annotations

import os
import sys

from omegaconf import DictConfig, OmegaConf

from segdcn.commands.compose import build_dataset
from segdcn.commands.console import console_script
from segdcn.commands.kinds import check_kinds

USAGE = """usage: segdcn-data check dataset=NAME dataset.root=PATH     (or python -m segdcn.commands.data check ...)

reads every file of a data set and reports what would go wrong in a training; segdcn-data check --help says more"""


@console_script("check")
def check(config: DictConfig) -> None:
    """Print tables, notes and problems; exit status 1 if there are problems."""
    from rich.console import Console

    from segdcn.data.check import notes, problems, read_splits, tables

    console = Console(soft_wrap=True)
    check_kinds(OmegaConf.to_container(config))
    dataset = build_dataset(config)
    workers = (os.cpu_count() or 1) if config.workers is None else config.workers
    reports = read_splits(dataset, workers, Console(stderr=True))
    for table in tables(reports, dataset.class_names):
        console.print(table)
    for note in notes(reports, dataset.class_names):
        print(f"note: {note}")
    found = problems(reports, dataset.class_names)
    if not found and (divided := getattr(dataset, "split_found", None)):
        print(f"note: {divided}")
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{sum(report.samples for report in reports):,} images, {len(found)} problem(s)")
    if found:
        sys.exit(1)


def main() -> None:
    """Console script."""
    if sys.argv[1:2] != ["check"]:
        print(USAGE)
        sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
    del sys.argv[1]
    check()


if __name__ == "__main__":
    main()
