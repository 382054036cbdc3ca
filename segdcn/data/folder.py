"""A user's own images and masks, without code."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from segdcn import MissingFileError, UserError
from segdcn.data.dataset import (
    Color,
    ImageMaskFiles,
    ImageMaskPair,
    checked_bits,
    checked_mapping,
    checked_names,
    few,
    listed,
    passed_over,
    voc_palette,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".png",)
LAYOUT = "ROOT/train/images/NAME.jpg with ROOT/train/masks/NAME.png, and the same under ROOT/val"


class ImageFolder:
    """ROOT/<split>/images and ROOT/<split>/masks with equal stems; splits train, val and perhaps test.

    Masks are one-channel PNGs (grey or palette) whose pixels are class numbers: 0 is the first class,
    255 is ignored. Images may have different sizes. Files of other kinds are passed over, with a warning.

    Args:
        class_names: texts, or numbers, which are taken as they are typed.
        palette: one RGB colour (0..255) per class; None gives the colours of PASCAL VOC's rule.
        mapping, bits: see `ImageMaskFiles`.

    Raises:
        FileNotFoundError: ROOT holds no split.
        ValueError: wrong class names, palette, mapping or bits; from `split`, images and masks that do not pair.
    """

    def __init__(
        self,
        root: str | Path,
        class_names: Sequence[object],
        palette: Sequence[Sequence[int]] | None = None,
        mapping: Mapping[int, int] | None = None,
        bits: int | None = None,
    ) -> None:
        self.root = Path(root)
        self.class_names = checked_names(class_names)
        self.mapping = checked_mapping(mapping, len(self.class_names))
        self.bits = checked_bits(bits)
        self.palette = voc_palette(len(self.class_names)) if palette is None else _checked(palette)
        if len(self.palette) != len(self.class_names):
            raise UserError(
                f"palette must hold one colour per class: {len(self.class_names)} classes,"
                f" got {len(self.palette)} colours"
            )
        self.splits = [name for name in ("train", "val", "test") if (self.root / name / "images").is_dir()]
        if not self.splits:
            raise MissingFileError(f"no images in {self.root}: expected {LAYOUT}; pass the folder as dataset.root=PATH")

    def split(self, name: str) -> ImageMaskFiles:
        """The pairs of one split, by name; their files are read when they are indexed."""
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
        pairs = [ImageMaskPair(images[stem], masks[stem], stem) for stem in sorted(images)]
        return ImageMaskFiles(pairs, len(self.class_names), self.mapping, self.bits)


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
