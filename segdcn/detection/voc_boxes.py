"""Boxes in PASCAL VOC's form (Everingham et al. 2010): its own years, or a folder of the same layout."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path

from segdcn.data.dataset import DataError, check_count, few, file_bytes, lines_of, listed, printable
from segdcn.data.folder import IMAGE_SUFFIXES
from segdcn.data.voc import VOC
from segdcn.detection.box_files import BoxFiles, ImageWithBoxes, Written, checked_class_names, objects_of, several
from segdcn.detection.samples import DetectionDataset
from segdcn.errors import MissingFileError, UserError

IMAGES = {"VOC2007/trainval": 5011, "VOC2007/test": 4952, "VOC2012/trainval": 11_540}  # as published
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocBoxes(DetectionDataset):
    """The objects of FOLDER/Annotations/NAME.xml in FOLDER/JPEGImages/NAME.*, for each NAME of a list.

    A split is one list or several of FOLDER/ImageSets/Main, each as FOLDER/LIST below the root, such as
    VOC2007/trainval, or as LIST where the root is such a folder itself. Images are found by the list's names, whatever
    an XML file calls them.

    Corners are pixels counted from 1, the last one included: xmin, ymin, xmax, ymax become the box
    (xmin - 1, ymin - 1, xmax, ymax). One whose corners are less than a pixel apart is degenerate and left out; what
    reaches beyond the image is clipped. Objects that are "difficult" are ignored, their parts passed over. An object's
    area is its box's.

    Args:
        root: the folder VOCdevkit, one that holds it, or a folder with Annotations, JPEGImages and ImageSets.
        train, val, test: the list or lists of each split; None where there is none.
        class_names: C names; None takes VOC's 20 for folders VOC2007 and so on, else those of train's objects, sorted.

    Raises:
        FileNotFoundError: a list that is missing; from `split`, a listed image or XML file.
        DataError: from a sample, an XML file that cannot be read, or an object of no class.
    """

    def __init__(
        self,
        root: str | Path,
        train: str | Sequence[str],
        val: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        class_names: Sequence[object] | None = None,
    ) -> None:
        given = {"train": train, "val": val, "test": test}
        self.lists = {
            name: (lists,) if isinstance(lists, str) else tuple(lists) for name, lists in given.items() if lists
        }
        folder = Path(root, "VOCdevkit")
        self.root = folder if folder.is_dir() else Path(root)
        files = [self._file(entry) for lists in self.lists.values() for entry in lists]
        if missing := [file for file in files if not file.is_file()]:
            raise MissingFileError(
                f"{missing[0]} does not exist: dataset.root must be VOCdevkit, or a folder with Annotations, JPEGImages"
                " and ImageSets/Main, and dataset.train, val and test name lists in it, such as VOC2007/trainval or, of"
                " one folder, train"
            )
        self._given = None if class_names is None else checked_class_names(class_names)

    def _file(self, entry: str) -> Path:
        return self._folder(entry) / "ImageSets" / "Main" / f"{Path(entry).name}.txt"

    def _folder(self, entry: str) -> Path:
        return self.root / Path(entry).parent

    @cached_property
    def class_names(self) -> Sequence[str]:
        """C names; looks through the XML files of train where nothing else tells them."""
        if self._given is not None:
            return self._given
        if all(entry.startswith("VOC20") for lists in self.lists.values() for entry in lists):
            return VOC.class_names[1:]
        found = set()
        for entry in self.lists.get("train", ()):
            for _, stem in lines_of(self._file(entry)):
                with suppress(DataError):  # told when it is read
                    root = _parsed(self._folder(entry) / "Annotations" / f"{stem}.xml")
                    found |= {name for name, _ in _elements(root) if name}
        if not found:
            raise DataError(f"no XML file of train in {self.root} names an object: give dataset.class_names")
        return tuple(sorted(found))

    @property
    def splits(self) -> Sequence[str]:
        return tuple(self.lists)

    def split(self, name: str) -> BoxFiles:
        """The images of one split in the order of its lists; their files are read when they are indexed."""
        if name not in self.lists:
            raise UserError(f"{self.root} has no split {name!r}, only {', '.join(self.lists)}: give dataset.{name}")
        labels = {class_name: label for label, class_name in enumerate(self.class_names, start=1)}
        found: list[ImageWithBoxes] = []
        for entry in self.lists[name]:
            stems = [stem for _, stem in lines_of(self._file(entry))]
            if not stems:
                raise MissingFileError(f"{self._file(entry)} names no image")
            images, annotations = (self._folder(entry) / part for part in ("JPEGImages", "Annotations"))
            photographs = _by_stem(images, IMAGE_SUFFIXES)
            files = _by_stem(annotations, (".xml",))
            missing = [
                f"{few(lost)} of {self._file(entry)} missing in {folder}"
                for folder, there in ((images, photographs), (annotations, files))
                if (lost := [stem for stem in stems if stem not in there])
            ]
            if missing:
                raise MissingFileError(f"{' and '.join(missing)}: unpack the archive again, or take them off the list")
            check_count(f"{entry} in {self.root}", len(stems), IMAGES.get(entry, len(stems)))
            found += [ImageWithBoxes(photographs[stem], stem, partial(read_xml, files[stem], labels)) for stem in stems]
        return BoxFiles(found)


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """One look into the folder instead of one at each file, which takes minutes on a network disk."""
    files = listed(folder) if folder.is_dir() else []
    return {path.stem: path for path, _ in files if path.suffix.lower() in suffixes}


def read_xml(path: Path, labels: Mapping[str, int]) -> Written:
    """The objects of an XML file.

    labels: of each class name.

    Raises: DataError, one line with all that is wrong.
    """
    root = _parsed(path)
    rows, names, wrong = [], [], []
    for number, (name, element) in enumerate(_elements(root), start=1):
        texts = [element.findtext(f"bndbox/{corner}", "nothing") for corner in CORNERS]
        names.append(f"object {number} ({name}, {' '.join(texts)})")
        corners = tuple(map(_number, texts))
        if name not in labels:
            wrong.append(f"{names[-1]} is of no class: dataset.class_names has {', '.join(labels)}")
        elif not all(map(math.isfinite, corners)):
            wrong.append(f"{names[-1]} has no {', '.join(CORNERS)} that are numbers")
        else:
            left, top, right, bottom = corners
            difficult = element.findtext("difficult", "0").strip().lower() not in ("0", "", "false")
            rows.append(((left - 1, top - 1, right, bottom), labels[name], difficult, math.nan))
    if wrong:
        raise DataError(f"{path}: {several(wrong)}")
    size = tuple(_number(root.findtext(f"size/{side}", "0")) for side in ("height", "width"))
    told = all(1 <= side < math.inf for side in size)  # some programs write 0
    return Written(objects_of(rows), 2, names, path, (int(size[0]), int(size[1])) if told else None)


def _elements(root: ElementTree.Element) -> Iterator[tuple[str, ElementTree.Element]]:
    for element in root.findall("object"):
        yield printable(element.findtext("name", "").strip()), element


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class _Plain(ElementTree.TreeBuilder):
    """Refuses what declares entities before they are: a few of them can fill the memory."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, which no annotation needs: remove it")


def _parsed(path: Path) -> ElementTree.Element:
    """An XML file's root; DataError where it cannot be read."""
    content = file_bytes(path)
    try:
        return ElementTree.fromstring(content, parser=ElementTree.XMLParser(target=_Plain()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an encoding that is not known
        raise DataError(f"{path} is no XML that can be read: {error}") from error
