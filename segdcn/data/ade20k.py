"""ADE20K as the scene parsing challenge of 2016 gives it out, SceneParse150 (Zhou et al. 2017)."""

from __future__ import annotations

from pathlib import Path

from segdcn.data.dataset import IGNORE_INDEX, Color, ImageMaskFiles, ImageMaskPair, check_count, few, listed
from segdcn.errors import MissingFileError, UserError

NAMES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway,
case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine,
hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane,
dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher,
screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
monitor, bulletin board, shower, radiator, glass, clock, flag
"""
COLOURS = """
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652
8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0
ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff
8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff
00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff
ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff
00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500
0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff
b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""
FOLDERS = {"train": "training", "val": "validation"}
IMAGES = {"train": 20_210, "val": 2_000}  # as published


class ADE20K:
    """Photographs of scenes, most of some 500x680 pixels, 150 classes; train 20,210 and val 2,000 images.

    Reads images/training/NAME.jpg with annotations/training/NAME.png, and validation likewise. A mask's numbers are 1
    to 150; 0, which is everything else, is ignored.

    Args:
        root: ADEChallengeData2016, or a folder that holds it.

    Raises:
        FileNotFoundError: no such folders there; from `split`, an image without its mask or a mask without its image.
    """

    class_names = tuple(name.strip() for name in NAMES.replace("\n", " ").split(","))
    palette: tuple[Color, ...] = tuple(
        (colour[0], colour[1], colour[2]) for colour in map(bytes.fromhex, COLOURS.split())
    )

    def __init__(self, root: str | Path) -> None:
        folders = [Path(root, "ADEChallengeData2016"), Path(root)]
        found = [folder for folder in folders if (folder / "annotations").is_dir() and (folder / "images").is_dir()]
        if not found:
            raise MissingFileError(
                f"no ADE20K in {root}: expected ADEChallengeData2016 with images/ and annotations/ in it; unpack"
                " ADEChallengeData2016.zip of data.csail.mit.edu/places/ADEchallenge and pass dataset.root=PATH"
            )
        self.root = found[0]
        self.splits = tuple(name for name, folder in FOLDERS.items() if (self.root / "images" / folder).is_dir())

    def split(self, name: str) -> ImageMaskFiles:
        """The pairs of one split, by name; their files are read when they are indexed."""
        if name not in self.splits:
            raise UserError(f"ADE20K in {self.root} has no split {name!r}, only {', '.join(self.splits)}")
        images, masks = (
            {path.stem: path for path, _ in listed(self.root / kind / FOLDERS[name]) if path.suffix == suffix}
            for kind, suffix in (("images", ".jpg"), ("annotations", ".png"))
        )
        if lonely := images.keys() ^ masks.keys():
            raise MissingFileError(
                f"{few(lonely)} of {FOLDERS[name]} in {self.root} without its mask, or a mask without its image"
            )
        if not images:
            raise MissingFileError(f"split {name!r} of ADE20K in {self.root} is empty")
        check_count(f"split {name!r} of ADE20K in {self.root}", len(images), IMAGES[name])
        pairs = [ImageMaskPair(image, masks[stem], stem) for stem, image in sorted(images.items())]
        numbers = {0: IGNORE_INDEX, **{number + 1: number for number in range(len(self.class_names))}}
        return ImageMaskFiles(pairs, num_classes=len(self.class_names), mapping=numbers)
