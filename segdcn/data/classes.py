"""Which classes masks hold: as they are given, as a file beside them names them, or by a look at their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from segdcn.data.colours import classes_of
from segdcn.data.dataset import (
    IGNORE_INDEX,
    Color,
    checked_mapping,
    checked_names,
    lines_of,
    ranges,
    read_numbers,
    spread_over,
)
from segdcn.errors import UserError

CLASSES = "classes.txt"
MOST_CLASSES = 255
LOOKED_AT = 200  # masks, where nothing names the classes: some seconds

Named = tuple[tuple[str, ...], str]  # the names, and how they were found, in words


def named_classes(
    root: Path, given: Sequence[object] | None, colours: Mapping[str, Color] | None, source: str
) -> Named | None:
    """The class names that are given, or that ROOT/classes.txt or the colours have; None where nothing names them.

    source: what gives the colours.

    Raises: UserError for wrong names, and for given ones that the file has not.
    """
    file = root / CLASSES
    in_file = None
    if file.exists() or file.is_symlink():  # one that leads nowhere is told
        try:
            in_file = checked_names([line for _, line in lines_of(file)])
        except UserError as error:
            raise UserError(f"{file}, one name a line: {error}") from None
    if given is not None:
        names = checked_names(given)
        if in_file not in (None, names) and names != _numbers(len(in_file or ())):
            raise UserError(
                f"dataset.class_names has {', '.join(names)} (given now, or when the run began), but {file} has"
                f" {', '.join(in_file or ())}: make them"
                " agree, or leave one of them out"
            )
        return names, ", ".join(names)
    if in_file is not None:
        return in_file, f"{', '.join(in_file)}, as {file} names them"
    if colours is None:
        return None
    names = classes_of(colours, source)
    ignored = [name for name in colours if name not in names]
    also = f" ({', '.join(ignored)} ignored)" if ignored else ""
    return names, f"{', '.join(names)}{also}, as {source} gives their colours"


def numbered_classes(root: Path, split: str, masks: Sequence[Path], mapping: Mapping[int, int] | None) -> Named:
    """Classes by the numbers that masks hold, all of them where they are few, else some spread over the split.

    Raises: UserError for masks that do not tell the classes.
    """
    mapping = checked_mapping(mapping, MOST_CLASSES)
    looked_at = [masks[place] for place in spread_over(len(masks), LOOKED_AT)]
    found = sorted({int(number) for mask in looked_at for number in np.unique(read_numbers(mask))})
    labels = sorted({mapping.get(number, number) for number in found} - {IGNORE_INDEX})
    some = f"{len(looked_at)} of {len(masks)}" if len(looked_at) < len(masks) else f"all {len(masks)}"
    seen = f"{some} {split} masks hold {ranges(found)}"
    if labels == [0] and IGNORE_INDEX in found:
        raise UserError(
            f"{seen} alone, and 255 is ignored: make the objects' pixels 1, or add 'dataset.mapping={{255:1}}' to"
            " the command"
        )
    if len(labels) < 2 or labels[0] < 0 or labels[-1] >= MOST_CLASSES:
        raise UserError(
            f"{seen}, which are not the numbers 0, 1, ... of two classes or more (255 is ignored): make them so, or"
            " give 'dataset.mapping={NUMBER:LABEL,...}'"
        )
    names = _numbers(labels[-1] + 1)
    how = f"{names[0]} to {names[-1]}, since {seen}; name them in {root / CLASSES}, one a line"
    return names, how


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(f"class_{number}" for number in range(count))
