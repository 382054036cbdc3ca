"""Pictures of detections, and of where the bins of deformable pooling lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from segdcn.data.dataset import Array
from segdcn.detection.samples import BoxSample, Detections
from segdcn.drawing.fonts import draw_text, drawable, text_width
from segdcn.drawing.panels import OUTLINE, RED, SWATCH_SIZE, resize, sheet, swatch
from segdcn.ops import DeformPSRoIPool, DeformRoIPool

SHOWN_SCORE = 0.5
"""Of the detections that are drawn, the least score."""

Colours = Sequence[Sequence[int]]


def boxes_picture(sample: BoxSample, found: Detections, class_names: Sequence[str], palette: Colours) -> Image.Image:
    """The truth and the detections of an image side by side; ignored objects are thin."""
    objects, shown = sample.objects, found.of_score(SHOWN_SCORE)
    truth = outlined(sample.image, objects.boxes, objects.labels, palette, widths=np.where(objects.ignored, 1, 3))
    scores = [f"{score:.2f}" for score in shown.scores]
    detected = outlined(sample.image, shown.boxes, shown.labels, palette, scores)
    present = sorted({*objects.labels.tolist(), *shown.labels.tolist()})
    names = drawable(class_names)
    legend = [(names[label - 1], swatch(palette[label - 1], SWATCH_SIZE)) for label in present]
    captions = (f"truth, {len(objects.labels)} objects", f"detections of {SHOWN_SCORE:g} or more, {len(shown.scores)}")
    return sheet(list(zip(captions, (truth, detected), strict=True)), legend, sample.name)


def outlined(
    image: NDArray[np.uint8], boxes: Any, labels: Any, palette: Colours, texts: Sequence[str] = (), widths: Any = 3
) -> NDArray[np.uint8]:
    """An image with boxes in their classes' colours; a small one is enlarged, a large one shrunk, to a tile's size.

    texts: of each box.  widths: of their lines in pixels, of all or of each.
    """
    picture = Image.fromarray(resize(image, Image.Resampling.BICUBIC).copy())
    scale = picture.width / image.shape[1]
    _draw_boxes(picture, np.asarray(boxes, float).reshape(-1, 4) * scale, labels, palette, texts, widths)
    return np.asarray(picture)


def overlay(image: NDArray[np.uint8], found: Detections, class_names: Sequence[str], palette: Colours) -> Image.Image:
    """The image at its own size with the detections' boxes, names and scores; letters grow with it."""
    picture = Image.fromarray(image)
    size = max(SWATCH_SIZE, round(max(image.shape) / 50))
    names = drawable(class_names)
    texts = [f"{names[label - 1]} {score:.2f}" for label, score in zip(found.labels, found.scores, strict=True)]
    _draw_boxes(picture, found.boxes, found.labels, palette, texts, max(2, size // 8), size)
    return picture


def _draw_boxes(
    picture: Image.Image,
    boxes: Any,
    labels: Any,
    palette: Colours,
    texts: Sequence[str],
    widths: Any,
    size: int = SWATCH_SIZE,
) -> None:
    """Outlines within their boxes, and above each its text on its colour."""
    draw = ImageDraw.Draw(picture)
    lines = np.broadcast_to(widths, len(boxes)).tolist()
    for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        colour = tuple(palette[label - 1])
        x1, y1, x2, y2 = (float(value) for value in box)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=lines[number])
        if texts:
            width, top = text_width(texts[number], size) + 6, max(0.0, y1 - size - 6)
            draw.rectangle((x1, top, x1 + width, top + size + 6), fill=colour)
            light = sum(colour) > 3 * 140
            draw_text(draw, (x1 + 3, top + 1), texts[number], size, (0, 0, 0) if light else (255, 255, 255))


class MovedBins(NamedTuple):
    """A region, its class, and how far its bins move, (x, y) in shares of its size: offset (2, h, w)."""

    box: NDArray[np.float32]
    label: int
    offset: NDArray[np.float32]


@torch.no_grad()
def moved_bins(network: Any, image: Tensor, found: Detections) -> list[MovedBins]:
    """Of the four best detections of an image, float (3, H, W) in 0..1; none without deformable pooling."""
    heads = getattr(network, "roi_heads", None)
    pool = None if heads is None else getattr(heads.box_roi_pool, "pool", None)
    pool = getattr(pool, "scores", pool)
    if not isinstance(pool, DeformRoIPool | DeformPSRoIPool) or not len(found.scores):
        return []
    boxes, labels = found.boxes[:4], found.labels[:4].tolist()
    images, _ = network.transform([image])
    (height, width), (resized_height, resized_width) = image.shape[1:], images.image_sizes[0]
    factor = torch.tensor([resized_width / width, resized_height / height] * 2)
    rois = torch.cat((torch.zeros(len(boxes), 1), torch.from_numpy(boxes) * factor), dim=1).to(image)
    offsets = pool.bin_offsets(network.backbone(images.tensors)["regions"], rois).cpu().numpy()
    classes = offsets.shape[1]
    return [
        MovedBins(box, label, offset[label if classes > 1 else 0])
        for box, label, offset in zip(boxes, labels, offsets, strict=True)
    ]


def bins_picture(image: Array, moved: Sequence[MovedBins], class_names: Sequence[str], name: str) -> Image.Image:
    """Where the bins of regions lie, as in the paper's Figure 7: a tile for each."""
    captions = [f"{class_names[one.label - 1]}: bins move {np.abs(one.offset).mean():.1%}" for one in moved]
    tiles = [bins_tile(image, [one]) for one in moved]
    return sheet(list(zip(captions, tiles, strict=True)), [], f"{name}: where bins are sampled")


def bins_tile(image: Array, moved: Sequence[MovedBins]) -> Array:
    """The image dimmed, regions, and their bins: a red dot each, and a line from where plain pooling has its centre."""
    dimmed = Image.fromarray((resize(image, Image.Resampling.BICUBIC) * 0.7).astype(np.uint8))
    canvas = dimmed.resize((2 * dimmed.width, 2 * dimmed.height))  # shrunk again, for soft edges
    scale = canvas.width / image.shape[1]
    draw = ImageDraw.Draw(canvas)
    for box, _, offset in moved:
        start, size = box[:2] * scale, (box[2:] - box[:2]) * scale
        draw.rectangle((*start, *(start + size)), outline=OUTLINE, width=3)
        _, rows, columns = offset.shape
        for row, column in np.ndindex(rows, columns):
            plain = start + size * np.array([(column + 0.5) / columns, (row + 0.5) / rows])
            x, y = plain + size * offset[:, row, column]
            draw.line((*plain, x, y), fill=OUTLINE, width=2)
            draw.circle((x, y), 4, fill=RED)
    return np.asarray(canvas.resize(dimmed.size, Image.Resampling.BOX))
