"""Annotations as programs for drawing them write them: COCO's JSON, and labelme's, a file for each image.

Everything is read and looked at before a pixel is drawn; what is wrong is told in one line each.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from segdcn.data.dataset import DataError, file_errors
from segdcn.data.folder import IMAGE_SUFFIXES
from segdcn.data.polygons import Patch, Points, Size, disc_pixels, polygon_pixels, run_lengths, run_pixels
from segdcn.errors import MissingFileError, UserError, is_lasting

IGNORED_LABEL = "__ignore__"  # labelme's word
FARTHEST = 1e7  # pixels; what is farther is no coordinate
_ORIENTATION, _WIDTH, _HEIGHT = 0x0112, 256, 257  # EXIF's and TIFF's tags
_INVERSE = {6: 8, 8: 6}  # of the other orientations: themselves


class Region(NamedTuple):
    """What one annotation covers.

    class_name: None where it is to be ignored.
    draw: its pixels in an image of a size (H, W).
    """

    class_name: str | None
    draw: Callable[[Size], Patch]


@dataclass
class AnnotatedImage:
    """An image file and its annotations.

    name: of the file as the annotations call it, with "/" between folders.
    size: (H, W) of the picture that the annotations were drawn on.
    turn: EXIF's orientation, which turns the mask into the pixels as they are stored; 1 does nothing.
    """

    path: Path
    name: str
    size: Size
    turn: int
    regions: list[Region] = field(default_factory=list)


@dataclass
class Annotations:
    """What was read.

    kind: "COCO" or "labelme".
    class_names: in order, COCO's by the categories' ids, labelme's by name.
    left_out: how many annotations have no region, by the reason.
    crowds: how many have no class since they are of a crowd.
    problems: what must be mended, a line each.
    strangers: images beside the annotated ones of which nothing is said.
    """

    kind: str
    class_names: list[str]
    images: list[AnnotatedImage] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    crowds: int = 0
    problems: list[str] = field(default_factory=list)
    strangers: int = 0


def read_annotations(
    path: Path, image_root: Path | None = None, outside: float = 2.0, ignore_crowd: bool = True
) -> Annotations:
    """Read COCO's JSON file, labelme's, or a folder of either with those within it.

    Args:
        image_root: where the images are; None takes the folder of the JSON file.
        outside: pixels that a shape may reach beyond its image.
        ignore_crowd: whether regions with COCO's iscrowd have no class.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: a file that holds no annotations of either kind.
    """
    if image_root is not None and not image_root.is_dir():
        raise MissingFileError(f"there is no folder {image_root}: give that of the images with image_root=PATH")
    files = _json_files(path)
    only = _load(files[0]) if len(files) == 1 else {"shapes": []}  # COCO's is one file, labelme's are any number
    if "shapes" not in only:
        found = _read_coco(files[0], only, image_root or files[0].parent, outside, ignore_crowd)
    else:
        found = _read_labelme(files, path if path.is_dir() else path.parent, image_root, outside)
    taken = {one.path.resolve() for one in found.images}
    for folder in {image_root} if image_root else {one.path.parent for one in found.images}:
        beside = (one for one in folder.iterdir() if one.suffix.lower() in IMAGE_SUFFIXES)
        found.strangers += sum(one.resolve() not in taken for one in beside if not one.name.startswith("."))
    if not found.images and not found.problems:
        found.problems.append(f"{path} lists no image")
    if not found.class_names and found.left_out and not found.problems:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.left_out.most_common())
        found.problems.append(f"{path} has no annotation that can be drawn: all are left out, {reasons}")
    return found


def _json_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.rglob("*.json"))
        files = [one for one in files if not any(part.startswith(".") for part in one.relative_to(path).parts)]
        if not files:
            raise MissingFileError(f"no .json in {path}: give COCO's file, or labelme's folder, as annotations=PATH")
        return files
    if not path.is_file():
        raise MissingFileError(f"there is no {path}: give COCO's JSON file, or labelme's folder, as annotations=PATH")
    return [path]


def _load(path: Path) -> dict[str, Any]:
    """A JSON file's object; UserError that names it where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no Unicode
        if isinstance(error, OSError) and not is_lasting(error):
            raise
        raise DataError(f"{path} is no JSON that can be read: {error}") from error
    if isinstance(content, dict) and ("shapes" in content or {"images", "annotations"} <= content.keys()):
        return content
    keys = list(content) if isinstance(content, dict) else None
    held = "it is no object" if keys is None else f"it holds {', '.join(map(str, keys[:5])) or 'nothing'}"
    lacks = [key for key in ("images", "annotations") if keys is not None and key not in keys]
    raise DataError(
        f"{path} is neither COCO's JSON, which has images, annotations and categories, nor labelme's, which has shapes:"
        f" {held}{f', and lacks {lacks[0]}' if len(lacks) == 1 else ''}"
    )


# --- COCO -------------------------------------------------------------------------------------------------------------


def _read_coco(
    file: Path, content: Mapping[str, Any], image_root: Path, outside: float, ignore_crowd: bool
) -> Annotations:
    found = Annotations("COCO", [])
    categories: dict[Any, str] = {}
    for entry in _entries(file, content, "categories", found):
        with _told(found, f"{file}: category {entry.get('id')}"):
            if (number := _id(entry, "id")) in categories:
                raise UserError("stands there twice")
            categories[number] = _name(_value(entry, "name", str))
    if found.problems:  # each annotation would be of a category that is not there
        return found
    by_id = sorted(categories, key=lambda one: (isinstance(one, str), one))
    found.class_names = list(dict.fromkeys(categories[one] for one in by_id))

    images: dict[Any, AnnotatedImage | None] = {}
    for entry in _entries(file, content, "images", found):
        with _told(found, f"{file}: image {entry.get('id')}"):
            number = _id(entry, "id")
            if number in images:
                raise UserError("stands there twice")
            images[number] = None  # its annotations are not strays
            name = _value(entry, "file_name", str).replace("\\", "/")
            size = (_value(entry, "height", int), _value(entry, "width", int))
            paths = [image_root / name, image_root / PurePosixPath(name).name]
            images[number] = _annotated_image(paths, name, size, drawn_upright=False)
    found.images = [one for one in images.values() if one is not None]

    for entry in _entries(file, content, "annotations", found):
        with _told(found, f"{file}: annotation {entry.get('id')}"):
            if (number := _id(entry, "image_id")) not in images:
                raise UserError(f"is of image {number}, which is not among the images")
            if (category := _id(entry, "category_id")) not in categories:
                raise UserError(f"is of category {category}, which is not among the categories")
            if (image := images[number]) is None:
                continue  # told already
            drawn = _segmentation(entry.get("segmentation"), image, outside)
            if callable(drawn):
                crowd = ignore_crowd and entry.get("iscrowd") == 1
                found.crowds += crowd
                class_name = categories[category]
                image.regions.append(Region(None if crowd or class_name == IGNORED_LABEL else class_name, drawn))
            else:
                found.left_out[drawn] += 1
    return found


def _segmentation(value: Any, image: AnnotatedImage, outside: float) -> Callable[[Size], Patch] | str:
    """How a segmentation is drawn, or the reason why it is left out."""
    if not value:
        return "without a polygon (a box alone)"
    if isinstance(value, dict):
        size = value.get("size")
        if size != list(image.size):
            raise UserError(f"has run lengths of size {size}, and its image {image.name} is {list(image.size)}")
        return partial(run_pixels, run_lengths(value.get("counts", ()), image.size))
    if not isinstance(value, list):
        raise UserError("has a segmentation that is neither polygons nor run lengths")
    polygons = [_points(one) for one in ([value] if isinstance(value[0], int | float) else value)]
    return _drawn_polygons(polygons, image, outside)


# --- labelme ----------------------------------------------------------------------------------------------------------


def _read_labelme(files: Sequence[Path], root: Path, image_root: Path | None, outside: float) -> Annotations:
    found = Annotations("labelme", [])
    names: set[str] = set()
    for file in files:
        with _told(found, ""):
            content = _load(file)
            if "shapes" not in content:
                raise UserError(f"{file} is COCO's JSON and lies among labelme's: give it by its name, or move it")
            with _prefixed(f"{file}:"):
                image = _labelme_image(file, content, root, image_root)
            found.images.append(image)
            for number, shape in enumerate(_entries(file, content, "shapes", found)):
                with _told(found, f"{file}: shape {number} ({shape.get('label')})"):
                    class_name = _name(_value(shape, "label", str))
                    drawn = _shape(shape, image, outside)
                    if callable(drawn):
                        image.regions.append(Region(None if class_name == IGNORED_LABEL else class_name, drawn))
                        names.add(class_name)
                    else:
                        found.left_out[drawn] += 1
            found.class_names = sorted(names - {IGNORED_LABEL})
    return found


def _labelme_image(file: Path, content: Mapping[str, Any], root: Path, image_root: Path | None) -> AnnotatedImage:
    given = _value(content, "imagePath", str).replace("\\", "/")
    name = PurePosixPath(given).name
    below = file.parent.relative_to(root)
    if image_root is None:
        paths = [file.parent / given, file.parent / name]
    else:
        paths = [image_root / below / name, image_root / name]
    keys = ("imageHeight", "imageWidth")
    told = any(content.get(key) is not None for key in keys)  # early versions tell none
    size = (_value(content, keys[0], int), _value(content, keys[1], int)) if told else None
    return _annotated_image(paths, (below / name).as_posix(), size, drawn_upright=True)


def _shape(shape: Mapping[str, Any], image: AnnotatedImage, outside: float) -> Callable[[Size], Patch] | str:
    """How a shape is drawn, or the reason why it is left out."""
    kind = shape.get("shape_type") or "polygon"
    points = _points(shape.get("points"))
    if kind == "polygon":
        return _drawn_polygons([points], image, outside)
    if kind == "rectangle" and len(points) in (2, 4):  # opposite corners, or all
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        return _drawn_polygons([corners], image, outside)
    if kind == "circle" and len(points) == 2:  # the centre, and a point of the edge
        _check_inside(points[:1], image, outside)  # the disc itself is cut off
        return partial(disc_pixels, points[0], float(np.hypot(*(points[1] - points[0]))))
    if kind == "mask" and len(points) == 2:
        _check_inside(points, image, outside)
        left, top = points[0].astype(int).tolist()
        encoded = _value(shape, "mask", str)
        with file_errors("has a mask that"), Image.open(io.BytesIO(base64.b64decode(encoded))) as stored:
            inside = np.array(stored.convert("L")) > 0
        if min(top, left) < 0 or top + inside.shape[0] > image.size[0] or left + inside.shape[1] > image.size[1]:
            raise UserError(f"has a mask that does not lie within its image {image.name}")
        return partial(_at, Patch(top, left, inside))
    if kind in ("rectangle", "circle", "mask"):
        raise UserError(f"is a {kind} of {len(points)} points")
    return f"that are no area ({kind})"


def _at(patch: Patch, _: Size) -> Patch:
    return patch


# --- both -------------------------------------------------------------------------------------------------------------


@contextmanager
def _told(found: Annotations, place: str) -> Iterator[None]:
    """What is wrong with one entry is a line among the problems; the others are looked at all the same."""
    try:
        with _prefixed(place):
            yield
    except UserError as error:
        found.problems.append(str(error))


@contextmanager
def _prefixed(place: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise DataError(f"{place} {error}".lstrip()) from error


def _entries(file: Path, content: Mapping[str, Any], key: str, found: Annotations) -> Iterator[Mapping[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list):
        found.problems.append(f"{file} has no list of {key}")
        return
    for number, entry in enumerate(entries):
        if isinstance(entry, dict):
            yield entry
        else:
            found.problems.append(f"{file}: entry {number} of {key} is no object")


def _value(entry: Mapping[str, Any], key: str, kind: type) -> Any:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, kind) or not value:
        words = {str: "a text", int: "a whole number above 0"}
        raise UserError(f"has no {key}, which must be {words[kind]}: got {value!r}")
    return value


def _id(entry: Mapping[str, Any], key: str) -> int | str:
    value = entry.get(key)
    if not isinstance(value, int | str):
        raise UserError(f"has no {key}: got {value!r}")
    return value


def _name(text: str) -> str:
    """A class's name as a line of classes.txt."""
    name = " ".join(text.replace("\ufeff", " ").split())
    if not name:  # a blank line there would be passed over, and each class after it be another
        raise UserError(f"has a name that is blank: {text!r}")
    return name


def _points(value: Any) -> Points:
    """Corners, of [x, y, x, y, ...] or [[x, y], ...]."""
    try:
        points = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.full((1, 1), np.nan)
    if points.ndim == 1 and len(points) % 2 == 0:
        points = points.reshape(-1, 2)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise UserError("has points that are not pairs of numbers")
    if (np.abs(points) > FARTHEST).any():
        raise UserError(f"has a point at {np.abs(points).max():.3g} pixels, which is in no image")
    return points


def _drawn_polygons(polygons: Sequence[Points], image: AnnotatedImage, outside: float) -> Callable[[Size], Patch] | str:
    for points in polygons:
        _check_inside(points, image, outside)
    areas = [points for points in polygons if len(points) > 2]
    return partial(polygon_pixels, areas) if areas else "of fewer than three points"


def _check_inside(points: Points, image: AnnotatedImage, outside: float) -> None:
    if not len(points):
        return
    height, width = image.size
    beyond = max(-points.min(), (points - (width, height)).max())
    if beyond > outside:
        raise UserError(
            f"reaches {math.ceil(beyond):,} pixels beyond its image {image.name} ({width}x{height}, width x height):"
            f" mend it, or add outside={math.ceil(beyond)} to cut off what lies outside"
        )


def _annotated_image(paths: Sequence[Path], name: str, size: Size | None, drawn_upright: bool) -> AnnotatedImage:
    """An image, found and held against the size that its annotations tell.

    drawn_upright: whether the program shows images as EXIF's orientation asks, where the size does not tell.
    """
    path = next((one for one in paths if os.path.isfile(one)), None)  # False for what can be no name
    if path is None:
        tried = " or ".join(dict.fromkeys(map(str, paths)))
        raise UserError(f"has no file {tried}: give the folder of the images with image_root=PATH")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"is {path}, whose kind is not read ({' '.join(IMAGE_SUFFIXES)}): convert it")
    with file_errors(path), Image.open(path) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # whose size may be given as turned
            width, height = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    stored = (height, width)
    if orientation not in range(2, 9):
        orientation = 1
    upright = (width, height) if orientation >= 5 else stored
    if size not in (None, stored, upright):
        raise UserError(
            f"is given as {size[1]}x{size[0]} pixels (width x height), but {path} is {width}x{height}:"
            " annotations must be of the images that are given"
        )
    if size is None or stored == upright:
        if orientation > 1 and not drawn_upright:
            raise UserError(
                f"is {path}, which asks to be turned (EXIF orientation {orientation}): whether its annotations were"
                " drawn on the turned image cannot be told; apply the rotation to its pixels and take the tag out"
            )
        turn = orientation
    else:
        turn = orientation if size == upright else 1
    return AnnotatedImage(path, name, upright if turn > 1 else stored, _INVERSE.get(turn, turn))
