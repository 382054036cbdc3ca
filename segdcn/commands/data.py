"""segdcn-data check|convert: what one does to a data set before a training reads it."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from segdcn.commands.configs import build_dataset
from segdcn.commands.console import console_script
from segdcn.commands.kinds import check_kinds
from segdcn.errors import UserError

if TYPE_CHECKING:
    from segdcn.data.annotations import Annotations

USAGE = """usage: segdcn-data check dataset=NAME dataset.root=PATH
       segdcn-data convert annotations=PATH image_root=FOLDER output=DIR     (or python -m segdcn.commands.data ...)

check reads every file of a data set and reports what would go wrong in a training; convert makes masks of polygons that
were drawn by hand; segdcn-data check --help and segdcn-data convert --help say more"""

MOST_LINES = 20  # of problems


@console_script("check")
def check(config: DictConfig) -> None:
    """Print tables, notes and problems, then draw a picture; exit status 1 if there are problems."""
    from rich.console import Console

    from segdcn.data import check as of_masks
    from segdcn.detection import check as of_boxes
    from segdcn.detection.samples import DetectionDataset
    from segdcn.drawing.decoration import decoration
    from segdcn.drawing.panels import class_sheet
    from segdcn.runs.files import shown, write_png

    console = Console(soft_wrap=True)
    check_kinds(OmegaConf.to_container(config))
    picture = None if config.picture is None else Path(config.picture)
    if picture is not None and (picture.suffix.lower() != ".png" or picture.is_dir()):
        raise UserError(f"picture={picture} must be a file that ends in .png, or null")
    dataset = build_dataset(config)
    checks: Any = of_boxes if isinstance(dataset, DetectionDataset) else of_masks
    workers = (os.cpu_count() or 1) if config.workers is None else config.workers
    reports = checks.read_splits(dataset, workers, Console(stderr=True))
    for table in checks.tables(reports, dataset.class_names):
        console.print(table)
    for note in checks.notes(reports, dataset.class_names):
        print(f"note: {note}")
    found = checks.problems(reports, dataset.class_names)
    if not found and (divided := getattr(dataset, "split_found", None)):
        print(f"note: {divided}")
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{sum(report.samples for report in reports):,} images, {len(found)} problem(s)", flush=True)
    if picture is not None and any(report.typical for report in reports):
        with decoration("picture of the classes", "picture=FILE.png writes another file, picture=null none"):
            write_png(picture, class_sheet(checks.examples(dataset, reports)))
            print(f"{shown(picture)} shows each class in an image")
    if found:
        sys.exit(1)


@console_script("convert")
def convert(config: DictConfig) -> None:
    """Read annotations, write images, masks and classes.txt; exit status 1, and nothing written, at a problem."""
    from segdcn.data.annotations import read_annotations

    _check_settings(config)
    output = Path(os.path.abspath(config.output))
    target = output if config.split is None else output / config.split
    _check_free(output, target)
    image_root = None if config.image_root is None else Path(config.image_root)
    found = read_annotations(Path(config.annotations), image_root, config.outside, config.ignore_crowd)
    for problem in found.problems[:MOST_LINES]:
        print(f"error: {problem}", file=sys.stderr)
    if (more := len(found.problems) - MOST_LINES) > 0:
        print(f"error: and {more:,} more of such lines", file=sys.stderr)
    if found.problems:
        print(f"{len(found.problems):,} problem(s), nothing was written")
        sys.exit(1)
    if not config.empty:
        found.images = [image for image in found.images if image.regions]
    if not found.images:
        raise UserError(f"{config.annotations} has no image with an annotation that can be drawn")
    background = None if config.background is None else str(config.background)
    names = _classes(config, background, output, found)
    _write(config, found, names, background, output, target)


def _check_settings(config: DictConfig) -> None:
    from segdcn.data.splits import SPLITS

    if config.split is not None and config.split not in SPLITS:
        raise UserError(f"split must be {', '.join(SPLITS)} or null, got {config.split!r}")
    outside = config.outside
    if isinstance(outside, bool) or not isinstance(outside, int | float) or not outside >= 0:
        raise UserError(f"outside must be a number of at least 0, got {outside!r}")
    if config.classes is not None and not OmegaConf.is_list(config.classes):
        raise UserError(f"classes must be a list of names or null, got {config.classes!r}")
    background = config.background
    is_name = isinstance(background, str | int) and str(background).split() and len(str(background).splitlines()) == 1
    if background is not None and not is_name:
        raise UserError(f"background must be a class's name or null, got {background!r}")


def _check_free(output: Path, target: Path) -> None:
    """That nothing is replaced, and that the folder does not get two layouts."""
    from segdcn.runs.files import shown

    taken = target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir())))
    if taken:
        raise UserError(f"{shown(target)} is there already: give another output=DIR, or delete it first")
    if target != output and (output / "images").exists():
        raise UserError(f"{shown(output)} holds images without a split: give another output=DIR")


def _classes(config: DictConfig, background: str | None, output: Path, found: Annotations) -> list[str]:
    """The names of the classes: those of the split that was converted before, if there is one."""
    from segdcn.data.classes import CLASSES
    from segdcn.data.conversion import LABELME_BACKGROUND, choose_classes
    from segdcn.data.dataset import lines_of
    from segdcn.runs.files import shown

    given = None if config.classes is None else [str(name) for name in config.classes]
    # labelme lists no classes: one that is in another split alone is not seen here
    known = [*found.class_names, *(given or ())] if found.kind == "labelme" else found.class_names
    file = output / CLASSES
    if config.split is None or not file.is_file():
        return choose_classes(known, given, background)
    before = [name for _, name in lines_of(file)]
    chosen = before if given is None else choose_classes([*known, *before], given, background)
    if chosen != before or (background is not None and background not in before):
        raise UserError(f"{shown(file)} has {', '.join(before)}: classes and background must agree with it")
    others = [name for name in found.class_names if name not in (*before, LABELME_BACKGROUND)]
    if given is None and others:
        raise UserError(
            f"{shown(file)} has no {', '.join(others)}, which these annotations name: 'classes=[{','.join(before)}]'"
            f" leaves them out; to have them, convert all splits anew with 'classes=[{','.join([*before, *others])}]'"
        )
    return before


def _write(
    config: DictConfig, found: Annotations, names: Sequence[str], background: str | None, output: Path, target: Path
) -> None:
    """Draw the masks in a folder of another name beside ``target``, which takes its place when it is whole."""
    from PIL import Image
    from rich.progress import track

    from segdcn.data.classes import CLASSES
    from segdcn.data.conversion import Drawn, draw_label, file_names, summary
    from segdcn.data.dataset import printable
    from segdcn.drawing.console import for_progress
    from segdcn.runs.files import shown, typed, write_png, write_text
    from segdcn.runs.folder import whole_folder

    pairs = list(zip(found.images, file_names(found), strict=True))
    drawn, linked = Drawn(left_out=Counter(found.left_out)), 0
    with whole_folder(target, "output=DIR") as made:
        for part in ("images", "masks"):
            (made / part).mkdir()
        for image, name in track(pairs, "masks", console=for_progress(), transient=True):
            mask = Image.fromarray(draw_label(image, names, background, drawn))
            write_png(made / "masks" / f"{Path(name).stem}.png", mask)
            linked += _copy(image.path, made / "images" / name, config.link)
        write_text((made if target == output else output) / CLASSES, "".join(f"{name}\n" for name in names))
    for line in summary(found, drawn, names, background):
        print(printable(line))
    kept = f"{linked:,} hard links to the given files (what changes one changes both; link=false copies)"
    copied = f"{len(pairs) - linked:,} copies of the given files"
    print(f"images: {kept if linked == len(pairs) else f'{kept}, {copied}' if linked else copied}")
    print(f"wrote {shown(target)}; look at it with segdcn-data check dataset=folder {typed(output, 'dataset.root')}")


def _copy(source: Path, copy: Path, link: bool) -> bool:
    """Make a file of the same content; whether it is a hard link."""
    if link:
        with suppress(OSError):  # another file system, or one without links
            os.link(source.resolve(), copy)
            return True
    shutil.copyfile(source, copy)
    return False


def main() -> None:
    """Console script."""
    commands = {"check": check, "convert": convert}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        print(USAGE)
        sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
    commands[sys.argv.pop(1)]()


if __name__ == "__main__":
    main()
