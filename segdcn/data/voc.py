"""PASCAL VOC 2012 (Everingham et al. 2010), alone or with the annotations of SBD (Hariharan et al. 2011)."""

from __future__ import annotations

from pathlib import Path

from segdcn.data.dataset import ImageMaskFiles, ImageMaskPair, check_count, few, listed, read_list, voc_palette
from segdcn.data.instance_maps import InstanceMaps
from segdcn.errors import MissingFileError, UserError

IMAGES = {"train": 1464, "val": 1449, "test": 1456}  # as published
TRAIN_AUG_IMAGES = 10_582


class VOC:
    """Photographs of about 500x375 pixels, 21 classes; train 1,464 or 10,582 with SBD, val 1,449, test 1,456 images.

    Reads VOC2012/ImageSets/Segmentation/SPLIT.txt, JPEGImages/NAME.jpg and SegmentationClass/NAME.png. The test
    split (where its list is) has no published labels: all its pixels are ignored.

    Args:
        root: VOC2012 itself, or a folder that holds it or VOCdevkit/VOC2012.
        sbd_root: SBD's benchmark_RELEASE/dataset. With it the train split is train_aug = (VOC train + SBD train +
            SBD val) - VOC val, by both data sets' lists. VOC's own mask wins where it has one; SBD's come from
            VOC2012/SegmentationClassAug, which `scripts/prepare_voc.py` makes of the .mat files.

    Raises:
        FileNotFoundError: no VOC 2012 or no SBD there; from `split`, a listed file that is missing.
    """

    class_names = (
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    )
    palette = tuple(voc_palette(len(class_names)))

    def __init__(self, root: str | Path, sbd_root: str | Path | None = None) -> None:
        folders = [Path(root, *below) for below in (("VOCdevkit", "VOC2012"), ("VOC2012",), ())]
        found = [folder for folder in folders if (folder / "ImageSets" / "Segmentation").is_dir()]
        if not found:
            raise MissingFileError(
                f"no VOC 2012 in {root}: expected VOCdevkit/VOC2012/ImageSets/Segmentation in it; unpack"
                " VOCtrainval_11-May-2012.tar of host.robots.ox.ac.uk/pascal/VOC/voc2012 and pass dataset.root=PATH"
            )
        self.root = found[0]
        self.sbd_root = Path(sbd_root) if sbd_root is not None else None
        self.splits = tuple(name for name in IMAGES if self.list_file(name).is_file())

    def list_file(self, name: str) -> Path:
        """The list of one split's names."""
        return self.root / "ImageSets" / "Segmentation" / f"{name}.txt"

    @property
    def sbd_masks(self) -> Path:
        """Where `scripts/prepare_voc.py` writes SBD's masks."""
        return self.root / "SegmentationClassAug"

    def sbd_names(self) -> list[str]:
        """SBD's part of train_aug: (SBD train + SBD val) - VOC val - VOC train, sorted.

        Raises: FileNotFoundError where SBD's lists are missing.
        """
        assert self.sbd_root is not None
        lists = [self.sbd_root / "train.txt", self.sbd_root / "val.txt"]
        if missing := [file for file in lists if not file.is_file()]:
            raise MissingFileError(
                f"{missing[0]} does not exist: sbd_root must be the folder benchmark_RELEASE/dataset of SBD's"
                " benchmark.tgz, with img/, cls/, train.txt and val.txt"
            )
        own = {name for split in ("train", "val") for name in read_list(self.list_file(split)).split()}
        return sorted({name for file in lists for name in read_list(file).split()} - own)

    def split(self, name: str) -> ImageMaskFiles:
        """The images of one split in the order of its list; their files are read when they are indexed."""
        if name not in self.splits:
            raise UserError(f"VOC 2012 in {self.root} has no split {name!r}, only {', '.join(self.splits)}")
        names = read_list(self.list_file(name)).split()
        if not names:
            raise MissingFileError(f"{self.list_file(name)} names no image")
        images = {stem: self.root / "JPEGImages" / f"{stem}.jpg" for stem in names}
        masks = {stem: self.root / "SegmentationClass" / f"{stem}.png" for stem in names if name != "test"}
        if name == "train" and self.sbd_root is not None:
            photographs = _stems(self.root / "JPEGImages")
            for stem in self.sbd_names():
                folder = self.root / "JPEGImages" if stem in photographs else self.sbd_root / "img"
                images[stem] = folder / f"{stem}.jpg"
                masks[stem] = self.sbd_masks / f"{stem}.png"
        self._check_exist([*images.values(), *masks.values()])
        published = TRAIN_AUG_IMAGES if name == "train" and self.sbd_root is not None else IMAGES[name]
        check_count(f"split {name!r} of VOC 2012 in {self.root}", len(images), published)
        pairs = [ImageMaskPair(image, masks.get(stem), stem) for stem, image in images.items()]
        return ImageMaskFiles(pairs, num_classes=len(self.class_names))

    def instances(self, name: str) -> InstanceMaps | None:
        """Which pixels are one object, for each image of a split; None unless VOC's SegmentationObject has them all."""
        files = [self.root / "SegmentationObject" / f"{pair.name}.png" for pair in self.split(name).pairs]
        there = _stems(self.root / "SegmentationObject")
        return InstanceMaps(files) if all(file.stem in there for file in files) else None

    def _check_exist(self, files: list[Path]) -> None:
        """One look into each folder instead of one at each of 20,000 files, which takes minutes on a network disk."""
        existing = {folder: _stems(folder) for folder in {file.parent for file in files}}
        for folder, stems in existing.items():
            if missing := [file.name for file in files if file.parent == folder and file.stem not in stems]:
                command = f"run python scripts/prepare_voc.py {self.root} --sbd {self.sbd_root}"
                mend = command if folder == self.sbd_masks else "unpack its archive again"
                raise MissingFileError(f"{few(missing)} of the lists missing in {folder}: {mend}")


def _stems(folder: Path) -> set[str]:
    return {path.stem for path, _ in listed(folder)} if folder.is_dir() else set()
