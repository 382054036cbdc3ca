"""A user's own images and masks, without code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from segdcn import MissingFileError, UserError
from segdcn.data.dataset import Color, ImageMaskFiles, ImageMaskPair, few, voc_palette

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
LAYOUT = "ROOT/train/images/NAME.jpg with ROOT/train/masks/NAME.png, and the same under ROOT/val"


class ImageFolder:
    """ROOT/<split>/images and ROOT/<split>/masks with equal stems; splits train, val and perhaps test.

    Masks are one-channel PNGs (grey or palette) whose pixels are class numbers: 0 is the first class,
    255 is ignored. Images may have different sizes.

    Args:
        palette: one RGB colour (0..255) per class; None gives the colours of PASCAL VOC's rule.

    Raises:
        FileNotFoundError: ROOT holds no split.
        ValueError: wrong class names or palette; from `split`, images and masks that do not pair.
    """

    def __init__(
        self, root: str | Path, class_names: Sequence[str], palette: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.root = Path(root)
        self.class_names = tuple(class_names)
        if not 2 <= len(self.class_names) <= 255 or len(set(self.class_names)) != len(self.class_names):
            raise UserError(
                f"class_names must be 2 to 255 different names, background included, got {list(self.class_names)}"
            )
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
        images = _by_stem(folder / "images", IMAGE_SUFFIXES)
        masks = _by_stem(folder / "masks", (".png",))
        if not images:
            raise UserError(f"{folder / 'images'} holds no image ({' '.join(IMAGE_SUFFIXES)})")
        if lonely := images.keys() - masks.keys():
            raise UserError(f"{few(lonely)} in {folder / 'images'} without a mask NAME.png in {folder / 'masks'}")
        if lonely := masks.keys() - images.keys():
            raise UserError(f"{few(lonely)} in {folder / 'masks'} without an image in {folder / 'images'}")
        pairs = [ImageMaskPair(images[stem], masks[stem], stem) for stem in sorted(images)]
        return ImageMaskFiles(pairs, num_classes=len(self.class_names))


def _checked(palette: Sequence[Sequence[int]]) -> list[Color]:
    colors = []
    for color in palette:
        if len(color) != 3 or not all(0 <= value <= 255 for value in color):
            raise UserError(f"a palette colour must be three numbers 0..255, got {list(color)}")
        red, green, blue = color
        colors.append((int(red), int(green), int(blue)))
    return colors


def _by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in files:
                raise UserError(f"{files[path.stem]} and {path.name} have the same name: keep one of them")
            files[path.stem] = path
    return files
