"""Cityscapes (Cordts et al. 2016), as it is distributed."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, NamedTuple

from segdcn.data.dataset import IGNORE_INDEX, Color, ImageMaskFiles, ImageMaskPair, check_count, few
from segdcn.data.instance_maps import InstanceMaps
from segdcn.errors import MissingFileError, UserError

IMAGES = {"train": 2975, "val": 500, "test": 1525}  # as published


class _Class(NamedTuple):
    name: str
    label_id: int
    category: str
    color: Color


# In the order of the trainIds 0..18; all other labelIds (0..33) are ignored.
_CLASSES = (
    _Class("road", 7, "flat", (128, 64, 128)),
    _Class("sidewalk", 8, "flat", (244, 35, 232)),
    _Class("building", 11, "construction", (70, 70, 70)),
    _Class("wall", 12, "construction", (102, 102, 156)),
    _Class("fence", 13, "construction", (190, 153, 153)),
    _Class("pole", 17, "object", (153, 153, 153)),
    _Class("traffic light", 19, "object", (250, 170, 30)),
    _Class("traffic sign", 20, "object", (220, 220, 0)),
    _Class("vegetation", 21, "nature", (107, 142, 35)),
    _Class("terrain", 22, "nature", (152, 251, 152)),
    _Class("sky", 23, "sky", (70, 130, 180)),
    _Class("person", 24, "human", (220, 20, 60)),
    _Class("rider", 25, "human", (255, 0, 0)),
    _Class("car", 26, "vehicle", (0, 0, 142)),
    _Class("truck", 27, "vehicle", (0, 0, 70)),
    _Class("bus", 28, "vehicle", (0, 60, 100)),
    _Class("train", 31, "vehicle", (0, 80, 100)),
    _Class("motorcycle", 32, "vehicle", (0, 0, 230)),
    _Class("bicycle", 33, "vehicle", (119, 11, 32)),
)
_TO_TRAIN_ID = dict.fromkeys(range(34), IGNORE_INDEX) | {row.label_id: k for k, row in enumerate(_CLASSES)}


class Cityscapes:
    """2048x1024 street scenes, 19 classes; train 2,975, val 500, test 1,525 images, and train_extra with coarse labels.

    Reads ROOT/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with ROOT/gtFine/SPLIT/CITY/*_gtFine_labelIds.png, or
    *_gtFine_labelTrainIds.png where a split has no labelIds. Names are CITY_SEQ_FRAME. The test split's labels
    are not published: all its pixels are ignored.

    Args:
        coarse: train on train_extra with its coarse labels (gtCoarse) as well.

    Attributes:
        categories: the names of each category's classes.
        object_classes: those that are annotated object by object.
        label_ids: the labelId of each class, which the benchmark's server takes.

    Raises:
        FileNotFoundError: ROOT holds no Cityscapes; from `split`, an image without labels or the reverse.
    """

    class_names = tuple(row.name for row in _CLASSES)
    palette = tuple(row.color for row in _CLASSES)
    label_ids = tuple(row.label_id for row in _CLASSES)
    object_classes = tuple(row.name for row in _CLASSES if row.category in ("human", "vehicle"))
    categories: ClassVar[dict[str, tuple[str, ...]]] = {
        category: tuple(row.name for row in _CLASSES if row.category == category)
        for category in dict.fromkeys(row.category for row in _CLASSES)
    }

    def __init__(self, root: str | Path, coarse: bool = False) -> None:
        self.root = Path(root)
        self.coarse = coarse
        there = {
            split
            for split in ("train", "val", "test", "train_extra")
            if (self.root / "leftImg8bit" / split).is_dir()
            and (split == "test" or (self.root / _annotation(split) / split).is_dir())
        }
        if not there:
            raise MissingFileError(
                f"no Cityscapes in {self.root}: expected leftImg8bit/train, gtFine/train and the same for val; unpack"
                " leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com into one folder"
                " and pass dataset.root=PATH"
            )
        if coarse and "train_extra" not in there:
            raise MissingFileError(
                f"coarse=true needs leftImg8bit/train_extra and gtCoarse/train_extra in {self.root}: unpack"
                " leftImg8bit_trainextra.zip and gtCoarse.zip there"
            )
        # with coarse=true train_extra is a part of train
        self.splits = tuple(
            s for s in ("train", "val", "test", "train_extra") if s in there and not (coarse and s == "train_extra")
        )

    def split(self, name: str) -> ImageMaskFiles:
        """The images of one split, by city and name; their files are read when they are indexed."""
        pairs, kind = self._pairs(name)
        if name == "train" and self.coarse:
            extra, extra_kind = self._pairs("train_extra")
            if kind != extra_kind:
                raise UserError(f"{self.root} has {kind} in gtFine but {extra_kind} in gtCoarse: keep one kind")
            pairs += extra
        mapping = _TO_TRAIN_ID if kind == "labelIds" else None
        return ImageMaskFiles(pairs, len(_CLASSES), mapping)

    def instances(self, name: str) -> InstanceMaps | None:
        """Which pixels are one object, for each image of a split; None unless its instanceIds files are all there."""
        masks = [pair.mask for pair in self.split(name).pairs if pair.mask is not None]
        files = [mask.with_name(mask.name.rpartition("_")[0] + "_instanceIds.png") for mask in masks]
        # 1000 · labelId + number; lower numbers are labelIds of what is not told apart, a crowd for example
        return InstanceMaps(files, lowest=1000) if files and all(file.is_file() for file in files) else None

    def _pairs(self, name: str) -> tuple[list[ImageMaskPair], str]:
        """The files of one split, and which kind of labels they have."""
        if name not in self.splits and not (name == "train_extra" and self.coarse):
            raise UserError(f"Cityscapes in {self.root} has no split {name!r}, only {', '.join(self.splits)}")
        annotation = _annotation(name)
        images = _by_name(self.root / "leftImg8bit" / name, "leftImg8bit")
        if not images:
            raise MissingFileError(f"{self.root / 'leftImg8bit' / name} holds no CITY/*_leftImg8bit.png")
        labels, kind = _by_name(self.root / annotation / name, f"{annotation}_labelIds"), "labelIds"
        if not labels:
            labels, kind = _by_name(self.root / annotation / name, f"{annotation}_labelTrainIds"), "labelTrainIds"
        if name != "test" and (lonely := images.keys() - labels.keys()):
            raise MissingFileError(
                f"{few(lonely)} in {self.root / 'leftImg8bit' / name} without CITY/*_{annotation}_{kind}.png in"
                f" {self.root / annotation / name}: unpack {annotation}'s archive again"
            )
        if lonely := labels.keys() - images.keys():
            raise MissingFileError(
                f"{few(lonely)} in {self.root / annotation / name} without an image in"
                f" {self.root / 'leftImg8bit' / name}: unpack leftImg8bit's archive again"
            )
        if name in IMAGES:
            check_count(f"split {name!r} of Cityscapes in {self.root}", len(images), IMAGES[name])
        return [ImageMaskPair(path, labels.get(key), key) for key, path in images.items()], kind


def _annotation(split: str) -> str:
    return "gtCoarse" if split == "train_extra" else "gtFine"


def _by_name(folder: Path, ending: str) -> dict[str, Path]:
    """The files CITY/CITY_SEQ_FRAME_<ending>.png below a folder, by CITY_SEQ_FRAME in sorted order."""
    paths = [path for path in folder.glob(f"*/*_{ending}.png") if not path.name.startswith(".")]
    return dict(sorted((path.name.removesuffix(f"_{ending}.png"), path) for path in paths))
