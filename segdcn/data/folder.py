"""A user's own images and masks, without code."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from segdcn.data.dataset import (
    IGNORE_INDEX,
    Color,
    ImageMaskFiles,
    ImageMaskPair,
    checked_bits,
    checked_mapping,
    checked_names,
    few,
    listed,
    passed_over,
    ranges,
    read_list,
    read_numbers,
    spread_over,
    voc_palette,
)
from segdcn.errors import MissingFileError, UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".png",)
CLASSES = "classes.txt"
MOST_CLASSES = 255
LOOKED_AT = 200  # masks, where nothing names the classes: some seconds
LAYOUT = "ROOT/train/images/NAME.jpg with ROOT/train/masks/NAME.png, and the same under ROOT/val"


class ImageFolder:
    """ROOT/<split>/images and ROOT/<split>/masks with equal stems; splits train, val and perhaps test.

    Masks are one-channel PNGs (grey or palette) whose pixels are class numbers: 0 is the first class,
    255 is ignored. Images may have different sizes. Files of other kinds are passed over, with a warning.

    Args:
        class_names: texts, or numbers, which are taken as they are typed. None takes them from ROOT/classes.txt, one a
            line; where there is none, classes are numbered after a look at the masks (`class_0`, `class_1`, ...).
        palette: one RGB colour (0..255) per class; None gives the colours of PASCAL VOC's rule.
        mapping, bits: see `ImageMaskFiles`.

    Raises:
        FileNotFoundError: ROOT holds no split.
        ValueError: wrong class names, or others than in ROOT/classes.txt; wrong palette, mapping or bits; masks that
            do not tell the classes; from `split`, images and masks that do not pair.

    Attributes:
        classes_found: the class names and how they were found, in words.
    """

    def __init__(
        self,
        root: str | Path,
        class_names: Sequence[object] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        mapping: Mapping[int, int] | None = None,
        bits: int | None = None,
    ) -> None:
        self.root = Path(root)
        self.splits = [name for name in ("train", "val", "test") if (self.root / name / "images").is_dir()]
        if not self.splits:
            if not self.root.is_dir():
                raise MissingFileError(
                    f"there is no folder {self.root}: expected {LAYOUT}; pass it as dataset.root=PATH"
                )
            raise MissingFileError(f"no images in {self.root}: expected {LAYOUT}; pass the folder as dataset.root=PATH")
        self.class_names, self.classes_found = self._named(class_names, mapping)
        self.mapping = checked_mapping(mapping, len(self.class_names))
        self.bits = checked_bits(bits)
        self.palette = voc_palette(len(self.class_names)) if palette is None else _checked(palette)
        if len(self.palette) != len(self.class_names):
            raise UserError(
                f"palette must hold one colour per class: {len(self.class_names)} classes,"
                f" got {len(self.palette)} colours"
            )

    def split(self, name: str) -> ImageMaskFiles:
        """The pairs of one split, by name; their files are read when they are indexed."""
        return ImageMaskFiles(self._pairs(name), len(self.class_names), self.mapping, self.bits)

    def _pairs(self, name: str) -> list[ImageMaskPair]:
        if name not in self.splits:
            raise UserError(f"{self.root} has no split {name!r}, only {', '.join(self.splits)}: expected {LAYOUT}")
        folder = self.root / name
        images, other_images = _by_stem(folder / "images", IMAGE_SUFFIXES)
        masks, other_masks = _by_stem(folder / "masks", MASK_SUFFIXES)
        if not images:
            raise UserError(f"{folder / 'images'} holds no image ({' '.join(IMAGE_SUFFIXES)}){other_images}")
        if lonely := images.keys() - masks.keys():
            where = f"{folder / 'images'} without a mask NAME.png in {folder / 'masks'}"
            raise UserError(f"{few(lonely)} in {where}{other_masks}")
        if lonely := masks.keys() - images.keys():
            where = f"{folder / 'masks'} without an image in {folder / 'images'}"
            raise UserError(f"{few(lonely)} in {where}{other_images}")
        for part, others in (("images", other_images), ("masks", other_masks)):
            if others:
                warnings.warn(f"{folder / part}{others}", stacklevel=2)
        return [ImageMaskPair(images[stem], masks[stem], stem) for stem in sorted(images)]

    def _named(self, given: Sequence[object] | None, mapping: Mapping[int, int] | None) -> tuple[tuple[str, ...], str]:
        """The class names, and how they were found, in words."""
        file = self.root / CLASSES
        in_file = None
        if file.exists() or file.is_symlink():  # one that leads nowhere is told
            try:
                in_file = checked_names([line.strip() for line in read_list(file).splitlines() if line.strip()])
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
        return self._numbered(mapping)

    def _numbered(self, mapping: Mapping[int, int] | None) -> tuple[tuple[str, ...], str]:
        """Classes by the numbers that masks hold, all of them where they are few, else some spread over the split."""
        mapping = checked_mapping(mapping, MOST_CLASSES)
        split = "train" if "train" in self.splits else self.splits[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `split` says them
            masks = [pair.mask for pair in self._pairs(split) if pair.mask is not None]
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
        how = f"{names[0]} to {names[-1]}, since {seen}; name them in {self.root / CLASSES}, one a line"
        return names, how


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(f"class_{number}" for number in range(count))


def _checked(palette: Sequence[Sequence[int]]) -> list[Color]:
    colors = []
    for color in palette:
        if len(color) != 3 or not all(0 <= value <= 255 for value in color):
            raise UserError(f"a palette colour must be three numbers 0..255, got {list(color)}")
        red, green, blue = color
        colors.append((int(red), int(green), int(blue)))
    return colors


def _by_stem(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], str]:
    """The files with one of the suffixes; and what else is there, but for hidden files, as the end of a sentence."""
    files: dict[str, Path] = {}
    others, folders = [], 0
    for path, is_folder in listed(folder) if folder.is_dir() else ():
        if is_folder:
            folders += 1
        elif path.suffix.lower() not in suffixes:
            others.append(path)
        elif path.stem in files:
            raise UserError(f"{files[path.stem]} and {path.name} have the same name: keep one of them")
        else:
            files[path.stem] = path
    said = f": {passed_over(others)} (read are {' '.join(suffixes)})" if others else ""
    if folders:
        said += f"{', and' if others else ':'} {folders} folder(s) within it, which are not looked into"
    return files, said
