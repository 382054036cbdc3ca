"""Boxes in the form of COCO (Lin et al. 2014): one JSON file for each split."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from segdcn.data.dataset import DataError, check_count, few, file_bytes, listed, printable
from segdcn.detection.box_files import BoxFiles, ImageWithBoxes, Row, Written, objects_of, several
from segdcn.detection.samples import DetectionDataset
from segdcn.errors import MissingFileError, UserError

IMAGES = {"train2017": 118_287, "val2017": 5_000}  # as published


class CocoBoxes(DetectionDataset):
    """The objects of ROOT/annotations/instances_NAME.json in the images ROOT/NAME, NAME being train2017 or val2017.

    Crowds are ignored. Boxes are clipped to their image; one of less than a pixel of width or height is left out. Areas
    are those of the file, which are of objects' masks. The labels 1..C are the categories by their ids, which may have
    gaps.

    Args:
        root: the folder that holds annotations and the folders of images.
        train, val, test: NAME of each split; None where there is none.

    Raises:
        FileNotFoundError: a JSON file that is missing; from `split`, an image.
        DataError: from whatever needs a JSON file, one that cannot be read, with what is wrong in it.
    """

    def __init__(
        self, root: str | Path, train: str = "train2017", val: str | None = "val2017", test: str | None = None
    ) -> None:
        self.root = Path(root)
        self.names = {split: name for split, name in (("train", train), ("val", val), ("test", test)) if name}
        if missing := [file for file in map(self._file, self.names) if not file.is_file()]:
            raise MissingFileError(
                f"{missing[0]} does not exist: dataset.root must hold annotations/instances_NAME.json and the images"
                " in NAME/, where dataset.train, val and test are each a NAME, or null"
            )
        self._contents: dict[str, _Content] = {}

    def _file(self, split: str) -> Path:
        return self.root / "annotations" / f"instances_{self.names[split]}.json"

    def _content(self, split: str) -> _Content:
        """What the JSON file of a split tells; read once, since COCO's own takes half a minute."""
        if split not in self.names:
            raise UserError(f"{self.root} has no split {split!r}, only {', '.join(self.names)}: give dataset.{split}")
        if split not in self._contents:
            self._contents[split] = _read_json(self._file(split), self.root / self.names[split])
        return self._contents[split]

    @cached_property
    def _categories(self) -> dict[int, str]:
        return self._content("val" if "val" in self.names else "train").categories  # of the smaller file

    @property
    def class_names(self) -> Sequence[str]:
        return tuple(self._categories.values())

    @property
    def splits(self) -> Sequence[str]:
        return tuple(self.names)

    def split(self, name: str) -> BoxFiles:
        """The images of one split in the order of its file, also those without an object; read when indexed."""
        content = self._content(name)
        if content.categories != self._categories:
            raise DataError(f"{self._file(name)} has other categories than the file of val: make them the same")
        images, folder = list(content.images.values()), self.root / self.names[name]
        folders = {image.image.parent for image in images}
        there = {path for one in folders if one.is_dir() for path, _ in listed(one)}
        if missing := [image.image.name for image in images if image.image not in there]:
            raise MissingFileError(f"{few(missing)} of {self._file(name)} missing in {folder}: unpack it again")
        check_count(f"{self.names[name]} in {self.root}", len(images), IMAGES.get(self.names[name], len(images)))
        return BoxFiles(images)


class _Content(NamedTuple):
    """What a JSON file tells: names of categories and images, by their ids."""

    categories: dict[int, str]
    images: dict[int, ImageWithBoxes]


class CocoIds(NamedTuple):
    """The ids of images, by the names of their files, and of categories, by their names."""

    images: dict[str, int]
    categories: dict[str, int]


def read_ids(file: Path) -> CocoIds:
    """The ids in a JSON file of instances or of images alone, as image_info_test-dev2017.json.

    Raises: DataError, one line, with what is wrong in it.
    """
    categories, images = _read_json(file, Path(), annotated=False)
    return CocoIds(
        {image.image.as_posix(): number for number, image in images.items()},
        {name: number for number, name in categories.items()},
    )


def _read_json(file: Path, folder: Path, annotated: bool = True) -> _Content:
    """Read a file of instances; DataError, one line, with what is wrong in it.

    annotated: whether objects are wanted.
    """
    text = file_bytes(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no Unicode
        raise DataError(f"{file} is no JSON that can be read: {error}") from error
    try:
        categories = {
            int(one["id"]): printable(str(one["name"])) for one in sorted(content["categories"], key=itemgetter("id"))
        }
        images = {int(one["id"]): (folder / one["file_name"], _size(one)) for one in content["images"]}
        annotations = [(one.get("id"), one) for one in (content["annotations"] if annotated else ())]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file} is no COCO JSON, which has lists of categories (id and name), images (id and file_name) and"
            f" annotations (id, image_id, category_id and bbox): {type(error).__name__} {error}"
        ) from error
    wrong = [
        f"the image {path} lies outside of {folder}"
        for path, _ in images.values()
        if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder))
    ]
    for key, named in (("categories", set(categories.values())), ("images", images)):
        if len(named) < len(content[key]):
            wrong.append(f"of its {key} two are the same")
    labels = {number: label for label, number in enumerate(categories, start=1)}
    rows: dict[int, list[Row]] = {number: [] for number in images}
    names: dict[int, list[str]] = {number: [] for number in images}
    for number, one in annotations:
        try:
            x, y, width, height = map(float, one["bbox"])
            box, image, category = (x, y, x + width, y + height), one["image_id"], one["category_id"]
            if not all(map(math.isfinite, box)):
                raise ValueError
            row = (box, labels[category], bool(one.get("iscrowd")), float(one.get("area", math.nan)))
            rows[image].append(row)
        except (KeyError, TypeError, ValueError):
            needed = "numbers as bbox and area, an image and a category that are listed"
            wrong.append(f"annotation {number} must have {needed}")
            continue
        names[image].append(f"annotation {number} ({categories[category]}, {x:g} {y:g} {width:g} {height:g})")
    if wrong:
        raise DataError(f"{file}: {several(wrong)}")
    found = {}
    for number, (path, size) in images.items():
        written = partial(Written, objects_of(rows[number]), 1, names[number], file, size)
        found[number] = ImageWithBoxes(path, path.stem, written)
    return _Content(categories, found)


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    return (int(height), int(width)) if height and width else None
