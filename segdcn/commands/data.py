"""segdcn-data check dataset=NAME dataset.root=PATH: read every file of a data set before a training does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from segdcn.commands.compose import build_dataset
from segdcn.commands.console import console_script
from segdcn.commands.kinds import check_kinds
from segdcn.errors import UserError

USAGE = """usage: segdcn-data check dataset=NAME dataset.root=PATH
                              (or python -m segdcn.commands.data check ...)

reads every file of a data set and reports what would go wrong in a training; segdcn-data check --help says more"""


@console_script("check")
def check(config: DictConfig) -> None:
    """Print tables, notes and problems, then draw a picture; exit status 1 if there are problems."""
    from rich.console import Console

    from segdcn.data.check import examples, notes, problems, read_splits, tables
    from segdcn.drawing.decoration import decoration
    from segdcn.drawing.panels import class_sheet
    from segdcn.runs.files import shown, write_png

    console = Console(soft_wrap=True)
    check_kinds(OmegaConf.to_container(config))
    picture = None if config.picture is None else Path(config.picture)
    if picture is not None and (picture.suffix.lower() != ".png" or picture.is_dir()):
        raise UserError(f"picture={picture} must be a file that ends in .png, or null")
    dataset = build_dataset(config)
    workers = (os.cpu_count() or 1) if config.workers is None else config.workers
    reports = read_splits(dataset, workers, Console(stderr=True))
    for table in tables(reports, dataset.class_names):
        console.print(table)
    for note in notes(reports, dataset.class_names):
        print(f"note: {note}")
    found = problems(reports, dataset.class_names)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{sum(report.samples for report in reports):,} images, {len(found)} problem(s)", flush=True)
    if picture is not None and any(report.read for report in reports):
        with decoration("picture of the classes", "picture=FILE.png writes another file, picture=null none"):
            write_png(picture, class_sheet(examples(dataset, reports)))
            print(f"{shown(picture)} shows each class in an image")
    if found:
        sys.exit(1)


def main() -> None:
    """Console script."""
    commands = {"check": check}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        print(USAGE)
        sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
    commands[sys.argv.pop(1)]()


if __name__ == "__main__":
    main()
