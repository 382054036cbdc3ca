"""Annotations as masks of class numbers, the layout of `ImageFolder`. Legend: H x W pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from segdcn.data.annotations import AnnotatedImage, Annotations
from segdcn.data.dataset import IGNORE_INDEX, Array, few
from segdcn.data.decoding import turned
from segdcn.data.labels import count_labels
from segdcn.errors import UserError

LABELME_BACKGROUND = "_background_"
MOST_PAIRS = 20  # of classes that overlap


@dataclass
class Drawn:
    """What became of annotations, summed up over images.

    regions: how many were drawn.
    left_out: how many were not, by the reason.
    beneath: pixels by the class that is seen and the one that it covers; None is what is ignored.
    pixels, images: (256,), of each label.
    """

    regions: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    beneath: Counter[tuple[str | None, str | None]] = field(default_factory=Counter)
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    images: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))


def choose_classes(found: Sequence[str], classes: Sequence[object] | None, background: str | None) -> list[str]:
    """The names of classes 0, 1, ...

    Args:
        found: those of the annotations, in order.
        classes: the chosen ones in the wanted order; None takes all.
        background: the class of what no annotation covers. It is the first, unless ``classes`` says otherwise; None
            ignores such pixels.

    Raises: UserError for classes that are not among ``found``, or too few or many of them.
    """
    names = [_with_background(name, background) for name in found] if classes is None else list(map(str, classes))
    unknown = [name for name in names if name not in found and name != background]
    if classes is not None and unknown:
        raise UserError(
            f"classes={_listed(names)} asks for {', '.join(unknown)}, which no annotation names: there are"
            f" {', '.join(found)}"
        )
    if background is not None and (classes is None or background not in names):
        names = [background, *(name for name in names if name != background)]
    if len(set(names)) != len(names):
        raise UserError(f"classes={_listed(names)} names a class twice")
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise UserError(
            f"there are {len(names)} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}): masks hold 2"
            f" to {IGNORE_INDEX} of them, what no annotation covers included; choose them with classes=[NAME,...] and"
            " background=NAME"
        )
    return names


def draw_label(image: AnnotatedImage, names: Sequence[str], background: str | None, drawn: Drawn) -> Array:
    """The mask of an image, as its pixels are stored; what was drawn is added to ``drawn``.

    Where annotations of several classes overlap the one of fewer pixels is seen, of equal ones the later.

    Shape: uint8 (H, W), class numbers or 255.
    """
    numbers: Mapping[str | None, int] = {None: IGNORE_INDEX, **{name: number for number, name in enumerate(names)}}
    patches = []
    for region in image.regions:
        class_name = region.class_name and _with_background(region.class_name, background)
        if class_name not in numbers:
            drawn.left_out[f"of classes that were not chosen ({class_name})"] += 1
            continue
        patch = region.draw(image.size)
        if area := int(np.count_nonzero(patch.inside)):
            patches.append((area, class_name, patch))
        else:
            drawn.left_out["that cover no pixel's centre"] += 1
    drawn.regions += len(patches)
    label = np.full(image.size, numbers[background], np.uint8)
    seen = np.full(image.size, -1, np.int16)  # places among the names, of what is drawn already; -1 is nothing
    order: list[str | None] = [*names, None]
    for _, class_name, (top, left, inside) in sorted(patches, key=lambda one: -one[0]):
        part = (slice(top, top + inside.shape[0]), slice(left, left + inside.shape[1]))
        place = order.index(class_name)
        counts = np.bincount(seen[part][inside] + 1, minlength=len(order) + 1)[1:]
        for other in np.flatnonzero(counts).tolist():
            if other != place:
                drawn.beneath[class_name, order[other]] += int(counts[other])
        seen[part][inside] = place
        label[part][inside] = numbers[class_name]
    pixels = count_labels(label)
    drawn.pixels += pixels
    drawn.images += pixels > 0
    return turned(label, image.turn)


def file_names(annotations: Annotations) -> list[str]:
    """The names of the images' copies: the files' own, with their folders before where two would be the same.

    None begins with a dot, which would hide it from `ImageFolder`.

    Raises: UserError where they still are.
    """
    own = [PurePosixPath(image.name).name.lstrip(".") for image in annotations.images]
    many = Counter(PurePosixPath(name).stem for name in own)
    names = [
        name if many[PurePosixPath(name).stem] == 1 else image.name.lstrip("./").replace("/", "_")
        for name, image in zip(own, annotations.images, strict=True)
    ]
    many = Counter(PurePosixPath(name).stem for name in names)
    if twice := next((stem for stem, count in many.items() if count > 1), None):
        pairs = zip(annotations.images, names, strict=True)
        alike = [image.name for image, name in pairs if PurePosixPath(name).stem == twice]
        raise UserError(
            f"{' and '.join(alike[:3])} would have the same mask {twice}.png: rename one, or annotate it once"
        )
    return names


def summary(annotations: Annotations, drawn: Drawn, names: Sequence[str], background: str | None) -> Iterator[str]:
    """What was drawn and what was not, and what overlapped, a line each."""
    share = 100 * drawn.pixels / max(1, drawn.pixels.sum())
    yield (
        f"{annotations.kind}: {len(annotations.images):,} image(s), {drawn.regions:,} annotation(s) drawn, {len(names)}"
        " classes"
    )
    labels = [*enumerate(names), *([(IGNORE_INDEX, "ignored")] if drawn.pixels[IGNORE_INDEX] else [])]
    for number, name in labels:
        yield f"  {number} {name}: {share[number]:.2f} % of the pixels, in {drawn.images[number]:,} image(s)"
    for reason, count in drawn.left_out.most_common():
        yield f"left out: {count:,} annotation(s) {reason}"
    if annotations.crowds:
        yield (
            f"ignored: {annotations.crowds:,} annotation(s) that are marked as iscrowd; ignore_crowd=false draws them"
            " as what they are named"
        )
    rest = "ignored" if background is None else background
    if bare := [image.name for image in annotations.images if not image.regions]:
        yield f"no annotation that is drawn: {few(bare)}, all of whose pixels are {rest}; empty=false leaves them out"
    if annotations.strangers:
        yield f"left out: {annotations.strangers:,} image file(s) that the annotations do not name"
    pairs = drawn.beneath.most_common(MOST_PAIRS)
    for (above, below), count in pairs:
        yield f"overlap: {count:,} pixels of {below or 'ignored'} lie under {above or 'ignored'}, the smaller"
    if len(drawn.beneath) > len(pairs):
        yield f"overlap: and {len(drawn.beneath) - len(pairs):,} pairs of classes more"


def _with_background(name: str, background: str | None) -> str:
    return background if background is not None and name == LABELME_BACKGROUND else name


def _listed(names: Sequence[str]) -> str:
    return f"[{','.join(names)}]"
