"""Miniature data sets of boxes in the forms of PASCAL VOC and COCO, written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def painted(height: int, width: int, boxes: Sequence[tuple[int, int, int, int]]) -> NDArray[np.uint8]:
    """A black image with a rectangle of one red for each box in VOC's numbers: its pixels counted from 1."""
    image = np.zeros((height, width, 3), np.uint8)
    for number, (first_column, first_row, last_column, last_row) in enumerate(boxes, start=1):
        for row in range(first_row, last_row + 1):
            for column in range(first_column, last_column + 1):
                image[row - 1, column - 1] = (20 * number, 200, 100)
    return image


def voc_object(name: str, *corners: object, difficult: int = 0, inside: str = "") -> str:
    xmin, ymin, xmax, ymax = corners
    return (
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>{inside}"
        f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"
    )


def write_voc(
    root: Path,
    name: str,
    image: NDArray[np.uint8],
    objects: Sequence[str],
    suffix: str = ".jpg",
    filename: str | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """An image and its XML file; ``size`` is what that tells, height and width."""
    height, width = size or image.shape[:2]
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / "JPEGImages" / f"{name}{suffix}")
    (root / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><folder>VOC</folder><filename>{filename or name + suffix}</filename>"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{''.join(objects)}</annotation>"
    )


def voc_folder(root: Path, **lists: Sequence[str]) -> None:
    """The lists of ImageSets/Main."""
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    for name, stems in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def write_coco(
    root: Path, name: str, images: dict[int, str], categories: dict[int, str], annotations: Sequence[dict[str, Any]]
) -> None:
    """A JSON file and its images of 40x30 pixels, each of another colour."""
    for folder in ("annotations", name):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, file in images.items():
        Image.new("RGB", (40, 30), (number % 256, number // 256, len(name))).save(root / name / file)
    content = {
        "info": {},
        "categories": [{"id": number, "name": text} for number, text in categories.items()],
        "images": [{"id": number, "file_name": file, "width": 40, "height": 30} for number, file in images.items()],
        "annotations": annotations,
    }
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
