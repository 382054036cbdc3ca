"""A user's own images and masks, without code."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segdcn.data.classes import Named, named_classes, numbered_classes
from segdcn.data.colours import LABELMAP, ColourTable, checked_colours, labels_of, read_labelmap
from segdcn.data.dataset import (
    Color,
    ImageMaskFiles,
    ImageMaskPair,
    checked_bits,
    checked_mapping,
    checked_palette,
    few,
    listed,
    passed_over,
)
from segdcn.data.splits import (
    LISTS,
    SPLITS,
    TABLES,
    Listed,
    checked_group_by,
    divided,
    is_grouped,
    listed_splits,
    splits_of_stems,
)
from segdcn.errors import MissingFileError, UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".png",)
COLOUR_MASK_SUFFIXES = (".png", ".jpg", ".jpeg")  # JPEGs are told why they are refused
VAL_SHARE = 0.2
LAYOUT = (
    "ROOT/train/images/NAME.jpg with ROOT/train/masks/NAME.png, and the same under ROOT/val; or ROOT/images with"
    " ROOT/masks"
)


class ImageFolder:
    """Images and masks of equal stems, in splits train, val and perhaps test: by folders, lists, or divided by a seed.

    ROOT/<split>/images and ROOT/<split>/masks; or ROOT/images and ROOT/masks, of which ROOT/train.txt and so on, or one
    file ROOT/splits.yaml or ROOT/splits.csv, list each split. Where nothing says what is val, a share of train is.

    A mask's pixels are class numbers (one-channel PNGs, grey or palette: 0 is the first class, 255 is ignored) or
    colours that ``colours`` or labelmap.txt name. Images may have different sizes. Files of other kinds are passed
    over, with a warning.

    Args:
        class_names: texts, or numbers, which are taken as they are typed. None takes them from ROOT/classes.txt, one a
            line, or from the colours; where there is neither, classes are numbered after a look at the masks
            (`class_0`, `class_1`, ...).
        palette: one RGB colour (0..255) per class; None gives the masks' colours, or those of PASCAL VOC's rule.
        mapping, bits: see `ImageMaskFiles`.
        colours: the RGB colour of each name in the masks. None takes them from labelmap.txt in ROOT or beside masks.
            Ignored are void, ignore, unlabeled, unlabelled, and what is none of given class names.
        colour_tolerance: see `ColourTable`.
        splits_file: a .yaml file (train: [NAME, ...]) or a .csv file (columns image and split) instead of those in
            ROOT.
        val_share: of train's sources that become val. None is a fifth where nothing else is val, 0 is none.
        split_seed: chooses which.
        group_by: a regular expression; see `source_name`.

    Raises:
        FileNotFoundError: ROOT holds no split.
        ValueError: wrong class names, or others than in ROOT/classes.txt; wrong palette, mapping, bits, colours, lists
            or share; masks that do not tell the classes; from `split`, images and masks that do not pair.

    Attributes:
        classes_found: the class names and how they were found, in words.
        settings_found: what None comes to, of arguments that decide what the data set is.
    """

    def __init__(
        self,
        root: str | Path,
        class_names: Sequence[object] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        mapping: Mapping[int, int] | None = None,
        bits: int | None = None,
        colours: Mapping[str, Sequence[int]] | None = None,
        colour_tolerance: int = 0,
        splits_file: str | Path | None = None,
        val_share: float | None = None,
        split_seed: int = 0,
        group_by: str | None = None,
    ) -> None:
        self.root = Path(root)
        self.split_seed, self.group_by = split_seed, checked_group_by(group_by)
        self._listed: Listed = {}
        self._lists = ""
        self._folders = self._found_folders(splits_file)
        self.val_share = self._checked_share(val_share)
        if not self.val_share and (group_by is not None or split_seed):
            key = "split_seed" if group_by is None else "group_by"
            why = f"{self._lists or self.root / 'val'} says what is val" if "val" in self._folders else "no val is made"
            raise UserError(f"dataset.{key} is of how train is divided, which it is not, since {why}: leave it out")
        self.splits = [name for name in SPLITS if name in self._folders or (name == "val" and self.val_share)]

        self.colours, self._source = self._colours(colours)
        if self.colours is None and colour_tolerance:
            raise UserError("dataset.colour_tolerance is of masks in colours: give dataset.colours or labelmap.txt too")
        if self.colours is not None and mapping:
            raise UserError(
                f"dataset.mapping is of masks that hold numbers, {self._source} of masks in colours: leave one out"
            )
        found = named_classes(self.root, class_names, self.colours, self._source) or self._classes_by_number(mapping)
        self.class_names, self.classes_found = found
        self.read_mask: ColourTable | None = None
        if self.colours is not None:
            labels = labels_of(self.colours, self.class_names, self._source)
            self.read_mask = ColourTable(labels, self._source, colour_tolerance)
            palette = [self.colours[name] for name in self.class_names] if palette is None else palette
        self.mapping = checked_mapping(mapping, len(self.class_names))
        self.bits = checked_bits(bits)
        self.palette = checked_palette(palette, len(self.class_names))
        self.settings_found: dict[str, Any] = {"val_share": self.val_share}
        if self.colours is not None:
            self.settings_found["colours"] = {name: list(colour) for name, colour in self.colours.items()}

    def split(self, name: str) -> ImageMaskFiles:
        """The pairs of one split, by name; their files are read when they are indexed."""
        pairs = self._pairs(name)
        return ImageMaskFiles(pairs, len(self.class_names), self.mapping, self.bits, self.read_mask)

    @property
    def split_found(self) -> str | None:
        """How val was divided off, in words; None where it was there, or cannot be."""
        if not self.val_share:
            return None
        train, val = self._divided
        if not val:
            return None
        alone = [pair.name for pair in (*train, *val) if self.group_by and not is_grouped(pair.name, self.group_by)]
        but = f" (but dataset.group_by does not match {few(alone)})" if alone else ""
        return (
            f"{len(val)} of {len(train) + len(val)} images are val, since {self.root} has none: dataset.val_share="
            f"{self.val_share:g} and dataset.split_seed={self.split_seed} chose them, copies of an image together{but}"
        )

    def _found_folders(self, splits_file: str | Path | None) -> dict[str, Path]:
        """Where the images of each split are, those that are listed and those that are divided together."""
        by_split = {name: self.root / name for name in SPLITS if (self.root / name / "images").is_dir()}
        if by_split and splits_file is None:
            if beside := [name for name in (*TABLES, *LISTS) if (self.root / name).exists()]:
                warnings.warn(
                    f"{self.root / beside[0]} is not read: the folders {', '.join(by_split)} say what is in each split",
                    stacklevel=3,
                )
            return by_split
        if not (self.root / "images").is_dir():
            if not self.root.is_dir():
                raise MissingFileError(
                    f"there is no folder {self.root}: expected {LAYOUT}; pass it as dataset.root=PATH"
                )
            if splits_file is not None:
                raise MissingFileError(f"{splits_file} lists images of {self.root / 'images'}, which is no folder")
            raise MissingFileError(f"no images in {self.root}: expected {LAYOUT}; pass the folder as dataset.root=PATH")
        found = listed_splits(self.root, splits_file)
        if found is None:
            return {"train": self.root}
        self._listed, self._lists = found
        return dict.fromkeys(self._listed, self.root)

    def _checked_share(self, given: float | None) -> float:
        """The share of train that becomes val, 0 where val is there or is not to be made."""
        if given is not None and not 0 <= given < 1:
            raise UserError(f"dataset.val_share must be 0 (none) or a share below 1, such as 0.2, got {given}")
        if "val" in self._folders:
            if given:
                raise UserError(
                    f"dataset.val_share={given:g} (given now, or when the run began) divides train, but"
                    f" val is there, by {self._lists or self.root / 'val'}: dataset.val_share=0 takes that"
                )
            return 0
        if "train" not in self._folders or (given is None and self._other_val):
            return 0
        return VAL_SHARE if given is None else given

    @property
    def _other_val(self) -> Path | None:
        """What is meant to be val, but is not read: dividing train would pass it over in silence."""
        lists = ("valid.txt", "validation.txt", *(() if self._lists else (*TABLES, "val.txt")))
        meant = ("val", "valid", "validation", *lists)
        return next((self.root / name for name in meant if (self.root / name).exists()), None)

    @functools.cached_property
    def _divided(self) -> tuple[list[ImageMaskPair], list[ImageMaskPair]]:
        return divided(self._pairs_there("train"), self.val_share, self.split_seed, self.group_by)

    def _pairs(self, name: str) -> list[ImageMaskPair]:
        if name not in self.splits:
            instead = ""
            if name == "val" and "train" in self.splits:
                there = f" ({self._other_val} is not read as it is)" if self._other_val else ""
                instead = f"{there}; dataset.val_share=0.2 makes a fifth of train val"
            raise UserError(
                f"{self.root} has no split {name!r}, only {', '.join(self.splits)}:"
                f" {f'{self._lists} lists no other' if self._lists else f'expected {LAYOUT}'}{instead}"
            )
        if self.val_share and name in ("train", "val"):
            train, val = self._divided
            if name == "val" and not val:
                or_else = "" if self.group_by is None else ", or another dataset.group_by"
                raise UserError(
                    f"{self.root} has no val, and {len(train)} image(s) of one source cannot be divided into train and"
                    f" val: add images, or another val{or_else}"
                )
            return train if name == "train" else val
        return self._pairs_there(name)

    def _pairs_there(self, name: str) -> list[ImageMaskPair]:
        """The pairs of a folder, or those of them that are listed for a split."""
        folder = self._folders[name]
        images, other_images = _by_stem(folder / "images", IMAGE_SUFFIXES)
        masks, other_masks = _by_stem(folder / "masks", MASK_SUFFIXES if self.colours is None else COLOUR_MASK_SUFFIXES)
        if not images:
            raise UserError(f"{folder / 'images'} holds no image ({' '.join(IMAGE_SUFFIXES)}){other_images}")
        stems = sorted(images)
        if self._listed:
            split_of = splits_of_stems(self._listed, images, IMAGE_SUFFIXES)
            stems = [stem for stem, split in split_of.items() if split == name]
            if name == self.splits[0] and (left_out := images.keys() - split_of.keys()):
                warnings.warn(f"{folder / 'images'}: {few(left_out)} in no split of {self._lists}", stacklevel=2)
        if lonely := set(stems) - masks.keys():
            where = f"{folder / 'images'} without a mask NAME.png in {folder / 'masks'}"
            raise UserError(f"{few(lonely)} in {where}{other_masks}")
        if not self._listed and (lonely := masks.keys() - images.keys()):
            where = f"{folder / 'masks'} without an image in {folder / 'images'}"
            raise UserError(f"{few(lonely)} in {where}{other_images}")
        for part, others in (("images", other_images), ("masks", other_masks)):
            if others:
                warnings.warn(f"{folder / part}{others}", stacklevel=2)
        return [ImageMaskPair(images[stem], masks[stem], stem) for stem in stems]

    def _colours(self, given: Mapping[str, Sequence[int]] | None) -> tuple[dict[str, Color] | None, str]:
        """The colour of each name, None where masks hold numbers; and what says so."""
        named, source = (None, "") if given is None else (checked_colours(given), "dataset.colours")
        for folder in (self.root, *dict.fromkeys(self._folders.values())):
            for file in dict.fromkeys((folder / LABELMAP, folder / "masks" / LABELMAP)):
                if not (file.exists() or file.is_symlink()):
                    continue
                in_file = read_labelmap(file)
                if named is not None and in_file != named:
                    when = " (given now, or when the run began)" if source == "dataset.colours" else ""
                    raise UserError(f"{source}{when} and {file} name other colours: make them agree, or leave one out")
                if named is None:
                    named, source = in_file, str(file)
        return named, source

    def _classes_by_number(self, mapping: Mapping[int, int] | None) -> Named:
        split = "train" if "train" in self.splits else self.splits[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `split` says them
            masks = [pair.mask for pair in self._pairs_there(split) if pair.mask is not None]
        return numbered_classes(self.root, split, masks, mapping)


def _by_stem(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], str]:
    """The files with one of the suffixes; and what else is there, but for hidden files, as the end of a sentence."""
    files: dict[str, Path] = {}
    others, folders = [], 0
    for path, is_folder in listed(folder) if folder.is_dir() else ():
        if is_folder:
            folders += 1
        elif path.name == LABELMAP:
            continue
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
