"""Miniature copies of PASCAL VOC 2012, SBD, Cityscapes and ADE20K, in the originals' layout and formats; noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.io import savemat

Size = tuple[int, int]  # height, width

# labelId: (name, trainId), from the published table
CITYSCAPES_LABELS = {
    0: ("unlabeled", 255),
    1: ("ego vehicle", 255),
    2: ("rectification border", 255),
    3: ("out of roi", 255),
    4: ("static", 255),
    5: ("dynamic", 255),
    6: ("ground", 255),
    7: ("road", 0),
    8: ("sidewalk", 1),
    9: ("parking", 255),
    10: ("rail track", 255),
    11: ("building", 2),
    12: ("wall", 3),
    13: ("fence", 4),
    14: ("guard rail", 255),
    15: ("bridge", 255),
    16: ("tunnel", 255),
    17: ("pole", 5),
    18: ("polegroup", 255),
    19: ("traffic light", 6),
    20: ("traffic sign", 7),
    21: ("vegetation", 8),
    22: ("terrain", 9),
    23: ("sky", 10),
    24: ("person", 11),
    25: ("rider", 12),
    26: ("car", 13),
    27: ("truck", 14),
    28: ("bus", 15),
    29: ("caravan", 255),
    30: ("trailer", 255),
    31: ("train", 16),
    32: ("motorcycle", 17),
    33: ("bicycle", 18),
}


def rectangles(rng: np.random.Generator, size: Size, count: int) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom), inclusive, of at least a few pixels."""
    height, width = size
    tops, lefts = rng.integers(0, height - 8, count), rng.integers(0, width - 8, count)
    return [
        (int(x), int(y), int(min(width - 1, x + w)), int(min(height - 1, y + h)))
        for x, y, w, h in zip(
            lefts, tops, rng.integers(6, width // 2, count), rng.integers(6, height // 2, count), strict=True
        )
    ]


def photograph(rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
    """A colour per label, with noise, so that no two images are alike."""
    colours = np.random.default_rng(7).integers(40, 216, (256, 3))
    return (colours[label] + rng.integers(-30, 31, (*label.shape, 3))).clip(0, 255).astype(np.uint8)


def palette_png(path: Path, label: np.ndarray) -> None:
    """A mask with VOC's colours: the label's bits go to R, G, B in turn, from the highest bit of each down."""
    palette = []
    for number in range(256):
        bits = [[number >> (3 * level + channel) & 1 for level in range(3)] for channel in range(3)]
        palette += [sum(bit << (7 - level) for level, bit in enumerate(channel)) for channel in bits]
    image = Image.fromarray(label)
    image.putpalette(palette)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def voc_label(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Some objects on background, each with a void border as VOC draws it."""
    image = Image.fromarray(np.zeros(size, np.uint8))
    for box in rectangles(rng, size, 3):
        ImageDraw.Draw(image).rectangle(box, fill=int(rng.integers(1, 21)), outline=255)
    return np.array(image)


def make_voc(
    root: Path,
    train: Sequence[str] = ("2007_000032", "2007_000039", "2008_000008"),
    val: Sequence[str] = ("2007_000033", "2008_000009"),
    test: Sequence[str] = ("2008_000006",),
    unlabelled: Sequence[str] = ("2008_000002", "2008_000003", "2008_000007"),
    size: Size = (48, 64),
) -> Path:
    """ROOT/VOCdevkit/VOC2012; the photographs named by ``unlabelled`` are in no list. Returns ROOT."""
    folder = root / "VOCdevkit" / "VOC2012"
    lists = {"train": train, "val": val, "trainval": [*train, *val], "test": test}
    for split, names in lists.items():
        file = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{name}\n" for name in names))
    (folder / "JPEGImages").mkdir()
    for number, name in enumerate([*train, *val, *test, *unlabelled]):
        rng = np.random.default_rng(number)
        label = voc_label(rng, (size[0] + number, size[1]))  # the photographs have many sizes
        Image.fromarray(photograph(rng, label)).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        if name in [*train, *val]:
            palette_png(folder / "SegmentationClass" / f"{name}.png", label)
    return root


def make_sbd(
    root: Path,
    voc_root: Path,
    train: Sequence[str] = ("2007_000039", "2007_000033", "2008_000002", "2008_000007"),
    val: Sequence[str] = ("2008_000003", "2008_000009"),
) -> Path:
    """SBD below ROOT, with masks of class 20 in class 5 and lists that overlap VOC's; returns its dataset folder."""
    folder = root / "benchmark_RELEASE" / "dataset"
    (folder / "cls").mkdir(parents=True)
    (folder / "img").mkdir()
    for split, names in {"train": train, "val": val}.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            photo = voc_root / "VOCdevkit" / "VOC2012" / "JPEGImages" / f"{name}.jpg"
            (folder / "img" / photo.name).write_bytes(photo.read_bytes())
            with Image.open(photo) as image:
                label = np.full((image.height, image.width), 5, np.uint8)
            label[10:20, 5:30] = 20
            sbd_mat(folder / "cls" / f"{name}.mat", label)
    return folder


def sbd_mat(path: Path, label: np.ndarray) -> None:
    """The struct GTcls as SBD stores it: MATLAB 5, compressed, with boundaries as cells."""
    boundaries = np.empty((20, 1), object)
    for index in range(20):
        boundaries[index, 0] = (label == index + 1).astype(np.uint8)
    categories = np.array([[k] for k in np.unique(label) if k > 0], np.uint8)
    ground_truth = {"Boundaries": boundaries, "Segmentation": label, "CategoriesPresent": categories}
    savemat(path, {"GTcls": ground_truth}, format="5", do_compression=True)


def make_cityscapes(
    root: Path,
    train: int = 3,
    val: int = 2,
    test: int = 1,
    train_extra: int = 0,
    size: Size = (64, 128),
    train_ids: bool = False,
) -> Path:
    """ROOT/leftImg8bit, gtFine and, for ``train_extra``, gtCoarse; with ``train_ids`` labelTrainIds as well."""
    cities = {"train": "aachen", "val": "munster", "test": "berlin", "train_extra": "augsburg"}
    counts = {"train": train, "val": val, "test": test, "train_extra": train_extra}
    for number, (split, count) in enumerate(counts.items()):
        for index in range(count):
            rng = np.random.default_rng((number, index))
            name = f"{cities[split]}_{index:06d}_{19 + index:06d}"
            _make_street(root, split, cities[split], name, rng, size, train_ids)
    return root


def _make_street(
    root: Path, split: str, city: str, name: str, rng: np.random.Generator, size: Size, train_ids: bool
) -> None:
    """One frame: image, labelIds, instanceIds, color and polygons.json."""
    height, width = size
    labels, instances = (Image.fromarray(np.zeros(size, dtype)) for dtype in (np.uint8, np.int32))
    objects = []
    counted: dict[int, int] = {}
    # the background first, then things over it; a test image has only the car's own bonnet
    drawn = [7, 23, 11, *rng.integers(0, 34, 6).tolist(), 26, 24] if split != "test" else [1, 3]
    boxes = [(0, height // 2, width - 1, height - 1), (0, 0, width - 1, height // 2 - 1)]
    boxes += rectangles(rng, size, len(drawn) - 2)
    for label_id, box in zip(drawn, boxes, strict=True):
        instance = label_id
        if label_id in (24, 25, 26, 27, 28, 31, 32, 33):
            instance = 1000 * label_id + counted.get(label_id, 0)
            counted[label_id] = counted.get(label_id, 0) + 1
        ImageDraw.Draw(labels).rectangle(box, fill=label_id)
        ImageDraw.Draw(instances).rectangle(box, fill=instance)
        left, top, right, bottom = box
        polygon = [[left, top], [right, top], [right, bottom], [left, bottom]]
        objects.append({"label": CITYSCAPES_LABELS[label_id][0], "polygon": polygon})
    annotation = "gtCoarse" if split == "train_extra" else "gtFine"
    folder = root / annotation / split / city
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.array(labels)
    image = root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph(rng, ids)).save(image)
    labels.save(folder / f"{name}_{annotation}_labelIds.png")
    Image.fromarray(np.array(instances).astype(np.uint16)).save(folder / f"{name}_{annotation}_instanceIds.png")
    colours = np.random.default_rng(3).integers(0, 256, (34, 4), dtype=np.uint8) | np.array([0, 0, 0, 255], np.uint8)
    Image.fromarray(colours[ids]).save(folder / f"{name}_{annotation}_color.png")
    polygons = {"imgHeight": height, "imgWidth": width, "objects": objects}
    (folder / f"{name}_{annotation}_polygons.json").write_text(json.dumps(polygons))
    if train_ids:
        table = np.array([train_id for _, train_id in CITYSCAPES_LABELS.values()], np.uint8)
        Image.fromarray(table[ids]).save(folder / f"{name}_{annotation}_labelTrainIds.png")


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Coarse, so that JPEG keeps it and labels vary over the image."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), channels), np.uint8)
    return np.ascontiguousarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8))[:height, :width])


def make_ade20k(root: Path, train: int = 2) -> Path:
    """Images to train, from the last to the first, and one to validate, of 24x32 pixels; masks hold 0, 1, 150, 13."""
    rng = np.random.default_rng(0)
    mask = Image.fromarray(np.repeat(np.array([0, 1, 150, 13], np.uint8), 8)[None].repeat(24, axis=0))
    names = [f"training/ADE_train_{number:08}" for number in range(train, 0, -1)]
    for name in (*names, "validation/ADE_val_00000001"):
        for kind in ("images", "annotations"):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(root / "images" / f"{name}.jpg")
        mask.save(root / "annotations" / f"{name}.png")
    return root
