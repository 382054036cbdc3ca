"""Which images are train, val and test: as a file lists them, or divided by a seed so that no source is in two."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath

import yaml

from segdcn.data.dataset import ImageMaskPair, file_bytes, lines_of, printable, read_list
from segdcn.errors import MissingFileError, UserError

SPLITS = ("train", "val", "test")
LISTS = tuple(f"{name}.txt" for name in SPLITS)
TABLES = ("splits.yaml", "splits.yml", "splits.csv")
# Roboflow names each changed copy of NAME.jpg NAME_jpg.rf.HASH.jpg
_ROBOFLOW = re.compile(r"(.+?)(?:_(?:jpe?g|png|bmp|tiff?|webp))?\.rf\.\w+", re.IGNORECASE)

Listed = dict[str, list[tuple[str, str]]]  # of each split: what is listed, and where


def listed_splits(root: Path, splits_file: str | Path | None) -> tuple[Listed, str] | None:
    """What a file lists, and what file that is in words; None where nothing is listed.

    splits_file: a .yaml or .csv file; None looks for ROOT/splits.yaml, .yml and .csv, and ROOT/train.txt and so on.

    Raises: UserError, one line, for a file that is missing, malformed, or not the only one.
    """
    if splits_file is not None:
        path = Path(splits_file)
        if not path.is_file():
            raise MissingFileError(f"there is no file {path}: give dataset.splits_file=PATH, a .yaml or .csv file")
        return _listed_in(path), str(path)
    found = [name for name in (*TABLES, *LISTS) if _is_there(root / name)]
    tables, lists = [name for name in found if name in TABLES], [name for name in found if name in LISTS]
    if len(tables) + bool(lists) > 1:
        raise UserError(f"{root} holds {', '.join(found)}, which all say what is train and val: keep one of them")
    if tables:
        return _listed_in(root / tables[0]), str(root / tables[0])
    if lists:
        entries = {
            name.removesuffix(".txt"): [
                (line, f"{root / name} line {number}") for number, line in lines_of(root / name)
            ]
            for name in lists
        }
        if empty := [name for name in entries if not entries[name]]:
            raise UserError(f"{root / empty[0]}.txt names no image: list them, one a line, or remove the file")
        return entries, " and ".join(str(root / name) for name in lists)
    return None


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # one that leads nowhere is told


def _table(path: Path) -> Iterator[tuple[str, str, str]]:
    """The split, the image and the place of each line of a .yaml or .csv file."""
    if path.suffix.lower() not in (".yaml", ".yml", ".csv"):
        raise UserError(f"{path} must end in .yaml or .csv: dataset.splits_file lists what is train and val")
    text = read_list(path)
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
        try:
            columns = list(rows.fieldnames or ())
            if not columns.count("image") == columns.count("split") == 1:
                raise UserError(
                    f"{path} must have the columns image and split in its first line, once each, as in image,split;"
                    f" it is {printable(','.join(columns))!r}"
                )
            for row in rows:
                split, image = (row["split"] or "").strip(), (row["image"] or "").strip()
                if split or image:
                    yield split, image, f"{path} line {rows.line_num}"
        except csv.Error as error:
            raise UserError(f"{path} line {rows.line_num} is no CSV: {error}") from None
    else:
        try:
            loader = yaml.BaseLoader(text)  # to which 0012 is a name, no number
            tree = loader.get_single_node()
            splits = None if tree is None else loader.construct_document(tree)
        except (yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(splits, dict) or not all(
            isinstance(names, list) and all(isinstance(name, str) for name in names) for names in splits.values()
        ):
            raise UserError(f"{path} must list images by split, as in train: [a, b] and val: [c]")
        if twice := [key for key, times in Counter(key.value for key, _ in tree.value).items() if times > 1]:
            raise UserError(f"{path} lists {twice[0]} twice: make one list of them")
        for split, names in splits.items():
            if not names:
                raise UserError(f"{path} names no image of {split}: list them, or leave {split} out")
            yield from ((split, name, f"{path}, {split}") for name in names)


def _listed_in(path: Path) -> Listed:
    listed: Listed = defaultdict(list)
    for split, image, where in _table(path):
        if split not in SPLITS:
            raise UserError(f"{where}: {split!r} is no split: they are {', '.join(SPLITS)}")
        if not image:
            raise UserError(f"{where} names no image of {split}")
        listed[split].append((image, where))
    if not listed:
        raise UserError(f"{path} names no image: list what is train and val, or remove the file")
    return dict(listed)


def splits_of_stems(listed: Listed, images: Mapping[str, Path], suffixes: Sequence[str]) -> dict[str, str]:
    """The split of each image that is listed, by its stem, in the order of the list.

    images: those that are there, by stem.

    Raises: UserError, one line, for an entry that means none of them, or one that was listed before.
    """
    split_of: dict[str, str] = {}
    missing = []
    for split, entries in listed.items():
        for entry, where in entries:
            stem = _stem(entry, images, suffixes)
            if stem is None:
                missing.append((entry, where))
                continue
            if stem in split_of:
                raise UserError(f"{where}: {stem} is in {split_of[stem]} already: list each image once")
            split_of[stem] = split
    if missing:
        (entry, where), folder = missing[0], next(iter(images.values())).parent
        wanted = {_loosely(entry), _loosely(PurePosixPath(entry.replace("\\", "/")).stem)}
        alike = [stem for stem in images if _loosely(stem) in wanted]
        meant = f", but {alike[0]}: list it as that" if alike else ""
        others = f" ({len(missing) - 1:,} more that are listed are not there)" if len(missing) > 1 else ""
        raise MissingFileError(f"{where}: there is no image {printable(entry)} in {folder}{meant}{others}")
    return split_of


def _loosely(name: str) -> str:
    """Alike for what a list made with a program may have lost: zeros before a number, capitals."""
    return name.lstrip("0").casefold()


def _stem(entry: str, stems: Mapping[str, Path], suffixes: Sequence[str]) -> str | None:
    """Which stem a listed entry means: a stem, a file or a path; of an image and its mask in one line the mask's."""
    for text in (entry, *entry.split()[-1:]):
        name = PurePosixPath(text.replace("\\", "/")).name
        without = name.rpartition(".")[0] if name.lower().endswith(tuple(suffixes)) else name
        for stem in (name, without):
            if stem in stems:
                return stem
    return None


def source_name(stem: str, group_by: re.Pattern[str] | None = None) -> str:
    """What an image was made of, by its name: Roboflow's copies of an image have its name.

    group_by: matched from the beginning of the name; its first group (without one, what it matches) is the source.
    """
    name = _original(stem)
    match = group_by.match(name) if group_by else None
    return name if match is None else str(match[1] if match.re.groups and match[1] is not None else match[0])


def is_grouped(stem: str, group_by: re.Pattern[str]) -> bool:
    """Whether ``group_by`` says what an image was made of."""
    return group_by.match(_original(stem)) is not None


def _original(stem: str) -> str:
    """The name of the image that Roboflow copied, or else the name."""
    roboflow = _ROBOFLOW.fullmatch(stem)
    return roboflow[1] if roboflow else stem


def checked_group_by(pattern: str | None) -> re.Pattern[str] | None:
    """The setting ``dataset.group_by`` compiled; UserError where it is no regular expression."""
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise UserError(f"dataset.group_by must be a regular expression, got {pattern!r}: {error}") from None


def divided(
    pairs: Sequence[ImageMaskPair], share: float, seed: int, group_by: re.Pattern[str] | None = None
) -> tuple[list[ImageMaskPair], list[ImageMaskPair]]:
    """Train and val: about ``share`` of the sources are val, all images of a source on one side.

    Images of one ``source_name``, and files of equal bytes, are of one source. A source's side depends on its name and
    the seed alone, so that images that come later move none of those that are there, but where a new one joins two
    sources, and of few sources, where chance would leave val less than half of its share, or a side nothing.

    Of a single source nothing is val.
    """
    groups = _groups(pairs, group_by)
    if len(groups) < 2:
        return list(pairs), []
    order = sorted(groups, key=lambda name: _place(name, seed))
    sizes = list(accumulate(len(groups[name]) for name in order))
    by_place = sum(_place(name, seed) < share for name in order)
    enough = next(n for n, size in enumerate(sizes, start=1) if size >= share / 2 * len(pairs))
    count = min(max(by_place, enough), len(order) - 1)
    val = {pair.name for name in order[:count] for pair in groups[name]}
    return [pair for pair in pairs if pair.name not in val], [pair for pair in pairs if pair.name in val]


def _groups(pairs: Sequence[ImageMaskPair], group_by: re.Pattern[str] | None) -> dict[str, list[ImageMaskPair]]:
    """The images of each source, by the first of its names."""
    leads: dict[str, str] = {}  # from a name to an earlier one of its source

    def first(name: str) -> str:
        while leads.get(name, name) != name:
            name = leads[name]
        return name

    def join(one: str, other: str) -> None:
        lower, higher = sorted((first(one), first(other)))
        leads[higher] = lower

    names = [source_name(pair.name, group_by) for pair in pairs]
    by_content: dict[tuple[int, bytes], str] = {}
    for content, name in zip(_contents([pair.image for pair in pairs]), names, strict=True):
        if content is not None:
            join(by_content.setdefault(content, name), name)
    groups = defaultdict(list)
    for pair, name in zip(pairs, names, strict=True):
        groups[first(name)].append(pair)
    return groups


def _contents(paths: Sequence[Path]) -> list[tuple[int, bytes] | None]:
    """What files of equal bytes share; None for one that no other can be equal to, which need not be read."""
    sizes = [path.stat().st_size if path.is_file() else None for path in paths]
    times = Counter(sizes)
    return [
        None if size is None or times[size] == 1 else (size, hashlib.blake2b(file_bytes(path)).digest())
        for path, size in zip(paths, sizes, strict=True)
    ]


def _place(name: str, seed: int) -> float:
    """Of a source between 0 and 1, evenly."""
    digest = hashlib.blake2b(f"{seed}:".encode() + os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
